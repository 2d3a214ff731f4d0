"""95 % intervals of the drawn bounds hold the truth 19 times in 20, over 2,000 repetitions with masks of their own."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dlm_core.answers import AnswerEstimate, Answers, answer_bound
from dlm_core.intervals import effective_dof, t_quantile
from dlm_core.likelihood import BlockDenoise, RowEstimate, Scoring, block_bound, exact_count_bound

NUM_REPETITIONS = 2_000
COVERS = (0.93, 0.97)
"""Share of 95 % intervals that hold the truth; over 2,000 of them its own spread is 0.005."""
MASK = 2


class Helped:
    """Tokens that differ, and differ in how much each token that is shown helps them; every row is of token 0."""

    def __init__(self, length: int) -> None:
        self.length = length
        generator = torch.Generator().manual_seed(length)
        self.own = 1.5 - 4 * torch.rand(length, generator=generator, dtype=torch.float64)
        self.help_of = torch.rand(length, length, generator=generator, dtype=torch.float64) - 0.2
        self.help_of *= 2.5 / math.sqrt(length)

    def logit(self, is_shown: Tensor) -> Tensor:
        """Of token 0 over token 1, at every place of the rows."""
        helped = is_shown.double() @ self.help_of.T
        return self.own + helped + 0.5 * (7 * helped).sin()

    def rows(self, xt: Tensor, select: Tensor) -> Tensor:
        """A denoiser of whole rows."""
        return _logits(self.logit(xt != MASK).flatten()[select])

    def blocks(self, block_size: int) -> BlockDenoise:
        """A denoiser of blocks, each of which sees the clean ones before it."""
        return lambda xt, x0, select: _logits(self.logit_in_blocks(xt, block_size).flatten()[select])

    def losses(self, xt: Tensor, select: Tensor, block_size: int) -> Tensor:
        """-log p of token 0 by the same."""
        return torch.nn.functional.softplus(-self.logit_in_blocks(xt, block_size).flatten()[select])

    def logit_in_blocks(self, xt: Tensor, block_size: int) -> Tensor:
        """What ``logit`` is where a block sees itself and those before it without their noise."""
        block = torch.arange(self.length) // block_size
        logit = torch.empty(xt.shape, dtype=torch.float64)
        for number in range(int(block[-1]) + 1):
            is_shown = (block < number) | ((block == number) & (xt != MASK))
            logit[:, block == number] = self.logit(is_shown)[:, block == number]
        return logit

    def bound(self, block_size: int) -> float:
        """sum over blocks of  mean over k of n / k times the mean loss of a subset of k."""
        total, size = 0.0, block_size
        subsets = torch.tensor(list(itertools.product((False, True), repeat=size))[1:])
        k = subsets.sum(dim=1)
        weight = 1 / (k * torch.tensor([math.comb(size, int(count)) for count in k], dtype=torch.float64))
        for start in range(0, self.length, size):
            shown = torch.zeros(len(subsets), self.length, dtype=torch.bool)
            shown[:, :start] = True
            shown[:, start : start + size] = ~subsets
            nats = torch.nn.functional.softplus(-self.logit(shown))[:, start : start + size]
            total += float(((nats * subsets).sum(dim=1) * weight).sum())
        return total

    def estimates(self, block_size: int, num_masks: int) -> AnswerEstimate:
        """Of rows that are all answer, each with masks of its own."""
        lengths = torch.full((NUM_REPETITIONS,), self.length)
        tokens = torch.zeros(NUM_REPETITIONS * self.length, dtype=torch.int64)
        own = torch.arange(NUM_REPETITIONS)
        answers = Answers(tokens, lengths, torch.zeros_like(lengths), lengths, own, MASK, block_size=block_size)
        return answer_bound(
            lambda xt, rows, select, targets: self.losses(xt, select, block_size), answers,
            num_masks=num_masks, batch_rows=8192,
        )  # fmt: skip


def _logits(logit: Tensor) -> Tensor:
    zero = torch.zeros_like(logit)
    return torch.stack([logit, zero, torch.full_like(logit, -math.inf)], dim=1)


def _repetitions(length: int) -> Scoring:
    x0 = torch.zeros(NUM_REPETITIONS, length, dtype=torch.int64)
    return Scoring(x0, x0 == 0, MASK, torch.arange(NUM_REPETITIONS), batch_rows=8192)


def _covered(estimate: RowEstimate, truth: float) -> float:
    return float(((estimate.nats - truth).abs() < 1.96 * estimate.mc_se).double().mean())


@pytest.mark.parametrize(
    ("length", "block_size", "num_masks"),
    [(16, 4, 8), (16, 8, 16), (16, 16, 16), (16, 16, 64), (64, 8, 16), (64, 8, 32)],
)
def test_intervals_of_answers_in_blocks_hold_the_truth(length: int, block_size: int, num_masks: int) -> None:
    world = Helped(length)
    found, truth = world.estimates(block_size, num_masks), world.bound(block_size)
    quantiles = [t_quantile(float(f"{effective_dof(row):.2g}")) for row in found.deviations.tolist()]  # each takes long
    covered = (found.nats - truth).abs() < torch.tensor(quantiles) * found.mc_se
    assert COVERS[0] <= float(covered.double().mean()) <= COVERS[1]


@pytest.mark.parametrize(
    ("length", "block_size", "num_draws"), [(16, 4, 16), (16, 4, 64), (16, 16, 16), (16, 16, 64), (64, 8, 32)]
)
def test_intervals_of_the_block_bound_hold_the_truth(length: int, block_size: int, num_draws: int) -> None:
    world = Helped(length)
    estimate = block_bound(world.blocks(block_size), _repetitions(length), block_size, num_draws=num_draws)
    assert COVERS[0] <= _covered(estimate, world.bound(block_size)) <= COVERS[1]


@pytest.mark.parametrize("num_draws", [32, 64])
def test_intervals_of_the_exact_count_bound_hold_the_truth(num_draws: int) -> None:
    world = Helped(length=16)
    estimate = exact_count_bound(world.rows, _repetitions(world.length), num_draws=num_draws)
    assert COVERS[0] <= _covered(estimate, world.bound(world.length)) <= COVERS[1]
