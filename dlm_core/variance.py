"""Low-variance training: where to sample t, which mask rates to train on, and how noisy a gradient is.

Every statistic is kept as sums, so that a caller may add those of several batches or workers before asking for the
answer.

What lives here: choosing and measuring.  What must not: drawing masks (corruption.py), collectives.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlm_core.blocks import num_blocks
from dlm_core.objectives import Targets
from dlm_core.schedules import Schedule


@dataclass(frozen=True)
class WeightedTimes:
    """Times drawn from some density on [t_min, 1], and what turns a mean over them into one over uniform t."""

    t: Float[Tensor, " n"]
    importance: Float[Tensor, " n"]
    """1 / density, relative to uniform t on [t_min, 1]: goes into ``Corrupted.importance``."""


def uniform_log_mask_prob(u: Float[Tensor, " n"], schedule: Schedule, t_min: float) -> WeightedTimes:
    """Times whose log(1 - alpha_t) is uniform: MDLM's change of variables and its importance sampling.

    Draws log(1 - alpha_t) = (1 - u) log(1 - alpha_{t_min}) + u log(1 - alpha_1).  Then NELBO weight * importance is
    the constant log((1 - alpha_1) / (1 - alpha_{t_min})) / (1 - t_min).  A constant weight is not a low variance: the
    *number* of masked tokens now varies from almost none to all, and in the enumerated world of figures/variance.svg
    the loss varies more than with uniform t.  MDLM (arXiv 2406.07524), whose code has both.  Raises ValueError unless
    t_min lies in (0, 1) and something is masked there, and where mask_prob stands still.
    """
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min is {t_min}; it must lie in (0, 1)")
    ends = torch.log(schedule.mask_prob(torch.tensor([t_min, 1.0], dtype=torch.float64)))
    span = ends[1] - ends[0]
    if not 0.0 < float(span) < math.inf:
        raise ValueError(
            f"log(1 - alpha_t) of {schedule} spans {float(span)} from t_min {t_min} to 1; it must be above 0"
        )
    t = schedule.time_of(torch.exp(ends[0] + u.double() * span).clamp(max=ends[1].exp())).clamp(min=t_min)
    return WeightedTimes(t, span / ((1.0 - t_min) * schedule.nelbo_weight(t)))


@dataclass(frozen=True)
class PiecewiseDensity:
    """A density of t, constant on equal bins of [t_min, 1]; ``mass`` sums to 1.

    Raises ValueError for no bin, a mass that is not above 0 (its bin would never be seen), or a sum other than 1.
    """

    t_min: float
    mass: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_min < 1.0:
            raise ValueError(f"t_min is {self.t_min}; it must lie in [0, 1)")
        if not self.mass or not all(0.0 < m < math.inf for m in self.mass) or abs(math.fsum(self.mass) - 1.0) > 1e-9:
            raise ValueError(f"the masses of the bins are {self.mass}; each must be above 0 and their sum 1")

    @classmethod
    def optimal(cls, t_min: float, second_moment: Float[Tensor, " bins"], floor: float = 0.1) -> "PiecewiseDensity":
        """The density of least variance: mass proportional to the root of the loss's second moment in the bin.

        Improved DDPM (arXiv 2102.09672) section 3.3.  A share ``floor`` stays uniform, so that no bin starves while its
        estimate is poor.  Raises ValueError for a negative moment, or floor outside (0, 1].
        """
        if not 0.0 < floor <= 1.0:
            raise ValueError(f"floor is {floor}; it must lie in (0, 1]")
        if not len(second_moment) or not ((second_moment >= 0) & second_moment.isfinite()).all():
            raise ValueError(
                f"second moments are {second_moment.tolist()}; wanted at least one, none negative or infinite"
            )
        root = second_moment.double().sqrt()
        share = root / root.sum() if float(root.sum()) > 0 else torch.full_like(root, 1 / len(root))
        mass = (1.0 - floor) * share + floor / len(root)
        return cls(t_min, tuple((mass / mass.sum()).tolist()))

    def sample(self, u: Float[Tensor, " n"]) -> WeightedTimes:
        """Times by inverting the distribution function at u (strata stay strata), with their importance."""
        mass = torch.tensor(self.mass, dtype=torch.float64)
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(dim=0)])
        place = (torch.searchsorted(edges, u.double(), right=True) - 1).clamp(0, len(mass) - 1)
        within = ((u.double() - edges[place]) / mass[place]).clamp(0.0, 1.0)
        fraction = (place + within) / len(mass)
        return WeightedTimes(self.t_min + (1.0 - self.t_min) * fraction, 1.0 / (len(mass) * mass[place]))

    def bin_of(self, t: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The bin that each time lies in."""
        fraction = (t - self.t_min) / (1.0 - self.t_min)
        return (fraction * len(self.mass)).long().clamp(0, len(self.mass) - 1)


def moment_sums(values: Float[Tensor, " n"]) -> Float[Tensor, "3"]:
    """(n, sum, sum of squares) in float64: they add over batches and workers."""
    v = values.double()
    return torch.stack([torch.tensor(float(len(v)), dtype=torch.float64, device=v.device), v.sum(), (v * v).sum()])


def variance_of_sums(sums: Float[Tensor, "*rows 3"]) -> Float[Tensor, "*rows"]:
    """Unbiased variance from (added) ``moment_sums``.  Raises ValueError for fewer than two values."""
    count, total, squares = sums.unbind(dim=-1)
    if (count < 2).any():
        raise ValueError(f"a variance needs at least 2 values; there are {int(count.min())}")
    return ((squares - total * total / count) / (count - 1)).clamp(min=0.0)


def block_losses(
    cross_entropy: Float[Tensor, " M"], targets: Targets, shape: tuple[int, int], block_size: int
) -> Float[Tensor, "B K"]:
    """Mean weighted loss a token of each block, nats:  1 / block_size * sum_{masked in block} weight * cross_entropy.

    What the search for an interval of mask rates compares (BD3-LM, arXiv 2503.09573), for rows of the ``shape`` [B, L]
    and target_offset 0.  Raises ValueError if block_size doesn't divide the row.
    """
    num_rows, num = shape[0], num_blocks(shape[1], block_size)
    block = targets.select.to(cross_entropy.device) // block_size
    losses = torch.zeros(num_rows * num, dtype=cross_entropy.dtype, device=cross_entropy.device)
    weighted = targets.weight.to(losses) * cross_entropy
    return losses.index_add_(0, block, weighted).view(num_rows, num) / block_size


def clip_candidates(block_size: int, t_min: float = 1e-3) -> list[tuple[float, float]]:
    """Intervals of mask rates that BD3-LM tries: widths 0.5 to 0.9, lower ends in steps of 0.05, and all of (t_min, 1).

    BD3-LM (arXiv 2503.09573) and its code.  For block_size 1 only (t_min, 1) and (1, 1): the second masks everything,
    which is autoregressive training.  t_min is where rates begin and bounds no masked fraction: give ``mask_within`` 0
    in its place.  Raises ValueError for a block_size below 1, or a t_min outside [0, 0.5].
    """
    if not 0.0 <= t_min <= 0.5:
        raise ValueError(f"t_min is {t_min}; it must lie in [0, 0.5], below the ends of all intervals")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    if block_size == 1:
        return [(t_min, 1.0), (1.0, 1.0)]
    twentieths = [(low, low + width) for width in range(10, 20, 2) for low in range(0, 21 - width)]
    clipped = [(max(low / 20, t_min), high / 20) for low, high in twentieths]
    return [(t_min, 1.0), *clipped]


def choose_interval(
    candidates: list[tuple[float, float]], sums: Float[Tensor, "C 3"]
) -> tuple[tuple[float, float], Float[Tensor, " C"]]:
    """The interval whose losses vary least, with the variance of every candidate; the first of equals.

    ``sums``: added ``moment_sums`` of the ``block_losses``, for blocks masked at rates uniform on the candidate
    and weighed by ``InverseMaskProb``.  BD3-LM (arXiv 2503.09573), data-driven schedules; its code averages the
    variances of single batches, where these sums pool the blocks of all, and so also count how batches differ.  Raises
    ValueError if there is not one row of sums a candidate, or one without two values.
    """
    if len(candidates) != len(sums):
        raise ValueError(f"{len(candidates)} candidates have {len(sums)} rows of sums; one each is needed")
    variances = variance_of_sums(sums).nan_to_num(nan=math.inf)  # an infinite loss is no reason to choose
    return candidates[int(variances.argmin())], variances


@dataclass(frozen=True)
class GradientSums:
    """Sums over gradients of independent draws of the noise, for the trace of their covariance."""

    count: int
    total: Float[Tensor, " P"]
    """Sum of the flattened gradients, float64."""
    square_norm: float
    """Sum of their squared norms."""

    @classmethod
    def of(cls, gradient: Float[Tensor, " P"]) -> "GradientSums":
        """The sums of one gradient."""
        g = gradient.double()
        return cls(1, g, float(g @ g))

    def __add__(self, other: "GradientSums") -> "GradientSums":
        """Sums over both sets of draws."""
        return GradientSums(self.count + other.count, self.total + other.total, self.square_norm + other.square_norm)

    def variance(self) -> float:
        """Unbiased trace of the covariance of one gradient:  (sum |g|^2 - |sum g|^2 / n) / (n - 1).

        Raises ValueError for fewer than two gradients.
        """
        if self.count < 2:
            raise ValueError(f"a variance needs at least 2 gradients; there is {self.count}")
        return max(0.0, (self.square_norm - float(self.total @ self.total) / self.count) / (self.count - 1))
