"""Noise schedules: alpha_t, its derivative, and the NELBO weight they imply.

What lives here: closed forms in t.  What must not: sampling (corruption.py), losses (objectives.py).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, ones_like


@dataclass(frozen=True)
class LinearSchedule:
    """Linear schedule  alpha_t = 1 - t,  so that a token is masked with probability t.

    MDLM (arXiv 2406.07524) calls the same schedule log-linear in its code; LLaDA (2502.09992) and
    Dream call it linear.
    """

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Probability that a token is still clean at time t:  1 - t."""
        return 1.0 - t

    def dalpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Derivative of alpha in t:  -1."""
        return -ones_like(t)


def nelbo_weight(alpha_t: Float[Tensor, "..."], dalpha_t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Weight of the masked cross-entropy at time t:  -dalpha_t / (1 - alpha_t)  >= 0.

    MDLM (arXiv 2406.07524) eq. 10; the paper keeps the sign inside alpha'.  It diverges as t -> 0
    for the linear schedule, hence the lower end t_min of the sampled times.
    """
    return -dalpha_t / (1.0 - alpha_t)
