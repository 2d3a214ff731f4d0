"""What the commands do with runs: create, go on.  No terminal here."""

import dataclasses
import datetime
import importlib.util
import os
import re
import secrets
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cluster.executor import Executor
from pipeline.config import apply_settings, from_json, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import environment
from pipeline.storage import Place
from workflows.plan import Plan, check_drift, make_plan, step_config
from workflows.recipes import load_recipe
from workflows.step import Step, Workflow, load_stage
from workflows.store import RunPlace, Store

ExecutorName = Literal["ray", "local"]
DEFAULT_EXECUTOR: ExecutorName = "ray"
_MAX_NAME_CHARS = 80


class DriftError(RuntimeError):
    """A frozen plan no longer describes what would be done."""


class DoesNotFitError(RuntimeError):
    """A worker would need more memory than its GPU has."""


def configured(recipe: str, settings: list[tuple[str, Any]]) -> Workflow:
    """A recipe with settings applied; UserError for any that do not fit."""
    workflow = load_recipe(recipe)
    configs = apply_settings({step.name: step.config for step in workflow.steps}, settings)
    steps = tuple(Step(s.name, s.stage, configs[s.name], s.inputs) for s in workflow.steps)
    return Workflow(workflow.name, workflow.summary, steps)


def plan_recipe(recipe: str, settings: list[tuple[str, Any]]) -> Plan:
    """The plan of a recipe with settings."""
    return dataclasses.replace(make_plan(configured(recipe, settings), environment()), recipe=recipe)


def new_run_id(workflow: str) -> str:
    """A readable id that sorts by time, whatever the characters of a workflow's name."""
    workflow = re.sub(r"[^A-Za-z0-9._-]+", "-", workflow).lstrip("._-")[:_MAX_NAME_CHARS] or "run"
    now = datetime.datetime.now(tz=datetime.UTC)
    return f"{workflow}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def frozen_plan(run: RunPlace) -> Plan:
    """The plan that a run was created with; CorruptionError if what lies there is none."""
    try:
        return from_json(Plan, run.plan()["plan"])
    except (CorruptionError, UserError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{run.directory / 'run.json'} holds no plan that this program reads: {error}. Use the version of dlm that "
            f"made it; if it was damaged, start a new run (what is finished is taken over) and delete {run.directory}"
        ) from None


def frozen_executor(run: RunPlace) -> ExecutorName:
    """The executor that a run was created for."""
    return run.plan()["executor"]


def create_run(
    store: Store, plan: Plan, executor: ExecutorName, run_id: str = "", settings: Sequence[str] = ()
) -> RunPlace:
    """Freeze a plan as a new run; ``settings`` are those given for it, as they were typed.

    UserError if a step wants something that the recipe leaves to its user, and was not given it.
    """
    for step in plan.steps:
        ready = load_stage(step.stage).ready
        if ready is not None:
            ready(step_config(step), step.name)
    value = {"plan": to_json(plan), "executor": executor, "settings": list(settings)}
    return store.create_run(run_id or new_run_id(plan.workflow), value)


def refuse_other_plan(run: RunPlace, plan: Plan) -> None:
    """UserError if a run of that id exists and would make something else."""
    frozen = frozen_plan(run)
    old = {step.name: step.fingerprint for step in frozen.steps}
    new = {step.name: step.fingerprint for step in plan.steps}
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        raise UserError(
            f"there is a run {run.run_id!r} already, with other settings for {', '.join(changed)}; give another "
            f"--run-id, or go on with it as it is: dlm resume {run.run_id}"
        )


def command_of(run: RunPlace) -> str:
    """The command that a run was started with, for a new one like it; without the option for the store."""
    frozen = run.plan()
    plan = frozen_plan(run)
    words = ["dlm", "run", plan.recipe or plan.workflow]
    if frozen["executor"] != DEFAULT_EXECUTOR:
        words += ["--executor", frozen["executor"]]
    for setting in frozen.get("settings", ()):
        words += ["--set", setting]
    return shlex.join(words)


def refuse_drift(plan: Plan, again: str) -> None:
    """DriftError naming every field of a frozen plan that would come out otherwise now, and how to run ``again``."""
    drifted = check_drift(plan)
    if drifted:
        lines = [
            f"  {step}: {field} was {old!r}, is now {new!r}"
            for step, fields in drifted.items()
            for field, (old, new) in fields.items()
        ]
        raise DriftError(
            "the run was planned for other data or code than there is now:\n" + "\n".join(lines) + "\n"
            "Bring them back to resume it, or start a new run, which makes again only what changes: " + again
        )


def executor_factory(name: ExecutorName, plan: Plan, address: str = "") -> Callable[[], Executor]:
    """How to start the executor, once a stage has to run; with an address, on the cluster that is there."""

    def make() -> Executor:
        if name == "local":
            from cluster.local import LocalExecutor  # noqa: PLC0415

            return LocalExecutor()
        from cluster.ray_executor import RayExecutor  # noqa: PLC0415

        return RayExecutor(num_cpus=_wanted_cpus(plan), address=address)

    if name == "ray":
        _check_ray(address)
    elif address:
        raise UserError(f"--executor local runs on this machine alone; leave --address {address} out")
    return make


def _check_ray(address: str) -> None:
    """UserError if the executor on Ray would not do what the environment asks for."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("Ray is not installed: pip install 'dlm[cluster]', or run with --executor local")
    if not address and os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']!r}, but this command starts a Ray of its own. Use dlm submit "
            "to run on that cluster, dlm resume --address auto within it, or unset RAY_ADDRESS"
        )


def _wanted_cpus(plan: Plan) -> int:
    """Logical cores of an embedded Ray: those of the machine, or more if a gang has more ranks."""
    wanted = [os.cpu_count() or 1]
    for step in plan.steps:
        stage = load_stage(step.stage)
        ranks = step_config(step).workers if stage.kind == "gang" else 1
        wanted.append(int(-(-ranks * stage.cpus // 1)))
    return max(wanted)


def committed_outputs(store: Store, run: RunPlace) -> dict[str, Place]:
    """Step -> its committed artifact, for the steps that have one."""
    found: dict[str, Place] = {}
    for step in frozen_plan(run).steps:
        committed = store.artifact(load_stage(step.stage).name, step.fingerprint).committed()
        if committed is not None:
            found[step.name] = committed
    return found


def require_run_id(store: Store, run_id: str) -> RunPlace:
    """The named run, or the newest for an empty name."""
    if run_id:
        return store.run(run_id)
    runs = store.runs()
    if not runs:
        raise UserError(f"there is no run in {store.root}; start one with: dlm run quickstart")
    return runs[0]
