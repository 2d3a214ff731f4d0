"""Commands that look at runs, from what the store knows; no process is asked."""

from datetime import datetime

from rich.table import Table

from workflows import runs
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    OptionalRun,
    StoreOption,
    console,
    find_store,
    print_json,
)
from workflows.copies import local_copy, scratch
from workflows.display import duration


def status(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show where a run stands."""
    place = find_store(store)
    summary = runs.summarise(place, runs.require_run_id(place, run_id))
    if as_json:
        print_json(summary)
        return
    attempts = f"{summary.attempts} attempt{'s' if summary.attempts != 1 else ''}"
    console.print(f"run {summary.run_id}  [bold]{summary.status}[/bold]  {attempts}", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", "status", "time", "detail", "artifact"):
        table.add_column(column, overflow="fold")
    for step in summary.steps:
        elapsed = duration(step.elapsed_s) if step.elapsed_s is not None else ""
        table.add_row(step.step, step.status, elapsed, step.detail, step.artifact)
    console.print(table)


def list_runs(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the runs of a store, newest first."""
    place = find_store(store)
    summaries = [runs.summarise(place, run) for run in place.runs()]
    if as_json:
        print_json(summaries)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", min_width=max((len(s.run_id) for s in summaries), default=0))
    for column in ("workflow", "status", "attempts", "started"):
        table.add_column(column)
    for s in summaries:
        started = f"{datetime.fromtimestamp(s.started_at):%Y-%m-%d %H:%M}" if s.started_at else ""
        table.add_row(s.run_id, s.workflow, s.status, str(s.attempts), started)
    console.print(table)


def report(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE) -> None:
    """Print the path of a run's report; an unfinished run gets one of what there is."""
    place = find_store(store)
    run = runs.require_run_id(place, run_id)
    outputs = runs.committed_outputs(place, run)
    if "report" in outputs:
        print(local_copy(outputs["report"]) / "report.html")
        return
    from workflows.report.run import render_partial

    path = (run.directory.path if run.directory.is_local else scratch(run.directory)) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = runs.report_sources(run)
    there = {name: local_copy(outputs[source]) for name, source in sources.items() if source in outputs}
    render_partial(f"{run.run_id} (unfinished)", there, path, wanted=sources)
    print(path)
