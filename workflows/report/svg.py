"""Layered graph as SVG strings, and what every drawing has.  Pure functions; what they show is the caller's affair.

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
    ".raw{fill:none;stroke:$accent;stroke-width:1;opacity:.35}"
    ".smooth{fill:none;stroke:$accent;stroke-width:2;stroke-linejoin:round}"
    ".band{fill:$line;opacity:.45}.band-label{fill:$muted;font-size:11px}"
    ".many{fill:none;stroke:$accent;stroke-width:1;opacity:.45}"
    ".series0{stroke:$accent}.series1{stroke:$level}.series2{stroke:$map}.series3{stroke:$gang}.series4{stroke:$task}"
    ".series5{stroke:$muted}.series{fill:none;stroke-width:1.6;stroke-linejoin:round}"
    ".smooth,.series,.many{stroke-linecap:round}.dots{stroke-width:5}.bar{stroke-width:1.2}"
    ".level{stroke:$level;stroke-width:1.5;stroke-dasharray:5 4}"
    ".level-label{fill:$level;font-size:12px;font-weight:600}"
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


def embed(drawing: Drawing, label: str, css_class: str, description: str = "") -> str:
    """A drawing as an <svg> element to put into a page; label and description tell a screen reader what it shows."""
    told = f"<title>{escape(label)}</title>" + (f"<desc>{escape(description)}</desc>" if description else "")
    return (
        f'<svg class="{css_class}" viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img" '
        f'aria-label="{escape(label)}" style="max-width:{drawing.width:g}px">{told}{drawing.body}</svg>'
    )


def for_both_widths(wide: str, narrow: str) -> str:
    """A drawing made twice, of which the page shows the one that fits the screen."""
    return f'<div class="scroll wide">{wide}</div><div class="narrow">{narrow}</div>'


def text(x: float, y: float, content: str, css_class: str, anchor: str = "start") -> str:
    """One line of text."""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" class="{css_class}"{place}>{escape(content)}</text>'


def text_width(content: str, size_px: float) -> float:
    """Rough width of a text, on the generous side."""
    return 0.58 * size_px * len(content)


def fit(content: str, width: float, size_px: float) -> str:
    """The text, shortened with an ellipsis if it would not fit."""
    most = max(1, int(width / text_width("x", size_px)))
    return content if len(content) <= most else content[: most - 1] + "…"


# Layered graph


@dataclass(frozen=True)
class Node:
    """One box."""

    name: str
    """What edges call it, and its title."""
    subtitle: str = ""
    kind: str = ""
    """Shown as a coloured label at the right of the title: task, map, gang, or nothing."""
    share: float | None = None
    """Filled part, in [0, 1], of a bar along the lower edge; None for no bar."""
    state: str = ""
    """Class of the frame, for one that is drawn otherwise than the rest."""


@dataclass(frozen=True)
class Layout:
    """Sizes in pixels, and how the layers are folded."""

    node_width: float = 132.0
    node_height: float = 62.0
    gap_x: float = 46.0
    gap_y: float = 22.0
    lane_gap: float = 9.0
    layers_per_row: int = 0
    """Layers before the drawing turns back on the next row, like a plough; 0 for a single row."""


def layers(names: Collection[str], edges: Collection[Edge]) -> dict[str, int]:
    """Layer of each node of an acyclic graph: after all that lead to it, and next to the first that it leads to."""
    layer: dict[str, int] = {}
    waiting = list(names)
    while waiting:
        ready = [n for n in waiting if all(a in layer for a, b in edges if b == n)]
        assert ready, f"the edges among {waiting} form a cycle"
        for name in ready:
            layer[name] = max((layer[a] + 1 for a, b in edges if b == name), default=0)
        waiting = [n for n in waiting if n not in layer]
    for name in sorted(layer, key=layer.__getitem__, reverse=True):
        layer[name] = min((layer[b] - 1 for a, b in edges if a == name), default=layer[name])
    return layer


def implied_edges(edges: Collection[Edge]) -> set[Edge]:
    """Edges whose end can also be reached from their start by a longer path."""
    after: dict[str, set[str]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)

    def reaches(start: str, goal: str) -> bool:
        return any(n == goal or reaches(n, goal) for n in after.get(start, ()))

    return {(a, b) for a, b in edges if any(reaches(n, b) for n in after[a] if n != b)}


def layered_graph(nodes: Sequence[Node], edges: Collection[Edge], layout: Layout = Layout()) -> Drawing:
    """Boxes in layers from left to right.

    An edge to the next layer is a curve.  A longer one runs in a lane below the boxes, one lane for each
    start, and turns up in the gap before its end.  A folded drawing has no lanes: it leaves out what is
    implied by other edges.
    """
    names = [node.name for node in nodes]
    layer = layers(names, edges)
    place = _positions(names, edges, layer, layout)
    width = max(x for x, _ in place.values()) + layout.node_width
    height = max(y for _, y in place.values()) + layout.node_height
    parts: list[str] = []
    if layout.layers_per_row:
        short = sorted(set(edges) - implied_edges(edges))
    else:
        short = sorted(edge for edge in edges if layer[edge[1]] == layer[edge[0]] + 1)
        drawn, height = _lanes(sorted(set(edges) - set(short)), layer, place, height, layout)
        parts += drawn
    boxes = set(place.values())
    parts += [
        (_detour if _is_hidden(place[a], place[b], boxes) else _curve)(place[a], place[b], layout) for a, b in short
    ]
    parts += [_box(node, *place[node.name], layout) for node in nodes]
    return Drawing("".join(parts), width, height)


def _positions(
    names: Sequence[str], edges: Collection[Edge], layer: Mapping[str, int], layout: Layout
) -> dict[str, Point]:
    """Upper left corner of every box: each layer a column, centred on its row."""
    num_layers = max(layer.values()) + 1
    columns: list[list[str]] = []
    rank: dict[str, float] = {}
    for i in range(num_layers):
        column = [n for n in names if layer[n] == i]
        column.sort(key=lambda n: _mean([rank[a] for a, b in edges if b == n]))
        rank |= {n: j - (len(column) - 1) / 2 for j, n in enumerate(column)}
        columns.append(column)
    per_row = layout.layers_per_row or num_layers
    pitch_x, pitch_y = layout.node_width + layout.gap_x, layout.node_height + layout.gap_y
    place: dict[str, Point] = {}
    top = 0.0
    for start in range(0, num_layers, per_row):
        row = columns[start : start + per_row]
        tallest = max(len(column) for column in row)
        backwards = start // per_row % 2 == 1
        for j, column in enumerate(row):
            x = (per_row - 1 - j if backwards else j) * pitch_x
            offset = (tallest - len(column)) * pitch_y / 2
            place |= {n: (x, top + offset + k * pitch_y) for k, n in enumerate(column)}
        top += tallest * pitch_y + layout.gap_y
    return place


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _curve(a: Point, b: Point, layout: Layout) -> str:
    """Edge between neighbouring columns, or from one row down to the next."""
    width, height = layout.node_width, layout.node_height
    if a[0] == b[0]:
        x, y0, y1 = a[0] + width / 2, a[1] + height, b[1]
        return f'<path d="M{x:g} {y0:g}V{y1 - 5:g}" class="edge"/>' + arrow_head(x, y1, "down", "head")
    forwards = b[0] > a[0]
    x0, x1 = (a[0] + width, b[0]) if forwards else (a[0], b[0] + width)
    y0, y1 = a[1] + height / 2, b[1] + height / 2
    end, tip = (x1 - 9, x1 - 5) if forwards else (x1 + 9, x1 + 5)
    bend = (x0 + end) / 2
    path = f'<path d="M{x0:g} {y0:g}C{bend:g} {y0:g} {bend:g} {y1:g} {end:g} {y1:g}H{tip:g}" class="edge"/>'
    return path + arrow_head(x1, y1, "right" if forwards else "left", "head")


def _is_hidden(a: Point, b: Point, boxes: Collection[Point]) -> bool:
    """Whether a straight edge down from one box to another would run behind a third, and seem to come from that."""
    return any(x == a[0] == b[0] and a[1] < y < b[1] for x, y in boxes)


def _detour(a: Point, b: Point, layout: Layout) -> str:
    """Edge between two boxes of a column, in the gap beside it."""
    side = -1 if a[0] > 0 else 1
    x = a[0] if side < 0 else a[0] + layout.node_width
    y0, y1 = a[1] + layout.node_height * 0.7, b[1] + layout.node_height * 0.3
    lane = x + side * layout.gap_x * 0.6
    corners = [(x, y0), (lane, y0), (lane, y1), (x + 5 * side, y1)]
    return f'<path d="{rounded(corners, 6)}" class="edge"/>' + arrow_head(
        x, y1, "right" if side < 0 else "left", "head"
    )


def arrow_head(x: float, y: float, direction: str, css_class: str) -> str:
    """Arrow head whose tip is at (x, y)."""
    back = {"right": "l-7 -3.5v7z", "left": "l7 -3.5v7z", "down": "l-3.5 -7h7z"}[direction]
    return f'<path d="M{x:g} {y:g}{back}" class="{css_class}"/>'


def _lanes(
    edges: Sequence[Edge], layer: Mapping[str, int], place: Mapping[str, Point], bottom: float, layout: Layout
) -> tuple[list[str], float]:
    """Edges that skip a layer, and the height of the drawing with their lanes below ``bottom``.

    The outermost lane belongs to the earliest start, turns up closest to the box and enters it lowest, so
    that the lanes of one box do not cross.
    """
    starts = sorted({a for a, _ in edges}, key=lambda n: -layer[n])
    parts: list[str] = []
    for number, start in enumerate(starts):
        lane_y = bottom + layout.gap_y / 2 + (number + 1) * layout.lane_gap
        x0 = place[start][0] + layout.node_width / 2
        y0 = place[start][1] + layout.node_height
        for end in [b for a, b in edges if a == start]:
            entering = [s for s in starts if (s, end) in edges]
            spacing = (layout.node_height / 2 - 6) / len(entering)
            x1, y1 = place[end]
            y1 += layout.node_height / 2 + min(layout.lane_gap, spacing) * (entering.index(start) + 1)
            turn_x = x1 - 14 - 7 * (len(starts) - 1 - number)
            corners = [(x0, y0), (x0, lane_y), (turn_x, lane_y), (turn_x, y1), (x1 - 5, y1)]
            parts.append(f'<path d="{rounded(corners, 6)}" class="lane"/>' + arrow_head(x1, y1, "right", "lane-head"))
    lanes_height = layout.gap_y / 2 + len(starts) * layout.lane_gap + 4 if starts else 0.0
    return parts, bottom + lanes_height


def rounded(corners: Sequence[Point], radius: float) -> str:
    """Path data of horizontal and vertical pieces with rounded corners."""
    parts = [f"M{corners[0][0]:g} {corners[0][1]:g}"]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        (x0, y0), (x1, y1) = (_towards(corner, other, radius) for other in (before, after))
        parts.append(f"L{x0:g} {y0:g}Q{corner[0]:g} {corner[1]:g} {x1:g} {y1:g}")
    parts.append(f"L{corners[-1][0]:g} {corners[-1][1]:g}")
    return "".join(parts)


def _towards(start: Point, goal: Point, distance: float) -> Point:
    """The point ``distance`` from start towards goal, at most half way."""
    length = math.dist(start, goal)
    part = min(distance / length, 0.5) if length else 0.0
    return start[0] + (goal[0] - start[0]) * part, start[1] + (goal[1] - start[1]) * part


_PADDING = 12.0
_KIND_SIZE_PX = 10.5


def _box(node: Node, x: float, y: float, layout: Layout) -> str:
    width, height = layout.node_width, layout.node_height
    inside = width - 2 * _PADDING
    middle = y + height / 2
    css_class = f"box {escape(node.state)}".rstrip()
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" class="{css_class}"/>']
    parts.append(text(x + _PADDING, middle - 5, fit(node.name, inside, 14), "name"))
    parts.append(text(x + _PADDING, middle + 14, fit(node.subtitle, inside, 11), "sub"))
    if node.kind:
        pill = _kind_width(node.kind)
        parts.append(kind_label(x + width - _PADDING / 1.5 - pill, middle - 18, node.kind))
    if node.share is not None:
        bar = f'x="{x + _PADDING:g}" y="{y + height - 9:g}" height="3" rx="1.5"'
        parts.append(f'<rect {bar} width="{inside:g}" class="share-track"/>')
        parts.append(f'<rect {bar} width="{max(2.0, node.share * inside):.1f}" class="share"/>')
    return "".join(parts)


def kind_label(x: float, y: float, kind: str) -> str:
    """The coloured label of a kind of stage, its upper left corner at (x, y)."""
    width = text_width(kind, _KIND_SIZE_PX) + 14
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="17" rx="8.5" class="pill {escape(kind)}"/>' + text(
        x + width / 2, y + 12, kind, f"kind {escape(kind)}", "middle"
    )


def _kind_width(kind: str) -> float:
    return text_width(kind, _KIND_SIZE_PX) + 18
