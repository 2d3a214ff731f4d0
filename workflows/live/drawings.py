"""The graph of a run's steps and the line of its time, each drawn for a wide and for a narrow screen."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from workflows.live.history import History, Session, Span
from workflows.live.snapshot import StepView
from workflows.progress import duration
from workflows.report import svg
from workflows.report.chart import nice_ticks
from workflows.report.column import column_graph
from workflows.report.text import count, listed

MOST_STEPS = 150
"""Boxes of the graph, and rows of the time line."""
_MOST_SPANS = 40
"""Attempts of one step that are drawn one by one."""
_GAP_SHARE = 0.15
"""Of the time that was worked: how much of the line the pauses between attempts of the run take together, at most."""
_MARKS = {
    "committed": "✓",
    "cached": "✓",
    "running": "▶",
    "failed": "✕",
    "damaged": "✕",
    "blocked": "⊘",
    "stopped": "■",
    "cancelled": "■",
    "interrupted": "■",
    "partial": "◐",
    "killed": "✕",
    "tried again": "↻",
    "queued": "…",
    "waiting": "…",
}
_WIDE_GRAPH = svg.Layout(node_width=156, node_height=64, gap_x=34, gap_y=18)
_NARROW_PX = 350.0
_LEAST_WIDTH = 700.0
"""As in the stylesheet, of figures of class steps."""
_ROW_PX = 26.0
_STACKED_ROW_PX = 40.0
_LABEL_PX = 230.0
"""Room for how a row ends, at the right of all bars."""


def mark_of(status: str) -> str:
    """A sign for a status, which stands beside its name: colour alone tells nothing to some."""
    return _MARKS.get(status, "○")


def seconds_taken(step: StepView, history: History) -> float | None:
    """Time that making a step took, as dlm status tells it; of one that is not made, the last attempt so far."""
    if step.manifest is not None:
        return step.manifest.elapsed_s
    spans = history.spans_of(step.name)
    return spans[-1].end_s - spans[-1].start_s if spans else None


def _status_words(step: StepView, history: History) -> str:
    """A status in the space of a box."""
    words = f"{mark_of(step.status)} {step.status}"
    if step.status == "running" and step.total:
        return f"{words} {step.done / step.total:.0%}"
    took_s = seconds_taken(step, history) if step.manifest is not None else None
    return words if took_s is None else f"{words} · {duration(took_s)}"


def graph(steps: Sequence[StepView], history: History) -> str:
    """Boxes with their status, and arrows from what is made to what is made from it."""
    shown = steps[:MOST_STEPS]
    nodes = [
        svg.Node(
            step.name,
            _status_words(step, history),
            share=min(1.0, step.done / step.total) if step.status == "running" and step.total else None,
            state=step.status,
        )
        for step in shown
    ]
    names = {step.name for step in shown}
    edges = {(a, step.name) for step in shown for a in step.planned.inputs.values() if a in names}
    described = "; ".join(
        f"{step.name}: {step.status}" + (f", from {listed(sorted(sources))}" if (sources := _sources(step)) else "")
        for step in shown
    )
    drawn = [svg.layered_graph(nodes, edges, _WIDE_GRAPH), column_graph(nodes, edges, _NARROW_PX)]
    return svg.for_both_widths(*(_embed(drawing, "The steps of the run", described) for drawing in drawn))


def _embed(drawing: svg.Drawing, title: str, described: str) -> str:
    """One that is wider than a small window scrolls sideways there, instead of shrinking until nobody can read it."""
    return svg.embed(drawing, title, "figure steps" if drawing.width > _LEAST_WIDTH else "figure", described)


def _sources(step: StepView) -> set[str]:
    return set(step.planned.inputs.values())


# Time line


@dataclass(frozen=True)
class _Scale:
    """Seconds since the epoch to pixels; pauses between attempts of the run are shortened."""

    sessions: Sequence[Session]
    left: float
    width: float

    @property
    def _worked_s(self) -> float:
        return max(1e-3, sum(s.end_s - s.start_s for s in self.sessions))

    @property
    def _most_gap_s(self) -> float:
        return _GAP_SHARE * self._worked_s / max(1, len(self.sessions) - 1)

    def starts(self) -> list[float]:
        """Seconds from the left edge at which each attempt of the run begins."""
        found, at_s = [0.0], 0.0
        for before, after in zip(self.sessions, self.sessions[1:], strict=False):
            at_s += before.end_s - before.start_s
            at_s += min(self._most_gap_s, max(0.0, after.start_s - before.end_s))
            found.append(at_s)
        return found

    def __call__(self, attempt: int, at_s: float) -> float:
        starts = self.starts()
        total_s = max(1e-3, starts[-1] + self.sessions[-1].end_s - self.sessions[-1].start_s)
        place = next(i for i, s in enumerate(self.sessions) if s.attempt == attempt)
        within_s = min(max(0.0, at_s - self.sessions[place].start_s), total_s - starts[place])
        return self.left + (starts[place] + within_s) / total_s * self.width


def time_line(steps: Sequence[StepView], history: History) -> str:
    """For each step when it was worked on, attempt by attempt, and how each ended."""
    if not history.sessions:
        return ""
    worked = [step for step in steps if history.spans_of(step.name)][:MOST_STEPS]
    described = "; ".join(_told(step.name, history) for step in worked)
    drawn = (_draw(worked, history, 1070.0, is_stacked=False), _draw(worked, history, _NARROW_PX, is_stacked=True))
    return svg.for_both_widths(*(_embed(drawing, "When each step was worked on", described) for drawing in drawn))


def _told(step: str, history: History) -> str:
    spans = history.spans_of(step)
    words = [f"{span.outcome} after {duration(span.end_s - span.start_s)}" for span in spans[-_MOST_SPANS:]]
    return f"{step}: {', '.join(words)}"


def _draw(steps: Sequence[StepView], history: History, width: float, *, is_stacked: bool) -> svg.Drawing:
    """Rows with the name at the left, or above where there is no room."""
    left = 2.0 if is_stacked else 130.0
    row_px = _STACKED_ROW_PX if is_stacked else _ROW_PX
    scale = _Scale(history.sessions, left, width - left - (4 if is_stacked else _LABEL_PX))
    top = 24.0 if len(history.sessions) > 1 else 2.0
    height = top + row_px * len(steps) + 26
    parts = _session_labels(history.sessions, scale, top, width)
    if not is_stacked:
        parts += _bands(history.sessions, scale, top - 4, height - 22)
    for number, step in enumerate(steps):
        y = top + number * row_px
        spans = history.spans_of(step.name)
        words = _summary(step, history)
        if is_stacked:  # the words lie above the bars: bands behind them would cut them up
            parts.append(svg.text(left, y + 12, svg.fit(f"{step.name}: {words}", width - left, 12), "legend"))
            parts += _bands(history.sessions, scale, y + 17, y + 31)
        else:
            parts.append(svg.text(left - 10, y + 17, svg.fit(step.name, left - 14, 13), "row", "end"))
            x = scale.left + scale.width + 10
            parts.append(svg.text(x, y + 16, svg.fit(words, width - x, 10), "legend"))
        parts += _bars(spans, scale, y + 17 if is_stacked else y + 5)
    parts += _axis(history.sessions, scale, height - 8)
    return svg.Drawing("".join(parts), width, height)


def _summary(step: StepView, history: History) -> str:
    spans = history.spans_of(step.name)
    last = spans[-1]
    words = f"{mark_of(last.outcome)} {last.outcome}"
    if len(spans) > 1:
        return f"{words}, {duration(sum(s.end_s - s.start_s for s in spans))} in {len(spans)} attempts"
    took_s = seconds_taken(step, history)
    return words if took_s is None else f"{words}, {duration(took_s)}"


def _bars(spans: Sequence[Span], scale: _Scale, y: float) -> list[str]:
    shown = spans[-_MOST_SPANS:]
    parts: list[str] = []
    for span in shown:
        x, end = scale(span.attempt, span.start_s), scale(span.attempt, span.end_s)
        took = duration(span.end_s - span.start_s)
        told = f"attempt {span.attempt} of the run: {span.outcome} after {took}"
        bar = f'x="{x:.1f}" y="{y:g}" width="{max(3.0, end - x):.1f}" height="14" rx="3"'
        parts.append(
            f'<rect {bar} class="span {escape(span.outcome.replace(" ", "-"))}"><title>{escape(told)}</title></rect>'
        )
    return parts


def _bands(sessions: Sequence[Session], scale: _Scale, top: float, bottom: float) -> list[str]:
    """A shaded stretch for each attempt of the run, if there are several."""
    if len(sessions) < 2:
        return []
    parts: list[str] = []
    for session in sessions[-_MOST_SPANS:]:
        x, end = scale(session.attempt, session.start_s), scale(session.attempt, session.end_s)
        parts.append(
            f'<rect x="{x:.1f}" y="{top:g}" width="{max(1.0, end - x):.1f}" height="{bottom - top:g}" class="band">'
            f"<title>attempt {session.attempt} of the run: {escape(session.outcome)}</title></rect>"
        )
    return parts


def _session_labels(sessions: Sequence[Session], scale: _Scale, top: float, width: float) -> list[str]:
    """The number of each attempt of the run above its stretch, if there are several."""
    if len(sessions) < 2:
        return []
    parts: list[str] = []
    free_from = 0.0
    for session in sessions[-_MOST_SPANS:]:
        x, end = scale(session.attempt, session.start_s), scale(session.attempt, session.end_s)
        label = f"attempt {session.attempt}: {session.outcome}"
        if svg.text_width(label, 11) > end - x:
            label = str(session.attempt)
        if x >= free_from and x + svg.text_width(label, 11) <= width:
            parts.append(svg.text(round(x + 2, 1), top - 9, label, "tick"))
            free_from = x + svg.text_width(label, 11) + 6
    return parts


def _axis(sessions: Sequence[Session], scale: _Scale, y: float) -> list[str]:
    """Time since the start below one attempt of the run; the dates of the ends below several."""
    first, last = sessions[0], sessions[-1]
    if len(sessions) > 1:
        end = time.strftime("%m-%d %H:%M UTC", time.gmtime(last.end_s))
        start = time.strftime("%Y-%m-%d %H:%M", time.gmtime(first.start_s))
        return [svg.text(scale.left, y, start, "tick"), svg.text(scale.left + scale.width, y, end, "tick", "end")]
    seconds = last.end_s - first.start_s
    unit_s, unit = next((u for u in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")) if seconds >= 2 * u[0]), (1.0, "s"))
    ticks = nice_ticks(0.0, seconds / unit_s, max(2, round(scale.width / 130)))
    parts: list[str] = []
    for tick in ticks:
        x = scale(first.attempt, first.start_s + tick * unit_s)
        anchor = "start" if tick == ticks[0] else "end" if x > scale.left + scale.width - 20 else "middle"
        parts.append(svg.text(round(x, 1), y, f"{tick:g} {unit}", "tick", anchor))
    return parts


def left_out(steps: Sequence[StepView]) -> str:
    """What is said of steps that the drawings have no room for."""
    more = len(steps) - MOST_STEPS
    return f" {count(more)} more steps are not drawn; the table has them." if more > 0 else ""
