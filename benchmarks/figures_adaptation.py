"""The figure of adaptation: ``python -m benchmarks.figures_adaptation [OUT.svg]``.

It shows ``results/adaptation.json``, which ``python -m benchmarks.adaptation --save`` writes.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.figures_parts import AMBER, BLUE, MUTED, PURPLE, TEAL, Axes, Points, card, coloured, number
from workflows.report.chart import nice_ticks, tick_label
from workflows.report.svg import text

RESULT = command.RESULTS / "adaptation.json"
OUT = Path(__file__).parent / "figures" / "adaptation.svg"
COLOURS = {"shift": BLUE, "no_shift": AMBER, "annealed": TEAL, "scratch": PURPLE}
SMOOTHED_STEPS = 4
EARLY_SHARE = 0.25
_HEIGHT = 430.0
_TOP, _PANEL = 62.0, 270.0


def draw_adaptation(report: Mapping[str, Any]) -> str:
    """Held-out bound by tokens seen, and the bound of the first batches, as a whole SVG file."""
    figures = report["figures"]
    arms: Mapping[str, Mapping[str, Any]] = figures["arms"]
    tokens = figures["tokens"]
    held_out = {slug: _mean(_held_out(arm)) for slug, arm in arms.items()}
    early = {
        slug: [point for point in smoothed(_mean(_trained(arm, tokens))) if point[0] <= EARLY_SHARE * tokens]
        for slug, arm in arms.items()
    }
    left = _axes(62.0, 430.0, tokens, held_out)
    right = _axes(600.0, 260.0, EARLY_SHARE * tokens, early)
    parts = [
        _frame(left, "Held-out text, nats a token (bound)"),
        _frame(right, f"The first batches, mean of {SMOOTHED_STEPS} steps"),
    ]
    for slug, arm in arms.items():
        colour = COLOURS[slug]
        for run in _held_out(arm):
            parts += [_dot(left, x, y, colour) for x, y in run]
        parts.append(left.curve(held_out[slug], colour))
        parts.append(right.curve(early[slug], colour))
    parts.append(_legend(arms))
    seeds = len(next(iter(arms.values()))["seeds"])
    note = (
        f"{tokens / 1e3:.0f} thousand tokens of training text. Lines: mean of {seeds} seeds, dots: each. Held out: "
        f"{figures['validation_rows']} rows of {figures['seq_len']} tokens of another text."
    )
    parts.append(text(30, _HEIGHT - 18, note, "tick"))
    ends = "; ".join(f"{arms[slug]['label']}: {points[-1][1]:.2f}" for slug, points in held_out.items())
    return card(
        "A next-token checkpoint as a diffusion model", f"Nats a token at the end: {ends}", _HEIGHT, "".join(parts)
    )


def _held_out(arm: Mapping[str, Any]) -> list[list[tuple[float, float]]]:
    """(tokens, nats) of every seed."""
    return [[(point[0], point[1]) for point in run["held_out"]] for run in arm["seeds"].values()]


def _trained(arm: Mapping[str, Any], tokens: float) -> list[list[tuple[float, float]]]:
    """(tokens, nats) of every seed and step."""
    return [
        [(tokens * step / len(run["trained"]), nats) for step, nats in enumerate(run["trained"], 1)]
        for run in arm["seeds"].values()
    ]


def _mean(runs: Sequence[Points]) -> list[tuple[float, float]]:
    return [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*runs, strict=True)]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Means of so many points one after another, at the last of them."""
    groups = [points[start : start + SMOOTHED_STEPS] for start in range(0, len(points), SMOOTHED_STEPS)]
    return [(group[-1][0], statistics.mean(y for _, y in group)) for group in groups]


def _axes(left: float, width: float, tokens: float, curves: Mapping[str, Points]) -> Axes:
    values = [y for points in curves.values() for _, y in points]
    margin = 0.06 * (max(values) - min(values))
    return Axes(left, _TOP, width, _PANEL, (0.0, tokens), (min(values) - margin, max(values) + margin))


def _frame(axes: Axes, title: str) -> str:
    x_ticks, y_ticks = nice_ticks(*axes.x_range), nice_ticks(*axes.y_range)
    labels = [(tick, f"{tick / 1e3:g}k") for tick in x_ticks]
    return axes.frame(title, labels, [(tick, tick_label(tick, y_ticks)) for tick in y_ticks], "tokens seen")


def _dot(axes: Axes, x: float, y: float, colour: str) -> str:
    return f'<circle cx="{number(axes.to_x(x))}" cy="{number(axes.to_y(y))}" r="3" fill="{colour}" opacity=".55"/>'


def _legend(arms: Mapping[str, Mapping[str, Any]]) -> str:
    parts: list[str] = []
    x = 62.0
    for slug, arm in arms.items():
        parts.append(f'<rect x="{number(x)}" y="22" width="14" height="4" rx="2" fill="{COLOURS[slug]}"/>')
        parts.append(coloured(x + 20, 28, arm["label"], COLOURS[slug], "at-end"))
        x += 40 + 7.2 * len(arm["label"])
    parts.append(coloured(870, 28, "lower is better", MUTED, "tick", "end"))
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures_adaptation", description=main.__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=OUT, metavar="OUT.svg", help="benchmarks/figures/adaptation.svg"
    )
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw_adaptation(json.loads(RESULT.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
