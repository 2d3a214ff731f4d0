import threading
from pathlib import Path

import psutil
import pytest

from cluster.child import no_notice
from cluster.executor import CallStoppedError, Executor
from cluster.local import LocalExecutor
from pipeline.artifact import read_json, write_json
from pipeline.config import to_json
from tests.support.executors import NUM_CPUS, RAY_LIMIT_S, Kept
from tests.support.races import place_at
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, coordinate, fabricate, is_gone, toy_plan, value_of, wait_until
from workflows import runs
from workflows.coordinator import Coordinator
from workflows.lease import LeaseHeldError, acquire_lease
from workflows.plan import Plan
from workflows.step import load_stage
from workflows.store import Store
from workflows.summary import summarise
from workflows.worker import Failure, Piece, first_failure, run_piece


def local() -> Executor:
    return LocalExecutor(NUM_CPUS)


def no_executor() -> Executor:
    raise AssertionError("nothing should have to run")


def statuses(states) -> dict[str, str]:
    return {name: state.status for name, state in states.items()}


def kinds(store: Store, run_id: str, step: str) -> list[str]:
    return [event["kind"] for event in store.run(run_id).events() if event["step"] == step]


def gang_plan(store: Store, log: Path, **settings) -> Plan:
    """A plan of which only the gang is left to do."""
    plan = toy_plan(log, **settings)
    fabricate(store, plan, "source", "double", "aside")
    return plan


def map_plan(store: Store, log: Path, **settings) -> Plan:
    """A plan of which only the map is left to do."""
    plan = toy_plan(log, ("source", "double"), **settings)
    fabricate(store, plan, "source")
    return plan


SHARDS = dict.fromkeys(["double-0", "double-1", "double-2"], 1)


def pids(log: Path, piece: str) -> list[psutil.Process]:
    """Processes that executed a piece and still run."""
    path = log / piece
    found = [int(line) for line in path.read_text().split()] if path.exists() else []
    return [psutil.Process(pid) for pid in found if psutil.pid_exists(pid)]


# --- the whole graph ------------------------------------------------------------------------------------------------


def test_run_commits_every_step_and_the_next_one_executes_nothing(store, log, executor):
    states = coordinate(store, toy_plan(log), executor)
    assert set(statuses(states).values()) == {"committed"}
    assert {name: value_of(state) for name, state in states.items()} == {
        "source": 1, "aside": 7, "double": 9, "total": 32,
    }  # fmt: skip
    assert executions(log) == ONCE
    again = coordinate(store, toy_plan(log), no_executor)
    assert set(statuses(again).values()) == {"cached"}
    assert executions(log) == ONCE


def test_run_with_one_changed_setting_executes_only_what_depends_on_it(store, log):
    coordinate(store, toy_plan(log), local)
    states = coordinate(store, toy_plan(log, aside__number=8), local)
    assert statuses(states) == {"source": "cached", "double": "cached", "aside": "committed", "total": "committed"}
    assert value_of(states["total"]) == 34
    assert executions(log) == {**ONCE, "aside": 2, "total-0": 2, "total-1": 2}


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trouble", "error_class"), [("user", "user"), ("code", "code")])
def test_step_with_a_permanent_failure_blocks_what_needs_it_and_nothing_else(store, log, trouble, error_class):
    plan = toy_plan(log, source__trouble=trouble, source__times=9)
    run = runs.create_run(store, plan, "local", "r1")
    states = coordinate(store, run, local)
    assert statuses(states) == {"source": "failed", "double": "blocked", "aside": "committed", "total": "blocked"}
    assert states["source"].failure.error_class == error_class
    assert states["double"].reason == "needs source"
    assert executions(log) == {"source": 1, "aside": 1}
    summary = summarise(store, run)
    assert summary.status == "failed"
    assert summary.steps[0].status == "failed"
    assert summary.steps[0].detail == states["source"].failure.message


def test_failed_run_goes_on_where_it_failed(store, log):
    run = runs.create_run(store, gang_plan(store, log, total__trouble="user", total__where="total-1"), "local", "r1")
    states = coordinate(store, run, local)
    assert statuses(states)["total"] == "failed"
    assert states["total"].failure.message == "total-1 does not like its settings"
    assert states["total"].failure.rank == 1
    states = coordinate(store, run, local)
    assert statuses(states) == {"source": "cached", "double": "cached", "aside": "cached", "total": "committed"}
    assert executions(log) == {"total-0": 2, "total-1": 2}


def test_worker_killed_once_is_retried(store, log, executor, no_backoff):
    run = runs.create_run(store, toy_plan(log, ("source", "aside"), source__trouble="kill"), "local", "r1")
    states = coordinate(store, run, executor)
    assert set(statuses(states).values()) == {"committed"}
    assert executions(log) == {"source": 2, "aside": 1}
    assert kinds(store, "r1", "source") == ["step_started", "step_retry", "step_started", "step_committed"]
    retry = next(e for e in run.events() if e["kind"] == "step_retry")
    assert retry["failure"]["error_class"] == "infra"


def test_transient_failure_is_retried_five_times(store, log, no_backoff):
    states = coordinate(store, toy_plan(log, ("source",), source__trouble="connection", source__times=5), local)
    assert statuses(states)["source"] == "committed"
    assert executions(log)["source"] == 6


def test_transient_failure_that_stays_fails_in_the_end(store, log, no_backoff):
    states = coordinate(store, toy_plan(log, ("source",), source__trouble="connection", source__times=99), local)
    assert statuses(states)["source"] == "failed"
    assert states["source"].failure.error_class == "transient"
    assert executions(log)["source"] == 6


def test_gang_with_a_killed_rank_restarts_as_a_whole(store, log, executor_of_gangs, no_backoff):
    plan = gang_plan(store, log, total__trouble="kill", total__where="total-1")
    run = runs.create_run(store, plan, "local", "r1")
    states = coordinate(store, run, executor_of_gangs)
    assert statuses(states)["total"] == "committed", states["total"].failure
    assert value_of(states["total"]) == 4
    assert executions(log) == {"total-0": 2, "total-1": 2}
    (retry,) = [e["failure"] for e in run.events() if e["kind"] == "step_retry"]
    assert retry["error_class"] == "infra", "the peer's lost connection is not the cause"


def test_gang_with_a_failing_rank_stops_the_others(store, log, executor_of_gangs):
    plan = gang_plan(store, log, total__trouble="user", total__where="total-1")
    states = coordinate(store, plan, executor_of_gangs)
    assert states["total"].failure.message == "total-1 does not like its settings"
    for rank in (0, 1):
        wait_until(lambda rank=rank: all(map(is_gone_or_idle, pids(log, f"total-{rank}"))), "the ranks are gone")


def is_gone_or_idle(process: psutil.Process) -> bool:
    """Ended, or back in the pool of Ray's idle workers."""
    try:
        return is_gone(process) or "IDLE" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


def test_gang_with_hanging_ranks_is_stopped_when_one_is_killed(store, log, no_backoff):
    run = runs.create_run(store, gang_plan(store, log, total__trouble="hang"), "local", "r1")

    def kill_rank_1(states) -> None:
        if executions(log) == {"total-0": 1, "total-1": 1}:
            for process in pids(log, "total-1"):
                process.kill()

    states = coordinate(store, run, local, kill_rank_1)
    assert statuses(states)["total"] == "committed"
    assert executions(log) == {"total-0": 2, "total-1": 2}


def test_map_resumed_executes_no_committed_shard_again(store, log):
    run = runs.create_run(
        store, map_plan(store, log, double__trouble="user", double__where="double-finish"), "local", "r1"
    )
    assert statuses(coordinate(store, run, local))["double"] == "failed"
    assert executions(log) == {**SHARDS, "double-list": 1, "double-finish": 1}
    states = coordinate(store, run, local)
    assert value_of(states["double"]) == 9
    assert executions(log) == {**SHARDS, "double-list": 2, "double-finish": 2}


def test_map_resumed_executes_a_shard_without_identity_again_if_any_value_of_it_differs(store, log):
    plan = map_plan(store, log, double__trouble="user", double__where="double-finish")
    run = runs.create_run(store, plan, "local", "r1")
    coordinate(store, run, local)
    shards = store.artifact("toy-double", plan.step("double").fingerprint).committed_shards()
    manifest = read_json(shards["1"].path / "manifest.json")
    write_json(shards["1"].path / "manifest.json", {**manifest, "shard": {**manifest["shard"], "place": 7}})
    assert value_of(coordinate(store, run, local)["double"]) == 9
    assert executions(log) == {**SHARDS, "double-list": 2, "double-1": 2, "double-finish": 2}


# --- stopping -------------------------------------------------------------------------------------------------------


def stop_once_running(store: Store, piece: str, log: Path, cancelled: list[int]):
    """An ``on_change`` that asks the run r1 to stop once a piece is being executed."""

    def on_change(states) -> None:
        if not cancelled and (log / piece).exists():
            cancelled.append(1)
            store.run("r1").cancel_file.touch()

    return on_change


@pytest.mark.parametrize(
    ("piece", "finished"),
    [("source", ["aside"]), ("double-1", ["aside", "source"]), ("total-1", ["aside", "source", "double"])],
)
def test_stop_request_lets_stages_stop_and_the_run_can_be_resumed(store, log, piece, finished):
    step = piece.split("-")[0]
    plan = toy_plan(log, **{f"{step}__trouble": "slow", f"{step}__where": piece})
    fabricate(store, plan, *finished)
    run = runs.create_run(store, plan, "local", "r1")
    states = coordinate(store, run, local, stop_once_running(store, piece, log, []))
    assert statuses(states)[step] == "stopped"
    assert "failed" not in statuses(states).values()
    assert statuses(states)["total"] == "stopped"
    assert summarise(store, run).status == "stopped"
    states = coordinate(store, run, local)
    assert set(statuses(states).values()) <= {"committed", "cached"}
    assert executions(log)[piece] == 2


def test_stop_request_starts_no_further_shard(store, log):
    run = runs.create_run(
        store, map_plan(store, log, double__trouble="slow", double__where="double-[0-9]"), "local", "r1"
    )
    coordinate(store, run, lambda: LocalExecutor(1), stop_once_running(store, "double-0", log, []))
    assert "double-2" not in executions(log)


def test_worker_that_starts_after_the_stop_request_does_nothing(store, log):
    """Pieces that were queued when the request came, on an executor that the coordinator cannot empty in time."""
    plan = toy_plan(log, ("source",))
    run = runs.create_run(store, plan, "local", "r1")
    run.cancel_file.touch()
    step = plan.step("source")
    lease = acquire_lease(run.lease_dir, "test")
    out = run.directory / "out"
    keys = {name: out.key for name in ("out", "state", "work")}
    piece = Piece(
        "whole", step.stage, "source", step.config, store.url, store.store_id, {}, **keys, log_dir=str(out.path),
        fingerprint=step.fingerprint, run_id="r1", lease=lease.folder.key, lease_epoch=lease.epoch,
        lease_token=lease.token, cancel=run.cancel_file.key,
    )  # fmt: skip
    with pytest.raises(CallStoppedError, match="asked to stop"):
        run_piece(to_json(piece), no_notice)
    assert executions(log) == {}
    found = first_failure(out)
    assert found is not None
    assert found.error_class == "stopped"


def test_stop_request_during_back_off_is_heard_at_once(store, log, monkeypatch):
    monkeypatch.setattr("workflows.retries.BACKOFF_S", 3600.0)
    run = runs.create_run(store, toy_plan(log, ("source",), source__trouble="connection"), "local", "r1")

    def stop_while_waiting(states) -> None:
        if states[0].status == "pending" and states[0].reason:
            run.cancel_file.touch()

    states = coordinate(store, run, local, stop_while_waiting)
    assert statuses(states)["source"] == "stopped"


def test_stage_that_stops_by_itself_stops_what_needs_it(store, log):
    run = runs.create_run(store, toy_plan(log, source__trouble="stop"), "local", "r1")
    states = coordinate(store, run, local)
    assert statuses(states) == {"source": "stopped", "double": "stopped", "aside": "committed", "total": "stopped"}
    assert executions(log) == {"source": 1, "aside": 1}
    (told,) = (path.read_text() for path in run.directory.path.glob("work/001/source/*/rank-0.log"))
    assert "stopped: source had enough\n" in told
    assert "Traceback" not in told


def test_interrupted_coordinator_stops_its_workers_and_frees_its_leases(store, log):
    run = runs.create_run(store, toy_plan(log, ("source",), source__trouble="hang"), "local", "r1")

    def interrupt(states) -> None:
        if (log / "source").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coordinate(store, run, local, interrupt)
    assert all(map(is_gone, pids(log, "source")))
    assert summarise(store, run).status == "interrupted"
    assert set(statuses(coordinate(store, run, local)).values()) == {"committed"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_interrupted_coordinator_on_ray_stops_a_hanging_gang(store, log, shared_ray):
    run = runs.create_run(store, gang_plan(store, log, total__trouble="hang"), "local", "r1")

    def interrupt(states) -> None:
        if {"total-0", "total-1"} <= set(executions(log)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coordinate(store, run, lambda: Kept(shared_ray), interrupt)
    for piece in ("total-0", "total-1"):
        wait_until(lambda piece=piece: all(map(is_gone_or_idle, pids(log, piece))), "the ranks are gone")


# --- leases ---------------------------------------------------------------------------------------------------------


def test_run_that_another_coordinator_drives_is_refused(store, log):
    run = runs.create_run(store, toy_plan(log, ("source",)), "local", "r1")
    lease = acquire_lease(run.lease_dir, "test")
    with pytest.raises(LeaseHeldError):
        Coordinator(store, run, toy_plan(log), no_executor, lambda states: None)
    lease.release()
    assert set(statuses(coordinate(store, run, local)).values()) == {"committed"}


def test_step_that_another_run_builds_is_waited_for_and_its_result_taken(store, log):
    plan = map_plan(store, log, double__trouble="slow", double__where="double-1")
    first, second = (runs.create_run(store, plan, "local", run_id) for run_id in ("r1", "r2"))
    results = {}
    gate = log.parent / "gate"

    def first_run() -> None:
        results["first"] = coordinate(store, first, local, stop_once_running(store, "never", log, []))

    thread = threading.Thread(target=first_run)
    thread.start()
    wait_until((log / "double-1").exists, "the first run is at work")
    double = plan.step("double")
    place = store.artifact(load_stage(double.stage).name, double.fingerprint)
    wait_until(lambda: {"0", "2"} <= place.committed_shards().keys(), "the other shards are committed")

    def end_the_first(states) -> None:
        waiting = [state for state in states if state.status == "waiting"]
        if waiting and not gate.exists():
            assert waiting[0].step.name == "double"
            assert "r1" in waiting[0].reason
            gate.touch()
            first.cancel_file.touch()

    results["second"] = coordinate(store, second, local, end_the_first)
    thread.join()
    assert gate.exists(), "the second run never waited"
    assert statuses(results["first"])["double"] == "stopped"
    assert set(statuses(results["second"]).values()) <= {"committed", "cached"}
    assert executions(log) == {**SHARDS, "double-1": 2, "double-list": 2, "double-finish": 1}


def test_step_that_another_run_finishes_meanwhile_is_taken_from_it(store, log):
    plan = toy_plan(log, ("source",))
    first, second = (runs.create_run(store, plan, "local", run_id) for run_id in ("r1", "r2"))
    place = store.artifact("toy-source", plan.step("source").fingerprint)
    lease = acquire_lease(place.lease_dir, "run r1")
    seen: list[str] = []

    def finish_the_other(states) -> None:
        if states[0].status == "waiting" and not seen:
            seen.append(states[0].reason)
            lease.release()
            coordinate(store, first, local)

    states = coordinate(store, second, local, finish_the_other)
    assert "run r1" in seen[0]
    assert set(statuses(states).values()) <= {"committed", "cached"}
    assert all(count == 1 for count in executions(log).values())


def test_step_whose_lease_was_taken_over_commits_nothing_and_waits(store, log, no_backoff):
    """Another process takes over in the middle of a map; the shards of the old epoch must not count."""
    plan = map_plan(store, log, double__trouble="slow", double__where="double-1")
    run = runs.create_run(store, plan, "local", "r1")
    place = store.artifact("toy-double", plan.step("double").fingerprint)
    heirs = []

    def take_over(states) -> None:
        double = next(s for s in states if s.step.name == "double")
        if not heirs and (log / "double-1").exists():
            double.lease.release()
            heirs.append(acquire_lease(place.lease_dir, "heir"))
            (next(iter(double.flights.values())).work / "done.json").write(b"null")
            for process in [p for piece in ("double-0", "double-1", "double-2") for p in pids(log, piece)]:
                process.kill()
        if heirs and double.status == "waiting":
            heirs[0].release()

    states = coordinate(store, run, local, take_over)
    assert heirs
    assert statuses(states)["double"] == "committed"
    assert value_of(states["double"]) == 9


# --- which failure is shown -----------------------------------------------------------------------------------------


def failure(error_class, rank: int, time: float) -> Failure:
    return Failure(error_class, "Error", f"{error_class} on rank {rank}", "", rank, time)


@pytest.mark.parametrize(
    ("failures", "shown"),
    [
        ([("code", 0, 2.0), ("code", 1, 1.0)], 1),
        ([("code", 0, 1.0), ("user", 1, 2.0)], 1),
        ([("infra", 0, 1.0), ("code", 1, 2.0)], 1),
        ([("code", 0, 1.0), ("memory", 1, 2.0)], 1),
        ([("transient", 0, 1.0), ("numerics", 1, 2.0)], 1),
        ([("code", 0, 1.0), ("stopped", 1, 2.0)], 1),
    ],
)
def test_first_failure_is_the_most_telling_then_the_earliest(tmp_path, failures, shown):
    for error_class, rank, time in failures:
        write_json(tmp_path / f"failure-{rank}.json", failure(error_class, rank, time))
    found = first_failure(place_at(tmp_path))
    assert found is not None
    assert found.rank == shown


def test_first_failure_of_nothing_is_none(tmp_path):
    assert first_failure(place_at(tmp_path)) is None


def test_damaged_artifact_fails_its_step_with_what_to_delete(store, log):
    fabricate(store, toy_plan(log))
    states = coordinate(store, toy_plan(log), no_executor)
    (states["source"].output.path / "value.txt").unlink()
    again = coordinate(store, toy_plan(log), no_executor)
    assert statuses(again) == {"source": "failed", "double": "blocked", "aside": "cached", "total": "blocked"}
    assert "delete" in again["source"].failure.message


def test_progress_of_a_running_step_reaches_the_display(store, log):
    seen = []
    run = runs.create_run(store, toy_plan(log, ("source",), source__trouble="slow"), "local", "r1")

    def on_change(states) -> None:
        if states[0].progress.get("done", 0) > 2 and not seen:
            seen.append(dict(states[0].progress))
            assert summarise(store, run).status == "running"
            run.cancel_file.touch()

    coordinate(store, run, local, on_change)
    assert seen[0]["total"] > seen[0]["done"]
    record = next((run.directory.path / "work").glob("*/source/*/progress.json"))
    assert read_json(record)["total"] == seen[0]["total"]


def test_run_that_is_asked_to_stop_while_its_executor_starts_begins_nothing(store, log):
    run = runs.create_run(store, toy_plan(log), "local", "r1")

    def make() -> Executor:
        assert not coordinator.is_at_work
        coordinator.request_stop()
        return local()

    coordinator = Coordinator(store, run, toy_plan(log), make, lambda states: None)
    states = {state.step.name: state for state in coordinator.run()}
    assert set(statuses(states).values()) == {"stopped"}
    assert coordinator.status == "stopped"
    assert executions(log) == {}
    assert not [event for event in run.events() if event["kind"] == "step_started"]
    again = coordinate(store, run, local)
    assert set(statuses(again).values()) == {"committed"}
