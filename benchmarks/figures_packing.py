"""The figure of the packing policies: ``python -m benchmarks.figures_packing [OUT.svg]``.

The rows in it are those that pipeline.data.packing plans for the same documents; a test compares the committed file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.figures_parts import AMBER, BLUE, CARD, LINE, PURPLE, TEAL, WIDTH, card, number
from pipeline.data.packing import PADDING, PackingPolicy, RowPlan, plan_rows
from workflows.report.svg import text

OUT = Path(__file__).parents[1] / "pipeline" / "figures" / "packing.svg"
SEQ_LEN = 32
LENGTHS = (21, 9, 45, 13, 5, 27, 18, 7, 30, 11, 3, 16)
"""Tokens of the documents."""
PANELS: tuple[tuple[PackingPolicy, int, str], ...] = (
    ("concatenate", 1, "concatenate"),
    ("best_fit", 1, "best_fit"),
    ("best_fit", 4, "best_fit, blocks of 4"),
    ("document", 1, "document"),
)
_COLOURS = (BLUE, TEAL, AMBER, PURPLE, "#3d8b37", "#b3324b", "#4a5a78")
_LEFT, _TOP, _GAP = 30.0, 64.0, 22.0
_ROW, _PITCH = 15.0, 19.0
_PANEL = (WIDTH - 2 * _LEFT - (len(PANELS) - 1) * _GAP) / len(PANELS)


def draw_packing() -> str:
    """The same documents as rows of each policy, as a whole SVG file."""
    plans = [plan_rows(np.array(LENGTHS), SEQ_LEN, policy, block) for policy, block, _ in PANELS]
    parts = [
        _panel(plan, label, _LEFT + place * (_PANEL + _GAP))
        for place, (plan, (*_, label)) in enumerate(zip(plans, PANELS, strict=True))
    ]
    height = _TOP + max(plan.num_rows for plan in plans) * _PITCH + 34
    parts.append(
        text(_LEFT, height - 16, f"{len(LENGTHS)} documents of {min(LENGTHS)} to {max(LENGTHS)} tokens in rows of "
             f"{SEQ_LEN}; a colour and a number are a document, white is padding", "sub")
    )  # fmt: skip
    title = "The same documents as rows of each packing policy"
    counts = "; ".join(f"{label}: {_summary(plan)}" for plan, (*_, label) in zip(plans, PANELS, strict=True))
    return card(title, counts, height, "".join(parts))


def _summary(plan: RowPlan) -> str:
    padding = 1 - sum(LENGTHS) / (plan.num_rows * SEQ_LEN)
    return f"{plan.num_rows} rows, {100 * padding:.0f} % padding"


def _panel(plan: RowPlan, label: str, left: float) -> str:
    parts = [text(left, _TOP - 30, label, "name"), text(left, _TOP - 13, _summary(plan), "sub")]
    scale = _PANEL / SEQ_LEN
    for row in range(plan.num_rows):
        x, y = left, _TOP + row * _PITCH
        parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(_PANEL)}" height="{number(_ROW)}" fill="{CARD}" '
            f'stroke="{LINE}"/>'
        )
        for segment in range(int(plan.row_starts[row]), int(plan.row_starts[row + 1])):
            width = abs(int(plan.length[segment])) * scale
            document = int(plan.document[segment])
            if document != PADDING:
                parts.append(_segment(x, y, width, document))
            x += width
    return "".join(parts)


def _segment(x: float, y: float, width: float, document: int) -> str:
    colour = _COLOURS[document % len(_COLOURS)]
    box = f'<rect x="{number(x)}" y="{number(y)}" width="{number(width - 1)}" height="{number(_ROW)}" fill="{colour}"/>'
    name = (
        f'<text x="{number(x + (width - 1) / 2)}" y="{number(y + 11.5)}" class="tick" text-anchor="middle" '
        f'style="fill:{CARD}">{document}</text>'
    )
    return box + (name if width > 14 else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures_packing", description=main.__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=OUT, metavar="OUT.svg", help="pipeline/figures/packing.svg"
    )
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw_packing(), encoding="utf-8")


if __name__ == "__main__":
    main()
