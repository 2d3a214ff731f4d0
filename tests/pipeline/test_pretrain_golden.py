"""The losses of a tiny training, as committed: a change that should not touch them must not."""

from pathlib import Path

import pytest

from pipeline.artifact import read_json
from tests.support.golden import GOLDEN
from tests.support.tiny_run import losses

SAME = 1e-5
"""Relative; not bitwise, since matrix products sum in an order that depends on the CPU's instruction set."""


@pytest.mark.timeout(120)
def test_losses_are_the_committed_ones(alone: Path) -> None:
    wanted = read_json(GOLDEN)["losses"]
    assert len(wanted) == 20
    assert losses(alone) == pytest.approx(wanted, rel=SAME), (
        "the losses changed; if that is meant, run: python -m tests.support.golden"
    )
