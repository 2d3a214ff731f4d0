"""The run as a person sees it in the terminal: a live table of steps while it runs, columns of text afterwards."""

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.training_state import checkpoint_name
from workflows.progress import duration, progress_words, seconds_left
from workflows.state import StepState

_STYLES = {
    "cached": "green",
    "committed": "bold green",
    "running": "bold cyan",
    "failed": "bold red",
    "blocked": "yellow",
    "stopped": "yellow",
    "cancelled": "yellow",
    "waiting": "yellow",
    "queued": "yellow",
    "skipped": "dim",
    "pending": "dim",
    "submitted": "dim",
    "succeeded": "bold green",
    "interrupted": "yellow",
    "partial": "yellow",
    "damaged": "bold red",
    "ok": "green",
    "run": "bold cyan",
}
_GAP = 2
_PLAIN_EVERY_S = 15.0
_LEAST_NAME_WIDTH = 13
_TOLD_AFTER_S = 5.0
"""How long a step starts before it is said for how long."""


def age(seconds: float) -> str:
    """How long ago, in one or two units: 12s, 4m, 1h02m."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    return f"{int(seconds // 60)}m" if seconds < 3600 else duration(seconds)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[Text]:
    """A line for the header and for each row, in columns as wide as their widest cell.

    What goes beyond ``width`` is cut off there; for None, as into a pipe, lines are as long as they get.  The first
    word of a cell gives its colour, if it is a status.
    """
    cells = [[cell.partition("\n")[0] for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in [list(header), *cells]) + _GAP for place in range(len(header))]
    lines: list[Text] = []
    for row in [list(header), *cells]:
        line = Text(style="" if lines else "dim")
        for cell, size in zip(row, widths, strict=True):
            line.append(cell.ljust(size), style=_STYLES.get(cell.partition(" ")[0], "") if lines else "")
        line.rstrip()
        if width is not None:
            line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return lines


def _detail(state: StepState) -> str:
    if state.status != "running":
        return state.reason.splitlines()[0] if state.reason else ""
    parts = progress_words(state.progress, seconds_left(state.progress, state.first_progress))
    if not state.progress and (so_far_s := time.time() - state.started_at) >= _TOLD_AFTER_S and state.started_at:
        parts.append(f"for {duration(so_far_s)}")
    return "  ".join(parts)


def step_table(states: list[StepState]) -> Table:
    """One line a step: status, time, what it is doing."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", "status", "time", ""):
        table.add_column(column, no_wrap=column != "")
    for state in states:
        elapsed = ""
        if state.started_at:
            elapsed = duration((state.ended_at or time.time()) - state.started_at)
        status = Text(state.status, style=_STYLES[state.status])
        table.add_row(state.step.name, status, elapsed, _detail(state))
    return table


class Display:
    """Shows step states as they change: a live table on a terminal, lines otherwise."""

    def __init__(self, console: Console, run_id: str) -> None:
        self._console, self._run_id = console, run_id
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown: dict[str, str] = {}
        self._next_line_s = 0.0
        self._name_width = _LEAST_NAME_WIDTH
        self._queued: dict[str, tuple[str, float]] = {}
        """Step -> why it was told to be queued, and when: shards get places one by one, and wait again between."""
        self._resumed: dict[str, int] = {}

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*details)

    def update(self, states: list[StepState]) -> None:
        """Show the states; a terminal that is gone ends no run."""
        try:
            self._show(states)
        except OSError:
            self._console.quiet = True

    def _show(self, states: list[StepState]) -> None:
        self._name_width = max(_LEAST_NAME_WIDTH, *(len(state.step.name) for state in states))
        for state in states:
            self._tell_resumed(state)
        if self._live is not None:
            self._live.update(Group(Text(f"run {self._run_id}", style="bold"), step_table(states)), refresh=True)
            return
        now = time.monotonic()
        due = now >= self._next_line_s
        for state in states:
            if state.status == "queued" and self._is_told(state, now):
                continue
            changed = self._shown.get(state.step.name) != state.status
            if (changed and state.status != "pending") or (due and state.status == "running"):
                self._print_line(state)
            self._shown[state.step.name] = state.status
        if due:
            self._next_line_s = now + _PLAIN_EVERY_S

    def _is_told(self, state: StepState, now: float) -> bool:
        """Whether the same wait was told a moment ago; takes note of it if not."""
        reason, at_s = self._queued.get(state.step.name, ("", -math.inf))
        if self._shown.get(state.step.name) == "queued" or (state.reason == reason and now - at_s < _PLAIN_EVERY_S):
            return True
        self._queued[state.step.name] = state.reason, now
        return False

    def _tell_resumed(self, state: StepState) -> None:
        """Say once where a training went on."""
        resumed_at = state.progress.get("figures", {}).get("resumed_at")
        if resumed_at is None or self._resumed.get(state.step.name) == resumed_at:
            return
        self._resumed[state.step.name] = resumed_at
        steps = f"{resumed_at} of {state.progress['total']} steps are done"
        told = f"{state.step.name} goes on from checkpoint {checkpoint_name(resumed_at)}: {steps}"
        self._console.print(told, highlight=False, markup=False, soft_wrap=True)

    def _print_line(self, state: StepState) -> None:
        elapsed = ""
        if state.ended_at and state.started_at:
            elapsed = duration(state.ended_at - state.started_at)
        line = f"{state.step.name:<{self._name_width}} {state.status:<10} {elapsed:<8} {_detail(state)}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
