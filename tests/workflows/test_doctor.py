"""``dlm doctor`` on machines and stores with planted faults."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import all_reduce, preflight
from cluster.all_reduce import free_port
from cluster.everywhere import Machine, Question, Reply, ThisMachine
from cluster.preflight import GIB, Check
from pipeline.errors import UserError
from pipeline.storage import FileStorage, Place
from tests.support.checks import only, tree
from tests.support.toy_workflow import wait_until
from workflows import doctor, store_checks
from workflows.doctor import all_reduce_checks, examine_as_job, parsed_checks
from workflows.store import open_writable_store
from workflows.store_checks import Raced, clock_checks, race_check

HERE = ThisMachine().machines
TWO = (Machine("a", "127.0.0.1"), Machine("b", "127.0.0.1"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No token of the user's own."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    return path


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
    assert race_check("n", [Raced((), 10), Raced((), 10)], store.root).status == "failure"


def test_race_that_one_came_late_to_is_none(store, monkeypatch):
    store.root.path.mkdir()
    compete = store_checks.compete

    def late(base: str, key: str, name: str, contestants: int) -> Raced:
        time.sleep(0.5 * int(name))
        return compete(base, key, name, contestants)

    monkeypatch.setattr(store_checks, "compete", late)
    monkeypatch.setattr(store_checks, "_START_S", 0.1)
    check = only(store_checks.store_checks(ThisMachine(), TWO, store.url), "exclusive create", "warning")
    assert "only 0 of 10 files were wanted by all 2 at once" in check.found
    assert "NFS" in check.todo, "whose listings are late when nobody is busy too"


@dataclass(frozen=True)
class WrittenTo(FileStorage):
    """Something comes into a folder after it was removed, so many times."""

    left: list[int]

    def remove(self, key: str) -> None:
        super().remove(key)
        if "/" not in key and self.left[0] > 0:
            self.left[0] -= 1
            self.write(f"{key}/race/here-9-1", b"")


@dataclass(frozen=True)
class InUse(WrittenTo):
    """Something comes into a folder while it is removed, so many times."""

    def remove(self, key: str) -> None:
        if "/" not in key and self.left[0] > 0:
            self.left[0] -= 1
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        super().remove(key)


@pytest.mark.parametrize("kind", [WrittenTo, InUse])
def test_folder_that_is_written_to_is_removed_until_nothing_comes_any_more(tmp_path, kind):
    place = Place(kind(tmp_path, [3]), ".dlm-doctor-x")
    (place / "race" / "here-0-0").write(b"")
    assert store_checks._clear("n", place, 0.3) == []
    assert not place.exists()


@pytest.mark.parametrize("kind", [WrittenTo, InUse])
def test_folder_that_is_written_to_without_end_is_left_and_said_so(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(store_checks, "_CLEAR_S", 0.5)
    place = Place(kind(tmp_path, [10**6]), ".dlm-doctor-x")
    (place / "race" / "here-0-0").write(b"")
    (check,) = store_checks._clear("n", place, 0.3)
    assert check.status == "warning"
    assert str(place) in check.found
    assert ("Directory not empty" in check.found) == (kind is InUse)


@pytest.mark.parametrize(("is_silent", "late_s"), [(False, 0.0), (True, store_checks._LATE_S)])
def test_late_writes_are_waited_for_where_somebody_has_not_answered(store, monkeypatch, is_silent, late_s):
    class Silent(ThisMachine):
        def ask(self, questions: Any, within_s: float) -> Any:
            replies = super().ask(questions, within_s)
            is_race = len(questions) == 2 and questions[0].function is store_checks.compete
            return [Reply(TWO[0], error="did not answer"), *replies[1:]] if is_race and is_silent else replies

    waited: list[float] = []
    clear = store_checks._clear
    monkeypatch.setattr(store_checks, "_clear", lambda node, place, s: waited.append(s) or clear(node, place, 0.0))
    store.root.path.mkdir()
    store_checks.store_checks(Silent(), TWO, store.url)
    assert waited == [late_s]


def test_one_who_comes_after_all_is_over_puts_nothing_there(store):
    store.root.path.mkdir()
    assert store_checks.compete(str(store.root.path), ".dlm-doctor-over", "0", 1) == Raced()
    assert not list(store.root.path.iterdir())


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


@pytest.mark.parametrize(("number", "told"), [(1, "1 node, 1 core, 1 GPU"), (2, "2 nodes, 2 cores, 2 GPUs")])
def test_one_node_is_a_node(number: int, told: str, monkeypatch):
    monkeypatch.setattr(doctor, "admission_check", lambda node, address: Check("admission", node, "ok", address))
    machine = Machine("a", "127.0.0.1", 1.0, 1)
    machines: Any = SimpleNamespace(machines=(machine,) * number, dashboard=("127.0.0.1", 8265), gcs="")
    found = doctor._node_checks(machines)
    assert found[0].found == told


def test_checks_of_a_job_are_found_in_its_log():
    checks = [Check("gpu", "a", "ok", "none"), Check("store", "b", "failure", "é {", "x")]
    text = json.dumps({"checks": [vars(check) for check in checks]}, indent=1)
    assert parsed_checks(f"(pid=1) noise {{\n{text}\nmore noise {{}}\n") == checks
    assert parsed_checks("Traceback ...") == []


def test_relative_store_is_refused_for_another_machine():
    with pytest.raises(UserError, match="is relative"):
        examine_as_job("http://10.0.0.1:8265", "store", True, print)


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
        return preflight.Survey((), {"torch": "2.13"}), "11"

    asked: list[list[str]] = []
    monkeypatch.setattr(doctor, "look_around", around)
    checks = doctor.examine(Half(), store.url, is_reduced=False)
    assert only(checks, "answer", "failure").node == "b"
    assert only(checks, "exclusive create", "ok").node == "a"
    assert asked[0] == ["a", "b"]
    assert {name for names in asked[1:] for name in names} == {"a"}


def test_nodes_with_different_code_are_a_failure():
    (check,) = doctor._same_code({"a": "11", "b": "22", "c": "11"})
    assert check.status == "failure"
    assert check.found == "11 on a, c; 22 on b"
    assert not doctor._same_code({"a": "11", "b": "11"})


# --- all-reduce -------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_two_ranks_give_the_right_sums_and_times():
    (check,) = all_reduce_checks(ThisMachine(), HERE)
    assert check.status == "ok", check
    assert check.found.startswith("2 ranks: 1 MiB in ")
    assert "64 MiB in " in check.found


@pytest.mark.distributed
def test_failed_all_reduce_says_what_to_do(monkeypatch):
    monkeypatch.setattr(all_reduce, "run_ranks", lambda *args: 1 / 0)
    (check,) = all_reduce_checks(ThisMachine(), HERE)
    assert check.status == "failure"
    assert "NCCL_SOCKET_IFNAME" in check.todo


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


WAITING = """
import sys
from workflows import cli, store_checks
compete = store_checks.compete
store_checks.compete = lambda base, key, name, contestants: compete(base, key, name, contestants + 1)
store_checks._START_S = store_checks._RACE_S = 60.0
sys.argv = ["dlm", "doctor", "--no-all-reduce", "--store", *sys.argv[1:]]
cli.main()
"""


def test_command_that_is_ended_by_a_signal_leaves_nothing_behind(store):
    store.root.path.mkdir()
    command = [sys.executable, "-c", WAITING, str(store.root.path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(store.root.path.glob(".dlm-doctor-*/race/here-*")), "they wait for each other", 60.0)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 75, told
    assert not list(store.root.path.iterdir())


def test_command_without_failures_ends_with_0(dlm, store, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(total=100 * GIB, free=100 * GIB))
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
