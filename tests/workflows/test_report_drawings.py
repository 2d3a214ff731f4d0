"""Where the names of a chart stand, and how a graph is drawn for a narrow screen."""

import re
from xml.etree import ElementTree

import pytest

from workflows.report import svg
from workflows.report.chart import Level, Line, Size, line_chart
from workflows.report.column import column_graph


@pytest.mark.parametrize("width", [1070.0, 350.0])
def test_names_of_lines_and_levels_stand_above_the_frame_and_inside_the_drawing(width: float):
    lines = [Line([(0.0, 5.0), (9.0, 1.0)], label, "smooth") for label in ("each step", "mean of the last 8 steps")]
    levels = [Level(4.9, "unigram entropy (held out), 4.90")]
    size = Size(width=width, height=260.0)
    drawing = line_chart(lines, levels, x_label="", y_label="", y_range=(0.0, 5.0), size=size)
    root = ElementTree.fromstring(f"<svg>{drawing.body}</svg>")
    frame = root.find("svg")
    assert frame is not None
    named = [text for text in root.iterfind("text") if text.get("class") in ("legend", "level-label")]
    assert [text.text for text in named] == ["each step", "mean of the last 8 steps", levels[0].label]
    places = [(float(text.get("x", "")), float(text.get("y", ""))) for text in named]
    assert max(y for _, y in places) < float(frame.get("y", ""))
    assert all(x + svg.text_width(text.text or "", 12) <= width for text, (x, _) in zip(named, places, strict=True))
    assert len({y for _, y in places}) == (1 if width > 1000 else 3)


def _column(names: str, edges: set[svg.Edge]) -> tuple[list[ElementTree.Element], list[ElementTree.Element]]:
    """Straight arrows and those in lanes."""
    drawing = column_graph([svg.Node(name) for name in names], edges, 350.0)
    paths = ElementTree.fromstring(f"<svg>{drawing.body}</svg>").findall("path[@class='edge']")
    straight = [path for path in paths if "v" in path.get("d", "")]
    return straight, [path for path in paths if path not in straight]


def _lane_x(path: ElementTree.Element) -> float:
    return max(float(x) for x in re.findall(r"[MLQ]([\d.]+) ", path.get("d", "")))


def test_column_graph_leads_edges_past_a_box_in_lanes_of_their_own():
    chain = {("a", "b"), ("b", "c"), ("c", "d")}
    straight, aside = _column("abcd", chain | {("a", "d")})
    assert (len(straight), aside) == (3, [])  # the long one is implied
    straight, aside = _column("abcd", {("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")})
    assert len(straight) == 2
    assert len({_lane_x(path) for path in aside}) == 2  # they overlap, and have no end in common


def test_column_graph_shares_a_lane_among_edges_with_one_end_and_among_those_that_do_not_meet():
    _, fan_out = _column("abcde", {("a", one) for one in "bcde"})
    assert (len(fan_out), len({_lane_x(path) for path in fan_out})) == (3, 1)
    _, fan_in = _column("abcde", {(one, "e") for one in "abcd"})
    assert (len(fan_in), len({_lane_x(path) for path in fan_in})) == (3, 1)
    _, apart = _column("abcdef", {("a", "c"), ("d", "f")})
    assert (len(apart), len({_lane_x(path) for path in apart})) == (2, 1)
