"""A workflow with a task, a map, a gang and an independent branch, and what tests do with it.

``python -m tests.support.toy_workflow`` is the command line with this workflow as the recipe "toy".
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cluster.executor import Executor
from pipeline.artifact import MANIFEST, Manifest, open_artifact, record_files, write_json
from pipeline.config import apply_settings
from pipeline.stage import environment
from tests.support.toy_stages.letters.config import LettersConfig
from tests.support.toy_stages.relay.config import RelayConfig
from tests.support.toy_stages.trouble import ToyConfig
from workflows import cli
from workflows.amendments import Wishes, amend, prepare
from workflows.coordinator import Coordinator
from workflows.lease import acquire_lease
from workflows.plan import Plan, make_plan
from workflows.recipes import RECIPES
from workflows.runs import create_run
from workflows.state import StepState
from workflows.step import Step, Workflow, load_stage
from workflows.store import RunPlace, Store

STAGES = "tests.support.toy_stages"
PIECES = {"source", "aside", "double-list", "double-0", "double-1", "double-2", "double-finish", "total-0", "total-1"}
ONCE = dict.fromkeys(PIECES, 1)
"""What is executed when all goes well, and how often."""


def toy_workflow(log: Path | str = "", only: tuple[str, ...] = (), **settings: Any) -> Workflow:
    """source -> double (3 shards) -> total (2 ranks) <- aside, or only some of it.  Settings: step__field=value."""
    if log:
        Path(log).mkdir(parents=True, exist_ok=True)
    config = ToyConfig(log=str(log))
    steps = (
        Step("source", f"{STAGES}.source", config),
        Step("double", f"{STAGES}.double", config, {"value": "source"}),
        Step("aside", f"{STAGES}.source", ToyConfig(number=7, log=str(log))),
        Step("total", f"{STAGES}.total", config, {"value": "double", "aside": "aside"}),
    )
    steps = tuple(step for step in steps if not only or step.name in only)
    changes = [(name.replace("__", "."), value) for name, value in settings.items()]
    configs = apply_settings({step.name: step.config for step in steps}, changes)
    return Workflow("toy", "small", tuple(Step(s.name, s.stage, configs[s.name], s.inputs) for s in steps))


def toy_plan(log: Path | str = "", only: tuple[str, ...] = (), **settings: Any) -> Plan:
    """The plan of the workflow with settings."""
    return make_plan(toy_workflow(log, only, **settings), environment())


def copies_plan(log: Path | str, text: str = "abc", **settings: Any) -> Plan:
    """letters -> copies, a map with a shard for each letter of the text.  Settings are those of the map."""
    steps = (
        Step("letters", f"{STAGES}.letters", LettersConfig(text=text)),
        Step("copies", f"{STAGES}.copies", ToyConfig(log=str(log), **settings), {"letters": "letters"}),
    )
    return make_plan(Workflow("copies", "letters twice", steps), environment())


def coordinate(
    store: Store,
    run: RunPlace | Plan,
    executor: Callable[[], Executor],
    on_change: Callable[[list[StepState]], None] = lambda states: None,
) -> dict[str, StepState]:
    """Create a run of a plan, or go on with a run, to the end; its steps by name."""
    if isinstance(run, Plan):
        run = create_run(store, run, "local")
    coordinator = Coordinator(store, run, cli.runs.frozen_plan(run), executor, on_change)
    return {state.step.name: state for state in coordinator.run()}


def amended(store: Store, run: RunPlace, wishes: Wishes, command: tuple[str, ...] = ()) -> Plan:
    """The plan of a run after what a resume wished for."""
    settings = [f"{path}={value}" for path, value in wishes.settings]
    amendment = prepare(store, run, wishes, cli.runs.command_of(run, settings))
    amend(store, run, amendment, command)
    return amendment.plan


def fabricate(store: Store, plan: Plan, *only: str, started_at: float = 0.0) -> None:
    """Commit an artifact for each step of a plan (or the named ones), without running anything."""
    for step in plan.steps:
        if only and step.name not in only:
            continue
        stage = load_stage(step.stage)
        place = store.artifact(stage.name, step.fingerprint)
        lease = acquire_lease(place.lease_dir, "test")
        attempt = place.new_attempt(lease)
        attempt.path.mkdir(parents=True)
        (attempt.path / "value.txt").write_text("1")
        inputs = {name: plan.step(source).fingerprint for name, source in step.inputs.items()}
        files, stats = record_files(attempt.path), {"value": 1}
        made = (stage.name, step.fingerprint, step.code_version, step.config, inputs, files, stats)
        manifest = Manifest(*made, started_at=started_at, external=step.external)
        write_json(attempt.path / MANIFEST, manifest)
        place.commit(attempt, lease, "test")
        lease.release()


def value_of(state: StepState) -> int:
    """The number that a step committed, its artifact verified."""
    assert state.output is not None
    return open_artifact(state.output.path).stats["value"]


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> None:
    """Poll until a condition holds; AssertionError naming it after the time-out."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain until {what}"
        time.sleep(0.02)


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def relay_workflow() -> Workflow:
    """A gang that goes on where it was, with as many ranks as there are."""
    return Workflow("relay", "counting", (Step("relay", f"{STAGES}.relay", RelayConfig()),))


if __name__ == "__main__":
    RECIPES["toy"] = toy_workflow
    RECIPES["relay"] = relay_workflow
    cli.main()
