"""The figure of the estimators' variance, enumerated in a small world."""

import torch

from benchmarks.figures_moments import (
    NUM_BINS,
    World,
    by_time,
    enumerate_world,
    estimators,
    median_time,
    shares_below,
    text_means,
    variance,
)
from benchmarks.figures_parts import AMBER, BLUE, MUTED, Axes, card, coloured, number
from tests.support.reference import Joint
from workflows.report.svg import text

NUM_REAL, LENGTH = 3, 5
T_MIN = 1e-3
NUM_STRATA = 8
_SEED, _SHARPNESS = 1, 2.0
_HEIGHT = 478.0
_PALE = "#a9c3f2"
_VARIANCES = (0.1, 1e4)
_BARS_LEFT, _BARS_TOP, _BARS_WIDTH = 498.0, 92.0, 270.0
_GROUP_PITCH, _BAR_HEIGHT = 70.0, 17.0
_MEANS_RIGHT = 872.0

_WHAT = {
    "uniform t": "weight 1 / t",
    "change of variables": "log t uniform, as in MDLM",
    "optimal density": f"{NUM_BINS} bins of t, a tenth kept uniform",
    "exact count": "k of L masked, weight L / k",
}


def make_joint() -> Joint:
    """The texts of the figure."""
    return Joint(NUM_REAL, LENGTH, _SEED, _SHARPNESS)


def draw_variance() -> str:
    """Variance by t, and in total by estimator, as a whole SVG file."""
    world = enumerate_world(make_joint())
    description = "Variance of one draw of the NELBO by time, and in total for four ways to draw, computed exactly"
    notes = (
        f"Exact, no sampling: {NUM_REAL} real tokens, sequences of L = {LENGTH}, a random joint distribution whose "
        "conditionals are the denoiser; linear schedule.",
        "Variance: for a given text, averaged over texts, per sequence. "
        f"Stratified: {NUM_STRATA} times the variance of the mean of a batch.",
        f"Mean: with exact counts the entropy of the texts, {world.entropy:.4f}; draws of t average over t above "
        f"t_min = {T_MIN:g}.",
    )
    foot = "".join(text(56, _HEIGHT - 56 + 18 * i, note, "tick") for i, note in enumerate(notes))
    return card("Variance of the NELBO estimators", description, _HEIGHT, _by_time(world) + _in_total(world) + foot)


def _by_time(world: World) -> str:
    """Left: one draw at a given t, with the times that make half of the variance."""
    upper = Axes(56, 52, 380, 184, (0.0, 1.0), _VARIANCES, log_y=True)
    lower = Axes(56, 274, 380, 84, (0.0, 1.0), (0.0, 6.0))
    # Many points below 0.1, where the variance is steep.
    t = torch.cat([torch.logspace(-3, -1, 50), torch.linspace(0.1, 1.0, 91)[1:]]).double()
    found = by_time(world, t)
    times, means, variances = found.t.tolist(), found.mean.tolist(), found.variance.tolist()
    middle = median_time(world, T_MIN)
    mean_share, _ = shares_below(world, middle, T_MIN)
    ticks = [(i / 5, f"{i / 5:g}") for i in range(6)]
    powers = [(10.0**power, label) for power, label in ((-1, "0.1"), (0, "1"), (1, "10"), (2, "100"), (3, "1,000"))]
    parts = [
        upper.frame("Variance of one draw at time t, (nats / time)²", [], [*powers, (1e4, "10,000")]),
        lower.frame(
            "Its mean: the contribution to the loss, nats / time", ticks, [(i, f"{i}") for i in (0, 2, 4, 6)], "time t"
        ),
    ]
    for axes in (upper, lower):
        width = number(axes.to_x(middle) - axes.left)
        parts.append(
            f'<rect x="{axes.left:g}" y="{axes.top:g}" width="{width}" height="{axes.height:g}" '
            f'fill="{AMBER}" opacity=".22"/>'
        )
    # The variance is 0 at t = 1, which a logarithm can't show.
    shown = [(x, y) for x, y in zip(times, variances, strict=True) if y > _VARIANCES[0] / 10]
    parts += [upper.curve(shown, BLUE), lower.curve(list(zip(times, means, strict=True)), BLUE)]
    beside = upper.to_x(middle) + 8
    parts.append(coloured(beside + 18, upper.to_y(2e3), f"half of the variance: t < {middle:.3f}", AMBER, "on-line"))
    parts.append(coloured(beside, lower.to_y(0.55), f"{100 * mean_share:.1f} % of the loss", AMBER, "on-line"))
    return "".join(parts)


def _in_total(world: World) -> str:
    """Right: a pair of bars for each estimator, with its mean."""
    rows = [
        (e, (variance(world, e), variance(world, e, NUM_STRATA)), float(world.probs @ text_means(world, e)))
        for e in estimators(world, T_MIN)
    ]
    longest = max(max(variances) for _, variances, _ in rows)
    parts = [
        text(_BARS_LEFT, 38, "Variance of one draw, nats²", "name"),
        text(_MEANS_RIGHT, 38, "mean, nats", "name", "end"),
        _swatch(_BARS_LEFT, _PALE, "independent"),
        _swatch(_BARS_LEFT + 112, BLUE, f"stratified over a batch of {NUM_STRATA}"),
    ]
    for i, (estimator, variances, mean) in enumerate(rows):
        top = _BARS_TOP + i * _GROUP_PITCH
        parts.append(
            f'<text x="{_BARS_LEFT:g}" y="{top:g}" style="font-weight:600">{estimator.name}'
            f'<tspan dx="8" style="font-weight:400;fill:{MUTED}">{_WHAT[estimator.name]}</tspan></text>'
        )
        for j, (value, colour) in enumerate(zip(variances, (_PALE, BLUE), strict=True)):
            y, width = top + 8 + j * (_BAR_HEIGHT + 2), value / longest * _BARS_WIDTH
            parts.append(
                f'<rect x="{_BARS_LEFT:g}" y="{y:g}" width="{number(width)}" height="{_BAR_HEIGHT:g}" '
                f'rx="2" fill="{colour}"/>'
            )
            parts.append(text(round(_BARS_LEFT + width + 7, 1), y + 13, f"{value:.1f}", "num"))
        parts.append(text(_MEANS_RIGHT, top + 8 + _BAR_HEIGHT + 5, f"{mean:.4f}", "num", "end"))
    return "".join(parts)


def _swatch(x: float, colour: str, label: str) -> str:
    return f'<rect x="{x:g}" y="50" width="12" height="12" rx="2" fill="{colour}"/>' + text(x + 18, 60, label, "tick")
