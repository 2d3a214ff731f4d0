"""What is measured in a step: with a clock that the test moves, and the norm on two ranks."""

import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.pretrain import saving
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.fragments import LocalTensor, Run
from pipeline.pretrain.gpus import PEAK_TFLOPS, peak_tflops
from pipeline.pretrain.meter import MEASURED, Meter, Stopwatch, peak_resident_bytes, sum_of_squares
from tests.support.hand_state import ThreadRanks, checkpointer, distinct, state_of, succeeded
from tests.support.tiny_run import tiny

GIANT = 600_000_000
CPU = torch.device("cpu")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Alone:
    """One rank, which therefore needs no process group."""

    device = CPU

    def of_all(self, value: Any) -> list[Any]:
        return [value]


def _meter(clock: Clock, weights: Sequence[LocalTensor] = (), stall: Stopwatch | None = None, **changes: Any) -> Meter:
    return Meter(tiny(**{"log_norms_every_steps": 0, **changes}), Alone(), weights, stall or Stopwatch(), clock)  # pyright: ignore[reportArgumentType]


def test_step_has_its_time_with_data_and_without_checkpoint_and_validation() -> None:
    clock = Clock()
    stall = Stopwatch(clock)
    with stall:
        clock.now_s += 7.0
    meter = _meter(clock, stall=stall)
    with meter.waiting_for("data"):
        clock.now_s += 0.25
    clock.now_s += 1.75
    first = {"step_s": 2.0, "tokens_per_s": 500.0, "data_wait_s": 0.25, "checkpoint_stall_s": 0.0}
    assert meter.end_step(0, 1000, 1.0) == first
    for seconds in (1.0, 2.0):
        with stall:
            clock.now_s += seconds
    with meter.waiting_for("validation"):
        clock.now_s += 5.0
    for _ in range(2):
        with meter.waiting_for("data"):
            clock.now_s += 0.5
    clock.now_s += 1.0
    second = {"step_s": 2.0, "tokens_per_s": 1000.0, "data_wait_s": 1.0, "checkpoint_stall_s": 3.0, "validation_s": 5.0}
    assert meter.end_step(1, 2000, 1.0) == second
    clock.now_s += 4.0
    assert meter.end_step(2, 2000, 1.0) == {"step_s": 4.0, "tokens_per_s": 500.0, "checkpoint_stall_s": 0.0}
    assert set(second) <= MEASURED


def test_waiting_that_ends_in_an_error_is_counted_and_the_error_goes_on() -> None:
    clock = Clock()
    stall = Stopwatch(clock)
    meter = _meter(clock, stall=stall)

    def wait_and_fail(waiting: AbstractContextManager[None]) -> None:
        with waiting:
            clock.now_s += 2.0
            raise OSError("no space")

    for waiting in (meter.waiting_for("validation"), stall):
        with pytest.raises(OSError, match="no space"):
            wait_and_fail(waiting)
    clock.now_s += 1.0
    found = meter.end_step(0, 10, 1.0)
    assert found == {"step_s": 1.0, "tokens_per_s": 10.0, "checkpoint_stall_s": 2.0, "validation_s": 2.0}


def test_a_stopwatch_counts_what_lies_within_itself_once_and_can_be_read_meanwhile() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    with watch:
        clock.now_s += 1.0
        with watch:
            clock.now_s += 2.0
            assert watch.spent_s == 3.0
        clock.now_s += 4.0
        assert watch.spent_s == 7.0
    clock.now_s += 8.0
    with watch:
        clock.now_s += 16.0
    assert watch.spent_s == 23.0


def test_what_each_checkpoint_has_cost_adds_up_to_all_that_training_has_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = saving.write_file
    monkeypatch.setattr(saving, "write_file", lambda *given: time.sleep(0.15) or write(*given))

    def work(ranks: ThreadRanks) -> float:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks)
        for step in (1, 2, 3):
            saver.save(step, is_last=step == 3)
            saver.poll()
        return saver.stall.spent_s

    (waited_s,) = succeeded(work, workers=1)
    said = re.findall(
        r"checkpoint step-0000000(\d) in ([\d.]+) s, of which training waited ([\d.]+) s", capsys.readouterr().out
    )
    assert [step for step, *_ in said] == ["1", "2", "3"]
    assert all(0.1 <= float(stall_s) <= float(total_s) for _, total_s, stall_s in said)
    assert sum(float(stall_s) for *_, stall_s in said) == pytest.approx(waited_s, abs=0.05)


def test_mfu_is_the_share_of_the_peak_of_all_workers() -> None:
    clock = Clock()
    meter = _meter(clock, peak_tflops_per_worker=0.5, workers=2)
    clock.now_s += 2.0
    # 4e6 tokens of 1e5 operations in 2 s are 2e11 a second, of 2 workers with 5e11 each
    assert meter.end_step(0, 4_000_000, 1e5)["mfu"] == pytest.approx(0.2)


def test_mfu_of_an_unknown_peak_is_not_told() -> None:
    clock = Clock()
    meter = _meter(clock, precision="bf16")
    clock.now_s += 2.0
    assert "mfu" not in meter.end_step(0, 1000, 1e9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100 80GB PCIe", 312.0), ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.5), ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0), ("NVIDIA GB200", 0.0), ("NVIDIA GH200 480GB", 0.0), ("NVIDIA A10", 0.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0.0), ("NVIDIA GeForce RTX 3090", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_peak_of_a_gpu_is_known_by_its_name_or_not_at_all(name: str, expected: float) -> None:
    assert peak_tflops(name) == expected


def test_every_gpu_of_the_table_is_found_by_its_own_name() -> None:
    assert {name: peak_tflops(f"NVIDIA {name}") for name in PEAK_TFLOPS} == PEAK_TFLOPS


def test_norms_stand_in_every_nth_line_only() -> None:
    clock = Clock()
    weights = [LocalTensor(torch.tensor([3.0, 4.0, 100.0]), (Run("a", 0, 2, 0),))]
    meter = _meter(clock, weights, log_norms_every_steps=3)
    with_norm: list[int] = []
    for step in range(3, 10):
        clock.now_s += 1.0
        figures = meter.end_step(step, 10, 1.0)
        if "weight_norm" in figures:
            with_norm.append(step)
            assert figures["weight_norm"] == 5.0
            assert figures["peak_resident_bytes"] > 1e7
            assert "peak_gpu_bytes" not in figures
    assert with_norm == [3, 6, 9]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), max_size=8), st.randoms(use_true_random=False))
def test_sum_of_squares_counts_what_runs_name_and_nothing_else(pieces: list[tuple[int, int]], random: Any) -> None:
    size = sum(numel + gap for numel, gap in pieces) + 1
    tensor = torch.linspace(-2.0, 3.0, size)
    runs, offset, expected = [], 0, 0.0
    for numel, gap in pieces:
        runs.append(Run("any", 0, numel, offset))
        expected += sum(float(tensor[i]) ** 2 for i in range(offset, offset + numel))
        offset += numel + gap
    random.shuffle(runs)
    tensor[offset:] = math.nan
    assert sum_of_squares([LocalTensor(tensor.view(1, -1), tuple(runs))]) == pytest.approx(expected, rel=1e-6)


def test_sum_of_squares_does_not_lose_small_weights_beside_large_ones() -> None:
    tensor = torch.full((1_000_001,), 1e-3)
    tensor[0] = 1e4
    found = sum_of_squares([LocalTensor(tensor, (Run("a", 0, 1_000_001, 0),))])
    assert found - 1e8 == pytest.approx(1.0, rel=1e-3)


_BIG_PARENT = """
import subprocess, sys
held = b"x" * int(sys.argv[1])
code = "from pipeline.pretrain.meter import *; big = b'y' * int(2e8); del big; print(peak_resident_bytes())"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
"""


def test_peak_memory_is_that_of_this_process_and_not_of_the_one_that_started_it() -> None:
    before = peak_resident_bytes()
    out = subprocess.run(
        [sys.executable, "-c", _BIG_PARENT, str(GIANT)], capture_output=True, text=True, check=True, timeout=50
    ).stdout
    assert 2e8 < int(out) < GIANT
    assert before <= peak_resident_bytes()


WHOLE = torch.arange(1.0, 12.0)


def _rank(rank: int, folder: Path) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    from pipeline.pretrain.ranks import Ranks

    # eleven elements in two parts of six, the last of which is padding
    part = torch.cat([WHOLE, torch.tensor([1000.0])])[6 * rank : 6 * rank + 6]
    weights = [LocalTensor(part, (Run("a", 6 * rank, 6 - rank, 0),))]
    held = bytearray(b"x" * (GIANT if rank else 1))
    clock = Clock()
    meter = Meter(PretrainConfig(log_norms_every_steps=1), Ranks(CPU), weights, Stopwatch(), clock)
    clock.now_s += 1.0
    figures = meter.end_step(0, 10, 1.0)
    (folder / f"{rank}.txt").write_text(f"{figures['weight_norm']!r} {figures['peak_resident_bytes']}")
    del held
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_norms_on_two_ranks_are_of_the_whole_model_and_memory_of_the_rank_with_most(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=_rank, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60.0)
    assert [process.exitcode for process in ranks] == [0, 0]
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1]
    norm, resident = said[0].split()
    assert float(norm) == pytest.approx(math.sqrt(sum(i * i for i in range(1, 12))))
    assert int(resident) > GIANT
