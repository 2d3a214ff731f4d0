"""``dlm cancel`` on this machine: what listens saves, what does not is ended, and everything can be gone on with."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.fabricated import begin
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, fabricate, is_gone, toy_plan, toy_workflow, wait_until
from tests.workflows.conftest import Dlm
from tests.workflows.test_kill import toy
from workflows import runs
from workflows.cancel import CancelFile
from workflows.runs import ExecutorName
from workflows.store import Store
from workflows.summary import summarise


def start(store: Store, log: Path, trouble: str) -> "subprocess.Popen[bytes]":
    """Run r1 with a source that does not end by itself."""
    logs = {f"{step.name}__log": str(log) for step in toy_workflow().steps}
    where = ("--store", store.url, "--executor", "local", "--run-id", "r1")
    process = toy("run", "toy", *where, **logs, source__trouble=trouble)
    wait_until((log / "source").exists, "the source runs", 60.0)
    return process


def test_cancelled_run_is_told_apart_from_a_stopped_one_and_goes_on_when_it_is_resumed(
    store: Store, log: Path, dlm: Dlm
):
    process = start(store, log, "slow")
    done = dlm("cancel", "r1", "--grace", "30")
    assert done.code == 0
    assert "cancelled; go on with: dlm resume r1" in done.stderr
    assert process.wait(timeout=20) == 75
    assert summarise(store, store.run("r1")).status == "cancelled"
    assert dlm("resume", "r1").code == 0
    assert executions(log) == {**ONCE, "source": 2}


def test_stage_that_does_not_listen_is_ended_after_the_time_it_was_given(store: Store, log: Path, dlm: Dlm):
    process = start(store, log, "hang")
    children = psutil.Process(process.pid).children(recursive=True)
    start_s = time.monotonic()
    assert dlm("cancel", "r1", "--grace", "1").code == 0
    assert 1.0 <= time.monotonic() - start_s < 15.0
    assert process.wait(timeout=20) == 75
    assert all(map(is_gone, children))
    assert summarise(store, store.run("r1")).status == "cancelled"


def test_coordinator_that_does_not_listen_is_ended_itself(store: Store, log: Path, dlm: Dlm, monkeypatch):
    monkeypatch.setattr("workflows.commands.submitting._BEYOND_GRACE_S", 0.5)
    process = start(store, log, "hang")
    coordinator = psutil.Process(process.pid)
    children = coordinator.children(recursive=True)
    coordinator.suspend()
    assert dlm("cancel", "r1", "--grace", "0").code == 0
    assert process.wait(timeout=20) == -9
    wait_until(lambda: all(map(is_gone, children)), "no process is left", 20.0)


@pytest.mark.parametrize(("executor", "is_made"), [("local", False), ("ray", True)])
def test_run_that_nothing_will_begin_by_itself_is_left_as_it_is(
    store: Store, log: Path, dlm: Dlm, executor: ExecutorName, is_made: bool
):
    plan = toy_plan(log)
    if is_made:
        fabricate(store, plan)
    runs.create_run(store, plan, executor, "r1")
    before = sorted(store.root.path.rglob("*"))
    done = dlm("cancel", "r1")
    assert (done.code, done.stderr.strip()) == (0, "nothing works on run r1")
    assert sorted(store.root.path.rglob("*")) == before
    assert dlm("cancel", "r2").code == 2


def test_run_that_waits_where_nobody_can_look_is_stopped_when_it_is_begun(store: Store, log: Path, dlm: Dlm):
    """As a Slurm job in the queue does, or a RayJob between two clusters."""
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    done = dlm("cancel", "r1")
    assert done.code == 0
    assert "the request was left for a job that begins it later" in done.stderr
    assert "dlm cancel r1 --undo" in done.stderr
    assert dlm("resume", "r1", "--address", "auto").code == 75  # what begins by itself
    assert summarise(store, run).status == "cancelled"
    assert executions(log) == {}
    assert dlm("cancel", "r1").code == 0, "the next cluster of a RayJob"
    undone = dlm("cancel", "r1", "--undo")
    assert (undone.code, undone.stderr) == (0, "the request to stop run r1 was taken back\n")
    assert not run.cancel_file.exists()


def test_request_that_is_taken_back_from_who_may_have_seen_it_is_said_to_stop_that_one_all_the_same(
    store: Store, log: Path, dlm: Dlm
):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    lease = begin(run, [])
    CancelFile(run.cancel_file).request(60.0, is_cancel=True)
    undone = dlm("cancel", "r1", "--undo")
    assert (undone.code, run.cancel_file.exists()) == (0, False)
    first, second = undone.stderr.splitlines()
    assert first == "the request to stop run r1 was taken back"
    assert second.endswith(
        "is at work (test), last heard of 0 s ago: if it has seen the request, it stops all the same"
    )
    lease.release()
    undone = dlm("cancel", "r1", "--undo")
    assert (undone.code, undone.stderr) == (0, "run r1 was not asked to stop: there is no request to take back\n")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"grace_s": "soon"}'])
def test_request_that_says_nothing_is_a_request_without_an_end(store: Store, content: bytes):
    run = store.create_run("r1", {})
    run.cancel_file.write(content)
    cancel = CancelFile(run.cancel_file)
    assert cancel.is_requested()
    assert not cancel.is_overdue()
    assert not cancel.is_cancel


def test_request_is_overdue_after_its_grace_from_when_it_was_seen(store: Store):
    run = store.create_run("r1", {})
    asking, seeing = CancelFile(run.cancel_file), CancelFile(run.cancel_file)
    assert not seeing.is_requested()
    asking.request(0.2, is_cancel=True)
    assert seeing.is_requested()
    assert not seeing.is_overdue()
    time.sleep(0.25)
    assert seeing.is_overdue()
    assert seeing.is_cancel
