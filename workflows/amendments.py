"""What may change of a run that was submitted: settings of how it runs, drift that is accepted, steps made anew.

run.json is never changed.  ``runs/<run>/amendments/<n>.json`` are created one after the other, each with the whole plan
that holds from then on and with what was changed, by whom and when.
"""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.artifact import json_bytes, read_json
from pipeline.config import apply_settings, diff, from_json, identity, to_json
from pipeline.errors import UserError
from workflows import snapshot
from workflows.lease import LeaseHeldError, find_holder
from workflows.plan import DriftError, Plan, PlannedStep, artifact_of, check_drift, resolved, step_config
from workflows.recipes import load_recipe
from workflows.selection import dependents, require_steps
from workflows.step import Step
from workflows.store import RunPlace, Store

Drift = dict[str, dict[str, tuple[Any, Any]]]


@dataclass(frozen=True)
class Change:
    """What an amendment did to a step."""

    step: str
    what: Literal["set", "accepted", "rebuilt"]
    fields: dict[str, list[Any]]
    """Field -> [what was, what is]."""
    old_fingerprint: str
    fingerprint: str


@dataclass(frozen=True)
class Wishes:
    """What a resume asks to be changed."""

    settings: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    accept: tuple[str, ...] = ()
    """Steps that are reused as they are, although they would come out otherwise now."""
    rebuild: tuple[str, ...] = ()
    """Steps that are made anew, with all that depend on them."""


@dataclass(frozen=True)
class Amendment:
    """The plan that would hold, and how it differs from the one that does: in nothing, where nothing was asked for."""

    plan: Plan
    changes: list[Change]


def _newest(run: RunPlace) -> Any:
    """The newest amendment as JSON, or run.json."""
    names = run.amendments.names()
    return read_json(run.amendments / names[-1]) if names else run.plan()


def effective_plan(run: RunPlace) -> Plan:
    """The plan that holds for a run."""
    return from_json(Plan, _newest(run)["plan"])


def newest_code(run: RunPlace) -> Mapping[str, Any]:
    """Which snapshot of the code a run was submitted, or amended, with; nothing for a run of an early version."""
    return _newest(run).get("code") or {}


def all_plans(run: RunPlace) -> list[dict[str, Any]]:
    """run.json and the amendments of a run as JSON, in their order."""
    return [run.plan(), *(read_json(run.amendments / name) for name in run.amendments.names())]


def describe_drift(drifted: Drift) -> str:
    """Every field of a frozen plan that would come out otherwise now."""
    lines = [
        f"  {step}: {name} was {old!r}, is now {new!r}"
        for step, fields in drifted.items()
        for name, (old, new) in fields.items()
    ]
    return "the run was planned for other data or code than there is now:\n" + "\n".join(lines)


def refuse_outdated(drifted: Drift, again: str) -> None:
    """DriftError for a step whose configuration this code does not take; ``again`` is the command for a new run."""
    if outdated := {step: fields for step, fields in drifted.items() if "config" in fields}:
        raise DriftError(f"{describe_drift(outdated)}\nThis code cannot go on with the run; start a new one: {again}")


def prepare(store: Store, run: RunPlace, wishes: Wishes, again: str) -> Amendment:
    """What would change of a run; nothing is written.

    UserError for a wish that would change what comes out, or do nothing; DriftError for a step that would come out
    otherwise now and is neither accepted nor made anew.
    ``again`` is the command for a new run with the settings that are wished for.
    """
    plan = effective_plan(run)
    require_steps(plan, "--accept-drift", wishes.accept)
    require_steps(plan, "--rebuild", wishes.rebuild)
    anew = dependents(plan.steps, wishes.rebuild)
    drifted = check_drift(plan)
    refuse_outdated(drifted, again)
    configs = _with_settings(plan, wishes.settings, again)
    drifted = {step: fields for step, fields in drifted.items() if step not in anew}
    _refuse_accepted(store, plan, wishes.accept, anew, drifted)
    if left := {step: fields for step, fields in drifted.items() if step not in wishes.accept}:
        files = f"Which files changed: dlm explain {run.run_id}"
        raise DriftError(f"{describe_drift(left)}\n{files}\n{_advice(store, plan, left, again)}")
    _refuse_lost(store, plan, anew)

    salts = dict.fromkeys(wishes.rebuild, secrets.token_hex(4))
    kept = {step.name: _accepting(step, drifted.get(step.name, {})) for step in plan.steps if step.name not in anew}
    steps = [Step(s.name, s.stage, configs[s.name], s.inputs) for s in plan.steps]
    amended = dataclasses.replace(plan, steps=resolved(steps, kept, salts))
    return Amendment(amended, list(_changes(plan, amended, drifted, anew)))


def _with_settings(plan: Plan, settings: list[tuple[str, Any]], again: str) -> dict[str, Any]:
    """Configurations with execution settings applied."""
    old = {step.name: step_config(step) for step in plan.steps}
    _refuse_added(plan, [path for path, _ in settings if path.partition(".")[0] not in old], again)
    new = apply_settings(old, settings)
    for name, config in new.items():
        changed = diff(identity(old[name]), identity(config))
        for path, (was, wanted) in changed.items():
            raise UserError(
                f"{name}.{path} is {was!r} and cannot become {wanted!r} in this run: it decides what comes out. "
                f"Start a new run, which makes again only what changes: {again}"
            )
    return new


def _refuse_added(plan: Plan, unknown: Sequence[str], again: str) -> None:
    """UserError for a setting, among those of no step of a run, of one that its recipe has if it is asked for."""
    if not unknown:
        return
    try:
        names = {step.name for step in load_recipe(plan.recipe or plan.workflow).steps}
    except UserError:
        return  # then it is a setting that nothing is known of
    for path in unknown:
        if (name := path.partition(".")[0]) in names:
            raise UserError(
                f"{path} cannot be set in this run, which was made without the step {name}. Start a new run with it, "
                f"which makes again only what changes: {again}"
            )


def _refuse_accepted(store: Store, plan: Plan, accept: Iterable[str], anew: frozenset[str], drifted: Drift) -> None:
    for name in accept:
        if name in anew:
            raise UserError(
                f"--accept-drift {name}: --rebuild makes it anew, so there is nothing to accept; leave it out"
            )
        if name not in drifted:
            raise UserError(f"--accept-drift {name}: it would come out as it was planned; leave the option out")
        if artifact_of(plan.step(name), store).committed() is None:
            raise DriftError(
                f"{describe_drift({name: drifted[name]})}\n{name} is not committed, so there is nothing to reuse; make "
                f"it as it would come out now: --rebuild {name}"
            )


def _refuse_lost(store: Store, plan: Plan, anew: frozenset[str]) -> None:
    """DriftError for a step that was accepted as it was, and is not there any more."""
    for step in plan.steps:
        if step.accepted and step.name not in anew and artifact_of(step, store).committed() is None:
            raise DriftError(
                f"{step.name} was accepted as it was committed, and is gone: it would come out otherwise now "
                f"({', '.join(step.accepted)}). Make it and all that depends on it anew: --rebuild {step.name}"
            )


def _advice(store: Store, plan: Plan, drifted: Drift, again: str) -> str:
    there = [name for name in drifted if artifact_of(plan.step(name), store).committed() is not None]
    accept = " ".join(f"--accept-drift {name}" for name in there)
    rebuild = " ".join(f"--rebuild {name}" for name in drifted)
    reuse = f"reuse what is committed as it is with {accept}; " if there else ""
    return (
        f"Bring them back to resume the run; or {reuse}make these steps and all that depend on them anew with "
        f"{rebuild}; or start a new run, which makes again only what changes: {again}"
    )


def _accepting(step: PlannedStep, drift: Mapping[str, tuple[Any, Any]]) -> PlannedStep:
    values = to_json(step)
    values["accepted"] |= {name: now for name, (_, now) in drift.items()}
    return from_json(PlannedStep, values)


def _changes(old: Plan, new: Plan, accepted: Drift, anew: frozenset[str]) -> Iterable[Change]:
    for step in new.steps:
        was = old.step(step.name)
        found = diff(to_json(was) | {"accepted": {}}, to_json(step) | {"accepted": {}}) | accepted.get(step.name, {})
        if found:
            what = "rebuilt" if step.name in anew else "accepted" if step.name in accepted else "set"
            fields = {name: list(change) for name, change in found.items()}
            yield Change(step.name, what, fields, was.fingerprint, step.fingerprint)


def amend(store: Store, run: RunPlace, amendment: Amendment, command: Sequence[str] = ()) -> None:
    """Write down what changes of a run, if anything does.  LeaseHeldError if somebody is at work on it."""
    if not amendment.changes:
        return
    holder = find_holder(run.lease_dir)
    if holder is not None and not holder.is_free:
        raise LeaseHeldError(str(holder))
    snapshot.refuse_secrets(amendment.plan)
    number = len(run.amendments.names()) + 1
    value = {
        **to_json(amendment),
        "time": time.time(),
        **snapshot.origin(store, amendment.plan, command),
    }
    if not (run.amendments / f"{number:03d}.json").create(json_bytes(value)):
        raise LeaseHeldError(
            f"another process changes run {run.run_id} right now; look at it with: dlm status {run.run_id}"
        )
