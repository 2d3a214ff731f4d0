"""The figure of the noise schedules: mask probability and NELBO weight over t."""

# ruff: noqa: RUF001 (the labels are typeset: minus signs, primes, Greek)

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.figures_parts import AMBER, BLUE, CARD, INK, PURPLE, TEAL, Axes, Points, card, coloured, number
from dlm_core.schedules import SCHEDULES, ClippedSchedule, Schedule
from workflows.report.svg import text

_SCHEDULES: dict[str, Schedule] = {**SCHEDULES, "clipped": ClippedSchedule(0.3, 0.8)}
_HEIGHT = 514.0
_LEGEND_TOP = 440
_LEGEND_COLUMNS = ((56, 88), (270, 98), (628, 66))
"""Where a column begins, and how far right of its names the formulas stand."""
_POINTS = 81
_MIN_WEIGHT, _MAX_WEIGHT = 0.1, 100.0
"""Range of the weights shown."""
_LABEL_GAP = 13.0
"""Pixels between the names at the ends of the lines."""
_CHAR_WIDTH = 6.3
"""About what a letter of a name takes: the ground of a name on its line is as long as its letters."""


@dataclass(frozen=True)
class _Look:
    """How the lines of a schedule are drawn; the name of one in the frame stands on it at a time t, or at a point."""

    colour: str
    formula: str
    """1 - alpha_t."""
    prob_label: float | tuple[float, float]
    weight_label: float | None = None
    """None for a line that ends at the right edge, where its name stands."""
    dash: str = ""


_LOOKS = {
    "linear": _Look(BLUE, "t", 0.24),
    "cosine": _Look(TEAL, "1 − cos(πt/2)", 0.63),
    "cosine_sqr": _Look("#5a8f1d", "sin²(πt/2)", 0.33, 0.53),
    "sigma_linear": _Look(INK, "1 − exp(−10⁸ t)", (0.02, 0.95), dash="7 3"),
    "geometric": _Look(AMBER, "1 − exp(−σ),  σ = 10⁻⁴⁽¹⁻ᵗ⁾ 20ᵗ", (0.645, 0.17), 0.4),
    "square": _Look("#c2347f", "t²", 0.55),
    "sqrt": _Look("#6f7a8d", "√t", 0.3),
    "log": _Look("#a88400", "log₂(1 + t)", 0.2),
    "clipped": _Look(PURPLE, "0.3 + 0.5 t", 0.93, dash="2 3"),
}


def draw_schedules() -> str:
    """Every published schedule and a clipped one, as a whole SVG file."""
    left = Axes(56, 52, 370, 300, (0.0, 1.0), (0.0, 1.0))
    right = Axes(504, 52, 318, 300, (0.0, 1.0), (_MIN_WEIGHT, _MAX_WEIGHT), log_y=True)
    probs = {name: mask_probs(schedule) for name, schedule in _SCHEDULES.items()}
    weights = {name: points for name, schedule in _SCHEDULES.items() if (points := nelbo_weights(schedule))}
    ticks = [(i / 5, f"{i / 5:g}") for i in range(6)]
    weight_ticks = [(10.0**power, f"{10.0**power:g}") for power in range(-1, 3)]
    parts = [
        left.frame("Mask probability  1 − αₜ", ticks, ticks, "time t"),
        right.frame("NELBO weight  −αₜ′ / (1 − αₜ),  in 1 / time", ticks, weight_ticks, "time t"),
    ]
    for axes, lines in ((left, probs), (right, weights)):
        parts += [axes.curve(points, _LOOKS[name].colour, _LOOKS[name].dash) for name, points in lines.items()]
    for name, look in _LOOKS.items():
        if isinstance(look.prob_label, tuple):
            x, y = look.prob_label
            parts.append(coloured(left.to_x(x), left.to_y(y), name, look.colour, "on-line"))
        else:
            parts.append(_on_line(left, probs[name], look.prob_label, name))
        if look.weight_label is not None:
            parts.append(_on_line(right, weights[name], look.weight_label, name))
    parts.append(_at_ends(right, weights))
    description = "Mask probability and NELBO weight over time for every schedule of dlm_core.schedules"
    return card("Noise schedules", description, _HEIGHT, "".join(parts) + _legend())


def mask_probs(schedule: Schedule) -> Points:
    """Points (t, 1 - alpha_t), t from 0 to 1."""
    # Dense near 0, where the square root is steep and sigma_linear jumps within a pixel.
    t = torch.cat([torch.tensor([0.0, 1e-6]), torch.linspace(0, 1, _POINTS)[1:] ** 1.5]).double()
    return list(zip(t.tolist(), schedule.mask_prob(t).tolist(), strict=True))


def nelbo_weights(schedule: Schedule) -> Points:
    """Points (t, weight) without those far below the frame, where a weight may be 0; none for sigma_linear."""
    # Half of the points near 0, where most weights are steep.
    t = torch.cat([torch.logspace(-2.5, -1, _POINTS // 2), torch.linspace(0.1, 1, _POINTS)[1:]]).double()
    weights = schedule.nelbo_weight(t)
    return [(x, w) for x, w in zip(t.tolist(), weights.tolist(), strict=True) if w > _MIN_WEIGHT / 100]


def _on_line(axes: Axes, points: Points, t: float, name: str) -> str:
    """The name of a schedule along its line, around time t."""
    after = next(i for i, (x, _) in enumerate(points) if x >= t)
    (x0, y0), (x1, y1) = ((axes.to_x(x), axes.to_y(y)) for x, y in points[after - 1 : after + 1])
    share = (axes.to_x(t) - x0) / (x1 - x0)
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    width = _CHAR_WIDTH * len(name)
    # A ground of its own: the line behind the name would fill the gap over an underscore and pass for a hyphen.
    ground = f'<rect x="{number(-width / 2)}" y="-5" width="{number(width)}" height="10" fill="{CARD}"/>'
    turned = ground + coloured(0, 4, name, _LOOKS[name].colour, "on-line", "middle")
    place = f"{number(axes.to_x(t))} {number(y0 + share * (y1 - y0))}"
    return f'<g transform="translate({place}) rotate({number(angle)})">{turned}</g>'


def _at_ends(axes: Axes, lines: dict[str, Points]) -> str:
    """Names beside the right edge, pushed apart where the lines end close together."""
    ends = {name: axes.to_y(points[-1][1]) for name, points in lines.items() if _LOOKS[name].weight_label is None}
    names = sorted(ends, key=lambda name: ends[name])
    places = spread([ends[name] for name in names], _LABEL_GAP)
    return "".join(
        coloured(axes.right + 7, y + 4, name, _LOOKS[name].colour, "at-end")
        for name, y in zip(names, places, strict=True)
    )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved so that neighbours are at least ``gap`` apart; groups stay around their middle."""
    groups: list[list[float]] = []
    for place in places:
        group = [place]
        while groups and _first(group, gap) - _first(groups[-1], gap) < len(groups[-1]) * gap:
            group = groups.pop() + group
        groups.append(group)
    return [_first(group, gap) + i * gap for group in groups for i in range(len(group))]


def _first(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * gap / 2


def _legend() -> str:
    parts = [text(_LEGEND_COLUMNS[0][0], _LEGEND_TOP - 24, "Mask probability 1 − αₜ of each schedule:", "sub")]
    for place, (name, look) in enumerate(_LOOKS.items()):
        x, indent = _LEGEND_COLUMNS[place // 3]
        y = _LEGEND_TOP + 20 * (place % 3)
        dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        parts.append(f'<path d="M{x} {y - 4}h24" class="curve" stroke="{look.colour}"{dash}/>')
        parts.append(text(x + 32, y, name, "item"))
        parts.append(text(x + 32 + indent, y, look.formula, "sub"))
    note = "sigma_linear is missing on the right: of its weight 10⁸ / (exp(10⁸ t) − 1) nothing is left beyond t = 10⁻⁶."
    return "".join(parts) + text(_LEGEND_COLUMNS[0][0], _LEGEND_TOP + 60, note, "sub")
