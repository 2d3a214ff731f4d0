"""The chart of the training loss: for the page, and as a file of its own for the README."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workflows.report import svg
from workflows.report.chart import Level, Line, Size, line_chart, phase_bands, thin, visible_range

WIDE = Size()
_RAW_POINTS = 2000
"""Points of the faint line; a longer training is thinned to the extremes of each stretch."""
_SMOOTH_POINTS = 600
_SMOOTH_SHARE = 50
"""The smooth line is a mean over this fraction of the training (one over)."""


BOUND, WEIGHTED = "NELBO of the training batch (nats/token)", "Weighted loss, no bound"


@dataclass(frozen=True)
class Drawn:
    """Which figure of the metrics is drawn as the training's loss."""

    key: str
    label: str
    is_in_nats: bool = True
    """Whether it may stand beside an entropy."""
    rest: str = ""
    """Which of "loss" and "nelbo" is left to a chart of its own."""


def drawn_loss(metrics: Sequence[Mapping[str, Any]]) -> Drawn:
    """The loss where it is its own bound or exact, as the NELBO logged beside it tells; else that NELBO.

    Where steps have none, since their times allow no bound, it is the loss for what it is.
    """
    if not all("nelbo" in line for line in metrics):
        return Drawn("loss", WEIGHTED.lower(), is_in_nats=False, rest="nelbo")
    if all(line["nelbo"] == line["loss"] for line in metrics):
        return Drawn("loss", "training loss (nats/token)")
    return Drawn("nelbo", BOUND, rest="loss")


@dataclass(frozen=True)
class LossChart:
    """The drawing, and how many steps lie outside its frame."""

    drawing: svg.Drawing
    num_outside: int


def trailing_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last ``window`` values at each place, of those that are numbers; None where there are none."""
    means: list[float | None] = []
    total, number = 0.0, 0
    for place, value in enumerate(values):
        if value is not None:
            total, number = total + value, number + 1
        if place >= window and (old := values[place - window]) is not None:
            total, number = total - old, number - 1
        means.append(total / number if number else None)
    return means


def loss_chart(metrics: Sequence[Mapping[str, Any]], unigram: float | None, size: Size = WIDE) -> LossChart | None:
    """Loss by step, raw and smoothed, with the level of the unigram entropy; None without a finite loss.

    Where the loss is weighted and no bound, the NELBO of the step is drawn instead, or there is no level beside it.
    """
    drawn = drawn_loss(metrics)
    unigram = unigram if drawn.is_in_nats else None
    steps = [line["step"] for line in metrics]
    losses: list[float | None] = [line[drawn.key] for line in metrics]
    numbers = sorted(loss for loss in losses if loss is not None)
    if not numbers:
        return None
    window = max(1, len(losses) // _SMOOTH_SHARE)
    smooth = trailing_mean(losses, window)
    whole = [y for y in smooth if y is not None] + ([] if unigram is None else [unigram])
    y_range = visible_range(numbers, whole)
    lines = [Line(thin(list(zip(steps, smooth, strict=True)), _SMOOTH_POINTS), drawn.key, "smooth")]
    if window > 1:
        raw = Line(thin(list(zip(steps, losses, strict=True)), _RAW_POINTS), "each step", "raw")
        lines = [raw, replace(lines[0], label=f"mean of the last {window} steps")]
    drawing = line_chart(
        lines,
        [] if unigram is None else [Level(unigram, f"unigram entropy (held out), {unigram:.2f}")],
        x_label="optimizer step",
        y_label=drawn.label,
        y_range=y_range,
        bands=phase_bands(metrics),
        size=size,
    )
    return LossChart(drawing, sum(not y_range[0] <= loss <= y_range[1] for loss in numbers))
