"""``dlm doctor`` on machines and stores with planted faults."""

import errno
import json
import os
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed
from packaging.requirements import Requirement

from cluster import all_reduce, gpus, preflight
from cluster.all_reduce import Gang, free_port, run_ranks
from cluster.everywhere import Machine, Question, ThisMachine
from cluster.gpus import DriverGpu, GpusFound, TorchGpu, find_gpus
from cluster.preflight import EXTRAS, GIB, PACKAGES, PYTHON, Check
from pipeline.errors import UserError
from pipeline.storage import FileStorage
from workflows import doctor, store_checks
from workflows.doctor import all_reduce_checks, examine_as_job, parsed_checks
from workflows.store import open_writable_store
from workflows.store_checks import clock_checks, race_check

ROOT = Path(__file__).parents[2]
HERE = ThisMachine().machines
TWO = (Machine("a", "127.0.0.1"), Machine("b", "127.0.0.1"))
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


def of(checks: list[Check], name: str, status: str = "") -> list[Check]:
    return [check for check in checks if check.name == name and status in ("", check.status)]


def only(checks: list[Check], name: str, status: str) -> Check:
    (check,) = of(checks, name, status)
    return check


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


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


def test_nodes_with_different_code_are_a_failure():
    (check,) = doctor._same_code({"a": "11", "b": "22", "c": "11"})
    assert check.status == "failure"
    assert check.found == "11 on a, c; 22 on b"
    assert not doctor._same_code({"a": "11", "b": "11"})


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
    assert (status == "failure") == doctor.has_failed(checks)


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
        assert doctor.has_failed(preflight.gpu_checks("n", found))
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


# --- the store --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadOnly(FileStorage):
    def write(self, key: str, data: bytes, is_durable: bool = True) -> None:
        raise OSError(errno.EROFS, "Read-only file system")


@dataclass(frozen=True)
class CreatesTwice(FileStorage):
    """Ignores the condition, as some servers of S3's protocol do."""

    def create(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


@dataclass(frozen=True)
class LooksThenWrites(FileStorage):
    """Right whenever two do not come within the same moment."""

    def create(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        time.sleep(0.01)
        self.write(key, data)
        return True


@dataclass(frozen=True)
class LosesCreated(FileStorage):
    def create(self, key: str, data: bytes) -> bool:
        is_first = super().create(key, data)
        self.write(key, b"x")
        return is_first


@dataclass(frozen=True)
class OldListings(FileStorage):
    def names(self, key: str) -> list[str]:
        return [name for name in super().names(key) if not name.startswith("used-")]


@dataclass(frozen=True)
class OldReads(FileStorage):
    def read(self, key: str) -> bytes:
        return b"one" if b"another" in super().read(key) else super().read(key)


@dataclass(frozen=True)
class AheadBy30(FileStorage):
    def now(self, key: str) -> float:
        return super().now(key) + 30.0


@dataclass(frozen=True)
class BehindBy90(FileStorage):
    def now(self, key: str) -> float:
        return super().now(key) - 90.0


def look(store: Any, monkeypatch: pytest.MonkeyPatch, kind: type[FileStorage]) -> list[Check]:
    """The checks of a store of a kind, which must be as it was afterwards."""
    before = tree(store.root.path.parent)
    monkeypatch.setattr(store_checks, "open_storage", lambda url: kind(Path(url).resolve()))
    checks = store_checks.store_checks(ThisMachine(), HERE, store.url)
    assert tree(store.root.path.parent) == before, "nothing is left behind"
    return checks


def test_sound_store_is_found_sound_and_left_as_it_was(store, monkeypatch):
    open_writable_store(store.url)
    checks = look(store, monkeypatch, FileStorage)
    assert [check.status for check in checks] == ["ok"] * 4
    assert store.store_id in checks[0].found
    assert "4 at once, 10 files: each went to exactly one" in only(checks, "exclusive create", "ok").found


def test_store_that_is_not_there_yet_is_said_so_and_not_made(store, monkeypatch):
    checks = look(store, monkeypatch, FileStorage)
    assert [check.status for check in checks] == ["ok"] * 4
    assert "there is none" in checks[0].found
    assert not store.root.path.exists()


def test_read_only_store_is_a_failure(store, monkeypatch):
    open_writable_store(store.url)
    check = look(store, monkeypatch, ReadOnly)[-1]
    assert (check.name, check.status) == ("store", "failure")
    assert "Read-only file system" in check.found


def test_store_of_another_schema_is_a_failure(store, monkeypatch):
    store.root.path.mkdir()
    (store.root.path / "store.json").write_text('{"schema_version": 99, "id": "x"}')
    check = look(store, monkeypatch, FileStorage)[0]
    assert check.status == "failure"
    assert "schema version 99" in check.found


@pytest.mark.parametrize(
    ("kind", "name", "status", "words"),
    [
        (CreatesTwice, "exclusive create", "failure", "10 of 10 files were created by several"),
        (LooksThenWrites, "exclusive create", "failure", "files were created by several at once"),
        (LosesCreated, "exclusive create", "failure", "do not bear the name"),
        (OldListings, "store", "failure", "lacks files"),
        (OldReads, "store", "failure", "was read as b'one'"),
        (AheadBy30, "clock", "warning", "30 s behind the storage's"),
        (BehindBy90, "clock", "failure", "90 s ahead of the storage's"),
    ],
)
def test_store_with_a_fault_is_found_out(store, monkeypatch, kind, name, status, words):
    open_writable_store(store.url)
    check = only(look(store, monkeypatch, kind), name, status)
    assert words in check.found
    assert check.todo


def test_file_system_without_hard_links_is_a_failure(store, monkeypatch):
    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(store_checks.os, "link", refuse)
    checks = store_checks.store_checks(ThisMachine(), HERE, store.url)
    assert "Operation not permitted" in only(checks, "hard links", "failure").found
    assert only(checks, "exclusive create", "failure"), "which rests on them"


def test_race_in_which_nobody_wins_is_a_failure(store):
    assert race_check("n", [[], []], store.root).status == "failure"


def test_clocks_of_nodes_are_told_apart():
    assert clock_checks({"a": 0.1, "b": -1.0})[0].found == "at most 1.0 s from the storage's, 1.1 s apart"
    checks = clock_checks({"a": 0.0, "b": 6.0, "c": -61.0})
    assert [(check.node, check.status) for check in checks] == [("b", "warning"), ("c", "failure")]
    assert all("Leases are judged by the storage's clock" in check.todo for check in checks)


def test_node_that_sees_another_store_is_named(store, monkeypatch, tmp_path):
    open_writable_store(store.url)
    seen = store_checks.view

    def view(base: str, key: str, node: str, word: str) -> Any:
        return seen(str(tmp_path / "home") if node == "b" else base, key, node, word)

    monkeypatch.setattr(store_checks, "view", view)
    checks = store_checks.store_checks(ThisMachine(), TWO, store.url)
    check = only(checks, "store", "failure")
    assert check.node == "b"
    assert "another folder here" in check.found


# --- answers ----------------------------------------------------------------------------------------------------------


def test_node_that_does_not_answer_is_a_row_and_not_a_hang():
    (machine,) = ThisMachine().machines
    start_s = time.monotonic()
    replies = ThisMachine().ask([Question(machine, time.sleep, (5.0,)), Question(machine, len, ("ab",))], 0.3)
    assert time.monotonic() - start_s < 3.0
    assert replies[0].error == "did not answer within 0 s"
    assert replies[1].value == 2
    assert doctor._silent("n", replies[0].error).status == "failure"


def test_node_without_our_code_is_told_how_to_get_it():
    check = doctor._silent("n", "ModuleNotFoundError: No module named 'workflows'")
    assert (check.name, check.status) == ("code", "failure")
    assert "http://HOST:8265" in check.todo


def test_checks_of_a_job_are_found_in_its_log():
    checks = [Check("gpu", "a", "ok", "none"), Check("store", "b", "failure", "é {", "x")]
    text = json.dumps({"checks": [vars(check) for check in checks]}, indent=1)
    assert parsed_checks(f"(pid=1) noise {{\n{text}\nmore noise {{}}\n") == checks
    assert parsed_checks("Traceback ...") == []


def test_relative_store_is_refused_for_another_machine():
    with pytest.raises(UserError, match="is relative"):
        examine_as_job("http://10.0.0.1:8265", "store", True)


def test_silent_node_is_not_waited_for_again(store, monkeypatch):
    class Half(ThisMachine):
        @property
        def machines(self) -> tuple[Machine, ...]:
            return TWO

        def ask(self, questions: Any, within_s: float) -> Any:
            asked.append([question.machine.name for question in questions])
            return super().ask(questions, 1.0)

    def around(node: str, root: str, is_in_cluster: bool) -> Any:
        if node == "b":
            time.sleep(5.0)
        return preflight.Survey((), GOOD), "11"

    asked: list[list[str]] = []
    monkeypatch.setattr(doctor, "look_around", around)
    checks = doctor.examine(Half(), store.url, is_reduced=False)
    assert only(checks, "answer", "failure").node == "b"
    assert only(checks, "exclusive create", "ok").node == "a"
    assert asked[0] == ["a", "b"]
    assert {name for names in asked[1:] for name in names} == {"a"}


# --- all-reduce -------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_two_ranks_give_the_right_sums_and_times():
    (check,) = all_reduce_checks(ThisMachine(), HERE)
    assert check.status == "ok", check
    assert check.found.startswith("2 ranks: 1 MiB in ")
    assert "64 MiB in " in check.found


@pytest.mark.distributed
def test_peers_that_cannot_be_reached_end_in_time_with_what_to_do(monkeypatch):
    with pytest.raises(RuntimeError, match="rank 1 was not through after 4 s"):
        run_ranks(Gang("gloo", 2, "127.0.0.1", free_port()), 1, 1, False, within_s=4.0)
    monkeypatch.setattr(all_reduce, "run_ranks", lambda *args: 1 / 0)
    (check,) = all_reduce_checks(ThisMachine(), HERE)
    assert check.status == "failure"
    assert "NCCL_SOCKET_IFNAME" in check.todo


def test_wrong_sums_are_found(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values[3].add_(1))
    try:
        with pytest.raises(ArithmeticError, match="1 of 262144 sums are wrong"):
            all_reduce._rank(Gang("gloo", 1, "127.0.0.1", free_port()), 0, 0)
    finally:
        torch.distributed.destroy_process_group()


def test_gpus_in_use_are_not_waited_for(monkeypatch):
    busy = Machine("a", "127.0.0.1", gpus=8, has_free_gpus=False)
    monkeypatch.setattr(doctor, "_all_reduce", lambda machines, backend, ranks: Check(backend, "a", "ok", ""))
    checks = all_reduce_checks(ThisMachine(), [busy])
    assert [(check.name, check.status) for check in checks] == [("gloo", "ok"), ("all-reduce (nccl)", "warning")]


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_tells_what_it_found_and_what_to_do(dlm, store, monkeypatch):
    faulty = CreatesTwice(store.root.path)
    store.root.path.mkdir()
    before = tree(store.root.path)
    monkeypatch.setattr(store_checks, "open_storage", lambda url: faulty)
    done = dlm("doctor", "--no-all-reduce")
    assert done.code == 3
    assert "created by several at once" in done.stdout
    assert "use a store that heeds conditions" in done.stdout
    assert "failed" in done.stderr
    assert tree(store.root.path) == before


def test_command_without_failures_ends_with_0(dlm, store, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB))
    done = dlm("doctor", "--no-all-reduce", "--json")
    checks = [Check(**value) for value in json.loads(done.stdout)["checks"]]
    assert not [check for check in checks if check.status == "failure"]
    assert done.code == 0
    names = {check.name for check in checks}
    assert names == {
        *("dashboard", "code", "packages", "gpu", "memory", "disk", "shared memory", "open files", "token"),
        *("store", "clock", "exclusive create"),
    }
    assert not store.root.path.exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--address", f"http://127.0.0.1:{free_port()}"), 5, "no cluster answers"),
        (("--store", "ftp://x/y"), 2, "s3://BUCKET/PREFIX"),
        (("--address", "http://10.0.0.1:8265", "--store", "/s"), 2, "there is no Ray token"),
        (("--address", "ray://10.0.0.1:10001"), 5, "jobs are submitted to the dashboard"),
    ],
)
def test_command_that_cannot_look_says_why(dlm, monkeypatch, words, code, told):
    monkeypatch.setattr("cluster.jobs.time.sleep", lambda seconds: None)
    done = dlm("doctor", "--no-all-reduce", *words)
    assert done.code == code
    assert told in done.stderr


@pytest.mark.ray
def test_command_within_no_cluster_says_so_at_once(dlm, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    start_s = time.monotonic()
    done = dlm("doctor", "--address", "auto")
    assert time.monotonic() - start_s < 20.0
    assert done.code == 5
    assert "part of no cluster that answers" in done.stderr
