"""What a run has used: time of processors and of GPUs, of every attempt, those that were killed too.

It is the sum of what the processes wrote down while they worked (workflows/usage.py).  What was taken over from another
run costs nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.artifact import read_json
from pipeline.config import from_json
from workflows.runs import frozen_plan
from workflows.store import RunPlace
from workflows.turns import Turn, find_turns
from workflows.usage import Usage

_HOUR_S = 3600.0


@dataclass(frozen=True)
class Cost:
    """What the processes of a step used in an attempt of the run, added up."""

    step: str
    attempt: int
    """0 for a sum over attempts."""
    processes: int
    cpu_s: float
    wall_s: float
    """Time that they were there."""
    gpu_s: float
    """Time that they were there times the GPUs that they had."""


def cost_of(run: RunPlace) -> list[Cost]:
    """A row for every step and attempt in which it was worked on; zeros for a step that never was."""
    names = [step.name for step in frozen_plan(run).steps]
    used: dict[tuple[str, int], list[Cost]] = {}
    for turn in find_turns(run, names):
        used.setdefault((turn.step, turn.attempt), []).append(cost_of_turn(turn, usages_of(turn)))
    rows: list[Cost] = []
    for name in names:
        own = [total_of(costs, *key) for key, costs in sorted(used.items()) if key[0] == name]
        rows += own or [total_of((), name)]
    return rows


def usages_of(turn: Turn) -> list[Usage]:
    """What the processes of a turn have written down so far."""
    return [from_json(Usage, read_json(turn.folder / f"usage-{rank}.json")) for rank in turn.ranks("usage")]


def cost_of_turn(turn: Turn, usages: Sequence[Usage]) -> Cost:
    """They added up."""
    return Cost(
        turn.step,
        turn.attempt,
        len(usages),
        sum(usage.cpu_s for usage in usages),
        sum(usage.elapsed_s for usage in usages),
        sum(usage.gpus * usage.elapsed_s for usage in usages),
    )


def total_of(costs: Iterable[Cost], step: str = "total", attempt: int = 0) -> Cost:
    """All of them together."""
    rows = list(costs)
    return Cost(
        step,
        attempt,
        sum(row.processes for row in rows),
        sum(row.cpu_s for row in rows),
        sum(row.wall_s for row in rows),
        sum(row.gpu_s for row in rows),
    )


def cost_json(cost: Cost) -> dict[str, Any]:
    """A row for programs, in hours too."""
    return {**asdict(cost), "cpu_hours": cost.cpu_s / _HOUR_S, "gpu_hours": cost.gpu_s / _HOUR_S}
