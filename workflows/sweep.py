"""Sweeps: a recipe at every point of a grid of settings, one run a point, which share what they have in common.

``sweeps/<sweep>.json`` says what varies, and is created once; its runs are ``<sweep>-1``, ``<sweep>-2`` and so on.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifact import json_bytes, read_json
from pipeline.config import diff, from_json, parse_json, parse_value, to_json
from pipeline.errors import UserError
from workflows import runs
from workflows.cost import cost_json, cost_of, total_of
from workflows.plan import Plan
from workflows.store import RunPlace, Store
from workflows.summary import summarise


@dataclass(frozen=True)
class Sweep:
    """What was asked for; the content of the record."""

    recipe: str
    executor: str
    grid: list[list[Any]]
    """[path, values] of every setting that varies."""
    settings: list[str]
    """What all runs have, as it was typed."""
    runs: list[str]
    """In the order of the grid, the last setting fastest."""

    def points(self) -> list[dict[str, Any]]:
        """The settings that vary, for each run."""
        paths, values = [path for path, _ in self.grid], [values for _, values in self.grid]
        return [dict(zip(paths, point, strict=True)) for point in itertools.product(*values)]


@dataclass(frozen=True)
class Row:
    """A run of a sweep, with what came out."""

    run_id: str
    settings: dict[str, Any]
    status: str
    figures: dict[str, float]
    """Of its evaluations and trainings, those that are there, and what it used; shared stages are on the bill of the
    run that made them."""


def parse_grid(items: Sequence[str]) -> list[list[Any]]:
    """What --grid was given, as paths and lists of values; UserError for what leaves nothing to compare."""
    grid: list[list[Any]] = []
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(
                f"--grid {item!r} is not of the form PATH=VALUE,VALUE, as in pretrain.optimizer.lr=1e-3,3e-3"
            )
        if path in (known for known, _ in grid):
            raise UserError(f"--grid {path} is given twice; give all its values in one list")
        values = _values(path, text)
        twice = [value for number, value in enumerate(values) if value in values[:number]]
        if twice:
            raise UserError(f"--grid {path} has the value {json.dumps(twice[0])} twice; leave one out")
        grid.append([path, values])
    if not grid:
        raise UserError("a sweep varies something: give --grid PATH=VALUE,VALUE; for one run use dlm run")
    return grid


def _values(path: str, text: str) -> list[Any]:
    """Values between commas; those within brackets, braces and quotes separate none."""
    try:
        values: list[Any] = parse_json(f"[{text}]")
    except json.JSONDecodeError:
        try:
            values = [parse_value(part) for part in text.split(",")]
        except UserError as error:
            raise UserError(f"--grid {path}: {error}") from None
    if not values or "" in values:
        raise UserError(f'--grid {path}={text} has an empty value; write values between commas, an empty text as ""')
    return values


def plan_sweep(recipe: str, grid: list[list[Any]], settings: list[tuple[str, Any]]) -> list[Plan]:
    """The plan of every point.  UserError if a point is not valid, or if two would make the same."""
    common = {path for path, _ in settings}
    if both := [path for path, _ in grid if path in common]:
        raise UserError(f"{both[0]} is given with --set and with --grid; leave one out")
    points = Sweep(recipe, "", grid, [], []).points()
    plans = [runs.plan_recipe(recipe, [*settings, *point.items()]) for point in points]
    seen: dict[tuple[str, ...], int] = {}
    for number, plan in enumerate(plans):
        made = tuple(step.fingerprint for step in plan.steps)
        if made in seen:
            one, other = json.dumps(points[seen[made]]), json.dumps(points[number])
            raise UserError(
                f"{one} and {other} would make the same: what differs is how it runs, or nothing. Vary a setting that "
                "decides what comes out"
            )
        seen[made] = number
    return plans


def create_sweep(
    store: Store,
    sweep_id: str,
    recipe: str,
    executor: runs.ExecutorName,
    grid: list[list[Any]],
    settings: Sequence[str],
    plans: Sequence[Plan],
    command: Sequence[str] = (),
) -> list[RunPlace]:
    """The runs of a sweep, created or, where the same sweep is there already, found."""
    names = [f"{sweep_id}-{number}" for number in range(1, len(plans) + 1)]
    for name, plan in zip(names, plans, strict=True):
        store.run_place(name)
        runs.require_ready(plan)
    sweep = Sweep(recipe, executor, grid, list(settings), names)
    record = store.root / "sweeps" / f"{sweep_id}.json"
    if not record.create(json_bytes(sweep)) and (found := diff(read_json(record), to_json(sweep))):
        lines = [f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in found.items()]
        raise UserError(
            f"there is a sweep {sweep_id!r} already, and it is another one:\n" + "\n".join(lines) + "\n"
            "Give the command that it was started with to go on with it, or another --sweep-id"
        )
    made: list[RunPlace] = []
    for name, plan, point in zip(names, plans, sweep.points(), strict=True):
        own = [*settings, *(f"{path}={_typed(value)}" for path, value in point.items())]
        made.append(runs.create_run(store, plan, executor, name, own, command))
    return made


def _typed(value: Any) -> str:
    """A value as it is given with --set: a text needs quotes only where it would be taken for something else."""
    is_text = isinstance(value, str) and parse_value(value) == value
    return value if is_text else json.dumps(value)


def open_sweep(store: Store, sweep_id: str) -> Sweep:
    """A sweep by its id; UserError naming those that are there otherwise."""
    store.run_place(sweep_id)
    try:
        return from_json(Sweep, read_json(store.root / "sweeps" / f"{sweep_id}.json"))
    except FileNotFoundError:
        known = [name.removesuffix(".json") for name in (store.root / "sweeps").names()]
        hint = f"there are: {', '.join(known)}" if known else "there are none in this store"
        raise UserError(f"there is no sweep {sweep_id!r} in {store.url}; {hint}") from None


def results(store: Store, sweep: Sweep) -> list[Row]:
    """One row a run."""
    rows: list[Row] = []
    known = {run.run_id for run in store.runs()}
    for name, point in zip(sweep.runs, sweep.points(), strict=True):
        if name not in known:
            rows.append(Row(name, point, "not there", {}))
            continue
        run = store.run(name)
        rows.append(Row(name, point, summarise(store, run).status, _figures(store, run) | _costs(run)))
    return rows


_EVALUATED = ("bpb_bound", "bpb_bound_mc_se", "bpb", "nelbo", "nelbo_mc_se", "nll")
_TRAINED = ("final_loss", "tokens_per_s")


def _figures(store: Store, run: RunPlace) -> dict[str, float]:
    """By the name of their step where there are several of a kind."""
    found: dict[str, float] = {}
    outputs = runs.committed_outputs(store, run)
    packages = {step.name: step.stage for step in runs.frozen_plan(run).steps}
    for name, output in outputs.items():
        is_one = list(packages.values()).count(packages[name]) == 1
        values: dict[str, Any] = {}
        if packages[name] == "pipeline.evaluate":
            values = {key: read_json(output / "results.json").get(key) for key in _EVALUATED}
        elif packages[name] == "pipeline.pretrain":
            values = {key: read_json(output / "manifest.json")["stats"].get(key) for key in _TRAINED}
        found |= {key if is_one else f"{name}.{key}": value for key, value in values.items() if value is not None}
    return found


def _costs(run: RunPlace) -> dict[str, float]:
    total = cost_json(total_of(cost_of(run)))
    return {name: total[name] for name in ("cpu_hours", "gpu_hours") if total[name]}
