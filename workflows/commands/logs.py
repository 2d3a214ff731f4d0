"""``dlm logs``: what the processes of a run wrote."""

import codecs
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from cluster.auth import redacted, secret_values
from pipeline.artifact import read_json
from pipeline.errors import UserError
from pipeline.storage import Place
from workflows import runs
from workflows.commands.common import (
    DEFAULT_STORE,
    OptionalRun,
    StoreOption,
    find_store,
    found_or_suggested,
    page_width,
    print_line,
    say,
)
from workflows.commands.completing import complete_steps
from workflows.commands.status import status_words
from workflows.display import columns
from workflows.lease import lease_is_free
from workflows.store import RunPlace, Store
from workflows.summary import RunSummary, StepSummary, summarise
from workflows.turns import Turn, find_turns
from workflows.worker import first_failure

_MOST_LISTED = 30
_FOLLOW_EVERY_S = 0.25
_BLOCK_BYTES = 64 * 1024
_MIN_SECRET_CHARS = 8
_TOLD_AFTER_S = 2.0
"""How long nothing comes before it is said what is waited for."""
_OVER = ("committed", "cached", "failed", "blocked", "skipped", "damaged")
"""Of a step, while the run goes on; one that was stopped waits for the rest of its run to stop."""


@dataclass(frozen=True)
class Log:
    """What one rank of a turn wrote."""

    turn: Turn
    rank: int

    @property
    def place(self) -> Place:
        """The file."""
        return self.turn.log(self.rank)

    @property
    def told(self) -> str:
        """How it ended; nothing if it did not say."""
        if self.rank in self.turn.ranks("failure"):
            failure = read_json(self.turn.folder / f"failure-{self.rank}.json")
            return "stopped" if failure["error_class"] == "stopped" else "failed"
        return "done" if self.turn.is_done else ""


def logs(
    run_id: OptionalRun = "",
    store: StoreOption = DEFAULT_STORE,
    step: Annotated[
        str, typer.Option("--step", help="A step, or a part of it such as STEP-SHARD.", autocompletion=complete_steps)
    ] = "",
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="A rank of a gang.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="An attempt of the run.")] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on with it, and with what the step writes next, until the run ends."),
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 50,
) -> None:
    """Print the end of a log: of what failed or runs, if none is chosen, after the list of those there are."""
    place = find_store(store)
    run = runs.require_run_id(place, run_id)
    there = _awaited_logs(place, run, step) if follow else find_logs(run)
    if not there:
        print_line(f"run {run.run_id} has written no logs yet")
        return
    chosen = _chosen(there, step, rank, attempt)
    if not (step or rank is not None or attempt is not None):
        _print_list(there)
    log = most_telling(chosen)
    print_line(f"==> {log.place} <==")
    hide = _hiding()
    tail, end = tail_of(log.place, lines)
    if not follow:
        print_line(hide(tail).rstrip("\n") or "(empty)")
        return
    whole, _, rest = tail.rpartition("\n")
    if whole:
        print_line(hide(whole))
    _follow(place, run, log, end, rest, hide)
    while (log := _next(place, run, log, attempt)) is not None:
        print_line(f"==> {log.place} <==")
        _follow(place, run, log, 0, "", hide)


def _awaited_logs(store: Store, run: RunPlace, step: str) -> list[Log]:
    """The logs of a run, as soon as there is one, of the step if one of the run's is named; or the run has ended."""
    is_step = step in [planned.name for planned in runs.frozen_plan(run).steps]
    is_told = False
    while True:
        summary = summarise(store, run)  # before the last look at what there is
        there = find_logs(run)
        if any(log.turn.step == step for log in there) if is_step else there:
            return there
        if summary.exit_code is not None:
            return there
        if is_step and (found := _of(summary, step)).status in _OVER:
            say(f"{_stands(found)} and writes no log in run {run.run_id}")
            return there
        if not is_told:
            of_step = f"{step} in run {run.run_id}" if is_step else f"run {run.run_id}"
            say(f"waiting for the first log of {of_step}, which is {status_words(summary)}")
            is_told = True
        time.sleep(max(_FOLLOW_EVERY_S, store.root.storage.poll_s))


def find_logs(run: RunPlace) -> list[Log]:
    """All logs of a run, by attempt, call, turn and rank."""
    steps = [step.name for step in runs.frozen_plan(run).steps]
    return [Log(turn, rank) for turn in find_turns(run, steps) for rank in turn.ranks("rank")]


def most_telling(logs: list[Log]) -> Log:
    """Of what failed in the last of the attempts, or else of what did not say how it ended; or else the newest."""
    last = [log for log in logs if log.turn.attempt == logs[-1].turn.attempt]
    newest = {log.turn.call: log.turn.folder for log in last}
    ends = [log for log in last if newest[log.turn.call] == log.turn.folder]
    if failed := [log for log in ends if log.told == "failed"]:
        failure = first_failure(failed[-1].turn.folder)
        assert failure is not None
        of_turn = [log for log in failed if log.turn.folder == failed[-1].turn.folder]
        return next((log for log in of_turn if log.rank == failure.rank), of_turn[0])
    if unsaid := [log for log in ends if not log.turn.is_over]:
        return unsaid[0]
    return max(ends, key=lambda log: (log.place.modified(), -log.rank))


def _chosen(there: list[Log], step: str, rank: int | None, attempt: int | None) -> list[Log]:
    """The logs that are meant; UserError naming what there is for anything that is not there."""
    chosen = there
    if attempt is not None:
        chosen = _narrowed(chosen, "attempt", attempt, lambda log: [log.turn.attempt])
    if step:
        names = sorted({name for log in chosen for name in (log.turn.step, log.turn.call)})
        found_or_suggested("step with a log", step, names)
        chosen = [log for log in chosen if step in (log.turn.step, log.turn.call)]
    if rank is not None:
        chosen = _narrowed(chosen, "rank", rank, lambda log: [log.rank])
    return chosen


def _narrowed(logs: list[Log], what: str, wanted: int, value: Callable[[Log], list[int]]) -> list[Log]:
    found = [log for log in logs if wanted in value(log)]
    if not found:
        there = ", ".join(str(number) for number in sorted({number for log in logs for number in value(log)}))
        raise UserError(f"--{what} is {wanted}; there are logs of {what} {there}")
    return found


def _print_list(there: list[Log]) -> None:
    rows = [
        (str(log.turn.attempt), log.turn.step, log.turn.call, str(log.rank), log.told, log.turn.folder.name)
        for log in there[-_MOST_LISTED:]
    ]
    if len(there) > _MOST_LISTED:
        print_line(f"{len(there) - _MOST_LISTED} earlier logs are not listed; choose with --attempt and --step")
    for line in columns(("attempt", "step", "part", "rank", "", "turn"), rows, page_width()):
        print_line(line)
    print_line("")


def tail_of(place: Place, lines: int) -> tuple[str, int]:
    """The last lines of a file, whole ones, and how many bytes it had."""
    if not place.is_local:
        data = place.read_bytes()
        return _last_lines(data, lines), len(data)
    with place.path.open("rb") as file:
        end = start = file.seek(0, 2)
        data = b""
        while start > 0 and data.count(b"\n") <= lines:
            size = min(_BLOCK_BYTES, start)
            start -= size
            file.seek(start)
            data = file.read(size) + data
    return _last_lines(data, lines), end


def _last_lines(data: bytes, lines: int) -> str:
    parts = [f"{line}\n" for line in data.decode(errors="replace").split("\n")]
    parts[-1] = parts[-1].removesuffix("\n")
    whole = parts[:-1] if not parts[-1] else parts  # the last one is empty if the text ends with a line
    return "".join(whole[-lines:]) if lines else ""


def _hiding() -> Callable[[str], str]:
    """Replaces secrets in text that may hold only one line of them."""
    values = secret_values()
    values += [line for value in values for line in value.splitlines() if len(line) >= _MIN_SECRET_CHARS]
    return lambda text: redacted(text, values)


def _follow(store: Store, run: RunPlace, log: Log, end: int, rest: str, hide: Callable[[str], str]) -> None:
    """Print whole lines as they come, until the turn has ended or nobody works on the run."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    waits = _Waits(store, run)
    while True:
        is_over = _is_over(log.turn) or lease_is_free(run.lease_dir)  # before the last look at what it wrote
        data = _from(log.place, end)
        end += len(data)
        whole, newline, rest = (rest + decoder.decode(data)).rpartition("\n")
        if newline:
            print_line(hide(whole))
        if is_over:
            break
        if not end:
            waits.tell(f"{log.turn.call} has written nothing yet", log.turn.step)
        time.sleep(max(_FOLLOW_EVERY_S, store.root.storage.poll_s))
    if rest:
        print_line(hide(rest))


class _Waits:
    """Says once what is waited for, if that takes a while."""

    def __init__(self, store: Store, run: RunPlace) -> None:
        self._store, self._run = store, run
        self._told_at_s = time.monotonic() + _TOLD_AFTER_S

    def tell(self, what: str, step: str) -> None:
        """Say it, and where the step stands, if it is time."""
        if time.monotonic() < self._told_at_s:
            return
        self._told_at_s = math.inf
        summary = summarise(self._store, self._run)
        say(f"{what}; {_stands(_of(summary, step))}, run {self._run.run_id} {summary.status}")


def _of(summary: RunSummary, step: str) -> StepSummary:
    return next(one for one in summary.steps if one.step == step)


def _stands(found: StepSummary) -> str:
    """Where a step stands, in a line."""
    detail = f" ({found.detail.splitlines()[0]})" if found.detail else ""
    return f"{found.step} is {found.status}{detail}"


def _next(store: Store, run: RunPlace, log: Log, attempt: int | None) -> Log | None:
    """What the rank writes when the call is tried again, once it does; None, having said why, if it will not."""
    turn = log.turn
    waits = _Waits(store, run)
    while not (turn.folder / "done.json").exists():
        summary = summarise(store, run)  # before the last look at what there is
        for other in find_logs(run):
            is_same = (other.turn.call, other.rank) == (turn.call, log.rank)
            is_later = (other.turn.attempt, other.turn.folder.name) > (turn.attempt, turn.folder.name)
            if is_same and is_later and attempt in (None, other.turn.attempt):
                return other
        of_step = next(step.status for step in summary.steps if step.step == turn.step)
        if summary.exit_code is not None:
            say(f"run {run.run_id} has ended: {summary.status}")
            return None
        if of_step in _OVER:
            say(f"{turn.step} has ended: {of_step}; the run goes on")
            return None
        if attempt is not None and attempt < summary.attempts:
            say(f"attempt {attempt} has ended; the run goes on in attempt {summary.attempts}")
            return None
        waits.tell(f"waiting for what {turn.call} writes next", turn.step)
        time.sleep(max(_FOLLOW_EVERY_S, store.root.storage.poll_s))
    say(f"{turn.call} is done")
    return None


def _is_over(turn: Turn) -> bool:
    """Whether it left a result or a failure, or another turn of the call has begun."""
    names = tuple(turn.folder.names())
    if Turn(turn.attempt, turn.step, turn.call, turn.folder, names).is_over:
        return True
    return turn.folder.parent.names()[-1] != turn.folder.name


def _from(place: Place, start: int) -> bytes:
    """What was added to a file; of an object store the copy is read whole."""
    if not place.is_local:
        return place.read_bytes()[start:]
    with place.path.open("rb") as file:
        file.seek(start)
        return file.read()
