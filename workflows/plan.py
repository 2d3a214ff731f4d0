"""Plans: a workflow resolved to fingerprints, and why each of its steps would run.

A plan is frozen when a run is created.  Workers never plan; a resume only checks that the plan still describes
what it would do.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.artifact import load_manifest
from pipeline.config import diff, from_json, identity, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import Stage, external_identity, stage_fingerprint
from workflows.graph import ordered_steps
from workflows.step import Step, Workflow, load_stage
from workflows.store import ArtifactPlace, Store


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


def _why(plan: Plan, step: PlannedStep, stage: Stage, store: Store, to_run: set[str]) -> str:
    """The smallest difference from an artifact that exists."""
    place = store.artifact(stage.name, step.fingerprint)
    if _has_state(place):
        return "started before and not finished"
    wanted = _recorded(step, plan)
    nearest: dict[str, tuple[Any, Any]] | None = None
    for other in store.artifacts(stage.name):
        recorded = _committed_record(other, stage)
        if recorded is not None:
            found = diff(recorded, wanted)
            if nearest is None or len(found) < len(nearest):
                nearest = found
    if nearest is None:
        return "never run"
    own = {key: change for key, change in nearest.items() if not key.startswith("inputs.")}
    if own:
        changes = [f"{key.removeprefix('config.')} {old!r} -> {new!r}" for key, (old, new) in own.items()]
        return "changed: " + ", ".join(changes)
    rebuilt = [f"{name} ({source})" for name, source in step.inputs.items() if source in to_run]
    if rebuilt:
        return "input will be rebuilt: " + ", ".join(rebuilt)
    changed = [key.removeprefix("inputs.") for key in nearest]
    return "input changed: " + ", ".join(changed) if changed else "outside data changed"


def _has_state(place: ArtifactPlace) -> bool:
    return any(place.state.glob("step-*")) or any((place.directory / "shards").glob("*.json"))


def _recorded(step: PlannedStep, plan: Plan) -> dict[str, Any]:
    return {
        "config": identity(step_config(step)),
        "code_version": step.code_version,
        "inputs": {name: plan.step(source).fingerprint for name, source in step.inputs.items()},
    }


def _committed_record(place: ArtifactPlace, stage: Stage) -> dict[str, Any] | None:
    try:
        directory = place.committed()
        if directory is None:
            return None
        manifest = load_manifest(directory)
        config = identity(from_json(stage.config, manifest.config))
    except (CorruptionError, UserError):
        return None  # unreadable, or of an older shape of the configuration: nothing to compare with
    return {"config": config, "code_version": manifest.code_version, "inputs": manifest.inputs}


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
