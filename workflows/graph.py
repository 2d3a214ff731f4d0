"""Order and validity of a workflow's graph, and which of its steps are wanted at all."""

from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush

from pipeline.errors import NotGivenError, UserError
from workflows.step import Step, Workflow, load_stage


def ordered_steps(workflow: Workflow) -> list[Step]:
    """Steps with every input before its user, otherwise in the order they were written.

    Raises UserError for a duplicate name, an input that no step makes or that the stage does not take, a
    configuration of the wrong type, and a cycle.
    """
    by_name = {step.name: step for step in workflow.steps}
    if len(by_name) < len(workflow.steps):
        names = [step.name for step in workflow.steps]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"workflow {workflow.name}: two steps have the same name, {twice}")
    for step in workflow.steps:
        _check_step(workflow, step, by_name)
    sorter = TopologicalSorter({step.name: list(step.inputs.values()) for step in workflow.steps})
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(f"workflow {workflow.name} has a cycle: {' -> '.join(error.args[1])}") from None
    place = {step.name: number for number, step in enumerate(workflow.steps)}
    ordered: list[Step] = []
    ready: list[tuple[int, str]] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heappush(ready, (place[name], name))
        _, first = heappop(ready)
        ordered.append(by_name[first])
        sorter.done(first)
    return ordered


def wanted_steps(workflow: Workflow) -> tuple[Step, ...]:
    """The steps without those that are left out; UserError as ``ordered_steps``."""
    without = left_out(workflow)
    return tuple(
        replace(step, inputs={name: source for name, source in step.inputs.items() if source not in without})
        for step in workflow.steps
        if step.name not in without
    )


def left_out(workflow: Workflow) -> dict[str, str]:
    """Optional steps that their user has not asked for, and what would come of these: step -> what was not given.

    Raises UserError as ``ordered_steps``.
    """
    found: dict[str, str] = {}
    for step in ordered_steps(workflow):
        if step.optional:
            reasons = [*(found.get(source, "") for source in step.inputs.values()), _not_given(step)]
            if reason := next(filter(None, reasons), ""):
                found[step.name] = reason
    return found


def _not_given(step: Step) -> str:
    """What the user of a step has not given, in the words of its stage."""
    ready = load_stage(step.stage).ready
    try:
        if ready is not None:
            ready(step.config, step.name)
    except NotGivenError as error:
        return str(error)
    except UserError:
        pass  # what was given is wrong: the step stays, and require_ready says it before a run
    return ""


def _check_step(workflow: Workflow, step: Step, by_name: dict[str, Step]) -> None:
    stage = load_stage(step.stage)
    where = f"workflow {workflow.name}, step {step.name}"
    if not stage.takes(step.inputs):
        optional = f" and, if wanted, {list(stage.optional_inputs)}" if stage.optional_inputs else ""
        raise UserError(
            f"{where}: stage {stage.name} takes inputs {list(stage.inputs)}{optional}, found {list(step.inputs)}"
        )
    for source in step.inputs.values():
        if source not in by_name:
            raise UserError(f"{where}: there is no step {source!r}; the steps are {', '.join(by_name)}")
    if type(step.config) is not stage.config:
        raise UserError(f"{where}: the configuration is a {type(step.config).__name__}, not {stage.config.__name__}")
