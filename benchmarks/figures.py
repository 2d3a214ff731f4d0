"""The pictures in the README of dlm_core: ``python -m benchmarks.figures [FOLDER]``.

Everything in them is computed by dlm_core itself; a test compares the committed files with what this draws.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.figures_masks import draw_masks
from benchmarks.figures_schedules import draw_schedules
from benchmarks.figures_variance import draw_variance

FOLDER = Path(__file__).parents[1] / "dlm_core" / "figures"
FIGURES: dict[str, Callable[[], str]] = {
    "schedules": draw_schedules,
    "masks": draw_masks,
    "variance": draw_variance,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw every figure anew into a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, metavar="FOLDER", help="dlm_core/figures")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
