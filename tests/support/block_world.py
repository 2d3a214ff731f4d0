"""Rows with prompts and holes, a denoiser that is wrong in a known way, and likelihood bounds summed by loops.

A row is its tokens and which of them are scored.  A model is a function nll(xt, place, token) -> -log p(token | xt) in
nats, and every bound below follows its definition: over all subsets, all orders, all counts.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlm_core.likelihood import Scoring
from tests.support import reference
from tests.support.reference import Tokens

Nll = Callable[[Tokens, int, int], float]

V, LENGTH, MASK = 3, 4, 3
NUM_NODES = 12  # Gauss-Legendre is exact up to degree 23; the integrand has degree n - 1


class Row(NamedTuple):
    """A row of tokens, and which of them are scored."""

    x: Tokens
    scored: tuple[bool, ...]

    @property
    def places(self) -> list[int]:
        """The scored places, from left to right."""
        return [place for place, hit in enumerate(self.scored) if hit]


WHOLE = Row((2, 0, 1, 1), (True, True, True, True))
PROMPTED = Row((0, 1, 2, 0), (False, True, True, True))
HOLED = Row((1, 2, 1, 0), (True, False, True, True))
INNER = Row((1, 2, 0, 2), (False, True, True, False))
SINGLE = Row((1, 1, 0, 2), (False, False, True, False))
EMPTY = Row((0, 2, 1, 0), (False, False, False, False))
MASKED_PROMPT = Row((MASK, 2, 0, 2), (False, True, False, True))
ROWS = [WHOLE, SINGLE, PROMPTED, EMPTY, HOLED, INNER, MASKED_PROMPT]


def scoring(rows: Sequence[Row], *, first_id: int = 100, noise_seed: int = 11, batch_rows: int = 4096) -> Scoring:
    """The rows as the estimators take them."""
    return Scoring(
        torch.tensor([row.x for row in rows]),
        torch.tensor([row.scored for row in rows]),
        MASK,
        torch.arange(first_id, first_id + len(rows)),
        noise_seed=noise_seed,
        batch_rows=batch_rows,
    )


class TableDenoiser:
    """Logits drawn at random for every noised sequence and place: they follow from no joint distribution."""

    def __init__(self, num_real: int, length: int, seed: int, scale: float = 1.5) -> None:
        draw = random.Random(seed)
        self.num_real, self.length, self.mask_token_id = num_real, length, num_real
        self.logits = {
            xt: [[draw.gauss(0.0, scale) for _ in range(num_real)] + [-math.inf] for _ in range(length)]
            for xt in itertools.product(range(num_real + 1), repeat=length)
        }
        self._powers = (num_real + 1) ** torch.arange(length - 1, -1, -1)
        self._table = torch.tensor(list(self.logits.values()), dtype=torch.float64)

    def __call__(self, xt: Tensor, select: Tensor) -> Tensor:
        """Logits [M, V + 1] at the flat positions ``select``."""
        codes = (xt * self._powers).sum(dim=1)
        return self._table[codes[select // self.length], select % self.length]

    def nll(self, xt: Tokens, place: int, token: int) -> float:
        """-log p(token at place | xt)."""
        return reference.cross_entropy(self.logits[xt][place], token)


class Recorder:
    """A denoiser that keeps what it was asked: every call's noised rows and flat positions."""

    def __init__(self, denoise: Callable[..., Tensor]) -> None:
        self.denoise = denoise
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, xt: Tensor, *x0_and_select: Tensor) -> Tensor:
        """Logits of the denoiser inside."""
        self.calls.append((xt, x0_and_select[-1]))
        return self.denoise(xt, *x0_and_select)

    @property
    def rows(self) -> Tensor:
        """The noised rows of all calls."""
        return torch.cat([xt for xt, _ in self.calls])

    @property
    def num_asked(self) -> int:
        """Tokens asked for in all calls."""
        return sum(len(select) for _, select in self.calls)


class BlockView:
    """A block denoiser made of one of whole rows: a block sees the clean blocks before it, itself, and masks after."""

    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor], block_size: int, mask_token_id: int) -> None:
        self.denoise, self.block_size, self.mask_token_id = denoise, block_size, mask_token_id

    def __call__(self, xt: Tensor, x0: Tensor, select: Tensor) -> Tensor:
        """Logits at the flat positions ``select``, each from a row of its own."""
        length = xt.shape[1]
        row, place = select // length, select % length
        block = torch.arange(length) // self.block_size
        own = block[place][:, None]
        seen = torch.where(block < own, x0[row], torch.where(block == own, xt[row], self.mask_token_id))
        return self.denoise(seen, torch.arange(len(select)) * length + place)


def block_nll(nll: Nll, row: Row, start: int, stop: int, mask_token_id: int) -> Nll:
    """The model as the block start..stop - 1 sees it: clean before, masks after."""
    after = (mask_token_id,) * (len(row.x) - stop)
    return lambda xt, place, token: nll(row.x[:start] + xt[start:stop] + after, place, token)


def cut(row: Row, start: int, stop: int) -> Row:
    """The row with only its block start..stop - 1 scored."""
    return Row(row.x, tuple(hit and start <= place < stop for place, hit in enumerate(row.scored)))


def masked_sum(nll: Nll, row: Row, subset: Iterable[int], mask_token_id: int) -> float:
    """sum over the subset of -log p, with just this subset masked."""
    subset = set(subset)
    xt = reference.apply_mask(row.x, [place in subset for place in range(len(row.x))], mask_token_id)
    return math.fsum(nll(xt, place, row.x[place]) for place in subset)


def ordered_sum(nll: Nll, row: Row, order: Sequence[int], mask_token_id: int) -> float:
    """sum_i -log p(x^{order(i)} | x^{order(<i)}): the scored places are filled in this order."""
    total = []
    for i, place in enumerate(order):
        xt = reference.apply_mask(row.x, [other in order[i:] for other in range(len(row.x))], mask_token_id)
        total.append(nll(xt, place, row.x[place]))
    return math.fsum(total)


def any_order_mean(nll: Nll, row: Row, mask_token_id: int) -> float:
    """The mean of ``ordered_sum`` over every order."""
    orders = list(itertools.permutations(row.places))
    return math.fsum(ordered_sum(nll, row, order, mask_token_id) for order in orders) / len(orders)


def any_order_variance(nll: Nll, row: Row, mask_token_id: int) -> float:
    """The variance of ``ordered_sum`` over a random order."""
    values = [ordered_sum(nll, row, order, mask_token_id) for order in itertools.permutations(row.places)]
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def bernoulli_moments(nll: Nll, row: Row, mask_token_id: int) -> Callable[[float], tuple[float, float]]:
    """First and second moment of ``masked_sum`` where every scored token is masked with a probability."""
    places = row.places
    subsets = [subset for k in range(len(places) + 1) for subset in itertools.combinations(places, k)]
    sums = [(len(subset), masked_sum(nll, row, subset, mask_token_id)) for subset in subsets]

    def moments(p: float) -> tuple[float, float]:
        terms = [(p**k * (1 - p) ** (len(places) - k), loss) for k, loss in sums]
        return math.fsum(q * loss for q, loss in terms), math.fsum(q * loss**2 for q, loss in terms)

    return moments


def integral(f: Callable[[float], float], low: float, high: float, num_nodes: int = NUM_NODES) -> float:
    """Gauss and Legendre's."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    half = (high - low) / 2
    return half * math.fsum(w * f(low + half * (1 + x)) for x, w in zip(nodes.tolist(), weights.tolist(), strict=True))


def continuous_moments(
    nll: Nll, row: Row, mask_token_id: int, mask_prob: Callable[[float], float], t_min: float, num_real: int
) -> tuple[float, float]:
    """Mean and variance of one draw of the bound on [t_min, 1], with its first and its last term.

    The mean of the middle term is the integral over the mask probability p of E[masked_sum] / p, since the weight is
    dp / dt / p: no derivative of the schedule is needed.
    """
    moments = bernoulli_moments(nll, row, mask_token_id)
    first, last = mask_prob(t_min), mask_prob(1.0)
    diffusion = integral(lambda p: moments(p)[0] / p, first, last)
    once, once_squared = moments(first)
    prior = len(row.places) * (1 - last) * math.log(num_real)

    def squared(t: float) -> float:
        slope = (mask_prob(t + 1e-6) - mask_prob(t - 1e-6)) / 2e-6
        return (slope / mask_prob(t)) ** 2 * moments(mask_prob(t))[1]

    second = (1 - t_min) * integral(squared, t_min, 1.0, num_nodes=50)
    return diffusion + once + prior, second - diffusion**2 + once_squared - once**2


def discrete_variance(
    nll: Nll, row: Row, mask_token_id: int, mask_prob: Callable[[float], float], num_steps: int
) -> float:
    """The variance of one draw of the bound with num_steps steps: a step, its masks, those of the reconstruction."""
    moments = bernoulli_moments(nll, row, mask_token_id)
    probs = [mask_prob(i / num_steps) for i in range(num_steps + 1)]
    weights = [num_steps * (after - before) / after for before, after in itertools.pairwise(probs)]
    drawn = [(weight, *moments(p)) for weight, p in zip(weights, probs[1:], strict=True)]
    mean = math.fsum(weight * m1 for weight, m1, _ in drawn) / num_steps
    once, once_squared = moments(probs[0])
    return math.fsum(w**2 * m2 for w, _, m2 in drawn) / num_steps - mean**2 + once_squared - once**2


def count_strata(nll: Nll, row: Row, mask_token_id: int, num_draws: int) -> list[tuple[float, float]]:
    """Mean and variance of n / k sum_{masked} -log p in each stratum of k = 1 + floor(u n), u in [j, j + 1) / N."""
    places, n = row.places, len(row.places)
    by_count = {
        k: [n / k * masked_sum(nll, row, subset, mask_token_id) for subset in itertools.combinations(places, k)]
        for k in range(1, n + 1)
    }
    strata = []
    for draw in range(num_draws):
        mean, square = 0.0, 0.0
        for k, values in by_count.items():
            low = max(Fraction(draw, num_draws), Fraction(k - 1, n))
            share = float(max(Fraction(0), min(Fraction(draw + 1, num_draws), Fraction(k, n)) - low) * num_draws)
            mean += share * math.fsum(values) / len(values)
            square += share * math.fsum(value**2 for value in values) / len(values)
        strata.append((mean, square - mean**2))
    return strata


def block_moments(nll: Nll, row: Row, mask_token_id: int, block_size: int) -> tuple[float, float]:
    """Mean and variance of one draw of the chain over blocks, each block with a count of its own."""
    mean, variance = 0.0, 0.0
    for start in range(0, len(row.x), block_size):
        part, seen = cut(row, start, start + block_size), block_nll(nll, row, start, start + block_size, mask_token_id)
        if part.places:
            mean += any_order_mean(seen, part, mask_token_id)
            ((_, of_block),) = count_strata(seen, part, mask_token_id, num_draws=1)
            variance += of_block
    return mean, variance


def block_chain_sum(nll: Nll, row: Row, mask_token_id: int, block_size: int) -> float:
    """sum_b sum_j -log p(x^{b,j} | x^{b,<j}, x^{<b})."""
    total = []
    for start in range(0, len(row.x), block_size):
        part, seen = cut(row, start, start + block_size), block_nll(nll, row, start, start + block_size, mask_token_id)
        total.append(ordered_sum(seen, part, part.places, mask_token_id))
    return math.fsum(total)


def answer_nll(joint: reference.Joint, row: Row) -> float:
    """-log p(scored tokens | the others)."""
    same = (
        p for x, p in joint.prob.items() if all(hit or a == b for a, b, hit in zip(x, row.x, row.scored, strict=True))
    )
    return math.log(math.fsum(same)) - math.log(joint.prob[row.x])
