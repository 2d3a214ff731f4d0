"""Sweeps: a recipe at every point of a grid, and what came out in one table."""

import json
from typing import Annotated

import typer
from rich.table import Table

from cluster.jobs import Jobs
from pipeline.errors import UserError
from workflows import runs
from workflows.commands import running
from workflows.commands.common import (
    DEFAULT_STORE,
    ExecutorOption,
    JsonOption,
    SetOption,
    StoreOption,
    console,
    executor_name,
    find_store,
    find_writable_store,
    parse_settings,
    print_json,
    print_table,
    say,
    store_option,
    typed_command,
)
from workflows.driver import Options
from workflows.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED
from workflows.store import Store
from workflows.summary import summarise
from workflows.sweep import Row, create_sweep, open_sweep, parse_grid, plan_sweep, results

_ERROR_SUFFIX = "_mc_se"


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="Recipe; none with --show.")] = "",
    grid: Annotated[
        list[str], typer.Option("--grid", metavar="PATH=V1,V2", help="A setting and its values; one run a combination.")
    ] = [],  # noqa: B006 - typer reads it, nobody changes it
    settings: SetOption = [],  # noqa: B006 - as above
    store: StoreOption = DEFAULT_STORE,
    executor: ExecutorOption = runs.DEFAULT_EXECUTOR,
    sweep_id: Annotated[
        str | None,
        typer.Option("--sweep-id", help="Name of the sweep; given again with the same command, goes on with it."),
    ] = None,
    show: Annotated[
        str, typer.Option("--show", metavar="SWEEP", help="Print the table of a sweep, and run nothing.")
    ] = "",
    address: Annotated[
        str, typer.Option("--address", help="http://HOST:8265: hand the runs over to that cluster instead.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Run a recipe at every point of a grid, one run after another; what runs have in common is made once."""
    if show:
        if recipe or grid or settings or sweep_id is not None or address:
            raise UserError(
                "--show prints a sweep that is there; leave the recipe, --grid, --set, --sweep-id and --address out"
            )
        _print_results(find_store(store), show, as_json)
        return
    if as_json:
        raise UserError("--json prints the table of a sweep that is there: give it with --show")
    if not recipe:
        raise UserError("name a recipe (dlm recipes lists them), or a sweep that is there with --show")
    values = parse_grid(grid)
    name = executor_name(executor)
    if address and name != "ray":
        raise UserError(f"--executor {name} runs on this machine alone; leave --address {address} out")
    plans = plan_sweep(recipe, values, parse_settings(settings))
    place = find_writable_store(store)
    jobs = Jobs(address) if address else None
    if sweep_id is None:
        sweep_id = runs.new_run_id(f"{plans[0].workflow}-sweep")
    else:
        place.run_place(sweep_id)  # names of sweeps are as those of runs
    made = create_sweep(place, sweep_id, recipe, name, values, settings, plans, typed_command())
    if jobs is not None:
        from workflows.commands.submitting import hand_over

        for run in made:
            hand_over(place, run, jobs, "", [], [])
        say(f"see all: dlm sweep --show {sweep_id}{store_option(place)}")
        return
    status = ""
    for run in made:
        if summarise(place, run).status == "succeeded":
            continue
        states, status = running.drive(place, run, runs.frozen_plan(run), name, Options())
        for state in states:
            if state.status == "failed":
                say(f"run {run.run_id}, {state.step.name} failed: {state.reason}")
        if status in ("stopped", "cancelled"):
            break
    _print_results(place, sweep_id, as_json)
    if status in ("stopped", "cancelled"):
        say(f"{status}; go on with the same command and --sweep-id {sweep_id}")
        raise typer.Exit(EXIT_INTERRUPTED)
    failed = [row.run_id for row in results(place, open_sweep(place, sweep_id)) if row.status != "succeeded"]
    if failed:
        say(f"not finished: {', '.join(failed)}; see dlm status {failed[0]}{store_option(place)}")
        raise typer.Exit(EXIT_FAILED)


def _print_results(store: Store, sweep_id: str, as_json: bool) -> None:
    rows = results(store, open_sweep(store, sweep_id))
    if as_json:
        print_json({"sweep": sweep_id, "runs": rows})
        return
    console.print(f"sweep {sweep_id}", highlight=False)
    paths = list(rows[0].settings)
    figures = list(dict.fromkeys(name for row in rows for name in row.figures if not name.endswith(_ERROR_SUFFIX)))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", *paths, "status"):
        table.add_column(column, overflow="fold")
    for column in figures:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        varied = [json.dumps(row.settings[path]) for path in paths]
        table.add_row(row.run_id, *varied, row.status, *(_shown(row, name) for name in figures))
    print_table(table)


def _shown(row: Row, name: str) -> str:
    if name not in row.figures:
        return ""
    value, error = row.figures[name], row.figures.get(f"{name}{_ERROR_SUFFIX}")
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
    return digits if error is None else f"{digits} ± {error:.4f}"
