"""From an estimate and its standard error to an interval.

What lives here: quantiles, intervals of shares, errors of differences.  What must not: torch, which a command line
cannot wait for; how estimates and their deviations come about.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from statistics import NormalDist

_NUM_NODES = 4001
"""Of Simpson's rule; the error of a quantile is below 1e-6 from 1 degree of freedom on."""
_NUM_HALVINGS = 60


def error_of_difference(deviations: Sequence[float], others: Sequence[float] = ()) -> float:
    """Standard error of one bound less another, from the deviations of both (dlm_core/answer_masks.py).

    Where the two have masks in common, what these do to both goes out of it.  Without ``others`` that of one bound.
    """
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip_longest(deviations, others, fillvalue=0.0)))


def effective_dof(deviations: Sequence[float]) -> float:
    """Degrees of freedom of a variance that is the sum of squares of independent deviations, each of mean 0.

    (sum_h sigma_h^2)^2 / sum_h sigma_h^4  (Satterthwaite, Biometrics Bull. 2, 1946), from 1 up to their number: fewer
    where few of them are large.  Of normal deviations d_h the square of sum_h d_h^2 has the mean numerator + 2
    denominator, and sum_h d_h^4 that of 3 denominator, whence  3 (sum_h d_h^2)^2 / sum_h d_h^4 - 2.  inf of none.
    """
    largest = max(map(abs, deviations), default=0.0)
    if largest == 0.0:
        return math.inf
    squares = [(deviation / largest) ** 2 for deviation in deviations]  # of which not all are too small for a float
    found = 3 * math.fsum(squares) ** 2 / math.fsum(square**2 for square in squares) - 2
    return min(found, float(sum(square > 0 for square in squares)))


@cache
def t_quantile(dof: float, level: float = 0.95) -> float:
    """Half-width in standard errors of an interval that holds the truth with probability ``level``.

    Student's t (Student, Biometrika 6, 1908) with ``dof`` degrees of freedom, of which inf is the normal law.  With
    t = sqrt(dof) tan(a) its density is cos(a)^(dof - 1), up to a factor.  Raises ValueError for less than one degree of
    freedom, and for a level outside (0, 1).
    """
    if not dof >= 1.0:
        raise ValueError(f"dof is {dof}; an interval needs at least 1 degree of freedom")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; it must lie in (0, 1)")
    if dof > 1e6:
        return NormalDist().inv_cdf((1.0 + level) / 2)
    log_half = 0.5 * math.log(math.pi) + math.lgamma(dof / 2) - math.lgamma((dof + 1) / 2) - math.log(2.0)
    low, high = 0.0, math.pi / 2
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if _log_density_integral(middle, dof) - log_half < math.log(level):
            low = middle
        else:
            high = middle
    return math.sqrt(dof) * math.tan(low)


def _log_density_integral(upper: float, dof: float) -> float:
    step, power = upper / (_NUM_NODES - 1), dof - 1
    values = [math.cos(step * node) ** power for node in range(_NUM_NODES)]
    total = values[0] + 4 * math.fsum(values[1:-1:2]) + 2 * math.fsum(values[2:-1:2]) + values[-1]
    return math.log(total * step / 3)


def wilson_interval(share: float, num_trials: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a probability after a share of successes (Wilson, J. Am. Stat. Assoc. 22, 1927).

    The p at which |share - p| = z sqrt(p (1 - p) / n): it lies in [0, 1], and has a length where all or none succeed.
    Raises ValueError for no trial, and for a share or a level outside [0, 1] or (0, 1).
    """
    if num_trials < 1:
        raise ValueError(f"num_trials is {num_trials}; an interval needs at least 1")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is {share}; it must lie in [0, 1]")
    return _score_interval(share, float(num_trials), t_quantile(math.inf, level))


def mean_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean that values in [0, 1] are drawn around, such as estimates of a probability for each problem.

    Wilson's, with as many trials as the values are worth: as many as zeros and ones of the same mean and ``weights``
    (1 by default) are worth, (sum w)^2 / sum w^2, over how their squared deviations compare with those of the zeros and
    ones.  Both sums are taken with the largest w^2 more, the most that one further trial adds, since the spread of
    values that happen to be alike is not known to be 0; and Student's t takes the place of the normal law.  Raises
    ValueError for less than two values, for one outside [0, 1], and for a weight that is not above 0.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"there are {n} values; an interval of their mean needs at least 2")
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"values lie in [{min(values)}, {max(values)}]; they must lie in [0, 1]")
    w = [1.0] * n if weights is None else list(weights)
    if not min(w) > 0.0:
        raise ValueError(f"the least weight is {min(w)}; weights must be above 0")
    total, squares, further = math.fsum(w), math.fsum(one**2 for one in w), max(w) ** 2
    mean = min(1.0, math.fsum(one * value for one, value in zip(w, values, strict=True)) / total)
    spread = math.fsum((one * (value - mean)) ** 2 for one, value in zip(w, values, strict=True))
    num_trials = total**2 / squares * (squares * mean * (1 - mean) + further) / (spread + further)
    return _score_interval(mean, num_trials, t_quantile(n - 1.0, level))


def difference_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of b - a, of pairs of values in [0, 1]: that of the mean of (1 + b - a) / 2, brought back.

    It stays within [-1, 1], has a length where no pair differs, and is wide where there are few pairs.  Raises
    ValueError as ``mean_interval`` does.
    """
    low, high = mean_interval([(1.0 + second - first) / 2 for first, second in zip(a, b, strict=True)], level=level)
    return 2 * low - 1, 2 * high - 1


def _score_interval(share: float, num_trials: float, z: float) -> tuple[float, float]:
    """All p with |share - p| <= z sqrt(p (1 - p) / n)."""
    z2 = z**2
    middle = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    half = math.sqrt(z2 * (share * (1 - share) / num_trials + z2 / (4 * num_trials**2))) / (1 + z2 / num_trials)
    return 0.0 if share == 0.0 else max(0.0, middle - half), 1.0 if share == 1.0 else min(1.0, middle + half)
