"""A world small enough to enumerate: exact conditionals as denoisers, and every draw of the noise with its weight."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dlm_core.cross_entropy import Denoise, logits_loss
from dlm_core.objectives import Corrupted, ExactCount, LossOutput, Weighting, loss_output, masked_targets
from dlm_core.schedules import Schedule
from tests.support.reference import Joint, Tokens, all_masks

Draw = tuple[float, float, tuple[bool, ...]]
"""What one block may get: its probability (or quadrature weight), its time, its mask."""


class ExactDenoiser:
    """Looks up the logarithm of p(x0 at place | unmasked tokens of xt); counts its calls."""

    def __init__(self, joint: Joint) -> None:
        self.calls, self.mask_token_id = 0, joint.mask_token_id
        self._length = joint.length
        self._powers = (joint.num_real + 1) ** torch.arange(joint.length - 1, -1, -1)
        self._table = torch.tensor(
            [[joint.logits(xt, place) for place in range(joint.length)] for xt in joint.noised_sequences()],
            dtype=torch.float64,
        )

    def __call__(self, xt: Tensor, select: Tensor) -> Tensor:
        """Logits [M, V + 1] at the flat positions ``select``."""
        self.calls += 1
        codes = (xt * self._powers).sum(dim=1)
        return self._table[codes[select // self._length], select % self._length]


class ExactBlockDenoiser:
    """The same for block diffusion: a token sees the clean blocks before its own and its own block of xt, no more."""

    def __init__(self, exact: ExactDenoiser, block_size: int) -> None:
        self._exact, self._block_size = exact, block_size

    def __call__(self, xt: Tensor, x0: Tensor, select: Tensor) -> Tensor:
        """Logits [M, V + 1] at the flat positions ``select``."""
        length = xt.shape[1]
        rows, start = select // length, select % length // self._block_size * self._block_size
        places = torch.arange(length)
        is_before, is_after = places < start[:, None], places >= start[:, None] + self._block_size
        context = torch.where(is_before, x0[rows], xt[rows]).masked_fill(is_after, self._exact.mask_token_id)
        return self._exact(context, torch.arange(len(select)) * length + select % length)


def context_free(probs: Sequence[float]) -> Denoise:
    """A denoiser that predicts the same for every token; the mask is a last column that is impossible."""
    logits = torch.tensor([*(math.log(p) for p in probs), -math.inf], dtype=torch.float64)
    return lambda xt, select: logits.expand(len(select), -1)


# Integrals over time


def interval_nodes(low: float = 0.0, high: float = 1.0, num_nodes: int = 5) -> tuple[list[float], list[float]]:
    """Nodes and weights of an integral over [low, high], exact for polynomials below degree 2 num_nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    half = (high - low) / 2
    return (low + half * (nodes + 1)).tolist(), (half * weights).tolist()


def log_time_nodes(t_min: float, split: float = 0.05) -> tuple[list[float], list[float]]:
    """Nodes and weights of an integral over [t_min, 1] for what varies with log t below ``split`` and with t above."""
    num_panels = math.ceil(math.log(split / t_min))
    times: list[float] = []
    weights: list[float] = []
    for panel in range(num_panels):
        low, high = (math.log(t_min) + math.log(split / t_min) * p / num_panels for p in (panel, panel + 1))
        nodes, shares = interval_nodes(low, high, 10)
        times += [math.exp(node) for node in nodes]
        weights += [share * math.exp(node) for node, share in zip(nodes, shares, strict=True)]
    for panel in range(12):
        nodes, shares = interval_nodes(*(split + (1 - split) * p / 12 for p in (panel, panel + 1)), num_nodes=10)
        times, weights = times + nodes, weights + shares
    return times, weights


# Every draw of the noise


@dataclass(frozen=True)
class Enumerated:
    """Noised rows, each with its probability (or its weight in an integral)."""

    batch: Corrupted
    probability: Tensor


def bernoulli_draws(
    times: Sequence[float], weights: Sequence[float], mask_probs: Sequence[float], length: int
) -> list[Draw]:
    """At each time every mask of independent tokens."""
    return [
        (weight * math.prod(p if hit else 1 - p for hit in is_masked), t, is_masked)
        for t, weight, p in zip(times, weights, mask_probs, strict=True)
        for is_masked in all_masks(length)
    ]


def schedule_draws(schedule: Schedule, times: Sequence[float], weights: Sequence[float], length: int) -> list[Draw]:
    """At each time every mask, as the schedule draws it."""
    mask_probs = schedule.mask_prob(torch.tensor(times, dtype=torch.float64)).tolist()
    return bernoulli_draws(times, weights, mask_probs, length)


def exact_count_draws(length: int) -> list[Draw]:
    """Every nonempty mask: first how many tokens, each number equally likely, then which."""
    return [
        (1 / (length * math.comb(length, sum(is_masked))), 0.5, is_masked)
        for is_masked in all_masks(length)
        if any(is_masked)
    ]


def enumerate_rows(sequences: dict[Tokens, float], draws: Sequence[Draw], mask_token_id: int) -> Enumerated:
    """Every sequence, of the given probability, with every draw for each of its blocks, independently."""
    length, block_size = len(next(iter(sequences))), len(draws[0][2])
    picks = torch.tensor(list(itertools.product(range(len(draws)), repeat=length // block_size)))
    shares, times = (torch.tensor([draw[i] for draw in draws], dtype=torch.float64)[picks] for i in (0, 1))
    masks = torch.tensor([draw[2] for draw in draws])[picks].flatten(1)
    x0 = torch.tensor(list(sequences)).repeat_interleave(len(picks), dim=0)
    is_masked = masks.repeat(len(sequences), 1)
    t = times.repeat_interleave(block_size, dim=1).repeat(len(sequences), 1)
    everywhere = torch.ones_like(is_masked)
    xt = torch.where(is_masked, mask_token_id, x0)
    batch = Corrupted(x0, xt, t, is_text=everywhere, maskable=everywhere, mask_token_id=mask_token_id)
    of_sequence = torch.tensor(list(sequences.values()), dtype=torch.float64).repeat_interleave(len(picks))
    return Enumerated(batch, of_sequence * shares.prod(dim=1).repeat(len(sequences)))


def row_losses(batch: Corrupted, weighting: Weighting, denoise: Denoise) -> Tensor:
    """The training objective of each row by itself, nats."""
    targets = masked_targets(batch, weighting, ExactCount())
    head = logits_loss(denoise(batch.xt, targets.select), targets.targets, targets.weight)
    rows = targets.select // batch.x0.shape[1]
    return torch.zeros(len(batch.x0), dtype=torch.float64).index_add_(0, rows, targets.weight * head.cross_entropy)


def expected_output(rows: Enumerated, weighting: Weighting, bound: Weighting, denoise: Denoise) -> LossOutput:
    """What ``loss_output`` gives in expectation: both weights of a token times the probability of its row."""
    targets = masked_targets(rows.batch, weighting, bound)
    of_row = rows.probability[targets.select // rows.batch.x0.shape[1]]
    targets = replace(targets, weight=targets.weight * of_row, nelbo_weight=targets.nelbo_weight * of_row)
    logits = denoise(rows.batch.xt, targets.select)
    return loss_output(logits_loss(logits, targets.targets, targets.weight), targets)


def expected_loss(rows: Enumerated, weighting: Weighting, denoise: Denoise) -> float:
    """Expectation of a loss, nats a row."""
    return float(expected_output(rows, weighting, ExactCount(), denoise).loss_sum)


def mixed_batch() -> Corrupted:
    """Eight rows of six tokens, mask 6, with everything a batch may hold; times are multiples of 1/20, in every bin.

    Row 0 and 3 have a prompt (that of row 3 is itself masked), row 1 has nothing masked, row 2 ends in padding, row 5
    is padding alone, row 6 has a time for each half, row 7 is masked wholly.
    """
    x0 = torch.tensor([[(7 * row + 3 * place + row * place) % 6 for place in range(6)] for row in range(8)])
    hidden = ["..x.x.", "......", "x.x...", "x..xx.", ".xx..x", "......", "x...xx", "xxxxxx"]
    prompt = ["p.....", "......", "......", "ppp...", "......", "......", "......", "......"]
    padding = ["......", "......", "....pp", "......", "......", "pppppp", "......", "......"]
    is_masked, is_prompt, is_padding = (
        torch.tensor([[mark != "." for mark in row] for row in rows]) for rows in (hidden, prompt, padding)
    )
    times = [[2, 2], [5, 5], [4, 4], [9, 9], [13, 13], [14, 14], [6, 17], [20, 20]]
    t = torch.tensor(times, dtype=torch.float64).repeat_interleave(3, dim=1) / 20
    return Corrupted(x0, torch.where(is_masked, 6, x0), t, ~is_padding, ~is_padding & ~is_prompt, mask_token_id=6)
