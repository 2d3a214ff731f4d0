"""A graph for a narrow screen: a column of boxes in the order of the work, with lanes for arrows beside it."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from workflows.report.svg import Drawing, Edge, Node, arrow_head, fit, implied_edges, rounded, text, text_width

_HEIGHT = 36.0
_GAP = 17.0
_PADDING = 12.0
_FIRST_LANE = 13.0
_LANE_GAP = 10.0
_MOST_LANES_SHARE = 0.4
"""Of the width: more lanes lie closer."""


@dataclass(frozen=True)
class _Bundle:
    """Edges that share a lane, since they have one end in common."""

    edges: tuple[Edge, ...]
    top: int
    """Place of the first box that it touches, and of the last."""
    bottom: int


def column_graph(nodes: Sequence[Node], edges: Collection[Edge], width: float) -> Drawing:
    """Boxes below one another; an edge to the next box is an arrow down, any other runs in a lane at the right.

    Edges that others imply are left out.

    Args:
        nodes: every one after all that lead to it.
    """
    place = {node.name: number for number, node in enumerate(nodes)}
    needed = sorted(set(edges) - implied_edges(edges), key=lambda edge: (place[edge[0]], place[edge[1]]))
    bundles = _bundles([(a, b) for a, b in needed if place[b] > place[a] + 1], place)
    lanes = _lanes(bundles)
    spacing = min(_LANE_GAP, _MOST_LANES_SHARE * width / max(1, len(lanes)))
    right = width - (_FIRST_LANE + spacing * (len(lanes) - 1) + 2 if lanes else 1)
    tops = [1 + number * (_HEIGHT + _GAP) for number in range(len(nodes))]
    parts = [
        f'<path d="M{right / 2:g} {tops[place[b]] - _GAP:g}v{_GAP - 5:g}" class="edge"/>'
        + arrow_head(right / 2, tops[place[b]], "down", "head")
        for a, b in needed
        if place[b] == place[a] + 1
    ]
    for number, lane in enumerate(lanes):
        for bundle in lane:
            x = right + _FIRST_LANE + number * spacing
            parts += [_arrow(right, x, tops[place[a]], tops[place[b]]) for a, b in bundle.edges]
    parts += [_box(node, top, right) for node, top in zip(nodes, tops, strict=True)]
    return Drawing("".join(parts), width, tops[-1] + _HEIGHT + 1)


def _bundles(edges: Sequence[Edge], place: Mapping[str, int]) -> list[_Bundle]:
    """Each edge with those that have the same start, or the same end if these are more; the shortest bundle first."""
    starts, ends = Counter(a for a, _ in edges), Counter(b for _, b in edges)
    found: dict[tuple[bool, str], list[Edge]] = {}
    for a, b in edges:
        found.setdefault((False, a) if starts[a] >= ends[b] else (True, b), []).append((a, b))
    bundles = [
        _Bundle(tuple(own), min(place[a] for a, _ in own), max(place[b] for _, b in own)) for own in found.values()
    ]
    return sorted(bundles, key=lambda bundle: (bundle.bottom - bundle.top, bundle.top))


def _lanes(bundles: Sequence[_Bundle]) -> list[list[_Bundle]]:
    """Bundles in as few lanes as are needed for none to touch another."""
    lanes: list[list[_Bundle]] = []
    for bundle in bundles:
        free = (lane for lane in lanes if all(bundle.top > o.bottom or bundle.bottom < o.top for o in lane))
        if (lane := next(free, None)) is None:
            lanes.append(lane := [])
        lane.append(bundle)
    return lanes


def _arrow(right: float, x: float, start_top: float, end_top: float) -> str:
    """Out of the lower part of one box, down the lane and into the upper part of the other."""
    y0, y1 = start_top + 0.7 * _HEIGHT, end_top + 0.3 * _HEIGHT
    corners = [(right, y0), (x, y0), (x, y1), (right + 5, y1)]
    return f'<path d="{rounded(corners, 5)}" class="edge"/>' + arrow_head(right, y1, "left", "head")


def _box(node: Node, top: float, right: float) -> str:
    width = right - 1
    css_class = f"box {escape(node.state)}".rstrip()
    baseline = top + _HEIGHT / 2 + 5
    room = width - 3 * _PADDING - text_width(node.subtitle, 11)
    parts = [
        f'<rect x="1" y="{top:g}" width="{width:g}" height="{_HEIGHT:g}" rx="8" class="{css_class}"/>',
        text(1 + _PADDING, baseline, fit(node.name, room, 14), "name"),
        text(right - _PADDING, baseline, node.subtitle, "sub", "end"),
    ]
    if node.share is not None:
        bar = f'x="{1 + _PADDING:g}" y="{top + _HEIGHT - 6:g}" height="3" rx="1.5"'
        inside = width - 2 * _PADDING
        parts.append(f'<rect {bar} width="{inside:g}" class="share-track"/>')
        parts.append(f'<rect {bar} width="{max(2.0, node.share * inside):.1f}" class="share"/>')
    return "".join(parts)
