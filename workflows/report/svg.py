"""Line chart and layered graph as SVG strings.  Pure functions; what they show is the caller's affair.

Colours come from one stylesheet with a palette filled in: CSS variables inside a page, fixed colours in a file.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import Template

Edge = tuple[str, str]
Point = tuple[float, float]

_STYLE = Template(
    "svg text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;fill:$ink}"
    ".tick,.axis,.legend,.sub{fill:$muted}"
    ".tick{font-size:11px}.axis{font-size:12px}.legend{font-size:12px}"
    ".grid{stroke:$line;stroke-width:1}"
    ".raw{fill:none;stroke:$accent;stroke-width:1;opacity:.3}"
    ".smooth{fill:none;stroke:$accent;stroke-width:2;stroke-linejoin:round}"
    ".level{stroke:$level;stroke-width:1.5;stroke-dasharray:5 4}.level-label{fill:$level;font-size:12px}"
    ".box{fill:$card;stroke:$line;stroke-width:1}"
    ".share-track{fill:$line}.share{fill:$accent}"
    ".edge{fill:none;stroke:$muted;stroke-width:1.5}.head{fill:$muted}"
    ".lane{fill:none;stroke:$lane;stroke-width:1.2}.lane-head{fill:$lane}"
    ".name{font-size:14px;font-weight:600}.sub{font-size:12px}"
    ".pill{opacity:.16}.pill.task{fill:$task}.pill.map{fill:$map}.pill.gang{fill:$gang}"
    ".kind{font-size:10.5px;font-weight:600}"
    ".kind.task{fill:$task}.kind.map{fill:$map}.kind.gang{fill:$gang}"
)


def stylesheet(palette: Mapping[str, str]) -> str:
    """CSS of everything drawn here.

    Args:
        palette: colours of ink, muted, line, card, accent, level, lane, task, map, gang.
    """
    return _STYLE.substitute(palette)


@dataclass(frozen=True)
class Drawing:
    """SVG elements and the size of the area they cover, from (0, 0)."""

    body: str
    width: float
    height: float


def embed(drawing: Drawing, label: str, css_class: str) -> str:
    """A drawing as an <svg> element to put into a page; ``label`` describes it to a screen reader."""
    return (
        f'<svg class="{css_class}" viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img" '
        f'aria-label="{escape(label)}" style="max-width:{drawing.width:g}px">{drawing.body}</svg>'
    )


def text(x: float, y: float, content: str, css_class: str, anchor: str = "start") -> str:
    """One line of text."""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" class="{css_class}"{place}>{escape(content)}</text>'


# Line chart


@dataclass(frozen=True)
class Line:
    """One series; a point whose y is None is a gap."""

    points: Sequence[tuple[float, float | None]]
    label: str
    css_class: str


@dataclass(frozen=True)
class Level:
    """A labelled horizontal line."""

    y: float
    label: str


_CHART_WIDTH, _CHART_HEIGHT = 960.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 16.0, 34.0, 48.0
_LABEL_CLEARANCE = 18.0


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Round numbers within [low, high], about ``target`` of them, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_label(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def thin(points: Sequence[tuple[float, float | None]], limit: int) -> list[tuple[float, float | None]]:
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


def line_chart(
    lines: Sequence[Line],
    levels: Sequence[Level],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float],
) -> Drawing:
    """Lines over a common x; what lies outside ``y_range`` is cut off at the frame."""
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = min(xs, default=0.0), max(xs, default=1.0)
    if x_high == x_low:
        x_high = x_low + 1
    y_low, y_high = y_range
    if y_high == y_low:
        y_low, y_high = y_low - 0.5, y_high + 0.5
    inner_width, inner_height = _CHART_WIDTH - _LEFT - _RIGHT, _CHART_HEIGHT - _TOP - _BOTTOM
    bottom, right = _TOP + inner_height, _LEFT + inner_width

    def to_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * inner_width

    def to_y(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * inner_height

    parts: list[str] = []
    y_ticks, x_ticks = nice_ticks(y_low, y_high, 5), nice_ticks(x_low, x_high, 8)
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<line x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(text(_LEFT - 8, round(y + 4, 1), _tick_label(tick, y_ticks), "tick", "end"))
    for tick in x_ticks:
        x = round(to_x(tick), 1)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{bottom:g}" y2="{bottom + 4:g}" class="grid"/>')
        parts.append(text(x, bottom + 18, _tick_label(tick, x_ticks), "tick", "middle"))
    parts.append(text(_LEFT + inner_width / 2, _CHART_HEIGHT - 8, x_label, "axis", "middle"))
    middle = _TOP + inner_height / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 {middle:g}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    # A nested <svg> cuts off at its frame without needing an id that is unique in the page.
    parts.append(
        f'<svg x="{_LEFT:g}" y="{_TOP:g}" width="{inner_width:g}" height="{inner_height:g}" '
        f'viewBox="{_LEFT:g} {_TOP:g} {inner_width:g} {inner_height:g}" overflow="hidden">'
    )
    parts += [f'<path d="{_path(line.points, to_x, to_y)}" class="{line.css_class}"/>' for line in lines]
    parts.append("</svg>")
    for level in levels:
        y = to_y(level.y)
        above = y - 6 if y - _TOP > _LABEL_CLEARANCE else y + 16
        parts.append(f'<line x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}" class="level"/>')
        parts.append(text(right - 4, round(above, 1), level.label, "level-label", "end"))
    parts.append(_legend(lines))
    return Drawing("".join(parts), _CHART_WIDTH, _CHART_HEIGHT)


def _legend(lines: Sequence[Line]) -> str:
    parts: list[str] = []
    x = _LEFT
    for line in lines:
        parts.append(f'<path d="M{x:g} 16h22" class="{line.css_class}"/>')
        parts.append(text(x + 28, 20, line.label, "legend"))
        x += 28 + _text_width(line.label, 12) + 28
    return "".join(parts)


def _path(points: Sequence[tuple[float, float | None]], to_x: object, to_y: object) -> str:
    raise NotImplementedError
