"""The figure of quality at equal tokens: ``python -m benchmarks.figures_quality [OUT.svg]``.

It shows ``results/quality.json``, which ``python -m benchmarks.quality --save`` writes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.figures_parts import AMBER, BLUE, MUTED, TEAL, WIDTH, Axes, card, coloured, number
from workflows.report.chart import nice_ticks, tick_label
from workflows.report.svg import text

RESULT = command.RESULTS / "quality.json"
OUT = Path(__file__).parent / "figures" / "quality.svg"
_LEFT, _TOP, _PITCH = 210.0, 52.0, 38.0
_AXIS_WIDTH = WIDTH - _LEFT - 190.0


def draw_quality(report: Mapping[str, Any]) -> str:
    """Bits a byte of every model with both standard errors, as a whole SVG file."""
    figures = report["figures"]
    models: Mapping[str, Mapping[str, Any]] = figures["models"]
    levels = {"xz -9": figures["yardsticks"]["xz_bpb"], "unigram": figures["yardsticks"]["unigram_bpb"]}
    ends = [m["bpb"] + sign * m["bpb_doc_se"] for m in models.values() for sign in (-1, 1)]
    low, high = min(ends + list(levels.values())), max(ends + list(levels.values()))
    margin = 0.04 * (high - low)
    axes = Axes(_LEFT, _TOP, _AXIS_WIDTH, _PITCH * len(models), (low - margin, high + margin), (0.0, 1.0))
    ticks = nice_ticks(*axes.x_range)
    label = "bits a byte of held-out text: exact for AR, a bound for all others"
    parts = [axes.frame("Quality at equal tokens", [(tick, tick_label(tick, ticks)) for tick in ticks], [], label)]
    for name, level in levels.items():
        x = axes.to_x(level)
        side, anchor = (4, "start") if x < axes.left + axes.width / 2 else (-4, "end")
        parts.append(f'<path d="M{number(x)} {_TOP:g}V{axes.bottom:g}" class="grid" stroke-dasharray="5 4"/>')
        parts.append(coloured(x + side, axes.bottom - 4, name, MUTED, "tick", anchor))
    parts.append(text(axes.right + 14, _TOP - 14, "bits a byte", "name"))
    parts += [_row(axes, place, name, model) for place, (name, model) in enumerate(models.items())]
    height = axes.bottom + 100
    tokens = f"{figures['tokens'] / 1e6:.1f}M tokens in the same order for every model, {figures['num_steps']} steps"
    parts.append(text(30, height - 36, f"{tokens}; dashed: two yardsticks on the same text.", "tick"))
    errors = (
        "Thick bar: standard error of the drawn masks. Thin bar: over documents, which are the same for all models."
    )
    parts.append(text(30, height - 18, errors, "tick"))
    summary = "; ".join(f"{name}: {model['bpb']:.3f}" for name, model in models.items())
    return card("Bits a byte of models trained on the same tokens", summary, height, "".join(parts))


def _row(axes: Axes, place: int, name: str, model: Mapping[str, Any]) -> str:
    y = _TOP + (place + 0.5) * _PITCH
    colour = AMBER if model["is_exact"] else BLUE if model["total_params"] == model["active_params"] else TEAL
    middle, bpb = number(y), model["bpb"]
    bars = (
        f'<path d="M{number(axes.to_x(bpb - half))} {middle}H{number(axes.to_x(bpb + half))}" fill="none" '
        f'stroke="{colour}" stroke-width="{width}"{faint}/>'
        for half, width, faint in ((model["bpb_doc_se"], 1.5, ' opacity=".6"'), (model["bpb_mc_se"], 5, ""))
    )
    shown = f"{bpb:.3f}" if model["is_exact"] else f"{bpb:.3f} ± {model['bpb_mc_se']:.3f}"
    dot = f'<circle cx="{number(axes.to_x(bpb))}" cy="{middle}" r="4.5" fill="{colour}"/>'
    label = text(axes.left - 12, round(y + 4, 1), name, "name", "end")
    return label + "".join(bars) + dot + text(axes.right + 14, round(y + 4, 1), shown, "num")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures_quality", description=main.__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=OUT, metavar="OUT.svg", help="benchmarks/figures/quality.svg"
    )
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw_quality(json.loads(RESULT.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
