"""Plans: a workflow resolved to fingerprints, and why each of its steps would run.

A plan is frozen when a run is created.  Workers never plan; a resume only checks that the plan still describes
what it would do.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import diff, from_json, identity, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import Stage, external_identity, stage_fingerprint
from workflows.graph import ordered_steps
from workflows.step import Step, Workflow, load_stage
from workflows.store import ArtifactPlace, Store

_SHOWN_CHANGES = 3
_OTHER_CHANGES = 8
"""An artifact that differs in more settings than these is another thing."""


@dataclass(frozen=True)
class PlannedStep:
    """A step with everything that identifies its output."""

    name: str
    stage: str
    """Package of the stage."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """Input -> step that makes it."""
    code_version: int
    external: Any
    """Identity of data from outside the store, such as the SHA-256 of the input files."""
    fingerprint: str


@dataclass(frozen=True)
class Plan:
    """A workflow ready to run; the content of run.json."""

    workflow: str
    steps: list[PlannedStep]
    environment: dict[str, str]
    recipe: str = ""
    """What was typed for it, a name or ``module:function``; empty where no recipe made it."""

    def step(self, name: str) -> PlannedStep:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)


@dataclass(frozen=True)
class Action:
    """What would happen to a step, and why."""

    step: str
    action: Literal["cached", "run"]
    reason: str
    fingerprint: str


def make_plan(workflow: Workflow, environment: Mapping[str, str]) -> Plan:
    """Resolve fingerprints in the order of the graph.

    Hashes input files; raises UserError if one is missing, or if the settings of a step do not fit those before it.
    """
    planned: dict[str, PlannedStep] = {}
    upstream: dict[str, dict[str, Any]] = {}
    for step in ordered_steps(workflow):
        stage = load_stage(step.stage)
        upstream[step.name] = _upstream(step, planned, upstream)
        if stage.check is not None:
            stage.check(step.config, upstream[step.name], step.name)
        external = external_identity(stage, step.config)
        fingerprints = {name: planned[source].fingerprint for name, source in step.inputs.items()}
        planned[step.name] = PlannedStep(
            name=step.name,
            stage=step.stage,
            config=to_json(step.config),
            inputs=dict(step.inputs),
            code_version=stage.code_version,
            external=external,
            fingerprint=stage_fingerprint(stage, step.config, fingerprints, external),
        )
    return Plan(workflow.name, list(planned.values()), dict(environment))


def _upstream(
    step: Step, planned: Mapping[str, PlannedStep], upstream: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Configurations of the steps that a step depends on, by path of inputs."""
    found: dict[str, Any] = {}
    for name, source in step.inputs.items():
        found[name] = planned[source].config
        found |= {f"{name}.{path}": config for path, config in upstream[source].items()}
    return found


def step_config(step: PlannedStep) -> Any:
    """The configuration of a planned step as its dataclass."""
    kind: type[Any] = load_stage(step.stage).config
    return from_json(kind, step.config, where=step.name)


def gang_sizes(stage: Stage, config: Any) -> tuple[int, ...]:
    """Numbers of ranks that a gang may have, ascending; none for a stage of another kind.

    All from ``min_workers`` to ``workers`` with which the configuration holds: the global batch divides among them.
    """
    if stage.kind != "gang":
        return ()
    fewest = getattr(config, "min_workers", 0) or config.workers
    return tuple(size for size in range(fewest, config.workers + 1) if _holds(config, size))


def with_workers(config: Any, workers: int) -> Any:
    """The configuration of a gang for another number of ranks; ValueError if it does not hold with so many."""
    elastic = {"min_workers": 0} if hasattr(config, "min_workers") else {}
    return dataclasses.replace(config, workers=workers, **elastic)


def _holds(config: Any, workers: int) -> bool:
    try:
        with_workers(config, workers)
    except ValueError:
        return False
    return True


def explain(plan: Plan, store: Store) -> list[Action]:
    """For every step: cached, or run and the reason."""
    actions: list[Action] = []
    to_run: set[str] = set()
    for step in plan.steps:
        stage = load_stage(step.stage)
        place = store.artifact(stage.name, step.fingerprint)
        if place.committed() is not None:
            actions.append(Action(step.name, "cached", f"at {place.directory.name}", step.fingerprint))
            continue
        to_run.add(step.name)
        reason = _why(plan, step, stage, store, to_run)
        actions.append(Action(step.name, "run", reason, step.fingerprint))
    return actions


@dataclass(frozen=True)
class Nearest:
    """The committed artifact of a stage that differs least from one that is to be made."""

    run_id: str
    """The run that made it."""
    place: ArtifactPlace
    changes: dict[str, tuple[Any, Any]]
    """Field -> (in that artifact, wanted)."""


def _why(plan: Plan, step: PlannedStep, stage: Stage, store: Store, to_run: set[str]) -> str:
    """The smallest difference from an artifact that exists, in a line."""
    if _has_state(store.artifact(stage.name, step.fingerprint)):
        return "started before and not finished"
    nearest = find_nearest(plan, step, stage, store)
    if nearest is None:
        return "never run"
    data = [key.removeprefix("external").removeprefix(".") for key in nearest.changes if key.startswith("external")]
    own = {key: change for key, change in nearest.changes.items() if not key.startswith(("inputs.", "external"))}
    if len(own) > _OTHER_CHANGES:
        return f"never run like this; the nearest, of run {nearest.run_id}, differs in {len(own)} settings"
    if own:
        changes = [f"{key.removeprefix('config.')} {old!r} -> {new!r}" for key, (old, new) in own.items()]
        return f"changed since run {nearest.run_id}: {_shortened(changes)}"
    if data:
        names = [name for name in data if name]
        shown = f": {_shortened(names)}" if names else ""
        return f"outside data changed since run {nearest.run_id}{shown}"
    rebuilt = [f"{name} ({source})" for name, source in step.inputs.items() if source in to_run]
    if rebuilt:
        return "input will be rebuilt: " + ", ".join(rebuilt)
    changed = [key.removeprefix("inputs.") for key in nearest.changes]
    return "input changed: " + ", ".join(changed) if changed else "outside data changed"


def _shortened(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN_CHANGES} more" if len(items) > _SHOWN_CHANGES else ""
    return ", ".join(items[:_SHOWN_CHANGES]) + more


def find_nearest(plan: Plan, step: PlannedStep, stage: Stage, store: Store) -> Nearest | None:
    """The artifact of the stage in the store that is most like the one that a step would make."""
    wanted = _recorded(step, plan)
    nearest: Nearest | None = None
    for place in store.artifacts(stage.name):
        recorded = _committed_record(place, stage)
        if recorded is not None:
            changes = diff(recorded, wanted)
            if nearest is None or len(changes) < len(nearest.changes):
                nearest = Nearest(place.made_by(), place, changes)
    return nearest


def _has_state(place: ArtifactPlace) -> bool:
    return any(name.startswith("step-") for name in place.state.names()) or bool((place.directory / "shards").names())


def _recorded(step: PlannedStep, plan: Plan) -> dict[str, Any]:
    return {
        "config": identity(step_config(step)),
        "code_version": step.code_version,
        "inputs": {name: plan.step(source).fingerprint for name, source in step.inputs.items()},
        "external": step.external,
    }


def _committed_record(place: ArtifactPlace, stage: Stage) -> dict[str, Any] | None:
    try:
        found = place.committed_manifest()
        if found is None:
            return None
        manifest = found[1]
        config = identity(from_json(stage.config, manifest.config))
    except (CorruptionError, UserError):
        return None  # unreadable, or of an older shape of the configuration: nothing to compare with
    return {
        "config": config,
        "code_version": manifest.code_version,
        "inputs": manifest.inputs,
        "external": manifest.external,
    }


def check_drift(plan: Plan) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Steps of a frozen plan that would come out otherwise now -> {field: (frozen, now)}.

    A run that is resumed must do what it set out to do: the code version of a stage or the data outside the store
    may have changed since.
    """
    drifted: dict[str, dict[str, tuple[Any, Any]]] = {}
    for step in plan.steps:
        stage = load_stage(step.stage)
        config = step_config(step)
        now = dataclasses.replace(
            step,
            config=to_json(config),
            code_version=stage.code_version,
            external=external_identity(stage, config),
        )
        if found := diff(to_json(step), to_json(now)):
            drifted[step.name] = found
    return drifted
