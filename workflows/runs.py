"""What the commands do with runs: create, go on.  No terminal here."""

import dataclasses
import datetime
import importlib.util
import os
import re
import secrets
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from cluster.executor import Executor
from pipeline.config import apply_settings, diff, merge_settings, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import PERMISSION, environment, has_permission
from pipeline.storage import Place
from workflows import snapshot
from workflows.amendments import describe_drift, effective_plan, newest_code
from workflows.graph import left_out, wanted_steps
from workflows.plan import DriftError, Plan, PlannedStep, check_drift, make_plan, step_config
from workflows.recipes import load_recipe
from workflows.step import Step, Workflow, load_stage
from workflows.store import RunExistsError, RunPlace, Store

ExecutorName = Literal["ray", "local"]
DEFAULT_EXECUTOR: ExecutorName = "ray"
_MAX_NAME_CHARS = 80


class DoesNotFitError(RuntimeError):
    """A worker would need more memory than its GPU has."""


def configured(recipe: str, settings: list[tuple[str, Any]]) -> Workflow:
    """A recipe with settings applied, without steps that nobody asked for; UserError for settings that do not fit."""
    workflow = load_recipe(recipe)
    configs = apply_settings({step.name: step.config for step in workflow.steps}, settings)
    steps = tuple(dataclasses.replace(step, config=configs[step.name]) for step in workflow.steps)
    configured = Workflow(workflow.name, workflow.summary, steps)
    _refuse_idle(workflow, configured)
    return dataclasses.replace(configured, steps=wanted_steps(configured))


def _refuse_idle(recipe: Workflow, configured: Workflow) -> None:
    """UserError for a setting of a step that is left out, with it or without: it would change nothing.

    One that by itself leaves its step out is meant to.
    """
    own, given = ({step.name: step for step in one.steps} for one in (recipe, configured))
    for name in left_out(configured):
        reason = left_out(_with_configs(configured, {name: own[name].config})).get(name)
        for path, (_, value) in diff(*(to_json(one[name].config) for one in (own, given))).items():
            alone = apply_settings({name: own[name].config}, [(f"{name}.{path}", value)])
            if reason or name not in left_out(_with_configs(configured, alone)):
                why = reason or left_out(configured)[name]
                raise UserError(f"{name}.{path} is {value!r}, but the step {name} is left out: {why}")


def _with_configs(workflow: Workflow, configs: Mapping[str, Any]) -> Workflow:
    steps = (dataclasses.replace(step, config=configs.get(step.name, step.config)) for step in workflow.steps)
    return dataclasses.replace(workflow, steps=tuple(steps))


def merged_values(recipe: str, settings: list[tuple[str, Any]]) -> dict[str, Any]:
    """Step -> its configuration as JSON with settings applied, whether they fit each other or not."""
    return merge_settings({step.name: step.config for step in load_recipe(recipe).steps}, settings)


def plan_recipe(recipe: str, settings: list[tuple[str, Any]]) -> Plan:
    """The plan of a recipe with settings."""
    return dataclasses.replace(make_plan(configured(recipe, settings), environment()), recipe=recipe)


def new_run_id(workflow: str) -> str:
    """A readable id that sorts by time, whatever the characters of a workflow's name."""
    workflow = re.sub(r"[^A-Za-z0-9._-]+", "-", workflow).lstrip("._-")[:_MAX_NAME_CHARS] or "run"
    now = datetime.datetime.now(tz=datetime.UTC)
    return f"{workflow}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def frozen_plan(run: RunPlace) -> Plan:
    """The plan that holds for a run: the one that it was created with, or that of its newest amendment.

    CorruptionError if what lies there is none.
    """
    try:
        return effective_plan(run)
    except (CorruptionError, UserError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{run.directory / 'run.json'} holds no plan that this program reads: {error}. Use the version of dlm that "
            f"made it; if it was damaged, start a new run (what is finished is taken over) and delete {run.directory}"
        ) from None


def frozen_executor(run: RunPlace) -> ExecutorName:
    """The executor that a run was created for."""
    return run.plan()["executor"]


def create_run(
    store: Store,
    plan: Plan,
    executor: ExecutorName,
    run_id: str | None = None,
    settings: Sequence[str] = (),
    command: Sequence[str] = (),
) -> RunPlace:
    """Freeze a plan as a run; ``settings`` and ``command`` are those given for it, as they were typed.

    A name is made up for it where none is given.  The run that is there already if it has this id and this plan:
    whoever submits twice means one run.  UserError naming what differs if it has another plan, and as
    ``require_ready``; DriftError if data or code have changed.
    """
    require_ready(plan)
    run_id = new_run_id(plan.workflow) if run_id is None else run_id
    store.run_place(run_id)
    value = {
        "plan": to_json(plan),
        "executor": executor,
        "settings": list(settings),
        **snapshot.origin(store, plan, command),
    }
    try:
        return store.create_run(run_id, value)
    except RunExistsError:
        return _same_run(store.run(run_id), plan, executor)


def require_ready(plan: Plan) -> None:
    """UserError if a step wants something that the recipe leaves to its user, and was not given it, or has a secret."""
    for step in plan.steps:
        ready = load_stage(step.stage).ready
        if ready is not None:
            ready(step_config(step), step.name)
    snapshot.refuse_secrets(plan)


def _same_run(run: RunPlace, plan: Plan, executor: ExecutorName) -> RunPlace:
    """A run that exists, if it is the one that was asked for."""
    frozen = frozen_plan(run)
    found = diff(_asked(frozen, frozen_executor(run)), _asked(plan, executor))
    if found:
        lines = [f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in found.items()]
        is_same = [step.fingerprint for step in frozen.steps] == [step.fingerprint for step in plan.steps]
        how = "works with other settings of how it runs" if is_same else "is another one"
        raise UserError(
            f"there is a run {run.run_id!r} already, and it {how}:\n" + "\n".join(lines) + "\n"
            f"Go on with it as it is: dlm resume {run.run_id} (--set changes how it runs). For a run of its own leave "
            "--run-id out, or give another"
        )
    if drifted := check_drift(frozen, plan):
        raise DriftError(describe_drift(drifted) + f"\nSee: dlm resume {run.run_id}")
    return run


def _asked(plan: Plan, executor: ExecutorName) -> dict[str, Any]:
    steps = {s.name: {"stage": s.stage, "config": s.config, "inputs": s.inputs} for s in plan.steps}
    return {"executor": executor, **steps}


def command_of(run: RunPlace, settings: Sequence[str] = ()) -> str:
    """The command that a run was started with, for a new one like it; without the option for the store.

    ``settings``, as they were typed, take the place of those of the same path.
    """
    frozen = run.plan()
    plan = frozen_plan(run)
    words = ["dlm", "run", plan.recipe or plan.workflow]
    if frozen["executor"] != DEFAULT_EXECUTOR:
        words += ["--executor", frozen["executor"]]
    given = {setting.partition("=")[0] for setting in settings}
    kept = [setting for setting in frozen.get("settings", ()) if setting.partition("=")[0] not in given]
    for setting in [*kept, *settings]:
        words += ["--set", setting]
    return shlex.join(words)


def permission(steps: Iterable[Step | PlannedStep]) -> list[str]:
    """What --allow-unsandboxed sets, as it would be typed; UserError where no step runs programs."""
    settings = [f"{step.name}.{PERMISSION}=true" for step in steps if has_permission(load_stage(step.stage).config)]
    if not settings:
        raise UserError("--allow-unsandboxed: no step runs programs that a model wrote; leave it out")
    return settings


def advice(plan: Plan) -> list[str]:
    """What the user of a plan probably does not mean, though it can be done."""
    found: list[str] = []
    for step in plan.steps:
        stage = load_stage(step.stage)
        if stage.advice is not None:
            found += [f"{step.name}.{line}" for line in stage.advice(step_config(step))]
    return found


def crowding(plan: Plan) -> list[str]:
    """Gangs that have more workers than this machine has cores for."""
    cores, found = os.cpu_count() or 1, list[str]()
    for step in plan.steps:
        stage = load_stage(step.stage)
        if stage.kind == "gang" and (workers := step_config(step).workers) * stage.cpus > cores:
            found.append(
                f"{step.name}.workers is {workers}, and this machine has {cores} core{'s' * (cores > 1)}: they "
                f"take turns, which is slower than --set {step.name}.workers={max(1, int(cores / stage.cpus))}"
            )
    return found


def code_change(run: RunPlace) -> str:
    """That the code differs from the snapshot of a run while its plan still holds; empty if it does not."""
    code = newest_code(run)
    if not code:
        return ""
    try:
        if snapshot.code_digest(tuple(code["packages"])) == code["sha256"]:
            return ""
    except UserError as error:
        return f"the code of run {run.run_id} cannot be compared with that of now: {error}"
    return (
        f"the code has changed since run {run.run_id} was submitted (its snapshot: code/{code['sha256'][:12]}….zip), "
        "and no stage raised its code_version: what is still to be made is made by the code of now"
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
