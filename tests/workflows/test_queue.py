"""Calls that wait for a place to run: how long, what is said of it, and what ends the wait."""

import dataclasses
import time
from pathlib import Path

import pytest

from cluster.executor import Call, Shortage
from cluster.local import LocalExecutor
from tests.support.executors import Inline
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import copies_plan, toy_plan
from workflows import calls, runs
from workflows.cancel import CancelFile
from workflows.coordinator import Coordinator
from workflows.driver import Options
from workflows.lease import acquire_lease
from workflows.plan import Plan, gang_sizes, step_config
from workflows.state import StepState
from workflows.step import load_stage
from workflows.store import Store
from workflows.summary import summarise


class Short(Inline):
    """Never runs calls of some names, and says why; may be told to."""

    def __init__(self, name: str, is_beyond: bool, may_grow: bool = True, grows_after_s: float = 1e9) -> None:
        super().__init__()
        self._name, self._is_beyond, self._may_grow = name, is_beyond, may_grow
        self._grows_at_s = time.monotonic() + grows_after_s
        self._held: list[Call] = []

    @property
    def may_grow(self) -> bool:
        return self._may_grow

    def start(self, call: Call) -> None:
        if call.key.startswith(self._name) and time.monotonic() < self._grows_at_s:
            self._held.append(call)
        else:
            super().start(call)

    def wait(self, timeout_s: float):
        if self._held and time.monotonic() >= self._grows_at_s:
            super().start(self._held.pop())
        if not self._calls:
            time.sleep(0.01)
        return super().wait(timeout_s)

    def shortage(self, call: Call) -> Shortage | None:
        return Shortage("wants 8 GPUs; the cluster has 4", self._is_beyond) if call in self._held else None

    def cancel(self, *keys: str) -> None:
        self._held = [call for call in self._held if call.key not in keys]
        super().cancel(*keys)


@pytest.fixture(autouse=True)
def shown_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_SHOWN_AFTER_S", 0.0)


def run_with(store: Store, plan: Plan, executor: Inline, options: Options):
    run = runs.create_run(store, plan, "local", "r1")
    states = Coordinator(store, run, plan, lambda: executor, lambda states: None, options).run()
    return run, {state.step.name: state for state in states}


def test_what_a_place_that_cannot_grow_does_not_have_is_not_waited_for(store: Store, log: Path):
    plan = toy_plan(log, ("source", "aside"))
    start_s = time.monotonic()
    _, states = run_with(store, plan, Short("source", True, may_grow=False), Options(queue_timeout_s=60.0))
    assert time.monotonic() - start_s < 10.0
    assert (states["source"].status, states["aside"].status) == ("failed", "committed")
    assert states["source"].failure.error_class == "unschedulable"
    assert states["source"].failure.message.startswith("wants 8 GPUs; the cluster has 4")


@pytest.mark.parametrize("is_beyond", [True, False])
def test_wait_ends_after_its_time_with_what_is_wanted_and_what_there_is(store: Store, log: Path, is_beyond: bool):
    plan = toy_plan(log, ("source",))
    start_s = time.monotonic()
    run, states = run_with(store, plan, Short("source", is_beyond), Options(queue_timeout_s=0.6))
    assert 0.6 <= time.monotonic() - start_s < 10.0
    assert states["source"].failure.error_class == "unschedulable"
    assert "step_queued" in [event["kind"] for event in run.events()]
    assert summarise(store, run).status == "failed"


def test_request_to_stop_is_heard_while_a_step_is_queued(store: Store, log: Path):
    plan = toy_plan(log, ("source",))
    run = runs.create_run(store, plan, "local", "r1")

    def stop(states) -> None:
        if states[0].status == "queued":
            CancelFile(run.cancel_file).request()

    start_s = time.monotonic()
    driven = Coordinator(store, run, plan, lambda: Short("source", False), stop, Options(queue_timeout_s=60.0))
    (source,) = driven.run()
    assert time.monotonic() - start_s < 10.0
    assert (source.status, driven.status) == ("stopped", "stopped")


def test_room_that_comes_in_time_is_taken(store: Store, log: Path):
    plan = toy_plan(log, ("source",))
    _, states = run_with(store, plan, Short("source", True, grows_after_s=0.8), Options(queue_timeout_s=30.0))
    assert states["source"].status == "committed"
    assert executions(log) == {"source": 1}


def test_gang_that_wants_too_much_is_told_what_to_set(store: Store, log: Path):
    plan = toy_plan(log)
    _, states = run_with(store, plan, Short("total", True, may_grow=False), Options())
    assert states["total"].failure.message.endswith("Set total.workers=N")


def test_shards_that_wait_for_each_other_are_not_short_of_anything(store: Store, log: Path):
    plan = copies_plan(log, "abcdef")
    options = Options(queue_timeout_s=0.2)
    run = runs.create_run(store, plan, "local", "r1")
    states = Coordinator(store, run, plan, lambda: LocalExecutor(1), lambda states: None, options).run()
    assert [state.status for state in states] == ["committed", "committed"]


def test_first_failure_stops_the_others_where_that_is_wanted(store: Store, log: Path):
    plan = toy_plan(log, aside__trouble="user", source__trouble="slow")
    _, states = run_with_local(store, plan, Options(is_fail_fast=True))
    assert states["aside"].status == "failed"
    assert states["source"].status == "stopped"
    _, states = run_with_local(store, plan, Options(is_fail_fast=True), "r2")
    assert {state.status for state in states.values()} == {"committed"}, "the troubles were there once"


def run_with_local(store: Store, plan: Plan, options: Options, run_id: str = "r1"):
    run = runs.create_run(store, plan, "local", run_id)
    states = Coordinator(store, run, plan, lambda: LocalExecutor(4), lambda states: None, options).run()
    return run, {state.step.name: state for state in states}


def test_numbers_of_ranks_are_those_that_the_configuration_holds_with():
    plan = runs.plan_recipe("quickstart", [])
    stage = load_stage("pipeline.pretrain")
    config = step_config(plan.step("pretrain"))

    def sizes(**changes: int) -> tuple[int, ...]:
        return gang_sizes(stage, dataclasses.replace(config, **changes))

    assert sizes(global_batch_seqs=8, workers=8, min_workers=0) == (8,)
    assert sizes(global_batch_seqs=8, workers=8, min_workers=1) == (1, 2, 4, 8)
    assert sizes(global_batch_seqs=12, workers=6, min_workers=2) == (2, 3, 4, 6)
    assert sizes(global_batch_seqs=12, workers=6, min_workers=2, micro_batch_seqs=2) == (2, 3, 6)


@pytest.mark.parametrize("required", [False, True])
def test_training_that_requires_gpus_waits_for_them_from_its_first_start_on(store: Store, required: bool):
    plan = runs.plan_recipe("quickstart", [("pretrain.requires_gpus", required)])
    site = calls.Site(store, "id", runs.create_run(store, plan, "ray", "r1"), 1)
    state = StepState(plan.step("pretrain"))
    place = site.place(state)
    state.lease = acquire_lease(place.lease_dir, "r1")
    flight = site.flight(state, "whole", place.new_attempt(state.lease))
    assert flight.call.wants_gpus is required
