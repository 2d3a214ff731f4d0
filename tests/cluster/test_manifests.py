"""Files for KubeRay and the launcher: the schemas of those who read them, and what they have to mean."""

import copy
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.manifests.__main__ import KINDS, main
from cluster.manifests.kuberay import Kubernetes, ray_cluster, ray_job
from cluster.manifests.launcher import TOKEN_FILE, Launcher, launcher_file
from cluster.shapes import STABLE, ClusterShape, WorkerGroup, node_labels, resume_command
from tests.support.kuberay_fields import TABLE, manifests, problems, walk

FIELDS = json.loads(TABLE.read_text(encoding="utf-8"))
STEADY = WorkerGroup("steady", 2, 4, 16)
SPOT = WorkerGroup("spot", 1, 8, 64, gpus=8, gpu_kind="H100", min_count=1, max_count=4, is_spot=True)
SHAPE = ClusterShape("dlm", "s3://bucket/store", (STEADY, SPOT), image="registry.example.org/dlm:1")
KUBERNETES = Kubernetes(platform="gke", env_secret="credentials")
AWS = Launcher(
    "aws", region="us-west-2", head_instance="m7i.xlarge", instances={"steady": "m7i.4xlarge", "spot": "p5.48xlarge"}
)
MACHINES = Launcher("local", ssh_private_key="~/.ssh/key", head_ip="10.0.0.1", worker_ips=("10.0.0.2", "10.0.0.3"))
ON_MACHINES = dataclasses.replace(SHAPE, workers=(STEADY,))


def _launcher_files() -> list[dict[str, Any]]:
    return [launcher_file(SHAPE, AWS), launcher_file(ON_MACHINES, MACHINES)]


# what others read


@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda manifest: f"{manifest['kind']}-{manifest['metadata']['namespace']}"
)
def test_kuberay_knows_every_field(manifest: dict[str, Any]) -> None:
    assert problems(manifest, FIELDS) == []
    assert manifest["apiVersion"] == "ray.io/v1"


def _drop(path: str) -> Any:
    def change(spec: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            spec = spec[int(name)] if isinstance(spec, list) else spec[name]
        del spec[last]

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda spec: spec.update(rayVersions="2.60.0"), "spec.rayVersions: unknown"),
        (lambda spec: spec.update(rayVersion=2.6), "spec.rayVersion: 2.6 is no string"),
        (lambda spec: spec["authOptions"].update(mode="basic"), "spec.authOptions.mode: 'basic' is none of"),
        (lambda spec: spec["workerGroupSpecs"][0].update(replicas=True), "replicas: True is no integer"),
        (lambda spec: spec["headGroupSpec"]["labels"].update(a=True), "labels.{}: True is no string"),
        (_drop("headGroupSpec"), "spec: lacks headGroupSpec"),
        (_drop("workerGroupSpecs.0.groupName"), "spec.workerGroupSpecs[]: lacks groupName"),
        (_drop("workerGroupSpecs.1.template.spec.containers.0.name"), "containers[]: lacks name"),
    ],
)
def test_the_table_of_fields_notices(change: Any, problem: str) -> None:
    manifest = copy.deepcopy(ray_cluster(SHAPE, KUBERNETES))
    change(manifest["spec"])
    assert any(problem in found for found in problems(manifest, FIELDS))


@pytest.mark.parametrize("made", _launcher_files(), ids=lambda made: made["provider"]["type"])
def test_the_launcher_takes_the_file(made: dict[str, Any], tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(made, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made | {"minimum_workers": 1}, schema)
    prepared = prepare_config(made)
    validate_config(prepared)
    types = {
        name: kind for name, kind in prepared["available_node_types"].items() if name != made.get("head_node_type")
    }
    bounds = {name: (kind["min_workers"], kind["max_workers"]) for name, kind in types.items()}
    aws = made["provider"]["type"] == "aws"
    assert bounds == ({"steady": (2, 2), "spot": (1, 4)} if aws else {"local.cluster.node": (2, 2)})


@pytest.mark.parametrize("made", [*manifests(), *_launcher_files()])
def test_yaml_says_the_same_when_it_is_read_back(made: dict[str, Any]) -> None:
    text = yaml.safe_dump(made, sort_keys=False, width=120)
    assert yaml.safe_load(text) == made
    assert "&id" not in text  # anchors, which not everybody reads


# what they mean


def _pods(cluster_spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], WorkerGroup | None]]:
    yield cluster_spec["headGroupSpec"], cluster_spec["headGroupSpec"]["template"]["spec"], None
    for made, group in zip(cluster_spec["workerGroupSpecs"], SHAPE.workers, strict=True):
        yield made, made["template"]["spec"], group


CLUSTER = ray_cluster(SHAPE, KUBERNETES)
JOB = ray_job(SHAPE, KUBERNETES, "run-1")


@pytest.mark.parametrize("spec", [CLUSTER["spec"], JOB["spec"]["rayClusterSpec"]], ids=["cluster", "job"])
def test_every_pod_is_what_the_shape_says(spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == SHAPE.ray_version
    assert spec["authOptions"] == {"mode": "token"}
    for made, pod, group in _pods(spec):
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert int(limits["cpu"]) == (group or SHAPE.head).cpus
        assert limits["memory"] == f"{(group or SHAPE.head).memory_gb * 1000:.0f}M"
        assert int(limits.get("nvidia.com/gpu", 0)) == (group.gpus if group else 0)
        assert made["labels"] == node_labels(SHAPE, group)
        assert made["rayStartParams"] == {}
        env = {item["name"]: item.get("value") for item in container["env"]}
        assert env["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in env
        assert container["envFrom"] == [{"secretRef": {"name": "credentials"}}]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] or 0) < pod["terminationGracePeriodSeconds"]
        shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "21300M" if group is SPOT else "5300M"}}
        assert pod["volumes"] == [shm]
        assert container["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]


def test_bounds_of_a_cluster() -> None:
    groups = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
    bounds = {name: tuple(g[key] for key in ("minReplicas", "replicas", "maxReplicas")) for name, g in groups.items()}
    assert bounds == {"steady": (2, 2, 2), "spot": (1, 1, 4)}
    between = dataclasses.replace(SHAPE, workers=(dataclasses.replace(SPOT, count=3),))
    assert ray_cluster(between, KUBERNETES)["spec"]["workerGroupSpecs"][0]["replicas"] == 3
    assert CLUSTER["spec"]["enableInTreeAutoscaling"] is True
    fixed = ray_cluster(dataclasses.replace(SHAPE, workers=(STEADY,)), KUBERNETES)["spec"]
    assert fixed["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in fixed


@pytest.mark.parametrize("platform", ["gke", "eks", "aks", "karpenter"])
def test_spot_groups_are_on_spot_nodes_and_nothing_else_is(platform: Any) -> None:
    spec = ray_cluster(SHAPE, Kubernetes(platform=platform))["spec"]
    pods = {(group.name if group else "head"): pod for _, pod, group in _pods(spec)}
    (taint, gpu) = pods["spot"]["tolerations"]
    assert pods["spot"]["nodeSelector"][taint["key"]] == taint["value"]
    assert gpu == {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert "H100" in pods["spot"]["nodeSelector"].values()
    assert "affinity" not in pods["spot"]
    for name in ("head", "steady"):
        required = pods[name]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (rule,) = required["nodeSelectorTerms"][0]["matchExpressions"]
        assert rule == {"key": taint["key"], "operator": "NotIn", "values": [taint["value"]]}
        assert "tolerations" not in pods[name]
        assert "nodeSelector" not in pods[name]


def test_a_retry_of_a_job_is_a_resume() -> None:
    spec = JOB["spec"]
    assert spec["entrypoint"] == f"{resume_command('run-1', SHAPE.store)} --stop-own-job"
    assert spec["entrypoint"].startswith("python -m workflows.supervise run-1 --store s3://bucket/store ")
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")
    assert spec["backoffLimit"] == 3
    assert spec["shutdownAfterJobFinishes"] is True
    assert "jobId" not in spec  # a fixed one would be refused at the retry
    assert ray_job(SHAPE, dataclasses.replace(KUBERNETES, retries=7), "r")["spec"]["backoffLimit"] == 7


@pytest.mark.parametrize("kind", ["rayjob", "slurm"])
def test_a_file_that_resumes_a_run_says_how_to_write_it_down_before(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([kind, *FLAGS[kind]]) == 0
    assert "dlm plan RECIPE --freeze run-1 --store s3://b/c\n" in capsys.readouterr().out


def test_a_store_on_disk_is_mounted_where_it_is() -> None:
    shape = dataclasses.replace(ON_MACHINES, store="/shared/store")
    spec = ray_cluster(shape, Kubernetes(store_claim="nfs"))["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"name": "store", "persistentVolumeClaim": {"claimName": "nfs"}} in pod["volumes"]
        assert {"name": "store", "mountPath": "/shared/store"} in pod["containers"][0]["volumeMounts"]
    assert "--volume /shared/store:/shared/store" in launcher_file(shape, MACHINES)["docker"]["run_options"]


def test_a_secret_of_the_token_is_named() -> None:
    made = ray_cluster(SHAPE, dataclasses.replace(KUBERNETES, token_secret="ray-token"))
    assert made["spec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}


_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def test_names_are_dns_labels_with_what_kuberay_appends() -> None:
    group = dataclasses.replace(STEADY, name="g" * 32)
    shape = dataclasses.replace(SHAPE, name="n" * 47, workers=(group,))
    made = ray_job(shape, KUBERNETES, "run-1")
    assert _DNS_LABEL.fullmatch(f"{made['metadata']['name']}-abcde-head-svc")
    for path, value in walk(made, ""):
        if path.endswith((".name", ".groupName")) and ".env" not in path:
            assert _DNS_LABEL.fullmatch(value), (path, value)


@pytest.mark.parametrize("made", _launcher_files(), ids=lambda made: made["provider"]["type"])
def test_nodes_of_the_launcher_ask_for_a_token(made: dict[str, Any]) -> None:
    for which in ("head", "worker"):
        start = made[f"{which}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start.split("; ray start")[0]
        assert f"RAY_AUTH_TOKEN_PATH={TOKEN_FILE}" in start
        assert "RAY_JOB_STOP_WAIT_TIME_S=300" in start
    assert "--dashboard-host=127.0.0.1" in made["head_start_ray_commands"][-1]
    assert made["file_mounts"] == {TOKEN_FILE: "~/.ray/auth_token"}
    assert f"chmod 600 {TOKEN_FILE}" in made["setup_commands"]


def test_machines_on_aws() -> None:
    types = launcher_file(SHAPE, dataclasses.replace(AWS, instance_profile="arn:aws:iam::1:instance-profile/dlm"))
    kinds = types["available_node_types"]
    assert types["max_workers"] == 6
    assert {name: kind["node_config"]["InstanceType"] for name, kind in kinds.items()} == {
        "head": "m7i.xlarge", "steady": "m7i.4xlarge", "spot": "p5.48xlarge",
    }  # fmt: skip
    assert [name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]] == ["spot"]
    assert all("instance-profile/dlm" in kind["node_config"]["IamInstanceProfile"]["Arn"] for kind in kinds.values())
    assert kinds["spot"]["resources"] == {"CPU": 8, "GPU": 8, "memory": 64_000_000_000}
    assert "GPU" not in kinds["steady"]["resources"]
    assert [name for name, kind in kinds.items() if kind["labels"].items() >= STABLE.items()] == ["head", "steady"]


def test_machines_of_ones_own_say_what_they_are_where_ray_starts() -> None:
    made = launcher_file(dataclasses.replace(ON_MACHINES, workers=(dataclasses.replace(STEADY, gpus=2),)), MACHINES)
    worker = made["worker_start_ray_commands"][-1]
    assert "--num-cpus=4 --num-gpus=2 --memory=16000000000 --labels=dlm.io/stable=true" in worker
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "--num-gpus" not in made["head_start_ray_commands"][-1]
    assert "available_node_types" not in made
    assert made["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}


def test_containers_of_the_launcher_see_gpus_only_where_there_are_some() -> None:
    see = ["--env NVIDIA_VISIBLE_DEVICES=all", "--env NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
    assert [option for option in launcher_file(SHAPE, AWS)["docker"]["run_options"] if "NVIDIA" in option] == see
    assert not [
        option for option in launcher_file(ON_MACHINES, MACHINES)["docker"]["run_options"] if "NVIDIA" in option
    ]


def test_the_head_of_aws_installs_nothing_over_what_the_image_has() -> None:
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(launcher_file(SHAPE, AWS))
    assert not [command for command in prepared["head_setup_commands"] if "pip" in command]


def test_shared_memory_is_asked_for_only_if_it_is_given() -> None:
    given = launcher_file(dataclasses.replace(SHAPE, shm_gb=5), AWS)["docker"]["run_options"]
    assert "--shm-size=5000000000b" in given
    assert not any("shm" in option for option in launcher_file(SHAPE, AWS)["docker"]["run_options"])


# what cannot be


@pytest.mark.parametrize(
    ("shape", "kubernetes", "message"),
    [
        ({"image": ""}, {}, "^image is '': Kubernetes needs one"),
        ({}, {"platform": ""}, r"^kubernetes\.platform is '': spot is a spot group"),
        ({"store": "/shared"}, {}, r"^kubernetes\.store_claim is '': store is /shared"),
        ({}, {"store_claim": "nfs"}, r"^kubernetes\.store_claim is 'nfs': store is s3://bucket/store"),
        ({}, {"platform": "nomad"}, r"^kubernetes\.platform is 'nomad'"),
        ({}, {"namespace": ""}, r"^kubernetes\.namespace is ''"),
        ({}, {"token_secret": "Ray_Token"}, r"^kubernetes\.token_secret is 'Ray_Token'"),
        ({}, {"env_secret": "a: b"}, r"^kubernetes\.env_secret is 'a: b'"),
        ({}, {"retries": -1}, r"^kubernetes\.retries is -1"),
        ({}, {"keep_s": 1.5}, r"^kubernetes\.keep_s is 1.5"),
    ],
)
def test_what_kubernetes_cannot_have_is_refused(
    shape: dict[str, Any], kubernetes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ray_cluster(dataclasses.replace(SHAPE, **shape), dataclasses.replace(KUBERNETES, **kubernetes))


@pytest.mark.parametrize(
    ("shape", "launcher", "message"),
    [
        ({"image": ""}, {}, "^image is ''"),
        ({"workers": (STEADY, SPOT)}, {}, r"^workers is \['steady', 'spot'\]: .*exactly one"),
        ({}, {"worker_ips": ("10.0.0.2",)}, r"^workers\.steady\.count is 2: launcher.worker_ips names 1"),
        ({"workers": (dataclasses.replace(STEADY, is_spot=True),)}, {}, r"^workers\.steady\.is_spot is True"),
        ({}, {"head_ip": ""}, r"^launcher\.head_ip is '': local needs it"),
        ({}, {"worker_ips": ("10.0.0.2", "a b")}, r"^launcher\.worker_ips\.1 is 'a b'"),
        ({}, {"ssh_private_key": ""}, r"^launcher\.ssh_private_key is ''"),
        ({}, {"token_path": "$(cat x)"}, r"^launcher\.token_path is "),
        ({}, {"region": "us-west-2"}, r"^launcher\.region is 'us-west-2': it means nothing with local"),
        ({}, {"provider": "gcp"}, r"^launcher\.provider is 'gcp': local or aws"),
    ],
)
def test_what_machines_of_ones_own_cannot_have_is_refused(
    shape: dict[str, Any], launcher: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        launcher_file(dataclasses.replace(ON_MACHINES, **shape), dataclasses.replace(MACHINES, **launcher))


@pytest.mark.parametrize(
    ("shape", "launcher", "message"),
    [
        ({}, {"region": ""}, r"^launcher\.region is '': aws needs it"),
        ({}, {"instances": {"steady": "m7i.large"}}, r"^launcher\.instances is .*each group.*: spot"),
        ({}, {"instances": AWS.instances | {"other": "m7i.large"}}, r"^launcher\.instances is .*each group.*: other"),
        ({}, {"head_ip": "10.0.0.1"}, r"^launcher\.head_ip is '10.0.0.1': it means nothing with aws"),
        ({"workers": (STEADY, dataclasses.replace(SPOT, count=2))}, {}, r"^workers\.spot\.count is 2: .*min_count 1"),
    ],
)
def test_what_aws_cannot_have_is_refused(shape: dict[str, Any], launcher: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launcher_file(dataclasses.replace(SHAPE, **shape), dataclasses.replace(AWS, **launcher))


# the command


NODES = ["--name", "dlm", "--store", "s3://b/c", "--workers", "2", "--cpus", "4", "--memory-gb", "16", "--gpus", "1"]
IMAGE = ["--image", "registry.example.org/dlm:1"]
FLAGS: dict[str, list[str]] = {
    "dockerfile": [],
    "kuberay": [*NODES, *IMAGE],
    "rayjob": [*NODES, *IMAGE, "--run", "run-1"],
    "launcher": [
        *NODES, *IMAGE, "--provider", "local", "--ssh-private-key", "~/.ssh/key", "--head-ip", "10.0.0.1",
        "--worker-ip", "10.0.0.2", "--worker-ip", "10.0.0.3",
    ],
    "slurm": [*NODES, "--run", "run-1", "--environment", "/opt/dlm", "--token-path", "/home/me/.ray/auth_token"],
}  # fmt: skip
SECRETS = {"RAY_AUTH_TOKEN": "f00d" * 8, "AWS_SECRET_ACCESS_KEY": "do/not+print", "WANDB_API_KEY": "beef" * 10}


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_holds_a_secret(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    token = tmp_path / "token"
    token.write_text("cafe" * 8)
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert main([kind, *FLAGS[kind]]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "RAY_AUTH_MODE" in printed.out or "mode: token" in printed.out
    for secret in [*SECRETS.values(), "cafe" * 8]:
        assert secret not in printed.out
    assert not re.search(r"RAY_AUTH_TOKEN=|AWS_SECRET|WANDB_API_KEY", printed.out)


@pytest.mark.parametrize("kind", KINDS)
def test_out_writes_what_is_printed(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([kind, *FLAGS[kind]]) == 0
    printed = capsys.readouterr().out
    assert main([kind, *FLAGS[kind], "--out", str(tmp_path / "file")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "file").read_text(encoding="utf-8") == printed


def test_flags_and_json_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [*FLAGS["rayjob"], "--platform", "gke", "--spot", "--min-workers", "1", "--max-workers", "3"]
    assert main(["rayjob", *flags]) == 0
    printed = capsys.readouterr().out
    group = {"name": "workers", "count": 2, "cpus": 4, "memory_gb": 16, "gpus": 1, "is_spot": True}
    shape = {
        "name": "dlm",
        "store": "s3://b/c",
        "image": IMAGE[1],
        "workers": [group | {"min_count": 1, "max_count": 3}],
    }
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({"shape": shape, "kubernetes": {"platform": "gke"}, "slurm": None}))
    assert main(["rayjob", "--run", "run-1", "--json", str(file)]) == 0
    assert capsys.readouterr().out == printed
    assert yaml.safe_load(printed)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kuberay", "--name", "dlm"], "shape.store is missing"),
        (["kuberay", *NODES], "image is '': Kubernetes needs one"),
        (["kuberay", "--json", "/nowhere.json"], "--json is /nowhere.json, which is no file"),
        (["kuberay", "--json", "/nowhere.json", "--gpus", "8"], "gpus is given by a flag too"),
        (["launcher", *NODES, *IMAGE], "launcher is missing"),
        (["slurm", *FLAGS["slurm"], *IMAGE], "image is 'registry.example.org/dlm:1': the job runs on the nodes"),
        (["rayjob", *FLAGS["rayjob"], "--run", "../x"], "run is '../x'"),
    ],
)
def test_what_cannot_be_is_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


@pytest.mark.parametrize(
    "arguments", [["kuberay", "--partition", "gpu"], ["rayjob", *NODES], ["slurm", "--provider", "aws"], ["kube"], []]
)
def test_a_flag_of_another_platform_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage" in capsys.readouterr().err


def test_the_example_of_the_readme_makes_every_kubernetes_file(tmp_path: Path) -> None:
    readme = Path("cluster/README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^    \{.*?\n\n", readme, re.MULTILINE | re.DOTALL)
    file = tmp_path / "request.json"
    file.write_text(example, encoding="utf-8")
    for kind, more in (("kuberay", []), ("rayjob", ["--run", "run-1"])):
        assert main([kind, *more, "--json", str(file), "--out", str(tmp_path / kind)]) == 0
        assert problems(yaml.safe_load((tmp_path / kind).read_text(encoding="utf-8")), FIELDS) == []


def test_the_commands_of_the_readme_write_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path("README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    python -m cluster\.manifests (.*)$", readme, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main([str(Path(word).expanduser()) if word[0] == "~" else word for word in shlex.split(command)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.sh", "rayjob.yaml"]
