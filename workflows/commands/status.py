"""``dlm status``: where a run stands, once or until it ends."""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from cluster.jobs import ClusterError, Jobs
from pipeline.errors import UserError
from workflows import runs
from workflows.causes import ended_words, failure_words
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    OptionalRun,
    StoreOption,
    console,
    find_store,
    page_width,
    print_json,
    print_line,
    say,
    store_option,
)
from workflows.display import age, columns
from workflows.live.history import tell
from workflows.progress import duration
from workflows.store import RunPlace, Store
from workflows.submit import cluster_of, jobs_of, last_submission, told_of_unknown
from workflows.summary import UNFINISHED, Event, RunSummary, StepSummary, summarise, summary_json

_WATCH_EVERY_S = 0.5
_ASK_EVERY_S = 5.0
_PROGRESS_EVERY_S = 15.0
"""Into a pipe, how often the progress of a step gives a line; everything else does at once."""
_MADE = ("committed", "cached")
_WHEN = "%Y-%m-%d %H:%M:%S"


def status(
    run_id: OptionalRun = "",
    store: StoreOption = DEFAULT_STORE,
    why: Annotated[bool, typer.Option("--why", help="What befell the run and each step, attempt by attempt.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until the run ends, with its exit code; into a pipe, only changes.")
    ] = False,
    address: Annotated[
        str,
        typer.Option("--address", help="Dashboard of its cluster: ask there about a job that has not begun."),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Show where a run stands: its steps, what failed and why, where logs and artifacts are."""
    place = find_store(store)
    run = runs.require_run_id(place, run_id)
    known: dict[str, Event] = {}
    ask = _asking(place, run, address) if address else None

    def look() -> RunSummary:
        summary = summarise(place, run, known)
        if ask is None or summary.status != "submitted":
            return summary
        ask()
        return summarise(place, run, known)

    if watch:
        every_s = max(_WATCH_EVERY_S, place.root.storage.poll_s)
        if as_json:
            summary = _until_the_end(look, _print_json_changes(), every_s)
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                summary = _until_the_end(look, _redraw(live), every_s)
        else:
            summary = _until_the_end(look, _print_changes(), every_s)
    else:
        summary = look()
        if as_json:
            print_json(summary_json(summary))
        else:
            for line in run_lines(summary, page_width()):
                print_line(line)
    if not as_json:
        _print_reasons(place, run, summary, list(known.values()) if why else [])
    if watch:
        raise typer.Exit(summary.exit_code or 0)


def _asking(store: Store, run: RunPlace, address: str) -> Callable[[], None]:
    """Asks a cluster, now and then, about the job that was handed over last: how it ended is then in the store.

    One that has answered once may be silent for a while.
    """
    if last_submission(run) is None:
        raise UserError(f"run {run.run_id} was not handed over to a cluster; leave --address out")
    connect = functools.cache(lambda: Jobs(address))
    next_s, has_answered, is_silent = 0.0, False, False

    def ask() -> None:
        nonlocal next_s, has_answered, is_silent
        if time.monotonic() < next_s:
            return
        next_s = time.monotonic() + _ASK_EVERY_S
        job = last_submission(run)
        assert job is not None
        jobs = connect()
        try:
            known = {found.job_id for found in jobs_of(store, run, jobs)}
        except ClusterError as error:
            if not has_answered:
                raise
            if not is_silent:
                say(f"{error}; it is asked again every {_ASK_EVERY_S:g} s")
            is_silent = True
            return
        has_answered, is_silent = True, False
        if job.job_id not in known:
            raise UserError(
                f"{told_of_unknown(run, job, jobs.url)}. To hand the run over again: dlm resume {run.run_id} --address "
                f"{address}{store_option(store)}"
            )

    return ask


def status_words(summary: RunSummary) -> str:
    """The status of a run, and what has to be known with it."""
    if summary.is_stale:
        assert summary.heartbeat_age_s is not None
        return f"{summary.status} (lease stale {age(summary.heartbeat_age_s)})"
    return f"{summary.status} ({summary.detail})" if summary.detail else summary.status


def run_lines(summary: RunSummary, width: int | None) -> list[Text]:
    """A line about the run, and one for each step."""
    head = Text(f"run {summary.run_id}  ")
    head.append(status_words(summary), style="bold")
    head.append(f"  {summary.attempts} attempt{'' if summary.attempts == 1 else 's'}")
    if summary.heartbeat_age_s is not None and not summary.is_stale:
        head.append(f"  last heard of {age(summary.heartbeat_age_s)} ago")
    rows = [(step.step, step.status, _time(step), step.detail) for step in summary.steps]
    return [head, *columns(("step", "status", "time", ""), rows, width)]


def _time(step: StepSummary) -> str:
    return "" if step.elapsed_s is None else duration(step.elapsed_s)


def _until_the_end(look: Callable[[], RunSummary], show: Callable[[RunSummary], Any], every_s: float) -> RunSummary:
    while True:
        summary = look()
        show(summary)
        if summary.exit_code is not None:
            return summary
        time.sleep(every_s)


def _redraw(live: Live) -> Callable[[RunSummary], None]:
    return lambda summary: live.update(Group(*run_lines(summary, console.width)), refresh=True)


def _print_changes() -> Callable[[RunSummary], None]:
    """Prints a line for the run when its status changes, and for a step when it does or has come further."""
    shown: dict[str, tuple[str, str]] = {}
    next_s: dict[str, float] = {}

    def print_changes(summary: RunSummary) -> None:
        words = status_words(summary).partition(" ")[0] if summary.is_stale else status_words(summary)
        if shown.get("") != (words, ""):
            shown[""] = (words, "")
            print_line(f"run {summary.run_id}  {status_words(summary)}")
        for step in summary.steps:
            now = (step.status, step.detail.partition("\n")[0])
            before = shown.get(step.step, ("pending", ""))
            is_progress = step.status == "running" and before[0] == "running"
            if now == before or (is_progress and time.monotonic() < next_s[step.step]):
                continue
            shown[step.step], next_s[step.step] = now, time.monotonic() + _PROGRESS_EVERY_S
            print_line(f"{step.step:<13} {step.status:<11} {_time(step):<8} {now[1]}".rstrip())

    return print_changes


def _print_json_changes() -> Callable[[RunSummary], None]:
    """Prints the summary as one line of JSON whenever anything but the age of the heartbeat has changed."""
    shown: list[dict[str, Any]] = []

    def print_changes(summary: RunSummary) -> None:
        value = summary_json(summary)
        without_age = {**value, "heartbeat_age_s": None}
        if shown[-1:] != [without_age]:
            shown[:] = [without_age]
            print(json.dumps(value), flush=True)

    return print_changes


def _print_reasons(store: Store, run: RunPlace, summary: RunSummary, events: Sequence[Event]) -> None:
    """What failed and where to look; with events, what befell the run and each step."""
    history = tell(events, summary.status == "running", time.time())
    if events:
        print_line("\nattempts of the run")
    for session in history.sessions:
        print_line(_line_of(session.attempt, session.start_s, ended_words(session.outcome)))
    for step in summary.steps:
        if step.error is not None:
            error = step.error
            on_rank = "" if error.rank is None else f" on rank {error.rank}"
            print_line(f"\n{step.step} failed{on_rank}: {error.error_class} ({error.type}): {error.message}")
            for log in error.logs:
                print_line(f"  log: {log}")
        elif events or step.status in ("damaged", "unknown"):
            print_line(f"\n{step.step} {step.status}" + (f": {step.detail}" if step.detail else ""))
        told = [
            (event["attempt"], _line_of(event["attempt"], event["time"], _told(event)))
            for event in _without_repeats(event for event in events if event["step"] == step.step)
        ]
        ends = {
            session.attempt: ended_words(session.outcome) for session in history.sessions if session.outcome == "killed"
        }
        for span in history.spans_of(step.step):
            if span.outcome == "killed":  # which left no event
                told.append((span.attempt, _line_of(span.attempt, None, ends.get(span.attempt, span.outcome))))
        for _, line in sorted(told, key=lambda one: one[0]):
            print_line(line)
    made = [step for step in summary.steps if step.status in _MADE]
    if made:
        width = max(len(step.step) for step in made)
        print_line("\nartifacts:")
        for step in made:
            print_line(f"  {step.step:<{width}}  {step.artifact}")
    if summary.is_stale or summary.status in UNFINISHED:
        there = cluster_of(run)
        where = f" --address {there}" if there else ""
        print_line(f"\ngo on with: dlm resume {run.run_id}{where}{store_option(store)}")


def _without_repeats(events: Iterable[Event]) -> Iterator[Event]:
    """Shards get their places one by one, and are queued again in between for the same reason."""
    before: dict[str, Any] = {}
    for event in events:
        now = {key: value for key, value in event.items() if key != "time"}
        if event["kind"] != "step_queued" or now != before:
            yield event
        before = now


def _line_of(attempt: int, at_s: float | None, words: str) -> str:
    when = "" if at_s is None else f"{datetime.fromtimestamp(at_s):{_WHEN}}"
    return f"  attempt {attempt}  {when:<{len('2026-01-31 23:59:59')}}  {words}"


def _told(event: Event) -> str:
    """What an event says, in a line."""
    what = event["kind"].removeprefix("step_").replace("_", " ")
    if "shard" in event:
        what += f" of {event['shard']}"
    if "failure" in event:
        failure = event["failure"]
        words = failure_words(failure["type"], failure["message"])
        what += f" after {failure['error_class']} ({failure['type']}, rank {failure['rank']}): {words}"
    elif reason := event.get("reason") or event.get("message"):
        what += f": {reason}"
    return what.replace("failed after", "failed:").replace("\n", " ")
