"""The committed figure of the packing policies is what the code draws, and shows every token once."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from benchmarks import figures_packing
from benchmarks.figures_packing import LENGTHS, OUT, PANELS, SEQ_LEN
from pipeline.data.packing import plan_rows


def test_the_committed_figure_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    figures_packing.main([str(tmp_path / "new" / "packing.svg")])
    assert (tmp_path / "new" / "packing.svg").read_bytes() == OUT.read_bytes()


def test_widths_of_a_policy_add_up_to_its_tokens() -> None:
    root = ElementTree.fromstring(OUT.read_text(encoding="utf-8"))
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if box.get("stroke") is None]
    widths = [float(box.get("width", "0")) + 1 for box in boxes]
    scale = figures_packing._PANEL / SEQ_LEN
    assert abs(sum(widths) / scale - len(PANELS) * sum(LENGTHS)) < 0.1 * len(boxes) / scale


def test_the_numbers_of_rows_are_those_of_the_plans() -> None:
    found = [int(rows) for rows in re.findall(r">(\d+) rows, ", OUT.read_text(encoding="utf-8"))]
    assert found == [plan_rows(np.array(LENGTHS), SEQ_LEN, policy, block).num_rows for policy, block, _ in PANELS]
