"""``dlm status`` and ``dlm list``, over runs that were written by hand and over one that was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.executor import Call, Ended, Shortage
from pipeline.stage import environment
from tests.support.executors import Inline
from tests.support.fabricated import age_lease, begin, end, fabricate_run, fabricate_turn, failure, usage
from tests.support.toy_stages.relay.config import RelayConfig
from tests.support.toy_workflow import STAGES, coordinate, copies_plan, fabricate, toy_plan, toy_workflow, wait_until
from tests.workflows.conftest import Dlm
from workflows import calls, summary
from workflows.lease import STALE_AFTER_S
from workflows.live.page import render
from workflows.live.snapshot import Watcher
from workflows.plan import make_plan
from workflows.progress import progress_words
from workflows.runs import create_run
from workflows.state import StepState
from workflows.step import Step, Workflow
from workflows.store import RunPlace, Store
from workflows.summary import StepSummary, summarise
from workflows.turns import find_turns

ROOT = Path(__file__).parents[2]
STARTED = ("step_started", "source", {"epoch": 1, "artifact": ""})


def step_of(store: Store, run: RunPlace, name: str) -> StepSummary:
    return next(step for step in summarise(store, run).steps if step.step == name)


def status_of(dlm: Dlm) -> dict[str, Any]:
    return json.loads(dlm("status", "r1", "--json").stdout)


# --- one step, one reason -------------------------------------------------------------------------------------------


def test_queued_step_says_what_it_wants_until_a_worker_begins(store):
    run = create_run(store, toy_plan(), "local", "r1")
    begin(run, [STARTED, ("step_queued", "source", {"reason": "wants 8 GPUs; there are 4"})])
    step = step_of(store, run, "source")
    assert (step.status, step.detail) == ("queued", "wants 8 GPUs; there are 4")
    progress = {"done": 3, "total": 9, "figures": {"loss": 1.5}, "time": time.time()}
    fabricate_turn(run, 1, "source", usage_0=usage(0.1), progress=progress)
    step = step_of(store, run, "source")
    assert (step.status, step.detail) == ("running", "3/9  loss 1.5")


class Full(Inline):
    """Has room for nothing at first."""

    until_s = 0.0

    def shortage(self, call: Call) -> Shortage | None:
        return Shortage("wants 8 GPUs; there are 4", is_beyond=False)

    def wait(self, timeout_s: float) -> list[Ended]:
        self.until_s = self.until_s or time.monotonic() + 1.0
        if time.monotonic() > self.until_s:
            return super().wait(timeout_s)
        time.sleep(0.05)
        return []


def test_coordinator_writes_once_why_a_step_is_queued(store, log, monkeypatch):
    monkeypatch.setattr(calls, "_SHOWN_AFTER_S", 0.0)
    seen: set[tuple[str, str]] = set()
    run = create_run(store, toy_plan(log, ("source",)), "local", "r1")

    def look(states: list[StepState]) -> None:
        step = step_of(store, run, "source")
        seen.add((step.status, step.detail))

    coordinate(store, run, Full, look)
    kinds = [event["kind"] for event in run.events() if event["step"] == "source"]
    assert kinds == ["step_started", "step_queued", "step_committed"]
    assert ("queued", "wants 8 GPUs; there are 4") in seen
    assert step_of(store, run, "source").status == "committed"


def test_call_of_an_earlier_attempt_of_the_step_does_not_end_its_queue(store):
    run = create_run(store, toy_plan(), "local", "r1")
    fabricate_turn(run, 1, "source", "000001", usage_0=usage(0.1))
    again = ("step_started", "source", {"epoch": 2, "artifact": ""})
    begin(run, [STARTED, again, ("step_queued", "source", {"reason": "no room"})])
    assert step_of(store, run, "source").status == "queued"


def test_progress_that_is_old_is_shown_with_its_age(store):
    run = create_run(store, toy_plan(), "local", "r1")
    begin(run, [STARTED])
    fabricate_turn(run, 1, "source", progress={"done": 3, "total": 9, "figures": {}, "time": time.time() - 300})
    assert step_of(store, run, "source").detail == "3/9  (5 min ago)"


def test_running_map_step_counts_its_shards(store):
    run = create_run(store, copies_plan(""), "local", "r1")
    begin(run, [("step_started", "copies", {"epoch": 1, "artifact": ""})])
    fabricate_turn(run, 1, "copies-list", done=[{"name": "000"}, {"name": "001"}, {"name": "002"}])
    place = store.artifact("toy-copies", copies_plan("").step("copies").fingerprint)
    (place.directory / "shards" / "000.json").write(b"{}")
    assert step_of(store, run, "copies").detail == "1/3"


def test_failed_step_says_class_rank_and_where_its_log_is_and_blocks_the_rest(dlm, store):
    found = failure("numerics", "diverged\nat step 3", rank=1)
    run = fabricate_run(store, toy_plan(), [STARTED, ("step_failed", "source", {"failure": found})])
    end(run, 1, "failed")
    fabricate_turn(run, 1, "source", log_0="a", log_1="b", failure_0=failure(), failure_1=found)
    shown = dlm("status", "r1").stdout
    assert "source failed on rank 1: numerics (RuntimeError): diverged\nat step 3" in shown
    assert f"log: {run.directory.path}/work/001/source/000001/rank-1.log\n" in shown
    assert "rank-0.log" not in shown
    status = status_of(dlm)
    assert (status["status"], status["exit_code"], status["attempts"]) == ("failed", 3, 1)
    assert (status["error"]["class"], status["error"]["step"]) == ("numerics", "source")
    assert status["error"]["message"] == "diverged\nat step 3"
    assert status["ended_at"] >= status["started_at"]
    assert {step["step"]: step["status"] for step in status["steps"]} == {
        "source": "failed",
        "double": "blocked",
        "aside": "pending",
        "total": "blocked",
    }


def test_log_of_a_failed_shard_is_that_of_the_shard(store):
    told = failure("poison", "shard 001 failed 3 times: it broke")
    plan = copies_plan("")
    run = fabricate_run(store, plan, [("step_failed", "copies", {"failure": told})])
    fabricate_turn(run, 1, "copies-000", "000001", log_0="a", failure_0=failure())
    fabricate_turn(run, 1, "copies-000", "000001-2", log_0="a", done=None)
    fabricate_turn(run, 1, "copies-001", "000001", log_0="b", failure_0=failure())
    folder = fabricate_turn(run, 1, "copies-001", "000001-2", log_0="b", failure_0={**told, "message": "it broke"})
    fabricate_turn(run, 1, "copies-002", "000001", log_0="c", failure_0=failure())
    fabricate_turn(run, 1, "copies-003", "000001", log_0="d", done=None)
    error = step_of(store, run, "copies").error
    assert error is not None
    assert (error.logs, error.rank) == ([f"{folder}/rank-0.log"], 0)


def test_log_of_workers_that_were_killed_is_that_of_all_ranks_of_the_last_turn(store):
    killed = failure("infra", "rank 1 was killed", type="WorkerDied")
    run = fabricate_run(store, toy_plan(), [("step_failed", "total", {"failure": killed})])
    fabricate_turn(run, 1, "total", "000001", log_0="a", log_1="b")
    folder = fabricate_turn(run, 1, "total", "000002", log_0="a", log_1="b", failure_0=failure("infra"))
    error = step_of(store, run, "total").error
    assert error is not None
    assert (error.logs, error.rank) == ([f"{folder}/rank-0.log", f"{folder}/rank-1.log"], None)


def test_names_of_the_json_of_a_status_stay(dlm, store):
    fabricate_run(store, toy_plan())
    status = status_of(dlm)
    assert list(status) == [
        "run_id", "workflow", "status", "attempts", "started_at", "ended_at", "heartbeat_age_s", "detail",
        "exit_code", "error", "steps",
    ]  # fmt: skip
    assert list(status["steps"][0]) == [
        "step", "status", "elapsed_s", "detail", "artifact", "from_run", "progress", "error",
    ]  # fmt: skip
    assert (status["status"], status["exit_code"], status["error"]) == ("submitted", None, None)


def test_step_that_failed_before_the_last_attempt_is_pending_with_the_reason(store):
    failed = ("step_failed", "source", {"failure": failure(message="no luck")})
    run = fabricate_run(store, toy_plan(), [STARTED, failed])
    begin(run, [])
    step = step_of(store, run, "source")
    assert (step.status, step.detail) == ("pending", "failed in attempt 1: no luck")
    assert summarise(store, run).error is None


def test_artifacts_are_shown_where_they_lie_with_the_run_that_made_them(dlm, store):
    plan = toy_plan()
    fabricate(store, plan, "source")
    fabricate_run(store, plan, [("step_cached", "source", {})])
    committed = store.artifact("toy-source", plan.step("source").fingerprint).committed()
    assert committed is not None
    step = status_of(dlm)["steps"][0]
    assert (step["status"], step["from_run"], step["artifact"]) == ("cached", "test", str(committed.path))
    assert f"source  {committed.path}\n" in dlm("status", "r1").stdout


def test_artifact_that_was_deleted_is_not_running(store):
    run = fabricate_run(store, toy_plan(), [("step_cached", "source", {})])
    begin(run, [("step_cached", "source", {})])
    assert step_of(store, run, "source").status == "pending"
    assert "deleted" in step_of(store, run, "source").detail


def test_why_tells_what_befell_a_step(dlm, store):
    events = [
        STARTED,
        ("step_retry", "source", {"failure": failure("infra", "lost", rank=2), "backoff_s": 1.0}),
        ("step_waiting", "source", {"reason": "process 7 is at work"}),
    ]
    begin(create_run(store, toy_plan(), "local", "r1"), events)
    shown = dlm("status", "r1", "--why").stdout
    assert "retry after infra (RuntimeError, rank 2): lost" in shown
    assert "source waiting: process 7 is at work" in shown
    assert "retry after" not in dlm("status", "r1").stdout


def test_why_tells_a_wait_that_shards_went_through_one_by_one_once(dlm, store):
    wait, other = ("step_queued", "source", {"reason": "wants 1 core"}), ("step_queued", "source", {"reason": "a GPU"})
    begin(create_run(store, toy_plan(), "local", "r1"), [STARTED, wait, wait, wait, other, wait])
    shown = dlm("status", "r1", "--why").stdout
    assert re.findall("queued: (.*)", shown.partition("attempts of the run")[2]) == [
        "wants 1 core",  # of the status of the step
        "wants 1 core",
        "a GPU",
        "wants 1 core",
    ]


def test_why_tells_how_every_attempt_ended_in_the_words_of_the_page(dlm, store):
    stopped = ("step_stopped", "source", {"message": "3 steps are done"})
    run = fabricate_run(store, toy_plan(), [STARTED], [STARTED, stopped])  # the first one said nothing more
    end(run, 2, "cancelled")
    shown = dlm("status", "r1", "--why").stdout
    words = "ended without a last entry: its coordinator was killed, or interrupted"
    run_part, _, source_part = shown.partition("\nattempts of the run\n")[2].partition("\nsource ")
    lines = [line.split(maxsplit=4) for line in run_part.splitlines() if line]
    assert [(line[1], line[4]) for line in lines] == [("1", words), ("2", "cancelled on request")]
    of_source = [line for line in source_part.partition("\n\n")[0].splitlines() if line.startswith("  attempt")]
    assert [line.split("  ")[-1].strip() for line in of_source] == [
        "started",
        words,
        "started",
        "stopped: 3 steps are done",
    ]
    assert words in render(Watcher(store, run, toy_plan()).look(None, 10), 3.0)
    assert words not in dlm("status", "r1").stdout


def test_status_hides_secrets_in_messages(dlm, store, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-s3cr3t")
    failed = ("step_failed", "source", {"failure": failure(message="401 for s3cr3t-s3cr3t")})
    end(fabricate_run(store, toy_plan(), [STARTED, failed]), 1, "failed")
    assert "s3cr3t-s3cr3t" not in "".join(dlm("status", "r1", *more).stdout for more in ([], ["--why"]))
    assert "401 for ***" in dlm("status", "r1").stdout


# --- the run as a whole ---------------------------------------------------------------------------------------------


def test_run_whose_steps_another_run_finished_has_succeeded(dlm, store):
    plan = toy_plan()
    run = fabricate_run(store, plan, [("step_cached", "source", {}), ("step_started", "double", {"epoch": 1})])
    assert summarise(store, run).status == "interrupted"
    fabricate(store, plan)
    assert "succeeded (finished by run test)" in dlm("status", "r1").stdout
    status = status_of(dlm)
    assert (status["status"], status["exit_code"]) == ("succeeded", 0)
    assert dlm("status", "r1", "--watch").code == 0


def test_run_that_was_never_started_has_succeeded_once_others_made_all_of_it(store):
    run = fabricate_run(store, toy_plan())
    fabricate(store, toy_plan(), "source", "aside", "double")
    assert summarise(store, run).status == "submitted"
    fabricate(store, toy_plan(), "total")
    summary = summarise(store, run)
    assert (summary.status, summary.exit_code, summary.detail) == ("succeeded", 0, "finished by run test")


def test_coordinator_not_heard_of_is_shown_as_stale_and_counts_as_interrupted(dlm, store):
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [STARTED])
    assert status_of(dlm)["exit_code"] is None
    assert "last heard of" in dlm("status", "r1").stdout
    age_lease(lease, 250.0)
    assert STALE_AFTER_S < 250
    assert "running (lease stale 4m)" in dlm("status", "r1").stdout
    assert status_of(dlm)["exit_code"] == 75
    assert dlm("status", "r1", "--watch").code == 75
    assert "lease stale 4m" in dlm("list").stdout


def test_run_that_ends_or_begins_while_it_is_looked_at_is_not_interrupted(store, monkeypatch):
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [STARTED])
    read_events, find_holder = summary.read_events, summary.find_holder

    def ends_afterwards(*arguments: Any) -> Any:
        events = read_events(*arguments)
        end(run, 1, "succeeded")
        lease.release()
        return events

    monkeypatch.setattr(summary, "read_events", ends_afterwards)
    assert summarise(store, run).status == "running"
    monkeypatch.setattr(summary, "read_events", read_events)
    assert summarise(store, run).status == "succeeded"

    def begins_afterwards(*arguments: Any) -> Any:
        holder = find_holder(*arguments)
        begin(run, [STARTED])
        return holder

    monkeypatch.setattr(summary, "find_holder", begins_afterwards)
    assert summarise(store, run).status == "running"


def test_call_belongs_to_the_step_with_the_longest_name(store):
    run = create_run(store, toy_plan(), "local", "r1")
    for call in ("a", "a-0", "a-b", "a-b-0", "ab"):
        fabricate_turn(run, 1, call, done=None)
    found = {turn.call: turn.step for turn in find_turns(run, ["a", "a-b"])}
    assert found == {"a": "a", "a-0": "a", "a-b": "a-b", "a-b-0": "a-b", "ab": "ab"}


@pytest.mark.parametrize(
    ("status", "error_class", "code"),
    [
        ("succeeded", "", 0),
        ("failed", "user", 3),
        ("failed", "unschedulable", 5),
        ("stopped", "", 75),
        ("", "", 75),
    ],
)
def test_watch_ends_with_the_exit_code_of_the_run(dlm, store, status, error_class, code):
    failed = [("step_failed", "source", {"failure": failure(error_class)})] if error_class else []
    run = fabricate_run(store, toy_plan(), [STARTED, *failed])
    if status:
        end(run, 1, status)
    assert dlm("status", "r1", "--watch").code == code
    assert dlm("status", "r1").code == 0


def test_watch_into_a_pipe_prints_changes_only_and_ends_with_the_run(dlm, store):
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [STARTED])
    written = {"done": 0, "total": 9, "figures": {}, "time": time.time()}
    folder = fabricate_turn(run, 1, "source", usage_0=usage(0.1), progress=written)

    def go_on() -> None:
        for done in range(1, 8):
            time.sleep(0.2)
            (folder / "progress.json").write(json.dumps({**written, "done": done}).encode())
        end(run, 1, "stopped")
        lease.release()

    thread = threading.Thread(target=go_on)
    thread.start()
    watched = dlm("status", "r1", "--watch")
    thread.join()
    lines = [line for line in watched.stdout.splitlines() if line.startswith(("run ", "source "))]
    assert watched.code == 75
    assert [line.split()[:3] for line in lines] == [
        ["run", "r1", "running"],
        ["source", "running", "0/9"],
        ["run", "r1", "stopped"],
        ["source", "interrupted", "7/9"],
    ]


def test_watch_as_json_gives_a_line_a_change(dlm, store):
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [STARTED])

    def stop() -> None:
        time.sleep(1.5)
        end(run, 1, "stopped")
        lease.release()

    thread = threading.Thread(target=stop)
    thread.start()
    watched = dlm("status", "r1", "--watch", "--json")
    thread.join()
    assert [json.loads(line)["status"] for line in watched.stdout.splitlines()] == ["running", "stopped"]


def test_killed_run_is_interrupted_and_shows_how_far_it_was(dlm, store, log):
    sets = [word for step in toy_workflow().steps for word in ("--set", f"{step.name}.log={log}")]
    command = [sys.executable, "-m", "tests.support.toy_workflow", "run", "toy", "--executor", "local"]
    process = subprocess.Popen(
        [*command, "--run-id", "r1", "--store", store.url, *sets, "--set", "source.trouble=slow"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        progress = store.root.path / "runs" / "r1" / "work"
        wait_until(lambda: list(progress.glob("001/source/*/progress.json")), "the source makes progress", 50.0)
        running = status_of(dlm)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (running["status"], running["steps"][0]["status"], running["exit_code"]) == ("running", "running", None)
    killed = status_of(dlm)
    assert (killed["status"], killed["steps"][0]["status"], killed["exit_code"]) == ("interrupted", "interrupted", 75)
    assert killed["steps"][0]["progress"]["total"] == 600
    assert "dlm resume r1" in dlm("status", "r1").stdout


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [("{", "not valid JSON"), ("[]", "run.json"), ('{"plan": {"steps": 1}}', "plan"), ('{"executor": "ray"}', "plan")],
)
def test_damaged_run_does_not_stop_the_list(dlm, store, content, word):
    fabricate_run(store, toy_plan(), run_id="whole")
    damaged = fabricate_run(store, toy_plan(), run_id="broken")
    (damaged.directory.path / "run.json").write_text(content)
    listed = {run["run_id"]: run for run in json.loads(dlm("list", "--json").stdout)}
    assert (listed["whole"]["status"], listed["broken"]["status"]) == ("submitted", "damaged")
    assert word in listed["broken"]["error"]["message"]
    shown = dlm("list")
    assert shown.code == 0
    assert "broken is damaged: " in shown.stdout
    assert "whole" in shown.stdout
    refused = dlm("status", "broken")
    assert refused.code == 3
    assert word in refused.stderr
    assert "Traceback" not in refused.stderr


def test_damaged_event_does_not_stop_the_list(dlm, store):
    run = fabricate_run(store, toy_plan(), [STARTED])
    next((run.directory.path / "events").iterdir()).write_text("")
    assert json.loads(dlm("list", "--json").stdout)[0]["status"] == "damaged"


def test_run_with_a_stage_that_is_not_here_is_listed(dlm, store):
    run = fabricate_run(store, toy_plan(), [STARTED])
    record = run.directory.path / "run.json"
    record.write_text(record.read_text().replace("tests.support.toy_stages.total", "elsewhere.stages.total"))
    listed = json.loads(dlm("list", "--json").stdout)[0]
    assert listed["status"] == "interrupted"
    assert {step["step"]: step["status"] for step in listed["steps"]}["total"] == "unknown"
    assert "elsewhere.stages.total" in dlm("status", "r1").stdout


def test_list_is_limited_and_says_so(dlm, store):
    for number in range(4):
        fabricate_run(store, toy_plan(), run_id=f"r{number}")
        os.utime(store.root.path / "runs" / f"r{number}" / "run.json", (number, number))
    limited = dlm("list", "--limit", "2", "--json")
    assert [run["run_id"] for run in json.loads(limited.stdout)] == ["r3", "r2"]
    assert "2 older ones" in limited.stderr
    assert "--limit 4" in limited.stderr
    assert len(json.loads(dlm("list", "--json").stdout)) == 4
    assert dlm("list", "--limit", "0").code == 2


def test_list_and_status_fit_80_columns_of_a_terminal_and_are_whole_in_a_pipe(store):
    run_id = "llada_moe_tiny-20261122-143000-abcd"
    failed = ("step_failed", "source", {"failure": failure(message="long " * 40)})
    end(fabricate_run(store, toy_plan(), [STARTED, failed], run_id=run_id), 1, "failed")
    env = {**os.environ, "DLM_STORE": store.url, "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    piped = dlm_lines("list", env=env) + dlm_lines("status", env=env)
    assert any(len(line) > 150 for line in piped)
    terminal = {**env, "FORCE_COLOR": "1", "TERM": "xterm"}
    shown = dlm_lines("list", env=terminal)
    assert all(len(line) <= 80 for line in shown)
    assert any(run_id in line and "failed" in line for line in shown)
    table = dlm_lines("status", env=terminal)[:6]
    assert all(len(line) <= 80 for line in table)
    assert any(line.endswith("…") for line in table)


def dlm_lines(*arguments: str, env: dict[str, str]) -> list[str]:
    """What a process of its own prints, without colours."""
    code = "from workflows.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()


def test_gang_with_fewer_workers_than_it_was_to_have_says_so(store, log, dlm: Dlm, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    config = RelayConfig(ticks=2, log=str(log), workers=3, min_workers=1)
    plan = make_plan(Workflow("relay", "counting", (Step("relay", f"{STAGES}.relay", config),)), environment())
    run = create_run(store, plan, "local", "r1")
    seen: set[str] = set()
    coordinate(store, run, Inline, lambda states: seen.update(progress_words(states[0].progress)))
    assert "1 of 3 workers" in seen
    (warning,) = [event["message"] for event in run.events() if event["kind"] == "step_warning"]
    assert warning == "works with 1 of 3 workers: no more found room"
    assert warning in dlm("status", "r1", "--why").stdout
