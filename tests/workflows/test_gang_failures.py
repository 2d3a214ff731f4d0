"""A gang that fails: which rank is named as the cause, and what is tried again."""

import socket
from pathlib import Path

import pytest

from cluster import local as local_module
from cluster.executor import Ended, Executor
from cluster.local import LocalExecutor
from pipeline.artifact import write_json
from tests.support.executors import NUM_CPUS, Inline
from tests.support.races import place_at
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import coordinate, fabricate, toy_plan
from workflows import runs
from workflows.state import StepState
from workflows.store import RunPlace, Store
from workflows.worker import Failure, first_failure, last_words


def local() -> Executor:
    return LocalExecutor(NUM_CPUS)


def run_gang(store: Store, log: Path, executor, **trouble) -> tuple[StepState, RunPlace]:
    """A run of which only the gang is left to do."""
    plan = toy_plan(log, **{f"total__{name}": value for name, value in trouble.items()})
    fabricate(store, plan, "source", "double", "aside")
    run = runs.create_run(store, plan, "local", "r1")
    return coordinate(store, run, executor)["total"], run


def retries(run: RunPlace) -> list[dict]:
    return [event["failure"] for event in run.events() if event["kind"] == "step_retry"]


def test_gang_fails_with_the_rank_that_raised_and_its_traceback(store, log, executor_of_gangs):
    state, run = run_gang(store, log, executor_of_gangs, trouble="code", where="total-1")
    assert state.status == "failed"
    assert (state.failure.rank, state.failure.error_class) == (1, "code")
    assert state.failure.message == "total-1 has a defect"
    assert "Traceback (most recent call last)" in state.failure.traceback
    assert "in _have_trouble" in state.failure.traceback
    assert not retries(run)


def test_gang_that_hangs_is_ended_by_its_watchdog_tried_again_and_the_log_has_the_stacks(
    store, log, executor_of_gangs, no_backoff
):
    state, run = run_gang(store, log, executor_of_gangs, trouble="stuck", where="total-1")
    assert state.status == "committed", state.failure
    assert executions(log) == {"total-0": 2, "total-1": 2}
    (retry,) = retries(run)
    assert (retry["error_class"], retry["type"], retry["rank"]) == ("transient", "HangError", 1)
    assert retry["message"] == "rank 1 made no progress for 0.3 s in phase 'start'; rank 0 has left no sign"
    (text,) = [path.read_text() for path in sorted((run.directory.path / "work").glob("001/total/*/rank-1.log"))[:1]]
    assert f"watchdog: {retry['message']}" in text
    assert "in _have_trouble" in text


def test_gang_out_of_memory_is_tried_once_more_and_told_what_to_lower(store, log, no_backoff):
    state, run = run_gang(store, log, local, trouble="memory", where="total-1", times=9)
    assert state.status == "failed"
    assert state.failure.error_class == "memory"
    assert "out of memory (total-1 wants more). Take fewer rows at a time" in state.failure.message
    assert executions(log) == {"total-0": 2, "total-1": 2}
    assert len(retries(run)) == 1


def test_gang_whose_port_is_taken_gets_another_one(store, log, no_backoff, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free, given = local_module._free_port, []

        def first_taken() -> int:
            given.append(free() if given else taken.getsockname()[1])
            return given[-1]

        monkeypatch.setattr(local_module, "_free_port", first_taken)
        state, run = run_gang(store, log, local, trouble="listen", where="total-0", times=9)
    assert state.status == "committed", state.failure
    assert len(given) == 2
    (retry,) = retries(run)
    assert retry["error_class"] == "transient"
    assert "Address already in use" in retry["message"]


@pytest.mark.parametrize("trouble", ["kill late", "connection late"])
def test_gang_that_dies_at_the_same_point_again_and_again_is_given_up(store, log, no_backoff, trouble):
    state, run = run_gang(store, log, local, trouble=trouble, where="total-0", times=99)
    assert state.status == "failed"
    assert state.failure.message.startswith("failed 3 times at the same point (3 done): ")
    assert executions(log)["total-0"] == 3
    assert len(retries(run)) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_gang_whose_libraries_would_abort_at_its_end_succeeds_at_once(store, log, rank):
    state, run = run_gang(store, log, local, trouble="abort at exit", where=f"total-{rank}")
    assert state.status == "committed"
    assert executions(log) == {"total-0": 1, "total-1": 1}
    assert not [event for event in run.events() if event["kind"] == "step_warning"]


class CrashAtEnd(Inline):
    """Every process crashes after it has reported."""

    def wait(self, timeout_s: float) -> list[Ended]:
        return [Ended(ended.key, "rank 0 ended with signal 6") for ended in super().wait(timeout_s)]


def test_step_that_crashes_after_its_end_has_succeeded_with_a_warning(store, log):
    run = runs.create_run(store, toy_plan(log, ("source",)), "local", "r1")
    state = coordinate(store, run, CrashAtEnd)["source"]
    assert state.status == "committed"
    assert executions(log) == {"source": 1}
    (warning,) = [event["message"] for event in run.events() if event["kind"] == "step_warning"]
    assert warning == "after its end: rank 0 ended with signal 6"


def test_rank_that_dies_without_a_word_is_told_with_the_end_of_its_log(store, log, monkeypatch):
    monkeypatch.setattr("workflows.retries.RETRIES", {})
    state, _ = run_gang(store, log, local, trouble="kill", where="total-1")
    assert state.failure.error_class == "infra"
    assert state.failure.message == "rank 1 ended with signal 9"


def test_a_hang_that_came_first_explains_the_failures_after_it_and_one_that_came_later_does_not(tmp_path):
    def fail(rank: int, type_: str, error_class, at: float) -> None:
        write_json(tmp_path / f"failure-{rank}.json", Failure(error_class, type_, "", "", rank, at))

    fail(0, "RuntimeError", "code", 2.0)
    fail(1, "HangError", "transient", 1.0)
    assert first_failure(place_at(tmp_path)).rank == 1
    fail(1, "HangError", "transient", 3.0)
    assert first_failure(place_at(tmp_path)).rank == 0


def test_last_words_are_the_ends_of_all_logs_that_are_not_empty(tmp_path):
    (tmp_path / "rank-0.log").write_text("x" * 9000 + "the end\n")
    (tmp_path / "rank-1.log").write_text("")
    (tmp_path / "gang.log").write_bytes(b"caf\xe9")
    words = last_words(place_at(tmp_path))
    assert words.count("the end of") == 2
    assert "the end\n" in words
    assert len(words) < 5000
    assert "caf�" in words
    assert last_words(place_at(tmp_path / "none")) == ""
