"""Which mask rates to train on: the candidates, the losses of blocks and the choice, against naive loops."""

import math

import pytest
import torch

from dlm_core.objectives import InverseMaskProb, masked_targets
from dlm_core.schedules import LinearSchedule
from dlm_core.variance import block_losses, choose_interval, clip_candidates, moment_sums
from tests.support.toy_world import mixed_batch

EXACT = 1e-12  # a few float64 operations


def _f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_block_losses_equal_naive_loop(block_size):
    batch = mixed_batch()
    rows, length = batch.x0.shape
    targets = masked_targets(batch, InverseMaskProb(LinearSchedule()))
    cross_entropy = 0.1 + torch.arange(len(targets.targets), dtype=torch.float64)
    expected = [[0.0] * (length // block_size) for _ in range(rows)]
    for place, weight, loss in zip(
        targets.select.tolist(), targets.weight.tolist(), cross_entropy.tolist(), strict=True
    ):
        expected[place // length][place % length // block_size] += weight * loss / block_size
    found = block_losses(cross_entropy, targets, (rows, length), block_size)
    assert found.tolist() == [pytest.approx(row, rel=EXACT) for row in expected]


def test_block_losses_of_blocks_that_do_not_divide_the_row_raise():
    targets = masked_targets(mixed_batch(), InverseMaskProb(LinearSchedule()))
    with pytest.raises(ValueError, match="block_size is 4;"):
        block_losses(torch.ones(len(targets.targets)), targets, tuple(mixed_batch().x0.shape), 4)


def test_clip_candidates_are_those_of_the_published_search():
    expected = [(1e-3, 1.0)]
    for width in (0.5, 0.6, 0.7, 0.8, 0.9):
        low = 0.0
        while low + width < 1.0 + 1e-6:
            expected.append((max(low, 1e-3), low + width))
            low += 0.05
    found = clip_candidates(4)
    assert len(found) == len(expected) == 36
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=EXACT)
    assert (0.3, 0.8) in found
    assert (0.45, 0.95) in found
    assert clip_candidates(2, t_min=0.01)[:2] == [(0.01, 1.0), (0.01, 0.5)]


def test_clip_candidates_of_single_tokens_are_all_rates_and_everything_masked():
    assert clip_candidates(1) == [(1e-3, 1.0), (1.0, 1.0)]
    assert clip_candidates(1, t_min=0.02) == [(0.02, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize("block_size", [0, -4])
def test_clip_candidates_without_tokens_are_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size};"):
        clip_candidates(block_size)


INTERVALS = [(0.0, 1.0), (0.3, 0.8), (0.5, 1.0)]


def _spread(*scales: float) -> torch.Tensor:
    return torch.stack([moment_sums(_f64([1.0 - scale, 1.0, 1.0 + scale])) for scale in scales])


@pytest.mark.parametrize("t_min", [-0.05, 0.505, math.nan])
@pytest.mark.parametrize("block_size", [1, 4])
def test_clip_candidates_from_a_t_min_beyond_them_are_refused(block_size, t_min):
    with pytest.raises(ValueError, match=f"t_min is {t_min}; it must lie in"):
        clip_candidates(block_size, t_min)
    assert clip_candidates(block_size, 0.5)[0] == (0.5, 1.0)


@pytest.mark.parametrize("least", [0, 1, 2])
def test_choose_interval_takes_the_least_variance(least):
    scales = [3.0, 3.0, 3.0]
    scales[least] = 2.0
    chosen, variances = choose_interval(INTERVALS, _spread(*scales))
    assert chosen == INTERVALS[least]
    assert variances.tolist() == pytest.approx([scale**2 for scale in scales], rel=EXACT)


def test_choose_interval_of_equals_takes_the_first():
    assert choose_interval(INTERVALS, _spread(5.0, 2.0, 2.0))[0] == INTERVALS[1]
    assert choose_interval(INTERVALS, _spread(2.0, 2.0, 2.0))[0] == INTERVALS[0]


def test_choose_interval_goes_by_variance_and_not_by_size():
    large_but_steady = moment_sums(_f64([100.0, 100.1]))
    small_but_noisy = moment_sums(_f64([-3.0, 3.0]))
    assert choose_interval(INTERVALS[:2], torch.stack([small_but_noisy, large_but_steady]))[0] == INTERVALS[1]


def test_choose_interval_never_takes_one_whose_losses_are_infinite():
    broken = moment_sums(_f64([1.0, math.inf]))
    sums = torch.stack([moment_sums(_f64([0.0, 9.0])), broken, moment_sums(_f64([0.0, 5.0]))])
    assert choose_interval(INTERVALS, sums)[0] == INTERVALS[2]


@pytest.mark.parametrize("num_rows", [2, 4])
def test_choose_interval_without_a_row_of_sums_each_is_refused(num_rows):
    with pytest.raises(ValueError, match=f"3 candidates have {num_rows} rows of sums"):
        choose_interval(INTERVALS, _spread(*[1.0] * num_rows))


def test_choose_interval_with_a_single_loss_is_refused():
    sums = _spread(1.0, 1.0, 1.0)
    sums[1] = moment_sums(torch.ones(1))
    with pytest.raises(ValueError, match="there are 1"):
        choose_interval(INTERVALS, sums)
