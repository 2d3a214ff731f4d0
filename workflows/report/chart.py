"""Line charts as SVG strings: lines with error bars, levels, and stretches of x that are shaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from workflows.report.svg import Drawing, fit, text, text_width

Points = Sequence[tuple[float, float | None]]
"""(x, y), by x; a y that is None is a gap."""


@dataclass(frozen=True)
class Line:
    """One series."""

    points: Points
    label: str
    css_class: str
    errors: Mapping[float, float] | None = None
    """Half the length of the error bar at each x that has a y."""


@dataclass(frozen=True)
class Level:
    """A horizontal line, named above the chart: beside it there may be curves."""

    y: float
    label: str


@dataclass(frozen=True)
class Band:
    """A labelled stretch of x."""

    start: float
    stop: float
    label: str


@dataclass(frozen=True)
class Size:
    """Of a chart, in pixels, with its margins."""

    width: float = 1070.0
    height: float = 380.0
    left: float = 64.0
    right: float = 16.0
    top: float = 34.0
    bottom: float = 48.0


_LEGEND_ROW_PX = 18.0
_LEAST_MARGIN = 1e-3
"""Of what is shown, as a share of its largest figure."""


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Round numbers within [low, high], about ``target`` of them, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """A tick as short as its neighbours allow: 0.25, 1,500, 20k, 1.5G, 2e-05."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    largest = max(map(abs, ticks))
    factor, suffix = next(
        ((f, s) for f, s, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)) if largest >= least), (1.0, "")
    )
    value, step = value / factor, step / factor
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals > 4:
        digits = decimals + math.floor(math.log10(largest / factor)) + 1
        return f"{value:.{digits}g}{suffix}" if abs(value) > step / 2 else "0"
    return f"{value:,.{decimals}f}{suffix}"


def thin(points: Points, limit: int) -> list[tuple[float, float | None]]:
    """At most about ``limit`` points that keep the extremes of every stretch: lowest and highest of each bucket."""
    if len(points) <= limit:
        return list(points)
    width = math.ceil(2 * len(points) / limit)
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), width):
        bucket = range(start, min(start + width, len(points)))
        drawn = [(y, i) for i in bucket if (y := points[i][1]) is not None]
        kept += [points[i] for i in sorted({min(drawn)[1], max(drawn)[1]})] if drawn else [points[start]]
    return kept


def visible_range(numbers: Sequence[float], whole: Sequence[float]) -> tuple[float, float]:
    """A range of y that shows all of ``whole`` and all but a hundredth of ``numbers``, which are many and scatter.

    It goes below 0 only if they do, and is never so narrow that a figure which does not change fills it.
    """
    ordered = sorted(numbers)
    rare = len(ordered) // 200
    shown = [ordered[rare], ordered[len(ordered) - 1 - rare], *whole]
    low, high = min(shown), max(shown)
    margin = max(0.05 * (high - low), _LEAST_MARGIN * max(abs(low), abs(high))) or 1.0
    return (low - margin if low < 0 else max(0.0, low - margin)), high + margin


def phase_bands(metrics: Sequence[Mapping[str, Any]]) -> list[Band]:
    """Stretches of steps with the same "phase"; none where nothing tells phases apart."""
    bands: list[Band] = []
    for line in metrics:
        name = line.get("phase")
        if name is None:
            continue
        if bands and bands[-1].label == str(name):
            bands[-1] = Band(bands[-1].start, line["step"], str(name))
        else:
            bands.append(Band(line["step"], line["step"], str(name)))
    return bands if len(bands) > 1 else []


def line_chart(
    lines: Sequence[Line],
    levels: Sequence[Level],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float],
    x_range: tuple[float, float] | None = None,
    bands: Sequence[Band] = (),
    size: Size = Size(),
) -> Drawing:
    """Lines over a common x, by default all of theirs; what lies outside ``y_range`` is cut off at the frame."""
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = x_range or (min(xs, default=0.0), max(xs, default=1.0))
    if x_high == x_low:
        x_high = x_low + 1
    y_low, y_high = y_range
    if y_high == y_low:
        y_low, y_high = y_low - 0.5, y_high + 0.5
    legend, num_rows = _legend(lines, levels, size)
    size = replace(size, top=max(size.top, 10 + _LEGEND_ROW_PX * num_rows))
    inner_width, inner_height = size.width - size.left - size.right, size.height - size.top - size.bottom
    bottom, right = size.top + inner_height, size.left + inner_width

    def to_x(x: float) -> float:
        return size.left + (x - x_low) / (x_high - x_low) * inner_width

    def to_y(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * inner_height

    parts: list[str] = []
    for number, band in enumerate(bands):
        x, stop = to_x(band.start), to_x(bands[number + 1].start if number + 1 < len(bands) else band.stop)
        if number % 2 == 0:
            parts.append(
                f'<rect x="{x:.1f}" y="{size.top:g}" width="{stop - x:.1f}" height="{inner_height:g}" class="band"/>'
            )
        parts.append(text(round(x + 5, 1), size.top + 13, fit(band.label, stop - x - 6, 11), "band-label"))
    y_ticks, x_ticks = nice_ticks(y_low, y_high, 5), nice_ticks(x_low, x_high, max(2, round(inner_width / 125)))
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<line x1="{size.left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(text(size.left - 8, round(y + 4, 1), tick_label(tick, y_ticks), "tick", "end"))
    for tick in x_ticks:
        x = round(to_x(tick), 1)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{bottom:g}" y2="{bottom + 4:g}" class="grid"/>')
        parts.append(text(x, bottom + 18, tick_label(tick, x_ticks), "tick", "middle"))
    if x_label:
        parts.append(text(size.left + inner_width / 2, size.height - 8, x_label, "axis", "middle"))
    if y_label:
        middle = size.top + inner_height / 2
        parts.append(
            f'<text class="axis" text-anchor="middle" transform="translate(14 {middle:g}) rotate(-90)">'
            f"{escape(y_label)}</text>"
        )
    # A nested <svg> cuts off at its frame without needing an id that is unique in the page.
    parts.append(
        f'<svg x="{size.left:g}" y="{size.top:g}" width="{inner_width:g}" height="{inner_height:g}" '
        f'viewBox="{size.left:g} {size.top:g} {inner_width:g} {inner_height:g}" overflow="hidden">'
    )
    for line in lines:
        drawn = [(to_x(x), None if y is None else to_y(y)) for x, y in line.points]
        parts.append(f'<path d="{_polyline(drawn)}" class="{line.css_class}"/>')
        found = [(x, y) for x, y in drawn if y is not None]
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in found)
        if line.errors:
            ends = [(x, y - line.errors[x], y + line.errors[x]) for x, y in line.points if y is not None]
            bars = "".join(f"M{to_x(x):.1f} {to_y(low):.1f}V{to_y(high):.1f}" for x, low, high in ends)
            parts.append(f'<path d="{bars}" class="{line.css_class} bar"/>')
        if line.errors or len(found) == 1:  # one value alone would be no longer than its line is wide
            parts.append(f'<path d="{dots}" class="{line.css_class} dots"/>')
    parts.append("</svg>")
    for level in levels:
        y = to_y(level.y)
        parts.append(f'<line x1="{size.left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}" class="level"/>')
    return Drawing("".join([*parts, legend]), size.width, size.height)


def _legend(lines: Sequence[Line], levels: Sequence[Level], size: Size) -> tuple[str, int]:
    """What lines and levels are called, and on how many rows that stands."""
    named = [(line.label, line.css_class, "legend") for line in lines if line.label]
    named += [(level.label, "level", "level-label") for level in levels]
    parts: list[str] = []
    x, row = size.left, 0
    for label, line_class, text_class in named:
        width = 28 + text_width(label, 12)
        if x > size.left and x + width > size.width:
            x, row = size.left, row + 1
        y = 16 + _LEGEND_ROW_PX * row
        parts.append(f'<path d="M{x:g} {y:g}h22" class="{line_class}"/>')
        parts.append(text(x + 28, y + 4, fit(label, size.width - x - 28, 12), text_class))
        x += width + 18
    return "".join(parts), row + 1


def _polyline(points: Points) -> str:
    """Path data through points in pixels, interrupted where y is None; a point that stands alone is a dot."""
    parts: list[str] = []
    pen_down = False
    for x, y in points:
        if y is None:
            pen_down = False
            continue
        parts.append(f"L{x:.1f} {y:.1f}" if pen_down else f"M{x:.1f} {y:.1f}h0")
        pen_down = True
    return "".join(parts)
