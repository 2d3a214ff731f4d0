"""Commands that look at runs, from what the store knows; no process is asked."""

from datetime import datetime
from typing import Annotated

import typer

from workflows import runs
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    OptionalRun,
    StoreOption,
    find_existing_store,
    find_store,
    page_width,
    print_json,
    print_line,
    say,
)
from workflows.display import age, columns
from workflows.summary import RunSummary, summarise_or_say_why, summary_json

_SHOWN_RUNS = 20


def list_runs(
    store: StoreOption = DEFAULT_STORE,
    limit: Annotated[int, typer.Option(min=1, help="How many runs are shown, the newest first.")] = _SHOWN_RUNS,
    as_json: JsonOption = False,
) -> None:
    """List the runs of a store, newest first."""
    place = find_existing_store(store)
    found = place.runs()
    summaries = [summarise_or_say_why(place, run) for run in found[:limit]]
    if len(found) > limit:
        say(f"{len(found) - limit} older ones are not shown; to see all: dlm list --limit {len(found)}")
    if as_json:
        print_json([summary_json(summary) for summary in summaries])
        return
    rows = [(s.run_id, s.status, str(s.attempts), _when(s.started_at), s.workflow, _note(s)) for s in summaries]
    for line in columns(("run", "status", "attempts", "started", "workflow", ""), rows, page_width()):
        print_line(line)
    for summary in summaries:
        if summary.status == "damaged":
            print_line(f"\n{summary.run_id} is damaged: {summary.detail}")


def _when(started_at: float | None) -> str:
    return f"{datetime.fromtimestamp(started_at):%Y-%m-%d %H:%M}" if started_at else ""


def _note(summary: RunSummary) -> str:
    """What has to be known with the status."""
    if summary.is_stale and summary.heartbeat_age_s is not None:
        return f"lease stale {age(summary.heartbeat_age_s)}"
    return "" if summary.status == "damaged" else summary.detail.partition("; ")[0]


def report(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE) -> None:
    """Print the path of the page of a run, brought up to date; while the run goes on its page is live."""
    place = find_store(store)
    run = runs.require_run_id(place, run_id)
    from workflows.live.writer import write_report

    print(write_report(place, run))
