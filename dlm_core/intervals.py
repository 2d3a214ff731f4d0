"""From an estimate and its standard error to an interval.

What lives here: quantiles.  What must not: how estimates and their errors come about.
"""

import math

import torch

_NUM_NODES = 4001
"""Of Simpson's rule; the error of a quantile is below 1e-6 from 1 degree of freedom on."""
_NUM_HALVINGS = 60


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
        return math.sqrt(2.0) * float(torch.special.erfinv(torch.tensor(level, dtype=torch.float64)))
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
    nodes = torch.linspace(0.0, upper, _NUM_NODES, dtype=torch.float64)
    values = nodes.cos().pow(dof - 1)
    weights = torch.ones(_NUM_NODES, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return math.log(float((weights * values).sum()) * upper / (_NUM_NODES - 1) / 3)
