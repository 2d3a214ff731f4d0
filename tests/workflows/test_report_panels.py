"""The small charts of a training: which there are, and where their lines, error bars and phases stand."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_core import objectives
from pipeline.pretrain.meter import MEASURED
from tests.support.tiny_run import forge
from tests.workflows.test_report import INPUTS, make_artifact, make_artifacts, render
from workflows.report import panels as module
from workflows.report.chart import Band, Line, line_chart, nice_ticks, phase_bands, tick_label, visible_range
from workflows.report.panels import Panel, panels

FRAME_TOP, FRAME_BOTTOM = 28.0, 184.0
"""Of a small chart, in pixels."""


def _metrics(num_steps: int = 200) -> list[dict[str, Any]]:
    """Lines as a training writes them, of two phases."""
    lines: list[dict[str, Any]] = []
    for step in range(num_steps):
        line: dict[str, Any] = {"step": step, "loss": 4.0, "tokens": 100 * step, "step_s": 0.1, "epochs": 0.1}
        line |= {"lr": 1e-3, "grad_norm": 1.0 + step % 7, "tokens_per_s": 1000.0, "phase": f"<{step // 120}>"}
        line |= {f"ce_t{bin}": 1.0 + bin for bin in range(4)} | {f"load_L{layer}": 1.0 + layer for layer in range(9)}
        line |= {"is_odd": step % 2 == 1, "odd_figure": -3.0} if step % 50 == 0 else {}
        if step in (60, 120, 180):
            line |= {"val_nelbo": 4.0 + step / 60, "val_nelbo_mc_se": 0.5}
        lines.append(line)
    return lines


def _named(found: list[Panel]) -> dict[str, ElementTree.Element]:
    return {panel.title: ElementTree.fromstring(f"<svg>{panel.drawing.body}</svg>") for panel in found}


def _paths(drawing: ElementTree.Element, css_class: str) -> list[list[tuple[float, float]]]:
    """Corners of the lines of a class."""
    found = [path.get("d", "") for path in drawing.iterfind("svg/path") if path.get("class") == css_class]
    corner = re.compile(r"[ML]([-\d.]+) ([-\d.]+)")
    return [[(float(x), float(y)) for x, y in corner.findall(path)] for path in found]


def test_panels_are_of_every_number_known_ones_first_and_kinds_together() -> None:
    named = _named(panels(_metrics()))
    assert list(named) == [
        "Validation NELBO (nats/token)",
        "Cross-entropy of masked tokens by t (nats/token)",
        "Learning rate",
        "Gradient norm, before clipping",
        "Tokens a second",
        "load",
        "odd_figure",
    ]
    words = {title: [text.text for text in drawing.iter("text")] for title, drawing in named.items()}
    assert {"t < 0.25", "t < 0.5", "t < 0.75", "t < 1"} <= set(
        words["Cross-entropy of masked tokens by t (nats/token)"]
    )
    assert "each of 9" in words["load"]
    assert len(_paths(named["load"], "many")) == 9


def test_validation_has_a_dot_and_an_error_bar_at_every_point_inside_the_frame() -> None:
    drawing = _named(panels(_metrics()))["Validation NELBO (nats/token)"]
    (line,) = _paths(drawing, "smooth")
    assert len(line) == 3
    assert [y for _, y in line] == sorted((y for _, y in line), reverse=True), "a higher bound stands higher"
    (bars,) = [path.get("d", "") for path in drawing.iterfind("svg/path") if path.get("class") == "smooth bar"]
    ends = [tuple(map(float, found)) for found in re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", bars)]
    nat = (line[0][1] - line[2][1]) / 2.0
    for (x, y), (at, low, high) in zip(line, ends, strict=True):
        assert at == x
        assert (low - y, y - high) == pytest.approx((0.5 * nat, 0.5 * nat), abs=0.11)
        assert FRAME_TOP <= high < low <= FRAME_BOTTOM


def test_panels_share_the_steps_of_the_training_as_their_x_axis() -> None:
    named = _named(panels(_metrics()))
    starts = {
        title: _paths(named[title], "smooth")[-1] for title in ("Learning rate", "Gradient norm, before clipping")
    }
    assert {points[0][0] for points in starts.values()} == {54.0}
    assert {points[-1][0] for points in starts.values()} == {508.0}
    sparse = _paths(named["odd_figure"], "smooth")[0]
    assert [round(x) for x, _ in sparse] == [round(54 + 454 * step / 199) for step in (0, 50, 100, 150)]


def test_learning_rate_is_drawn_as_it_was_and_not_as_a_mean() -> None:
    lines = [{"step": step, "loss": 1.0, "lr": float(step == 150)} for step in range(200)]
    (drawing,) = _named(panels(lines)).values()
    (line,) = _paths(drawing, "smooth")
    assert min(y for _, y in line) == pytest.approx(FRAME_TOP + 156 * 0.05 / 1.05, abs=0.2)


def test_panels_show_a_gap_where_a_figure_was_not_finite_and_nothing_where_it_never_was() -> None:
    lines = [{"step": step, "loss": None, "grad_norm": None if step == 2 else 1.0, "z": None} for step in range(5)]
    (drawing,) = _named(panels(lines)).values()
    path = next(path for path in drawing.iterfind("svg/path")).get("d", "")
    assert path.count("M") == 2
    assert panels([]) == panels([{"step": 0, "loss": 1.0}]) == []


def test_panels_of_a_single_step_are_dots() -> None:
    (drawing,) = _named(panels([{"step": 0, "loss": 1.0, "lr": 1e-3}])).values()
    line, dots = drawing.iterfind("svg/path")
    assert re.fullmatch(r"M[\d.]+ [\d.]+h0", line.get("d", ""))
    assert (dots.get("d"), dots.get("class")) == (line.get("d"), "smooth dots")


def test_bins_of_t_are_those_of_the_objective() -> None:
    assert module.NUM_T_BINS == objectives.NUM_T_BINS


def test_every_measured_figure_has_a_title_or_is_told_by_another() -> None:
    assert {key for key in MEASURED if key not in module._TITLES} == {"step_s"}


def test_phase_bands_are_stretches_of_equal_names() -> None:
    lines = [{"step": step, "phase": name} for step, name in enumerate("aabbba")]
    assert phase_bands(lines) == [Band(0, 1, "a"), Band(2, 4, "b"), Band(5, 5, "a")]
    assert phase_bands(lines[:2]) == phase_bands([{"step": 0}, {"step": 1}]) == []


def test_line_chart_shades_every_other_phase_up_to_the_next() -> None:
    bands = [Band(0, 4, "first"), Band(5, 9, "a name that is far too long for its place"), Band(10, 20, "last")]
    line = Line([(0, 1.0), (20, 2.0)], "", "smooth")
    chart = line_chart([line], [], x_label="", y_label="", y_range=(0, 3), bands=bands)
    root = ElementTree.fromstring(f"<svg>{chart.body}</svg>")
    shaded = [(float(r.get("x", "")), float(r.get("width", ""))) for r in root.iterfind("rect")]
    step = (1070 - 64 - 16) / 20
    assert shaded == [(64.0, pytest.approx(5 * step)), (pytest.approx(64 + 10 * step), pytest.approx(10 * step))]
    labels = [text.text or "" for text in root.iter("text") if text.get("class") == "band-label"]
    assert (labels[0], labels[2]) == ("first", "last")
    assert labels[1].endswith("…")


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        (1.0, ["0.0", "0.2", "0.4"]), (9_000.0, ["0", "2,000", "4,000"]), (40_000.0, ["0k", "10k", "20k"]),
        (2.5e6, ["0.0M", "0.5M", "1.0M"]), (8e10, ["0G", "20G", "40G"]), (0.004, ["0.000", "0.001", "0.002"]),
        (1e-6, ["0", "2e-07", "4e-07"]), (5e-5, ["0", "1e-05", "2e-05"]),
    ],
)  # fmt: skip
def test_tick_label_is_short_at_every_magnitude(high: float, expected: list[str]) -> None:
    ticks = nice_ticks(0.0, high, 5)
    assert [tick_label(tick, ticks) for tick in ticks[:3]] == expected


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 8))
def test_tick_labels_tell_ticks_apart(low: float, width: float, target: int) -> None:
    if width < 1e-6 * abs(low):
        width = abs(low) + 1.0
    ticks = nice_ticks(low, low + width, target)
    labels = [tick_label(tick, ticks) for tick in ticks]
    assert len(set(labels)) == len(ticks)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600), st.lists(st.floats(-1e6, 1e6), max_size=5))
def test_visible_range_hides_a_hundredth_of_the_numbers_at_most(numbers: list[float], whole: list[float]) -> None:
    low, high = visible_range(numbers, whole)
    assert sum(not low <= number <= high for number in numbers) <= len(numbers) / 100
    assert all(low <= number <= high for number in whole)
    assert low >= 0 or min([*numbers, *whole]) < 0


@pytest.mark.parametrize(
    ("value", "labels"), [(751_996_928.0, ["751.5M", "752.0M", "752.5M"]), (0.0, ["0.0", "0.2", "0.4"])]
)
def test_a_figure_that_does_not_change_has_an_axis_of_its_size(value: float, labels: list[str]) -> None:
    lines = [{"step": step, "peak_resident_bytes": value + step % 2} for step in range(4)] if value else []
    lines = lines or [{"step": step, "skipped": 0} for step in range(4)]
    (drawing,) = _named(panels(lines)).values()
    ticks = [text.text for text in drawing.iter("text") if text.get("class") == "tick" and text.get("x") == "46"]
    assert ticks[:3] == labels


def test_report_with_every_figure_is_well_formed_and_escapes_the_names_of_phases(tmp_path: Path) -> None:
    artifacts = make_artifacts(tmp_path)
    text = "".join(json.dumps(line) + "\n" for line in _metrics())
    (artifacts["pretrain"] / "metrics.jsonl").write_text(text)
    forge(artifacts["pretrain"], "metrics.jsonl")
    source, page = render(artifacts, tmp_path / "report.html")
    drawings = re.findall(r'<svg class="figure.*?</svg>(?=</div>|</figure>)', source)
    assert len(drawings) == 3 + 7
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert page.tags.count("figcaption") == 7
    assert page.texts.count("<0>") == page.texts.count("<1>") == 2 + 7
    assert "nan" not in "".join(drawings)


@pytest.mark.parametrize(("logged", "has_level"), [({"nelbo": 6.5}, True), ({}, False)])
def test_a_weighted_loss_does_not_stand_beside_the_unigram_entropy(
    logged: dict[str, float], has_level: bool, tmp_path: Path
):
    artifacts = make_artifacts(tmp_path, *(name for name in INPUTS if name != "pretrain"))
    artifacts["pretrain"] = make_artifact(tmp_path, "pretrain", logged=logged)
    _, page = render(artifacts, tmp_path / "report.html")
    assert ("unigram entropy (held out), 6.43" in page.texts) == has_level
    assert ("NELBO of the training batch (nats/token)" in page.texts) == has_level
    assert ("Weighted loss, no bound" in page.texts) == has_level  # in a chart of its own
    assert ("weighted loss, no bound" in page.texts) == (not has_level)
    assert "training loss (nats/token)" not in page.texts
    assert "the mean loss of the last 50 is 3.3000 as it is weighted, which is no bound." in page.text
