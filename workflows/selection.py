"""What part of a plan is worked on: the steps that depend on some, the steps that some need."""

import difflib
from collections.abc import Iterable, Sequence

from pipeline.errors import UserError
from workflows.plan import Plan, PlannedStep, artifact_of
from workflows.step import Step
from workflows.store import Store


def dependents(steps: Iterable[Step | PlannedStep], of: Iterable[str]) -> frozenset[str]:
    """Names of these steps and of all that depend on them."""
    found = set(of)
    for step in steps:  # each stands after those that it needs
        if found & set(step.inputs.values()):
            found.add(step.name)
    return frozenset(found)


def needed(steps: Iterable[Step | PlannedStep], by: Iterable[str]) -> frozenset[str]:
    """Names of these steps and of all that they depend on."""
    found = set(by)
    for step in reversed(list(steps)):
        if step.name in found:
            found |= set(step.inputs.values())
    return frozenset(found)


def require_steps(plan: Plan, option: str, names: Iterable[str]) -> None:
    """UserError for the first name that is no step of the plan."""
    steps = [step.name for step in plan.steps]
    for name in names:
        if name not in steps:
            close = difflib.get_close_matches(name, steps, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{option} {name}: there is no such step; {hint}the steps are: {', '.join(steps)}")


def selection(
    plan: Plan, store: Store, from_: Sequence[str] = (), until: Sequence[str] = (), only: Sequence[str] = ()
) -> frozenset[str] | None:
    """The steps that --from, --until and --only leave, for ``Options.selected``; None without any of them.

    UserError if nothing is left, or if a step that is left out and was not committed is needed.
    """
    for option, names in (("--from", from_), ("--until", until), ("--only", only)):
        require_steps(plan, option, names)
    if not (from_ or until or only):
        return None
    if only and (from_ or until):
        raise UserError("--only names all steps that are worked on; leave --from and --until out, or --only")
    selected = frozenset(only) or frozenset(step.name for step in plan.steps)
    if from_:
        selected &= dependents(plan.steps, from_)
    if until:
        selected &= needed(plan.steps, until)
    if not selected:
        raise UserError(
            f"nothing is left to do: {', '.join(until)} does not come after {', '.join(from_)}; "
            "change --from or --until"
        )
    before = needed(plan.steps, selected) - selected
    missing = [s.name for s in plan.steps if s.name in before and artifact_of(s, store).committed() is None]
    if missing:
        option = "--only" if only else "--from"
        raise UserError(
            f"{option} {', '.join(only or from_)} needs what is not there yet: {', '.join(missing)}. Name these steps "
            "too, or leave the option out"
        )
    return selected


def selection_words(from_: Sequence[str], until: Sequence[str], only: Sequence[str]) -> list[str]:
    """The options as words of a command."""
    given = (("--from", from_), ("--until", until), ("--only", only))
    return [word for option, names in given for name in names for word in (option, name)]
