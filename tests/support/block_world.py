"""Rows with prompts and holes, a denoiser that is wrong in a known way, and likelihood bounds summed by loops.

A row is its tokens and which of them are scored.  A model is a function nll(xt, place, token) -> -log p(token | xt) in
nats, and every bound below follows its definition: over all subsets, all orders, all counts.
"""

import itertools
import math
import random
import statistics
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
Strata = list[tuple[float, float]]
"""Mean and variance of one draw in each stratum; there are as many strata as draws."""

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


def _unmixed(word: int) -> int:
    """The word that SplitMix64's finalizer maps to this one."""
    for multiplier, shift in ((0x94D049BB133111EB, 31), (0xBF58476D1CE4E5B9, 27), (1, 30)):
        high = word
        for _ in range(64 // shift):
            high = word ^ (high >> shift)
        word = high * pow(multiplier, -1, reference.WORD) % reference.WORD
    return word


def id_of_last_uniform(noise_seed: int, stream: int, group: int, draw: int) -> int:
    """The sample id whose uniform is the largest below 1:  at (hash of (noise_seed, stream, id), group, draw)."""
    word = reference.WORD - 1
    for later in (draw, group):
        word = ((_unmixed(word) ^ later) - reference.GOLDEN) % reference.WORD
    address = _unmixed(word) ^ reference.GOLDEN
    before = (reference.hash_words(noise_seed, stream) + reference.GOLDEN) % reference.WORD
    return reference.as_signed(_unmixed(address) ^ before)


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


def strata_moments(strata: Strata) -> tuple[float, float, float]:
    """Mean and variance of the mean of one draw a stratum, and the expected square of its standard error.

    The error is that of neighbours, E (g' - g)^2 = v + v' + (m - m')^2 over 2 N^2, the first and the last pair twice.
    """
    squares = [v + w + (a - b) ** 2 for (a, v), (b, w) in itertools.pairwise(strata)]
    error = math.fsum([*squares, squares[0], squares[-1]]) / (2 * len(strata) ** 2)
    return (
        math.fsum(mean for mean, _ in strata) / len(strata),
        math.fsum(variance for _, variance in strata) / len(strata) ** 2,
        error,
    )


def continuous_strata(
    nll: Nll, row: Row, mask_token_id: int, form: tuple[Callable[[float], float], float], num_real: int, num_draws: int
) -> Strata:
    """The bound on [t_min, 1] with its first and its last term; form is the mask probability and t_min.

    The mean of the middle term is the integral over the mask probability p of E[masked_sum] / p, since the weight is
    dp / dt / p: no derivative of the schedule is needed.
    """
    mask_prob, t_min = form
    moments = bernoulli_moments(nll, row, mask_token_id)
    once, once_squared = moments(mask_prob(t_min))
    prior = len(row.places) * (1 - mask_prob(1.0)) * math.log(num_real)

    def squared(t: float) -> float:
        slope = (mask_prob(t + 1e-6) - mask_prob(t - 1e-6)) / 2e-6
        return (slope / mask_prob(t)) ** 2 * moments(mask_prob(t))[1]

    strata = []
    for draw in range(num_draws):
        low, high = (t_min + (1 - t_min) * edge / num_draws for edge in (draw, draw + 1))
        diffusion = num_draws * integral(lambda p: moments(p)[0] / p, mask_prob(low), mask_prob(high))
        second = (1 - t_min) * num_draws * integral(squared, low, high, num_nodes=50)
        strata.append((diffusion + once + prior, second - diffusion**2 + once_squared - once**2))
    return strata


def _shares(size: int, draw: int, num_draws: int) -> list[float]:
    """The law of floor(u size), u uniform on [draw, draw + 1) / num_draws."""
    overlaps = [
        min(Fraction(draw + 1, num_draws), Fraction(i + 1, size)) - max(Fraction(draw, num_draws), Fraction(i, size))
        for i in range(size)
    ]
    return [float(max(Fraction(0), overlap) * num_draws) for overlap in overlaps]


def discrete_strata(
    nll: Nll, row: Row, mask_token_id: int, mask_prob: Callable[[float], float], num_steps: int, num_draws: int
) -> Strata:
    """The bound with num_steps steps but for its last term: a step, its masks, those of the reconstruction."""
    moments = bernoulli_moments(nll, row, mask_token_id)
    probs = [mask_prob(i / num_steps) for i in range(num_steps + 1)]
    weights = [num_steps * (after - before) / after for before, after in itertools.pairwise(probs)]
    drawn = [(weight, *moments(p)) for weight, p in zip(weights, probs[1:], strict=True)]
    once, once_squared = moments(probs[0])
    strata = []
    for draw in range(num_draws):
        shared = list(zip(_shares(num_steps, draw, num_draws), drawn, strict=True))
        mean = math.fsum(share * weight * m1 for share, (weight, m1, _) in shared)
        second = math.fsum(share * weight**2 * m2 for share, (weight, _, m2) in shared)
        strata.append((mean + once, second - mean**2 + once_squared - once**2))
    return strata


def count_strata(nll: Nll, row: Row, mask_token_id: int, num_draws: int) -> Strata:
    """n / k sum_{masked} -log p with k = 1 + floor(u n) masked."""
    places, n = row.places, len(row.places)
    by_count = [
        [n / k * masked_sum(nll, row, subset, mask_token_id) for subset in itertools.combinations(places, k)]
        for k in range(1, n + 1)
    ]
    strata = []
    for draw in range(num_draws):
        shared = list(zip(_shares(n, draw, num_draws), by_count, strict=True))
        mean = math.fsum(share * math.fsum(values) / len(values) for share, values in shared)
        square = math.fsum(share * math.fsum(v**2 for v in values) / len(values) for share, values in shared)
        strata.append((mean, square - mean**2))
    return strata


def block_strata(nll: Nll, row: Row, mask_token_id: int, block_size: int, num_draws: int) -> list[Strata]:
    """The chain over blocks: each block with a count of its own, independent of the others."""
    parts = []
    for start in range(0, len(row.x), block_size):
        part, seen = cut(row, start, start + block_size), block_nll(nll, row, start, start + block_size, mask_token_id)
        if part.places:
            parts.append(count_strata(seen, part, mask_token_id, num_draws))
    return parts


def context_free_strata(losses: Sequence[float], num_draws: int) -> Strata:
    """``count_strata`` in closed form for predictions by place alone, all places scored.

    A sum of k of n values without replacement has the variance k (1 - k / n) S^2; times n^2 / k^2.
    """
    n, spread = len(losses), statistics.variance(losses)
    by_count = [n * (n - k) / k * spread for k in range(1, n + 1)]
    return [
        (math.fsum(losses), math.fsum(a * b for a, b in zip(_shares(n, draw, num_draws), by_count, strict=True)))
        for draw in range(num_draws)
    ]


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
