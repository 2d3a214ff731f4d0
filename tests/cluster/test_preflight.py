"""What a machine is found to have, with planted faults: packages, GPUs, disks, limits, the token, an all-reduce."""

import errno
import os
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import torch.distributed
from packaging.requirements import Requirement
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster import all_reduce, gpus, preflight
from cluster.all_reduce import Gang, free_port, run_ranks
from cluster.gpus import DriverGpu, GpusFound, TorchGpu, find_gpus
from cluster.preflight import EXTRAS, GIB, PACKAGES, PYTHON, Check
from tests.support.checks import only

ROOT = Path(__file__).parents[2]
A_TOKEN = "a-token-of-the-doctor-0123456789"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No token of the user's own."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    return path


def has_failed(checks: list[Check]) -> bool:
    return any(check.status == "failure" for check in checks)


# --- packages ---------------------------------------------------------------------------------------------------------


def test_bounds_of_packages_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    extras = {
        r.name: (extra, r.specifier)
        for extra, words in project["optional-dependencies"].items()
        if extra != "dev"
        for r in map(Requirement, words)
    }
    assert {name: Requirement(name + bounds).specifier for name, bounds in PACKAGES.items()} == wanted
    known = {name: (extra, Requirement(name + bounds).specifier) for name, (extra, bounds) in EXTRAS.items()}
    assert {name: known[name] for name in known} == {name: value for name, value in extras.items() if name in known}
    assert project["requires-python"] == PYTHON


def test_extras_that_the_doctor_does_not_know_are_those_of_object_stores():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        Requirement(word).name
        for extra, words in project["optional-dependencies"].items()
        if extra != "dev"
        for word in words
    }
    assert named - set(EXTRAS) <= {"s3fs", "gcsfs"}


GOOD = {name: "99" for name in PACKAGES} | {"python": "3.11.7", "deepspeed": "0.19.8", "ray": "2.60.0"}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"torch": "2.9.1+cu130"}, "failure", "torch 2.9.1+cu130, allowed is >=2.10"),
        ({"ray": "2.61.0"}, "failure", "ray 2.61.0, allowed is >=2.58,<2.61"),
        ({"wandb": "0.30"}, "warning", "wandb 0.30"),
        ({"pyarrow": None}, "failure", "pyarrow is not installed"),
        ({"ray": None}, "warning", "ray is not installed: only --executor local"),
        ({"deepspeed": None}, "warning", "nothing can be trained"),
        ({"python": "3.10.1"}, "failure", "python 3.10.1"),
    ],
)
def test_package_of_a_wrong_version_or_missing_is_named_with_what_to_install(change, status, words):
    versions = {name: number for name, number in {**GOOD, **change}.items() if number}
    (check,) = preflight.package_checks("n", versions)
    assert check.status == status
    assert words in check.found
    assert check.todo


def test_packages_that_are_right_make_one_line():
    (check,) = preflight.package_checks("n", GOOD)
    assert check.status == "ok"
    assert "ray 2.60.0" in check.found


@pytest.mark.parametrize(("package", "status"), [("torch", "failure"), ("ray", "failure"), ("numpy", "warning")])
def test_nodes_with_different_versions_are_named(package, status):
    checks = preflight.agreement_checks({"a": GOOD, "b": {**GOOD, package: "1"}, "c": GOOD})
    assert only(checks, "same versions", status).found == f"{package}: 1 on b; {GOOD[package]} on a, c"
    assert preflight.agreement_checks({"a": GOOD, "b": GOOD})[0].status == "ok"


# --- GPUs -------------------------------------------------------------------------------------------------------------

GPU = DriverGpu("H200", 143771, "570.1", has_mig=False)
MIG = DriverGpu("H200", 143771, "570.1", has_mig=True)
USABLE, BROKEN = TorchGpu("H200"), TorchGpu("cuda:1", "no kernel image is available")


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (GpusFound(), "ok", "none"),
        (GpusFound((GPU, GPU), "", "2.13", "13.0", (USABLE, USABLE)), "ok", "2 x H200, 140 GiB, driver 570.1, CUDA 13"),
        (GpusFound((GPU,), "", "2.13+cpu", "", ()), "failure", "without CUDA"),
        (GpusFound((GPU,), "", "2.13", "13.0", (), "driver too old"), "failure", "none of 1 GPUs: driver too old"),
        (GpusFound((GPU, GPU), "", "2.13", "13.0", (USABLE, BROKEN)), "failure", "cuda:1: no kernel image"),
        (GpusFound((GPU, GPU), "", "2.13", "13.0", (USABLE,)), "warning", "lists 2 GPUs, torch 1"),
        (GpusFound((MIG,), "", "2.13", "13.0", (USABLE,)), "warning", "MIG"),
        (GpusFound((), "Driver/library version mismatch"), "failure", "version mismatch"),
    ],
)
def test_gpus_that_torch_cannot_use_are_told_with_the_reason(found, status, words):
    checks = preflight.gpu_checks("n", found)
    worst = [check for check in checks if check.status == status]
    assert any(words in check.found for check in worst)
    assert all(check.todo for check in checks if check.status != "ok")
    assert (status == "failure") == has_failed(checks)


def test_driver_and_torch_are_asked(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 570.86, Disabled'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = find_gpus()
    assert found.listed == (DriverGpu("NVIDIA H200", 143771, "570.86", has_mig=False),)
    assert found.torch_build == torch.__version__
    if not torch.version.cuda:
        assert not found.usable
        assert has_failed(preflight.gpu_checks("n", found))
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    assert "NVML" in find_gpus().listing_error


def test_driver_that_hangs_is_a_failure_and_no_wait(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpus, "_SMI_S", 0.3)
    monkeypatch.setattr(gpus, "_TORCH_S", 0.01)
    assert "did not answer" in find_gpus().listing_error


# --- the machine ------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    free: int


@pytest.mark.parametrize(("free_gib", "status"), [(0.5, "failure"), (5, "warning"), (50, "ok")])
def test_disk_that_is_nearly_full_is_told(tmp_path, monkeypatch, free_gib, status):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(100 * GIB, int(free_gib * GIB)))
    monkeypatch.setattr(preflight, "write_speed", lambda folder: 1e9)
    check = preflight.disk_check("n", "store", tmp_path)
    assert check.status == status
    assert f"{free_gib:g} GiB free" in check.found


def test_slow_disk_is_a_warning_and_one_that_cannot_be_written_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB))
    monkeypatch.setattr(preflight, "write_speed", lambda folder: 1e6)
    assert preflight.disk_check("n", "store", tmp_path).status == "warning"

    def refuse(folder: Path) -> float:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(preflight, "write_speed", refuse)
    check = preflight.disk_check("n", "store", tmp_path)
    assert check.status == "failure"
    assert "Read-only" in check.found


def test_speed_of_a_disk_is_measured_and_folders_on_one_disk_are_one_check(tmp_path):
    (tmp_path / "a").mkdir()
    (check,) = preflight.disk_checks("n", {"store": tmp_path / "a", "cache": tmp_path / "not" / "there"})
    assert check.found.startswith("store, cache: ")
    assert "MB/s" in check.found or check.status == "failure"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "home"]


def test_little_shared_memory_few_files_and_little_memory_are_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(GIB // 16, GIB // 16))
    assert preflight.shm_check("n", tmp_path).status == "warning"
    assert preflight.files_check("n", (1024, 4096)).status == "warning"
    assert preflight.files_check("n", (65536, 65536)).status == "ok"
    monkeypatch.setattr(preflight, "_limit", lambda file: GIB)
    check = preflight.memory_check("n")
    assert check.status == "warning"
    assert "1 GiB of memory" in check.found


# --- the token --------------------------------------------------------------------------------------------------------


def test_token_is_told_by_its_place_and_mode_and_never_shown(tmp_path):
    file = tmp_path / "token"
    file.write_text(A_TOKEN)
    file.chmod(0o600)
    env = {"RAY_AUTH_TOKEN_PATH": str(file)}
    check = preflight.token_check("n", True, env)
    assert (check.status, check.found) == ("ok", f"in {file}, mode 0600")
    file.chmod(0o644)
    check = preflight.token_check("n", True, env)
    assert check.status == "failure"
    assert "chmod 600" in check.todo
    assert A_TOKEN not in str(check)
    assert preflight.token_check("n", True, {"HOME": str(tmp_path)}).status == "warning"
    assert preflight.token_check("n", False, {"HOME": str(tmp_path)}).status == "ok"


def test_secrets_in_what_was_found_are_not_shown(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_KEY", A_TOKEN)
    (check,) = preflight.without_secrets([Check("store", "n", "failure", f"key {A_TOKEN} is bad", f"not {A_TOKEN}")])
    assert A_TOKEN not in str(check)
    assert check.found == "key *** is bad"


@contextmanager
def dashboard(code: int, body: bytes) -> Iterator[int]:
    """Something that listens for all, and answers what was said."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("0.0.0.0", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("code", "body", "status", "words"),
    [
        (200, b"[]", "failure", "asks for no token"),
        (401, b"", "ok", "asks for a token"),
        (200, b"<html>", "ok", "is no dashboard of Ray"),
    ],
)
def test_dashboard_for_everybody_without_a_token_is_a_failure(code, body, status, words):
    with dashboard(code, body) as port:
        hosts = preflight.listening_hosts(port)
        assert hosts == ["0.0.0.0"]
        check = preflight.dashboard_check("n", hosts, port)
    assert check.status == status
    assert words in check.found
    assert preflight.dashboard_check("n", ["127.0.0.1"], port).status == "ok"
    assert preflight.listening_hosts(port) == []


# --- all-reduce -------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_peers_that_cannot_be_reached_end_in_time():
    with pytest.raises(RuntimeError, match="rank 1 was not through after 4 s"):
        run_ranks(Gang("gloo", 2, "127.0.0.1", free_port()), 1, 1, False, within_s=4.0)


def test_wrong_sums_are_found(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values[3].add_(1))
    try:
        with pytest.raises(ArithmeticError, match="1 of 262144 sums are wrong"):
            all_reduce._rank(Gang("gloo", 1, "127.0.0.1", free_port()), 0, 0)
    finally:
        torch.distributed.destroy_process_group()


class Gcs(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """Lets in who says one of these words; None is for anything that is said."""

    def __init__(self, *words: str | None) -> None:
        self.words = words

    def GetAllNodeInfo(self, request: Any, context: Any) -> Any:
        said = dict(context.invocation_metadata()).get("authorization", "")
        if said not in self.words and not (said and None in self.words):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
        return gcs_service_pb2.GetAllNodeInfoReply()


@contextmanager
def listening(gcs: Gcs) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(gcs, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("Bearer good",), "ok", "refuses who has no token or a wrong token"),
        (("Bearer good", None), "failure", "lets in who has a wrong token"),
        (("Bearer good", ""), "failure", "lets in who has no token"),
        (("", None), "failure", "lets in who has no token or a wrong token"),
    ],
)
def test_cluster_is_asked_by_somebody_who_has_not_its_token(monkeypatch, words, status, told):
    monkeypatch.setattr(preflight, "is_loopback", lambda address: False)
    with listening(Gcs(*words)) as address:
        check = preflight.admission_check("n", address)
    assert (check.status, check.found) == (status, f"{address} {told}")


def test_cluster_that_only_this_machine_reaches_may_be_open():
    with listening(Gcs("", None)) as address:
        assert preflight.admission_check("n", address).status == "warning"


def test_cluster_that_says_nothing_is_no_refusal():
    check = preflight.admission_check("n", f"127.0.0.1:{free_port()}")
    assert check.status == "warning"
    assert "answers UNAVAILABLE" in check.found
