"""A request to stop: from a signal, from ``dlm cancel``, one after another, and while the storage does not answer."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from pipeline.artifact import read_json
from pipeline.errors import LeaseLostError
from pipeline.storage import FileStorage, Place
from tests.support.executors import Inline
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, coordinate, copies_plan, toy_plan, toy_workflow
from tests.workflows.test_passing_errors import Failing, lost
from workflows import runs
from workflows.cancel import CancelFile
from workflows.coordinator import Coordinator
from workflows.driver import Options
from workflows.lease import acquire_lease
from workflows.state import StepState
from workflows.store import RunPlace, Store


@pytest.fixture
def run(store: Store, log: Path) -> RunPlace:
    return runs.create_run(store, toy_plan(log), "local", "r1")


def stopping(store: Store, run: RunPlace, before: Callable[[], None] = lambda: None) -> Coordinator:
    """A coordinator that is asked to stop when its first step runs, after something else."""
    asked = count()

    def ask(states: list[StepState]) -> None:
        if any(state.status == "running" for state in states) and not next(asked):
            before()
            driven.request_stop()

    driven = Coordinator(store, run, runs.frozen_plan(run), Inline, ask)
    return driven


@pytest.mark.parametrize("when", ["before", "after"])
def test_request_that_the_storage_does_not_take_at_first_is_made_again(tmp_path: Path, log: Path, when, monkeypatch):
    monkeypatch.setattr("workflows.coordinator._POLL_S", 0.01)
    row = iter(range(3))

    def three(number: int, told: str) -> OSError | None:
        return lost(told) if told == "create runs/r1/cancel" and next(row, None) is not None else None

    failing = Failing(FileStorage(tmp_path / "store"), three, when)
    store = Store(Place(failing))  # pyright: ignore[reportArgumentType]
    run = runs.create_run(store, toy_plan(log), "local", "r1")
    driven = stopping(store, run)
    failing.is_on = True
    states = {state.step.name: state.status for state in driven.run()}
    assert len(failing.failed) == 3
    assert (driven.status, states["total"]) == ("stopped", "stopped")
    assert read_json(run.cancel_file)["cancel"] is False


def test_signal_does_not_take_the_place_of_a_cancel(store: Store, run: RunPlace):
    cancel = CancelFile(run.cancel_file)
    driven = stopping(store, run, lambda: cancel.request(600.0, is_cancel=True))
    driven.run()
    assert driven.status == "cancelled"
    assert read_json(run.cancel_file)["cancel"] is True
    by_itself = Options(is_wanted_again=False)
    again = Coordinator(store, run, runs.frozen_plan(run), Inline, lambda states: None, by_itself)
    again.run()
    assert again.status == "cancelled", "what starts it again by itself finds the request"


def test_who_has_lost_the_run_does_not_stop_whoever_has_it(store: Store, run: RunPlace, log: Path):
    def lose() -> None:
        held = driven._run_lease
        (held.folder / f"{held.epoch:06d}.released").touch()
        acquire_lease(run.lease_dir, "the next")

    driven = stopping(store, run, lose)
    with pytest.raises(LeaseLostError):
        driven.run()
    assert not run.cancel_file.exists()


def test_later_request_may_leave_less_time_and_be_for_good(store: Store, run: RunPlace):
    seen, asked = CancelFile(run.cancel_file), CancelFile(run.cancel_file)
    assert not seen.is_requested()
    asked.request()
    assert seen.is_requested()
    assert not seen.is_cancel
    asked.request(600.0, is_cancel=True)
    assert seen.is_requested()
    assert seen.is_cancel
    assert not seen.is_overdue()
    asked.request(0.0, is_cancel=True)
    assert seen.is_requested()
    assert seen.is_overdue()
    asked.request(600.0, is_cancel=True)
    assert seen.is_requested()
    assert seen.is_overdue(), "what was ended does not come back"
    asked.withdraw()
    assert seen.is_requested()


def test_shard_that_stops_leaves_the_others_their_time(store: Store, log: Path):
    plan = copies_plan(log, "ab")
    run = runs.create_run(store, plan, "local", "r1")
    asked = count()

    def ask(states: list[StepState]) -> None:
        if {"copies-000", "copies-001"} <= {key.partition("@")[0] for key in inline.started} and not next(asked):
            held = inline._calls
            assert len(held) == 2
            held[0].payload["cancel"] = run.cancel_file.key  # one hears of it, the other has come too far
            held[1].payload["cancel"] = "nowhere"
            CancelFile(run.cancel_file).request()

    inline = Inline()
    driven = Coordinator(store, run, plan, lambda: inline, ask)
    states = {state.step.name: state for state in driven.run()}
    assert states["copies"].status == "stopped"
    assert len(store.artifact("toy-copies", plan.step("copies").fingerprint).committed_shards()) == 1
    assert coordinate(store, run, Inline)["copies"].status == "committed"
    assert executions(log) == {"copies-list": 2, "copies-000": 1, "copies-001": 1, "copies-finish": 1}, "no shard twice"


def test_lease_that_can_neither_be_taken_nor_given_up_at_first_is_taken_later(tmp_path: Path, log: Path, monkeypatch):
    monkeypatch.setattr("workflows.coordinator._POLL_S", 0.01)
    row = iter(range(4))

    def four(number: int, told: str) -> OSError | None:
        is_lease = "toy-source" in told and "/lease" in told and not told.endswith(".json")
        return lost(told) if is_lease and next(row, None) is not None else None

    failing = Failing(FileStorage(tmp_path / "store"), four)
    store = Store(Place(failing))  # pyright: ignore[reportArgumentType]
    plan = toy_plan(log, ("source",))
    driven = Coordinator(store, runs.create_run(store, plan, "local", "r1"), plan, Inline, lambda states: None)
    failing.is_on = True
    start_s = time.monotonic()
    assert driven.run()[0].status == "committed"
    assert len(failing.failed) == 4
    assert time.monotonic() - start_s < 10.0


def test_run_goes_on_when_whoever_read_along_leaves(store: Store, log: Path):
    command = [
        sys.executable,
        "-m",
        "tests.support.toy_workflow",
        "run",
        "toy",
        "--run-id",
        "r1",
        "--executor",
        "local",
    ]
    command += ["--store", store.url]
    for step in toy_workflow().steps:
        command += ["--set", f"{step.name}.log={log}"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert executions(log) == ONCE
