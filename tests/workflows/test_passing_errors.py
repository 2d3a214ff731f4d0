"""One operation of the coordinator's storage fails and would succeed at the next try: the run goes on to its end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.object_storage import ObjectStorage
from pipeline.storage import FileStorage, Place, Storage
from tests.support.executors import Inline
from tests.support.mortal import in_memory
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import coordinate, copies_plan, toy_plan
from workflows import coordinator, lease, runs, worker
from workflows.coordinator import Coordinator
from workflows.driver import Options
from workflows.lease import lease_is_free
from workflows.plan import Plan
from workflows.state import StepState
from workflows.store import RunPlace, Store
from workflows.summary import summarise

When = Literal["before", "after"]
ONCE = dict.fromkeys(["copies-list", "copies-000", "copies-001", "copies-finish"], 1)
_OPERATIONS = {
    "create", "write", "touch", "read", "exists", "names", "sizes", "modified", "now", "remove", "upload", "download",
}  # fmt: skip


class Failing:
    """A storage as a coordinator has it, of which operations fail, before they are done or after."""

    def __init__(self, inner: Any, fails: Callable[[int, str], OSError | None], when: When = "before") -> None:
        self._inner, self._fails, self._when = inner, fails, when
        self.is_on = False
        self.done: list[str] = []
        self.failed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._inner, name)
        if name not in _OPERATIONS or not self.is_on:
            return operation

        def operate(*given: Any, **more: Any) -> Any:
            told = f"{name} {given[-1] if name == 'upload' else given[0]}"
            self.done.append(told)
            if (error := self._fails(len(self.done) - 1, told)) is None:
                return operation(*given, **more)
            self.failed.append(told)
            if self._when == "after":
                operation(*given, **more)
            raise error

        return operate


def nothing(number: int, told: str) -> None:
    """No operation fails."""


def lost(told: str) -> OSError:
    return ConnectionError(f"{told} was not answered")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, no_backoff: None) -> None:
    """Nothing is waited for, and no power is cut."""
    monkeypatch.setattr(coordinator, "_POLL_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def drive(
    storage: Failing, plan: Plan, options: Options | None = None
) -> tuple[Store, RunPlace, dict[str, StepState], Coordinator]:
    """A run of a plan; from its first turn on its storage may fail."""
    store = Store(Place(storage))  # pyright: ignore[reportArgumentType]
    run = runs.create_run(store, plan, "local", "r1")
    driven = Coordinator(store, run, plan, Inline, lambda states: None, options or Options())
    storage.is_on = True
    try:
        states = driven.run()
    finally:
        storage.is_on = False
    return store, run, {state.step.name: state for state in states}, driven


def storage_of(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """One that the workers open too."""
    storage: Any = FileStorage(root / "store") if kind == "files" else in_memory()
    monkeypatch.setattr(ObjectStorage, "poll_s", 0.05)
    monkeypatch.setattr(worker, "open_storage", lambda url: storage)
    monkeypatch.setenv("DLM_CACHE", str(root / "cache"))
    return storage


def fail_once(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch, number: int, when: When) -> str:
    """The operation that failed; empty if the run had fewer."""
    log = root / "log"
    log.mkdir(parents=True)
    failing = Failing(storage_of(kind, root, monkeypatch), lambda at, told: lost(told) if at == number else None, when)
    store, run, states, _ = drive(failing, copies_plan(log, "ab"))
    assert {state.status for state in states.values()} <= {"committed", "cached"}, failing.failed
    assert summarise(store, run).status == "succeeded"
    events = [event for event in run.events() if event["kind"] != "run_warning"]
    assert [(events[place]["kind"], events[place]["step"]) for place in (0, -1)] == [
        ("run_started", ""),
        ("run_ended", ""),
    ]
    made = {event["step"] for event in events if event["kind"] in ("step_committed", "step_cached")}
    assert made == {"letters", "copies"}, failing.failed
    assert lease_is_free(run.lease_dir)
    for step in states.values():
        assert lease_is_free(store.artifact(step.step.stage.rpartition(".")[2], step.step.fingerprint).lease_dir)
    assert executions(log) == ONCE, f"what a worker has made is not made again: {failing.failed}"
    return "".join(failing.failed)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "every"),
    [("files", 3), pytest.param("files", 1, marks=pytest.mark.slow), pytest.param("memory", 1, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("quick")
def test_run_goes_on_after_any_operation_that_fails_once(kind: str, every: int, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "log").mkdir()
    calm = Failing(storage_of(kind, tmp_path, monkeypatch), nothing)
    drive(calm, copies_plan(tmp_path / "log", "ab"))
    faults: list[tuple[int, When]] = [(at, when) for at in range(len(calm.done)) for when in ("before", "after")]
    assert len(faults) > 100
    faults = faults[::every]
    failed = [fail_once(kind, tmp_path / f"{at}-{when}", monkeypatch, at, when) for at, when in faults]
    assert sum(map(bool, failed)) > 0.9 * len(failed)
    print(*failed, sep="\n")  # noqa: T201


@pytest.mark.usefixtures("quick")
def test_passing_error_is_told_once_a_row(tmp_path: Path, log: Path) -> None:
    row = iter(range(3))

    def three(number: int, told: str) -> OSError | None:
        return lost(told) if "/cancel" in told and number > 5 and next(row, None) is not None else None

    _, run, states, _ = drive(Failing(FileStorage(tmp_path / "store"), three), copies_plan(log, "ab"))
    assert states["copies"].status == "committed"
    (warning,) = [event for event in run.events() if event["kind"] == "run_warning"]
    assert "ConnectionError: read runs/r1/cancel was not answered" in warning["message"]


@pytest.mark.parametrize("what", ["/events/", "/lease/", "/work/", "/cancel", "COMMIT.json"])
@pytest.mark.usefixtures("quick")
def test_storage_that_does_not_come_back_ends_the_run(what: str, tmp_path: Path, log: Path, monkeypatch) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    monkeypatch.setattr("workflows.retries.RETRIES", {"transient": 10**6})
    failing = Failing(FileStorage(tmp_path / "store"), lambda number, told: lost(told) if what in told else None)
    with pytest.raises(ConnectionError, match="was not answered"):
        drive(failing, copies_plan(log, "ab"))
    assert len(failing.failed) > 3


@pytest.mark.usefixtures("quick")
def test_error_that_does_not_pass_ends_the_run_at_once(tmp_path: Path, log: Path) -> None:
    failing = Failing(
        FileStorage(tmp_path / "store"),
        lambda number, told: PermissionError(errno.EACCES, "not allowed") if told == "read runs/r1/cancel" else None,
    )
    with pytest.raises(PermissionError):
        drive(failing, copies_plan(log, "ab"))
    assert len(failing.failed) == 1


@pytest.mark.usefixtures("quick")
def test_executor_that_cannot_be_started_ends_the_run_at_once(store: Store, log: Path) -> None:
    tries: list[int] = []

    def refuse() -> Inline:
        tries.append(1)
        raise ConnectionError("there is no cluster")

    with pytest.raises(ConnectionError, match="there is no cluster"):
        coordinate(store, copies_plan(log, "ab"), refuse)
    assert len(tries) == 1
    (run,) = store.runs()
    assert lease_is_free(run.lease_dir)


@pytest.mark.usefixtures("quick")
def test_fail_fast_stops_the_others_although_the_request_cannot_be_written_at_first(tmp_path: Path, log: Path) -> None:
    row = iter(range(3))

    def three(number: int, told: str) -> OSError | None:
        return lost(told) if told.startswith("create") and "/cancel" in told and next(row, None) is not None else None

    failing = Failing(FileStorage(tmp_path / "store"), three)
    plan = copies_plan(log, "ab", trouble="user", where="copies-000")
    _, run, states, driven = drive(failing, plan, Options(is_fail_fast=True))
    assert states["copies"].status == "failed"
    assert driven.status == "failed"
    assert len(failing.failed) == 3
    assert run.cancel_file.exists()


@pytest.mark.usefixtures("quick")
def test_folder_of_a_failed_shard_that_cannot_be_removed_is_left(tmp_path: Path, log: Path) -> None:
    def full(number: int, told: str) -> OSError | None:
        return (
            OSError(errno.ENOTEMPTY, "Directory not empty") if told.startswith("remove") and "shards-" in told else None
        )

    failing = Failing(FileStorage(tmp_path / "store"), full)
    _, run, states, _ = drive(failing, copies_plan(log, "ab", trouble="code", where="copies-001", times=1))
    assert states["copies"].status == "committed"
    assert len(failing.failed) == 1
    (warning,) = [event for event in run.events() if event["kind"] == "step_warning"]
    assert "shard 001 leaves files" in warning["message"]


@pytest.mark.usefixtures("quick")
def test_what_a_storage_refuses_of_one_step_fails_that_step_alone(tmp_path: Path, log: Path, monkeypatch):
    monkeypatch.setattr("workflows.driver._COMMIT_WITHIN_S", 0.2)
    plan = toy_plan(log)
    refused = f"artifacts/toy-source/{plan.step('aside').fingerprint[:12]}/COMMIT.json"
    failing = Failing(
        FileStorage(tmp_path / "store"), lambda number, told: lost(told) if told == f"create {refused}" else None
    )
    _, _, states, driven = drive(failing, plan)
    found = states["aside"].failure
    assert found is not None
    assert found.error_class == "transient"
    assert {name: state.status for name, state in states.items()} == {
        "source": "committed", "double": "committed", "aside": "failed", "total": "blocked"
    }  # fmt: skip
    assert driven.status == "failed"
    assert {name: number for name, number in executions(log).items() if number > 1} == {"aside": 6}


@pytest.mark.usefixtures("quick")
def test_shard_that_was_taken_over_is_committed_once_the_storage_takes_it(tmp_path: Path, log: Path):
    row = iter(range(3))

    def three(number: int, told: str) -> OSError | None:
        is_shard = told.startswith("create") and "/shards/" in told and told.startswith("create artifacts/")
        return lost(told) if is_shard and next(row, None) is not None else None

    failing = Failing(FileStorage(tmp_path / "store"), three)
    store = Store(Place(failing))  # pyright: ignore[reportArgumentType]
    assert coordinate(store, copies_plan(log, "ab"), Inline)["copies"].status == "committed"
    assert not failing.failed
    _, run, states, _ = drive(failing, copies_plan(log, "abc"))
    assert states["copies"].status == "committed"
    assert len(failing.failed) == 3
    assert executions(log) == {**ONCE, "copies-list": 2, "copies-002": 1, "copies-finish": 2}
    assert not [event for event in run.events() if event["kind"] == "step_retry"]
