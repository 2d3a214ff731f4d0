"""Mean and variance of NELBO estimators in a world small enough to enumerate: quadrature over t, no sampling.

The denoiser is the world's exact conditional, so that every mean is the entropy of the texts but for what lies below
t_min.  Variances are those that the drawn time and mask add for a given text, averaged over texts; nats^2 a sequence.

Shapes: X texts, K = L + 1 numbers of masked tokens, n values of u.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlm_core.corpus_bound import exact_count_weight
from dlm_core.schedules import LinearSchedule
from dlm_core.variance import PiecewiseDensity, WeightedTimes, uniform_log_mask_prob
from tests.support.reference import Joint, all_masks

NUM_BINS = 16
_NODES = 32
_PIECES = 24
"""Pieces of [t_min, 1], equal in log t, each with its own nodes: 1 / t^2 is then exact to 1e-12."""
_SCHEDULE = LinearSchedule()


@dataclass(frozen=True)
class World:
    """Moments of the masked cross-entropy of every text, over the masks with k of L tokens masked."""

    probs: Tensor
    """Probability of each text [X]."""
    first: Tensor
    """Mean of the sum of masked cross-entropies [X, K]."""
    second: Tensor
    """Mean of its square [X, K]."""

    @property
    def length(self) -> int:
        """L."""
        return self.first.shape[1] - 1

    @property
    def entropy(self) -> float:
        """What every unbiased estimator has as its mean."""
        return float(-torch.special.xlogy(self.probs, self.probs).sum())


def enumerate_world(joint: Joint) -> World:
    """Every text with every mask; texts in the order of joint.sequences()."""
    length = joint.length
    table = torch.tensor([joint.prob[x] for x in joint.sequences()], dtype=torch.float64)
    cube = table.view((joint.num_real,) * length)
    first = torch.zeros(len(table), length + 1, dtype=torch.float64)
    second = torch.zeros_like(first)
    for is_masked in all_masks(length):
        masked = [place for place, hit in enumerate(is_masked) if hit]
        loss = torch.zeros_like(cube)
        for place in masked:
            others = [other for other in masked if other != place]
            shown = cube.sum(dim=others, keepdim=True) if others else cube
            loss = loss - torch.log(shown / shown.sum(dim=place, keepdim=True))
        share = 1 / math.comb(length, len(masked))
        first[:, len(masked)] += share * loss.flatten()
        second[:, len(masked)] += share * loss.flatten() ** 2
    return World(table, first, second)


@dataclass(frozen=True)
class Estimator:
    """One way to turn a uniform number into a mask and a weight."""

    name: str
    draw: Callable[[Tensor], tuple[Tensor, Tensor]]
    """u [n] -> law of the number of masked tokens [n, K], weight of the masked cross-entropy [n]."""
    cuts: Sequence[float]
    """Where to cut [0, 1] for the quadrature over u; the ends are added."""


def estimators(world: World, t_min: float) -> list[Estimator]:
    """Three densities of t for the linear schedule, and exact counts."""
    bounds = np.geomspace(t_min, 1.0, _PIECES + 1)
    length = world.length

    def timed(sample: Callable[[Tensor], WeightedTimes]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def draw(u: Tensor) -> tuple[Tensor, Tensor]:
            times = sample(u)
            return binomial(length, times.t), _SCHEDULE.nelbo_weight(times.t) * times.importance

        return draw

    def counted(u: Tensor) -> tuple[Tensor, Tensor]:
        count = 1 + torch.floor(u * length).long()
        law = torch.nn.functional.one_hot(count, length + 1).double()
        return law, exact_count_weight(torch.full_like(count, length), count)

    density = optimal_density(world, t_min)
    edges = np.concatenate([[0.0], np.cumsum(density.mass)])
    in_bins = (bounds - t_min) / (1.0 - t_min) * NUM_BINS
    at_bounds = np.interp(in_bins, np.arange(NUM_BINS + 1), edges)
    return [
        Estimator("uniform t", timed(lambda u: uniform_times(u, t_min)), list((bounds - t_min) / (1.0 - t_min))),
        Estimator(
            "change of variables",
            timed(lambda u: uniform_log_mask_prob(u, _SCHEDULE, t_min)),
            list(np.linspace(0.0, 1.0, _PIECES + 1)),
        ),
        Estimator("optimal density", timed(density.sample), [*edges, *at_bounds]),
        Estimator("exact count", counted, [k / length for k in range(length + 1)]),
    ]


def uniform_times(u: Tensor, t_min: float) -> WeightedTimes:
    """Times uniform on [t_min, 1]."""
    return WeightedTimes(t_min + (1.0 - t_min) * u, torch.ones_like(u))


def optimal_density(world: World, t_min: float) -> PiecewiseDensity:
    """The density of t with bins that are proportional to the root of the exact second moment in each."""
    moments = []
    for number in range(NUM_BINS):
        low, high = (t_min + (1.0 - t_min) * (number + i) / NUM_BINS for i in (0, 1))
        s, weight = nodes(np.linspace(math.log(low), math.log(high), 3))
        t = torch.exp(s)
        second = binomial(world.length, t) @ (world.probs @ world.second) * _SCHEDULE.nelbo_weight(t) ** 2
        moments.append((second * t * weight).sum() / (high - low))
    return PiecewiseDensity.optimal(t_min, torch.stack(moments))


def binomial(length: int, t: Tensor) -> Tensor:
    """Law [n, K] of the number of masked tokens when each is masked with probability t."""
    count = torch.arange(length + 1)
    choose = torch.tensor([math.comb(length, k) for k in range(length + 1)], dtype=torch.float64)
    return choose * t[:, None] ** count * (1.0 - t[:, None]) ** (length - count)


def nodes(cuts: Sequence[float] | np.ndarray) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on each piece between ascending cuts."""
    x, w = (torch.from_numpy(a) / 2 for a in np.polynomial.legendre.leggauss(_NODES))
    edges = torch.tensor(np.asarray(cuts), dtype=torch.float64)
    width = edges.diff()[:, None]
    return (edges[:-1, None] + width * (x + 0.5)).flatten(), (width * w).flatten()


def text_means(world: World, estimator: Estimator) -> Tensor:
    """Mean of one draw for each text [X]."""
    u, weight = nodes(_cuts(estimator, 1))
    law, scale = estimator.draw(u)
    return world.first @ (law * (scale * weight)[:, None]).sum(dim=0)


def variance(world: World, estimator: Estimator, num_strata: int = 1) -> float:
    """Variance of the mean over a batch of num_strata texts, times num_strata; each draws u from a stratum of its own.

    With G strata that share one offset and are dealt out at random, texts drawn independently,
    E_x Var(g | x) + (E (sum_a m_a)^2 - E sum_a m_a^2) / G - (G - 1) (E m)^2, where m_a is the mean of g over texts and
    masks at the u of stratum a.
    """
    u, weight = nodes(_cuts(estimator, 1))
    law, scale = estimator.draw(u)
    second = (law @ (world.probs @ world.second) * scale**2) @ weight
    means = text_means(world, estimator)
    total = world.probs @ means
    offset, offset_weight = nodes(_cuts(estimator, num_strata))
    by_stratum = torch.stack([_mean_at(world, estimator, (a + offset) / num_strata) for a in range(num_strata)])
    together = (by_stratum.sum(dim=0) ** 2 - (by_stratum**2).sum(dim=0)) @ offset_weight
    alone = second - world.probs @ means**2
    return float(alone + together / num_strata - (num_strata - 1) * total**2)


def _mean_at(world: World, estimator: Estimator, u: Tensor) -> Tensor:
    law, scale = estimator.draw(u)
    return law @ (world.probs @ world.first) * scale


def _cuts(estimator: Estimator, num_strata: int) -> list[float]:
    """Cuts of the common offset: those of u, folded into one stratum."""
    folded = {round(num_strata * cut % 1.0, 12) for cut in estimator.cuts}
    return sorted(folded | {0.0, 1.0})


@dataclass(frozen=True)
class ByTime:
    """One draw at a given t, weight 1 / t: nats per time, whose integral over t is the loss."""

    t: Tensor
    mean: Tensor
    """Over texts and masks: the contribution to the loss."""
    variance: Tensor
    """From the mask alone, averaged over texts."""


def by_time(world: World, t: Tensor) -> ByTime:
    """Mean and variance of weight * masked cross-entropy at each t."""
    law, scale = binomial(world.length, t), _SCHEDULE.nelbo_weight(t)
    second = law @ (world.probs @ world.second)
    products = world.first.T @ (world.probs[:, None] * world.first)
    of_texts = (law @ products * law).sum(dim=1)
    return ByTime(t, law @ (world.probs @ world.first) * scale, (second - of_texts) * scale**2)


def shares_below(world: World, t: float, t_min: float) -> tuple[float, float]:
    """Share of the mean and of the variance (from the mask alone) that comes from times in [t_min, t], t uniform."""
    below, whole = (_integrals(world, t_min, high) for high in (t, 1.0))
    return below[0] / whole[0], below[1] / whole[1]


def _integrals(world: World, low: float, high: float) -> tuple[float, float]:
    s, weight = nodes(np.linspace(math.log(low), math.log(high), _PIECES + 1))
    found = by_time(world, torch.exp(s))
    return float(found.mean * found.t @ weight), float(found.variance * found.t @ weight)


def median_time(world: World, t_min: float) -> float:
    """The time below which half of the variance lies, by bisection."""
    low, high = t_min, 1.0
    while high - low > 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if shares_below(world, middle, t_min)[1] < 0.5 else (low, middle)
    return low
