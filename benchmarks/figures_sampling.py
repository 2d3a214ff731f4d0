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
from benchmarks.figures_parts import AMBER, BLUE, INK, MUTED, PURPLE, TEAL, Axes, card, coloured, number
from workflows.report.chart import nice_ticks, tick_label
from workflows.report.svg import text

RESULT = command.RESULTS / "sampling_quality.json"
OUT = Path(__file__).parent / "figures" / "sampling_quality.svg"
FAMILIES: Mapping[str, Mapping[str, str]] = {
    "In random order": {name: name for name in ("ancestral", "origin", "analytic", "first_hitting", "random")},
    "The surest first": {
        **{name: name for name in ("confidence", "threshold", "factor")},
        "self_speculative, temperature 0": "self_speculative",
    },
    "Margin or entropy": {name: name for name in ("margin", "entropy", "entropy_bound")},
    "Tokens taken back": {name: name for name in ("remdm", "path_planning")},
    "In windows of 32": {
        "confidence, windows of 32": "no cache",
        "confidence, windows of 32, prefix cache": "prefix cache",
        "confidence, windows of 32, dual cache": "dual cache",
    },
}
"""Title of a column -> label of a curve -> how it is called there."""
_LOOKS = ((BLUE, ""), (AMBER, "7 4"), (TEAL, "2 3"), (PURPLE, "9 3 2 3"), (INK, "4 3"))
"""Colour and dashes of the first curve of a column, and so on."""
_METRICS = (
    ("ppl", "Generative perplexity (lower: likelier text)", True),
    ("unigram_entropy", "Unigram entropy, nats (higher: more varied text)", False),
)
_LEFT, _GAP, _PANEL_WIDTH, _PANEL_HEIGHT = 56.0, 14.0, 153.0, 190.0
_TOPS = (160.0, 404.0)
_HEIGHT = 692.0


def draw_sampling(report: Mapping[str, Any]) -> str:
    """Generative perplexity and entropy by forward passes, a column a family of samplers, as a whole SVG file.

    Raises ValueError for a sampler that has no column.
    """
    figures = report["figures"]
    curves = figures["curves"]
    if strange := curves.keys() - {label for family in FAMILIES.values() for label in family}:
        raise ValueError(f"{sorted(strange)[0]} has no column; FAMILIES has {', '.join(FAMILIES)}")
    passes = [point["nfe"] for points in curves.values() for point in points]
    x_range = (math.log2(min(passes)) - 0.25, math.log2(max(passes)) + 0.25)
    parts: list[str] = []
    for top, (key, title, is_log) in zip(_TOPS, _METRICS, strict=True):
        level = figures["text"][key]
        values = [point[key] for points in curves.values() for point in points] + [level]
        low, high = min(values), max(values)
        margin = 0.06 * (high - low)
        y_range = (low / 1.15, high * 1.15) if is_log else (low - margin, high + margin)
        parts.append(text(_LEFT, top - 12, title, "name"))
        for column, family in enumerate(FAMILIES.values()):
            left = _LEFT + column * (_PANEL_WIDTH + _GAP)
            axes = Axes(left, top, _PANEL_WIDTH, _PANEL_HEIGHT, x_range, y_range, log_y=is_log)
            parts.append(_frame(axes, has_labels=column == 0))
            y = number(axes.to_y(level))
            parts.append(f'<path d="M{axes.left:g} {y}H{axes.right:g}" stroke="{MUTED}" stroke-dasharray="1 3"/>')
            for label, look in zip(family, _LOOKS, strict=False):
                points = sorted(curves[label], key=lambda point: point["nfe"])
                parts.append(axes.curve([(math.log2(point["nfe"]), point[key]) for point in points], *look))
                parts.append(_dots(axes, points, key, look[0]))
            if column == 0:
                parts.append(coloured(axes.left + 5, axes.to_y(level) - 5, "held-out text", MUTED, "on-line"))
    parts += [_legend(title, family, column) for column, (title, family) in enumerate(FAMILIES.items())]
    parts.append(
        text(_LEFT + 2.5 * _PANEL_WIDTH + 2 * _GAP, _TOPS[1] + 225, "forward passes of a sample", "sub", "middle")
    )
    notes = (
        f"{figures['num_samples']} samples of {figures['seq_len']} tokens each, temperature 1 (self_speculative: 0), "
        "scored by a next-token model trained on the same text. Windows: by confidence.",
        "Text that repeats itself is likely: a perplexity below that of text goes with an entropy below it.",
    )
    parts += [text(30, _HEIGHT - 34 + 18 * place, note, "tick") for place, note in enumerate(notes)]
    ends = "; ".join(f"{label}: {points[-1]['ppl']:.0f} at {points[-1]['nfe']:.0f}" for label, points in curves.items())
    return card("Quality against forward passes", f"Perplexity at most passes: {ends}", _HEIGHT, "".join(parts))


def _frame(axes: Axes, *, has_labels: bool) -> str:
    exponents = range(math.ceil(axes.x_range[0]), math.floor(axes.x_range[1]) + 1)
    x_ticks = [(float(k), str(2**k) if k % 2 else "") for k in exponents]
    low, high = axes.y_range
    if axes.log_y:
        y_ticks = [(10.0**k * m, f"{10.0**k * m:,g}") for k in range(-1, 7) for m in (1, 2, 5)]
    else:
        ticks = nice_ticks(low, high)
        y_ticks = [(tick, tick_label(tick, ticks)) for tick in ticks]
    return axes.frame("", x_ticks, [(y, words if has_labels else "") for y, words in y_ticks if low <= y <= high])


def _dots(axes: Axes, points: Sequence[Mapping[str, float]], key: str, colour: str) -> str:
    return "".join(
        f'<circle cx="{number(axes.to_x(math.log2(point["nfe"])))}" cy="{number(axes.to_y(point[key]))}" r="2.4" '
        f'fill="{colour}"/>'
        for point in points
    )


def _legend(title: str, family: Mapping[str, str], column: int) -> str:
    x = _LEFT + column * (_PANEL_WIDTH + _GAP)
    parts = [text(x, 28, title, "name")]
    for place, (name, (colour, dash)) in enumerate(zip(family.values(), _LOOKS, strict=False)):
        y = 47.0 + place * 17.0
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path d="M{x:g} {y:g}h26" stroke="{colour}" stroke-width="2.5"{dashed}/>')
        parts.append(coloured(x + 32, y + 4, name, colour, "at-end"))
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
