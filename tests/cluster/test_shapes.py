"""Shapes of clusters: what cannot be is refused by the name of its field; labels, bounds and the command of a run."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cluster.manifests.request import make_request, read_request
from cluster.shapes import (
    STABLE,
    ClusterShape,
    Head,
    WorkerGroup,
    node_env,
    node_labels,
    ray_version,
    resume_command,
    shm_gb,
)

GROUP = WorkerGroup("gpu", 2, 8, 64, gpus=4, gpu_kind="H100")
SHAPE = ClusterShape("dlm", "s3://bucket/store", (GROUP,), image="registry.example.org/dlm:1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "workers.name is ''"),
        ({"name": "GPU"}, "workers.name is 'GPU'"),
        ({"name": "1gpu"}, "workers.name is '1gpu'"),
        ({"name": "gpu-"}, "workers.name is 'gpu-'"),
        ({"name": "a" * 33}, "workers.name is 'a+'"),
        ({"name": "head"}, "workers.name is 'head'.*not head or headgroup"),
        ({"count": -1}, r"workers\.gpu\.count is -1: a whole number from 0"),
        ({"count": True}, r"workers\.gpu\.count is True"),
        ({"cpus": 0}, r"workers\.gpu\.cpus is 0: a whole number from 1"),
        ({"cpus": 1.5}, r"workers\.gpu\.cpus is 1.5"),
        ({"gpus": -1}, r"workers\.gpu\.gpus is -1"),
        ({"memory_gb": 0.5}, r"workers\.gpu\.memory_gb is 0.5: a number of gigabytes from 1"),
        ({"memory_gb": float("nan")}, r"workers\.gpu\.memory_gb is nan"),
        ({"memory_gb": float("inf")}, r"workers\.gpu\.memory_gb is inf"),
        ({"min_count": 1}, r"workers\.gpu\.min_count is 1: max_count is None; set both"),
        ({"max_count": 4}, r"workers\.gpu\.min_count is None: max_count is 4; set both"),
        ({"min_count": 3, "max_count": 4}, r"workers\.gpu\.count is 2: it starts between min_count 3 and max_count 4"),
        ({"min_count": 3, "max_count": 1}, r"workers\.gpu\.count is 2: it starts between min_count 3 and max_count 1"),
        ({"min_count": -1, "max_count": 4}, r"workers\.gpu\.min_count is -1"),
        ({"min_count": 0, "max_count": 0, "count": 0}, r"workers\.gpu\.max_count is 0"),
        ({"gpu_kind": "two words"}, r"workers\.gpu\.gpu_kind is 'two words'"),
        ({"gpus": 0}, r"workers\.gpu\.gpu_kind is 'H100': the group has no GPU"),
        ({"is_spot": 1}, r"workers\.gpu\.is_spot is 1"),
        ({"labels": {"dlm.io/stable": "true"}}, r"workers\.gpu\.labels\.dlm.io/stable.*set by us and by Ray"),
        ({"labels": {"a b": "c"}}, r"workers\.gpu\.labels\.a b"),
        ({"labels": {"zone": "a,b=c"}}, r"workers\.gpu\.labels\.zone is 'a,b=c'"),
        ({"labels": {"zone": "a" * 64}}, r"workers\.gpu\.labels\.zone"),
    ],
)
def test_a_group_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GROUP, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Dlm"}, "^name is 'Dlm'"),
        ({"name": "a" * 48}, "^name is 'a+': .*47 characters"),
        ({"name": "dlm\n"}, "^name is"),
        ({"store": "./store"}, "^store is './store': every node has to find it"),
        ({"store": ""}, "^store is ''"),
        ({"store": "http://host/store"}, "^store is 'http://host/store'"),
        ({"store": "s3:///key"}, "^store is 's3:///key'"),
        ({"store": "/a b"}, "^store is '/a b'"),
        ({"workers": (GROUP, GROUP)}, "^workers.name is 'gpu': two groups have this name"),
        ({"image": "dlm"}, "^image is 'dlm': registry/name:tag is needed"),
        ({"image": "host:5000/dlm"}, "^image is 'host:5000/dlm'"),
        ({"image": "dlm:1 --privileged"}, "^image is"),
        ({"shm_gb": 0}, "^shm_gb is 0"),
        ({"shm_gb": 16}, "^shm_gb is 16: it is part of a node's memory, and head has 16"),
        ({"shm_gb": 15, "workers": (dataclasses.replace(GROUP, memory_gb=8),)}, "^shm_gb is 15.*gpu has 8"),
        ({"labels": {"ray.io/node-group": "x"}}, "^labels.ray.io/node-group"),
        ({"ray_version": "2.0.0"}, "^ray_version is '2.0.0': the Ray here is"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHAPE, **changes)


def test_a_head_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^head\.cpus is 0"):
        Head(cpus=0)
    with pytest.raises(ValueError, match=r"^head\.memory_gb is 1"):
        Head(memory_gb=1)


def test_a_key_in_the_stores_address_is_refused_and_not_printed() -> None:
    with pytest.raises(ValueError, match="store has a user or a key before its @") as refused:
        dataclasses.replace(SHAPE, store="s3://key:hunter22@bucket/store")
    assert "hunter22" not in str(refused.value)


def test_only_nodes_that_stay_are_stable() -> None:
    spot = dataclasses.replace(GROUP, is_spot=True, labels={"zone": "a"})
    shape = dataclasses.replace(SHAPE, labels={"team": "x"})
    assert node_labels(shape) == STABLE | {"team": "x"}
    assert node_labels(shape, GROUP) == STABLE | {"dlm.io/gpu": "H100", "team": "x"}
    assert node_labels(shape, spot) == {"dlm.io/gpu": "H100", "team": "x", "zone": "a"}


def test_ray_takes_our_labels() -> None:
    from ray._private.label_utils import parse_node_labels_string, validate_label_selector

    labels = node_labels(SHAPE, GROUP)
    assert parse_node_labels_string(",".join(f"{key}={value}" for key, value in labels.items())) == labels
    assert validate_label_selector(STABLE) is None


def test_a_group_without_bounds_keeps_its_count() -> None:
    assert GROUP.bounds == (2, 2)
    assert not SHAPE.is_elastic
    elastic = dataclasses.replace(GROUP, min_count=1, max_count=4)
    assert elastic.bounds == (1, 4)
    assert dataclasses.replace(SHAPE, workers=(GROUP, dataclasses.replace(elastic, name="more"))).is_elastic
    assert not dataclasses.replace(GROUP, min_count=2, max_count=2).is_elastic


def test_shared_memory_is_a_third_unless_it_is_given() -> None:
    assert shm_gb(SHAPE, GROUP) == pytest.approx(64 / 3, abs=0.05)
    assert shm_gb(dataclasses.replace(SHAPE, shm_gb=5), GROUP) == 5


def test_the_version_of_ray_is_the_pinned_one() -> None:
    pinned = re.findall(r"^ray==(.*)$", Path("constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned == [SHAPE.ray_version] == [ray_version()]


def test_a_run_is_resumed_with_one_command() -> None:
    assert resume_command("run-1", "s3://b/c") == "python -m workflows.supervise run-1 --store s3://b/c --address auto"


@pytest.mark.parametrize("run", ["", "../x", "a/b", "a b", "-x", "$(reboot)", "a;b", "x" * 129, "a\n"])
def test_a_run_that_is_none_is_refused(run: str) -> None:
    with pytest.raises(ValueError, match="run is "):
        resume_command(run, "s3://b/c")


@pytest.mark.parametrize("store", ["s3://b/$(reboot)", "/a;reboot", "/a'b"])
def test_nothing_in_the_store_becomes_a_command(store: str) -> None:
    command = resume_command("run-1", store)
    assert shlex.split(command) == [
        "python",
        "-m",
        "workflows.supervise",
        "run-1",
        "--store",
        store,
        "--address",
        "auto",
    ]


def test_every_node_asks_for_a_token() -> None:
    env = node_env(SHAPE)
    assert env["RAY_AUTH_MODE"] == "token"
    assert 60 <= int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < int(env["RAY_JOB_STOP_WAIT_TIME_S"])
    assert env["DLM_STORE"] == SHAPE.store
    assert env["PYTHONSAFEPATH"] == "1"


def test_this_ray_reads_the_variables_that_we_set() -> None:
    import ray

    root = Path(ray.__file__ or "").parent
    sources = [*root.glob("_private/**/*.py"), *root.glob("_common/**/*.py"), *root.glob("dashboard/modules/job/*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    unknown = [name for name in node_env(SHAPE) if name.startswith("RAY_") and f'"{name}"' not in text]
    assert unknown == []
    assert '"RAY_AUTHENTICATION_MODE"' not in text  # as a name that is none shows


def test_a_request_is_read() -> None:
    request = read_request(
        '{"shape": {"name": "dlm", "store": "s3://b/c", "workers": [{"name": "w", "count": 1, "cpus": 2,'
        ' "memory_gb": 4}]}, "launcher": {"provider": "local", "ssh_private_key": "~/.ssh/k", "head_ip": "10.0.0.1",'
        ' "worker_ips": ["10.0.0.2"]}}'
    )
    assert request.shape.workers == (WorkerGroup("w", 1, 2, 4.0),)
    assert request.launcher is not None
    assert request.launcher.worker_ips == ("10.0.0.2",)
    assert request.slurm is None


SMALL: dict[str, Any] = {"name": "dlm", "store": "s3://b/c"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "shape is missing"),
        ({"shape": SMALL, "kubernets": {}}, "unknown setting kubernets; did you mean kubernetes"),
        ({"shape": SMALL | {"imag": "x:1"}}, r"unknown setting shape\.imag; did you mean image"),
        ({"shape": SMALL | {"head": {"xyz": 1}}}, r"unknown setting shape\.head\.xyz; allowed: cpus, memory_gb"),
        ({"shape": SMALL | {"workers": [{"nam": "w"}]}}, r"unknown setting shape\.workers\.0\.nam; did you mean name"),
        ({"shape": SMALL | {"head": {"cpus": "4"}}}, r"shape\.head\.cpus is '4': input should be a valid integer"),
        ({"shape": SMALL | {"head": {"cpus": True}}}, r"shape\.head\.cpus is True"),
        ({"shape": SMALL | {"shm_gb": True}}, r"shape\.shm_gb is True"),
        ({"shape": SMALL | {"head": {"cpus": 0}}}, "head.cpus is 0: a whole number from 1"),
        ({"shape": SMALL, "slurm": {"environment": "/venv"}}, r"slurm\.token_path is missing"),
        ({"shape": SMALL, "launcher": {"provider": "gcp"}}, r"launcher\.provider is 'gcp': input should be 'local'"),
    ],
)
def test_a_request_that_is_none_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_request(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "is \\[\\]"),
        ('{"shape": {"name": "a", "name": "b"}}', "name stands twice"),
        ('{"shape": {"name": "a", "store": "s3://b/c", "shm_gb": NaN}}', r"shape\.shm_gb is nan"),
    ],
)
def test_text_that_is_no_request_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_request(text)
