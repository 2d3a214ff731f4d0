"""The benchmark of memory: its figures are a rank's own, and the formula is within a tenth of them."""

from pathlib import Path

import pytest

from benchmarks import memory
from benchmarks.command import Options, RefusedError
from benchmarks.memory import CASES, Case, peak_bytes
from pipeline.pretrain.memory import rank_memory


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", CASES)
def test_formula_is_within_a_tenth_of_the_measured_peak(name):
    case = CASES[name]
    assert rank_memory(case.model, case.layout).device_bytes == pytest.approx(peak_bytes(case), rel=0.1)


def test_text_is_refused():
    with pytest.raises(ValueError, match="--text"):
        memory.measure(Options(quick=True, text=(Path("x"),)))


def _fail(case: Case, rank: int, answer: object) -> None:
    raise SystemExit(3)


@pytest.mark.distributed
def test_rank_that_fails_is_no_measurement(monkeypatch):
    monkeypatch.setattr(memory, "_rank", _fail)
    with pytest.raises(RefusedError, match="ended without an answer"):
        peak_bytes(CASES["dense, float32, ZeRO-1"])


def test_machine_that_is_busy_may_be_reported_where_no_time_is_measured(capsys):
    from benchmarks import command
    from benchmarks.machine import Probe

    busy = Probe(10.0, 100.0, 500.0, 5000.0, 2)
    measured = command.Measured("table", {}, {})
    assert command.run("x", lambda options: measured, [], lambda: busy, is_timed=False) == 0
    assert "start" in capsys.readouterr().out
    assert command.run("x", lambda options: measured, [], lambda: busy) == 1
