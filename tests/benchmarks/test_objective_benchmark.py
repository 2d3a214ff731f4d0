"""The benchmark of the head: its batches, the refusal of a path that computes something else, one quick run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import objective
from benchmarks.command import RefusedError

ROOT = Path(__file__).parents[2]
TINY = replace(objective.QUICK, vocab_size=300, seq_len=40, batch_seqs=4, d_model=8)
TEXT = bytes(range(256)) * 5


pytestmark = pytest.mark.usefixtures("one_thread")


def test_batch_has_pairs_of_bytes_as_targets_and_weighs_by_the_time_that_masked():
    first, second = (objective._batch(TINY, TEXT, step) for step in range(2))
    assert first.targets[:2].tolist() == [1 % 299, (2 * 256 + 3) % 299]
    start = 2 * TINY.num_tokens
    assert int(second.targets[0]) == (TEXT[start] * 256 + TEXT[start + 1]) % 299
    weights = first.weight.view(4, 40)
    assert torch.equal(weights, weights[:, :1].expand(4, 40))
    assert sorted((4 / weights[:, 0]).floor().tolist()) == [0, 1, 2, 3]
    assert torch.allclose(first.is_masked.view(4, 40).float().mean(1), 1 / weights[:, 0], atol=0.35)
    assert not torch.equal(first.is_masked, second.is_masked)


def test_paths_agree_and_are_each_timed_in_every_round():
    measured = objective._measure_times(TINY, TEXT, 3)
    assert list(measured.seconds) == list(measured.relative_difference) == list(objective.PATHS)
    assert all(len(times) == 3 for times in measured.seconds.values())
    assert measured.relative_difference[objective.OURS] == 0.0
    assert 0 < measured.masked_share < 1


def test_path_with_another_loss_is_refused(monkeypatch):
    def unweighted(hidden: torch.Tensor, head: torch.Tensor, batch: objective.Batch) -> torch.Tensor:
        return objective._masked_rows(hidden, head, replace(batch, weight=torch.ones_like(batch.weight)))

    monkeypatch.setitem(objective.PATHS, "unweighted", unweighted)
    with pytest.raises(RefusedError, match=r"'unweighted' differs from 'ours.*expected at most 0.0001"):
        objective._measure_times(TINY, TEXT, 1)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_quick_run_prints_its_ratios_on_the_last_line(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"To be, or not to be. " * 1000)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.objective", "--quick", "--text", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads of many tests on few cores wait for each other
    )
    *lines, last = done.stdout.splitlines()
    report = json.loads(last)
    assert report["benchmark"] == "objective"
    assert set(report["ratios"]) == {
        f"{what}_vs_{peer}" for what in ("speed", "memory") for peer in ("full_logits", "masked_rows", "torch")
    }
    assert report["ratios"]["memory_vs_full_logits"] > 1
    assert report["machine"]["quick"]
    assert all(any(line.startswith(path) for line in lines) for path in objective.PATHS)
