"""The figure of quality against forward passes: ``python -m benchmarks.figures_sampling [OUT.svg]``.

It shows ``results/sampling_quality.json``, which ``python -m benchmarks.sampling_quality --save`` writes.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.figures_parts import AMBER, BLUE, MUTED, PURPLE, TEAL, Axes, card, coloured, number
from workflows.report.chart import nice_ticks, tick_label
from workflows.report.svg import text

RESULT = command.RESULTS / "sampling_quality.json"
OUT = Path(__file__).parent / "figures" / "sampling_quality.svg"
SHOWN: Mapping[str, tuple[str, str]] = {
    "ancestral": (BLUE, ""),
    "first_hitting": (BLUE, "6 4"),
    "random": (BLUE, "2 3"),
    "remdm": (TEAL, ""),
    "path_planning": (TEAL, "6 4"),
    "confidence": (AMBER, ""),
    "threshold": (AMBER, "6 4"),
    "factor": (AMBER, "2 3"),
    "margin": (PURPLE, ""),
    "entropy": (PURPLE, "6 4"),
    "entropy_bound": (PURPLE, "2 3"),
}
"""Colour and dashes by sampler; the rest is in the table."""
_HEIGHT = 500.0
_TOP, _PANEL, _WIDTH = 92.0, 300.0, 372.0
_LEGEND_COLUMNS, _LEGEND_PITCH = 6, 138.0


def draw_sampling(report: Mapping[str, Any]) -> str:
    """Generative perplexity and entropy by forward passes of every sampler, as a whole SVG file."""
    figures = report["figures"]
    curves = {label: points for label, points in figures["curves"].items() if label in SHOWN}
    passes = [point["nfe"] for points in curves.values() for point in points]
    x_range = (math.log2(min(passes)) - 0.2, math.log2(max(passes)) + 0.2)
    parts = [_legend(curves)]
    for left, key, title, is_log in (
        (62.0, "ppl", "Generative perplexity (lower: likelier text)", True),
        (500.0, "unigram_entropy", "Unigram entropy, nats (higher: more varied)", False),
    ):
        level = figures["text"][key]
        values = [point[key] for points in curves.values() for point in points] + [level]
        low, high = min(values), max(values)
        margin = 0.06 * (high - low)
        y_range = (low / 1.15, high * 1.15) if is_log else (low - margin, high + margin)
        axes = Axes(left, _TOP, _WIDTH, _PANEL, x_range, y_range, log_y=is_log)
        parts.append(_frame(axes, title))
        parts += [
            axes.curve(
                [(math.log2(point["nfe"]), point[key]) for point in sorted(points, key=lambda p: p["nfe"])], *look
            )
            + _dots(axes, points, key, look[0])
            for look, points in ((SHOWN[label], points) for label, points in curves.items())
        ]
        y = number(axes.to_y(level))
        parts.append(f'<path d="M{axes.left:g} {y}H{axes.right:g}" stroke="{MUTED}" stroke-dasharray="1 3"/>')
        parts.append(coloured(axes.right - 4, axes.to_y(level) - 5, "held-out text", MUTED, "on-line", "end"))
    note = (
        f"{figures['num_samples']} samples of {figures['seq_len']} tokens each, temperature 1, scored by a next-token "
        "model trained on the same text."
    )
    parts.append(text(30, _HEIGHT - 34, note, "tick"))
    warning = "Text that repeats itself is likely: a perplexity below that of text goes with an entropy below it."
    parts.append(text(30, _HEIGHT - 16, warning, "tick"))
    ends = "; ".join(f"{label}: {points[-1]['ppl']:.0f} at {points[-1]['nfe']:.0f}" for label, points in curves.items())
    return card("Quality against forward passes", f"Perplexity at most passes: {ends}", _HEIGHT, "".join(parts))


def _frame(axes: Axes, title: str) -> str:
    x_ticks = [(float(k), str(2**k)) for k in range(math.ceil(axes.x_range[0]), math.floor(axes.x_range[1]) + 1)]
    low, high = axes.y_range
    if axes.log_y:
        y_ticks = [10.0**k * m for k in range(-1, 7) for m in (1, 2, 5) if low <= 10.0**k * m <= high]
        return axes.frame(title, x_ticks, [(tick, f"{tick:,g}") for tick in y_ticks], "forward passes of a sample")
    ticks = nice_ticks(low, high)
    return axes.frame(title, x_ticks, [(t, tick_label(t, ticks)) for t in ticks], "forward passes of a sample")


def _dots(axes: Axes, points: Sequence[Mapping[str, float]], key: str, colour: str) -> str:
    return "".join(
        f'<circle cx="{number(axes.to_x(math.log2(point["nfe"])))}" cy="{number(axes.to_y(point[key]))}" r="2.6" '
        f'fill="{colour}"/>'
        for point in points
    )


def _legend(curves: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for place, label in enumerate(curves):
        colour, dash = SHOWN[label]
        x, y = 62.0 + place % _LEGEND_COLUMNS * _LEGEND_PITCH, 26.0 + place // _LEGEND_COLUMNS * 20.0
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path d="M{x:g} {y:g}h26" stroke="{colour}" stroke-width="2.5"{dashed}/>')
        parts.append(coloured(x + 32, y + 4, label, colour, "at-end"))
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures_sampling", description=main.__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=OUT, metavar="OUT.svg", help="benchmarks/figures/sampling_quality.svg"
    )
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw_sampling(json.loads(RESULT.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
