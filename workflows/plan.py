"""Plans: a workflow resolved to fingerprints, and why each of its steps would run.

A plan is frozen when a run is created.  Workers never plan; a resume only checks that the plan still describes
what it would do (workflows/amendments.py has what may change).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import diff, fingerprint, flatten, from_json, identity, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import Stage, external_identity, stage_identity
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
    salt: str = ""
    """Of a step that is made anew although nothing changed: part of the fingerprint only where it is set."""
    accepted: dict[str, Any] = field(default_factory=dict[str, Any])
    """Field -> the value that it has by now, where the committed artifact was accepted in spite of that."""


class DriftError(RuntimeError):
    """A frozen plan no longer describes what would be done."""


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
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, tuple[Any, Any]])
    """Field -> (in the nearest artifact, wanted), of a step that would run."""


def make_plan(workflow: Workflow, environment: Mapping[str, str]) -> Plan:
    """Resolve fingerprints in the order of the graph.

    Hashes input files; raises UserError if one is missing, or if the settings of a step do not fit those before it.
    """
    return Plan(workflow.name, resolved(ordered_steps(workflow)), dict(environment))


def resolved(
    steps: Iterable[Step], kept: Mapping[str, PlannedStep] = {}, salts: Mapping[str, str] = {}
) -> list[PlannedStep]:
    """Steps, each after those that it needs, with their fingerprints.

    Those in ``kept`` stay what they were frozen as, but for execution settings; ``salts`` are by name of step.
    """
    planned: dict[str, PlannedStep] = {}
    upstream: dict[str, dict[str, Any]] = {}
    for step in steps:
        stage = load_stage(step.stage)
        upstream[step.name] = _upstream(step, planned, upstream)
        if stage.check is not None:
            stage.check(step.config, upstream[step.name], step.name)
        if step.name in kept:
            planned[step.name] = dataclasses.replace(kept[step.name], config=to_json(step.config))
            continue
        external, salt = external_identity(stage, step.config), salts.get(step.name, "")
        fingerprints = {name: planned[source].fingerprint for name, source in step.inputs.items()}
        what = stage_identity(stage, step.config, fingerprints, external)
        planned[step.name] = PlannedStep(
            name=step.name,
            stage=step.stage,
            config=to_json(step.config),
            inputs=dict(step.inputs),
            code_version=stage.code_version,
            external=external,
            fingerprint=fingerprint(what | ({"salt": salt} if salt else {})),
            salt=salt,
        )
    return list(planned.values())


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
        nearest = find_nearest(plan, step, stage, store)
        reason = _why(step, place, nearest, to_run)
        changes = nearest.changes if nearest is not None else {}
        actions.append(Action(step.name, "run", reason, step.fingerprint, changes))
    return actions


@dataclass(frozen=True)
class Nearest:
    """The committed artifact of a stage that differs least from one that is to be made."""

    run_id: str
    """The run that made it."""
    place: ArtifactPlace
    changes: dict[str, tuple[Any, Any]]
    """Field -> (in that artifact, wanted)."""


def _why(step: PlannedStep, place: ArtifactPlace, nearest: Nearest | None, to_run: set[str]) -> str:
    """The smallest difference from an artifact that exists, in a line."""
    if _has_state(place):
        return "started before and not finished"
    if step.salt:
        return "to be made anew, as was asked for"
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
    """The artifact of the stage in the store that is most like the one that a step would make.

    Of several that are alike the newest, as what was made anew is what its run uses.
    """
    wanted = _recorded(step, plan)
    found: list[tuple[int, float, Nearest]] = []
    for place in store.artifacts(stage.name):
        if (recorded := _committed_record(place, stage)) is not None:
            made_at, record = recorded
            changes = diff(record, wanted)
            found.append((len(changes), -made_at, Nearest(place.made_by(), place, changes)))
    return min(found, key=lambda one: one[:2], default=(0, 0.0, None))[2]


def _has_state(place: ArtifactPlace) -> bool:
    return any(name.startswith("step-") for name in place.state.names()) or bool((place.directory / "shards").names())


def _recorded(step: PlannedStep, plan: Plan) -> dict[str, Any]:
    return {
        "config": identity(step_config(step)),
        "code_version": step.code_version,
        "inputs": {name: plan.step(source).fingerprint for name, source in step.inputs.items()},
        "external": step.external,
    }


def _committed_record(place: ArtifactPlace, stage: Stage) -> tuple[float, dict[str, Any]] | None:
    """When an artifact was begun, and what identifies it."""
    try:
        found = place.committed_manifest()
        if found is None:
            return None
        manifest = found[1]
        config = identity(from_json(stage.config, manifest.config))
    except (CorruptionError, UserError):
        return None  # unreadable, or of an older shape of the configuration: nothing to compare with
    return manifest.started_at, {
        "config": config,
        "code_version": manifest.code_version,
        "inputs": manifest.inputs,
        "external": manifest.external,
    }


def check_drift(plan: Plan, now: Plan | None = None) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Steps of a frozen plan that would come out otherwise now -> {field: (frozen, now)}, but for what was accepted.

    A run that is resumed must do what it set out to do: the code version of a stage or the data outside the store
    may have changed since.  ``now`` is a plan of the same settings that was just made, where there is one.
    """
    drifted: dict[str, dict[str, tuple[Any, Any]]] = {}
    for step in plan.steps:
        found = _drift(step, None if now is None else now.step(step.name))
        if left := {name: change for name, change in found.items() if not _is_accepted(step, name, change[1])}:
            drifted[step.name] = left
    return drifted


def _is_accepted(step: PlannedStep, name: str, value: Any) -> bool:
    return name in step.accepted and step.accepted[name] == value


def _drift(step: PlannedStep, now: PlannedStep | None) -> dict[str, tuple[Any, Any]]:
    stage = load_stage(step.stage)
    try:
        config = step_config(step)
    except UserError as error:
        return {"config": ("as it was planned", str(error))}
    external = external_identity(stage, config) if now is None else now.external
    wanted = {"config": to_json(config), "code_version": stage.code_version, "external": external}
    found = diff({"config": step.config, "code_version": step.code_version, "external": step.external}, wanted)
    own = flatten({"config": identity(config)})
    # A setting of how to run that came with newer code changes nothing.
    return {name: change for name, change in found.items() if not name.startswith("config.") or name in own}


def artifact_of(step: PlannedStep, store: Store) -> ArtifactPlace:
    """Where the artifact of a step lies or will lie."""
    return store.artifact(load_stage(step.stage).name, step.fingerprint)
