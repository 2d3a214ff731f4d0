"""The forward process of one token: marginal, transition and posterior of the absorbing and the uniform kernel.

What lives here: probabilities over the vocabulary, exact, in float64 and on the CPU.
What must not: drawing (corruption.py).

Every kernel here forgets a token with probability 1 - alpha and then draws from one fixed distribution pi:

    q(xt | x0) = alpha_t [xt = x0] + (1 - alpha_t) pi(xt)

With pi all on the mask token it is the absorbing kernel of masked diffusion, with pi uniform the uniform kernel, and
anything between a mixture of both, as token editing trains on.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def reveal_prob(alpha_s: Float[Tensor, "..."], alpha_t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Probability that a mask at time t is revealed by time s < t:  (alpha_s - alpha_t) / (1 - alpha_t).

    MDLM (arXiv 2406.07524) eq. 6; (t - s) / t for the linear schedule.  s is a time, not a step.  Raises ValueError
    unless 1 >= alpha_s >= alpha_t >= 0, and where alpha_t = 1: no mask is there to reveal.
    """
    _check_order(alpha_s, alpha_t)
    if (alpha_t >= 1).any():
        raise ValueError("alpha_t is 1 somewhere: nothing is masked at that time, so nothing can be revealed")
    return (alpha_s - alpha_t) / (1 - alpha_t)


def _check_alpha(alpha: Tensor) -> None:
    outside = ~((alpha >= 0) & (alpha <= 1))  # catches nan too
    if outside.any():
        raise ValueError(f"alpha is {float(alpha[outside][0])}; it must lie in [0, 1]")


def _check_order(alpha_s: Tensor, alpha_t: Tensor) -> None:
    alpha_s, alpha_t = torch.broadcast_tensors(alpha_s, alpha_t)
    bad = ~((alpha_s >= alpha_t) & (alpha_s <= 1) & (alpha_t >= 0))  # catches nan too
    if bad.any():
        raise ValueError(
            f"alpha_s is {float(alpha_s[bad][0])} and alpha_t {float(alpha_t[bad][0])}; "
            "wanted 1 >= alpha_s >= alpha_t >= 0, since s is the earlier time"
        )


@dataclass(frozen=True)
class Kernel:
    """q(xt | x0) = alpha_t [xt = x0] + (1 - alpha_t) pi(xt);  pi has ``mask_share`` on the mask, the rest uniform.

    D3PM (arXiv 2107.03006) section 3.1 and appendix A.2.  The uniform part is over the real tokens: every id but the
    mask.  Raises ValueError for a mask id outside the vocabulary, a share outside [0, 1], a share above 0 without a
    mask id, or no real token.
    """

    vocab_size: int
    mask_token_id: int | None
    mask_share: float

    def __post_init__(self) -> None:
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}; the vocabulary has the ids 0..{self.vocab_size - 1}"
            )
        if not 0.0 <= self.mask_share <= 1.0:
            raise ValueError(f"mask_share is {self.mask_share}; it must lie in [0, 1]")
        if self.mask_token_id is None and self.mask_share > 0.0:
            raise ValueError(
                f"mask_share is {self.mask_share}, but there is no mask_token_id; give one, or a share of 0"
            )
        if self.num_real_tokens < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, which leaves no real token; it must be larger")

    @classmethod
    def absorbing(cls, vocab_size: int, mask_token_id: int) -> "Kernel":
        """Masked diffusion: a noised token becomes the mask and stays it.  D3PM (arXiv 2107.03006) appendix A.2."""
        return cls(vocab_size, mask_token_id, 1.0)

    @classmethod
    def uniform(cls, vocab_size: int, mask_token_id: int | None = None) -> "Kernel":
        """Uniform diffusion: a noised token becomes any real token, itself among them.  D3PM (arXiv 2107.03006)."""
        return cls(vocab_size, mask_token_id, 0.0)

    @property
    def num_real_tokens(self) -> int:
        """Ids that are not the mask."""
        return self.vocab_size - (self.mask_token_id is not None)

    def stationary(self) -> Float[Tensor, " V"]:
        """pi: where a token goes once it is noised, a probability, float64.  D3PM (arXiv 2107.03006) section 3.1."""
        pi = torch.full((self.vocab_size,), (1.0 - self.mask_share) / self.num_real_tokens, dtype=torch.float64)
        if self.mask_token_id is not None:
            pi[self.mask_token_id] = self.mask_share
        return pi

    def transition(self, alpha: Float[Tensor, "..."]) -> Float[Tensor, "... V V"]:
        """Row-stochastic matrix  alpha I + (1 - alpha) 1 pi^T:  from an id (row) to an id (column).

        For one step of a chain alpha is 1 - beta_t (its Q_t), from time 0 it is alpha_t (Q-bar_t), from s to t it is
        alpha_t / alpha_s: the products stay in the family.  D3PM (arXiv 2107.03006) eq. 3.  Raises ValueError for an
        alpha outside [0, 1].
        """
        _check_alpha(alpha)
        keep = alpha.to(torch.float64)[..., None, None]
        return keep * torch.eye(self.vocab_size, dtype=torch.float64) + (1.0 - keep) * self.stationary()

    def marginal(self, x0: Int[Tensor, "..."], alpha_t: Float[Tensor, "..."]) -> Float[Tensor, "... V"]:
        """q(xt | x0) over the vocabulary: the row x0 of ``transition(alpha_t)``, without the matrix.

        D3PM (arXiv 2107.03006) eq. 3; MDLM (2406.07524) writes it Cat(xt; alpha_t x0 + (1 - alpha_t) pi).  Raises
        ValueError for an alpha outside [0, 1].
        """
        _check_alpha(alpha_t)
        alpha = alpha_t.to(torch.float64)[..., None]
        return alpha * torch.nn.functional.one_hot(x0, self.vocab_size) + (1.0 - alpha) * self.stationary()

    def posterior(
        self,
        xt: Int[Tensor, "..."],
        x0: Int[Tensor, "..."],
        alpha_s: Float[Tensor, "..."],
        alpha_t: Float[Tensor, "..."],
    ) -> Float[Tensor, "... V"]:
        """q(xs | xt, x0) over the vocabulary for s < t, by Bayes:  q(xt | xs) q(xs | x0) / q(xt | x0).

        D3PM (arXiv 2107.03006) eq. 3; for the absorbing kernel MDLM (2406.07524) eq. 6: xt where xt is no mask, else
        x0 with ``reveal_prob`` and the mask otherwise.  Where alpha_s = 0 nothing happens from s to t.  Raises
        ValueError if s lies after t, or where xt cannot come from x0.
        """
        alpha_s, alpha_t = alpha_s.to(torch.float64), alpha_t.to(torch.float64)
        _check_order(alpha_s, alpha_t)
        ratio = torch.where(alpha_s > 0, alpha_t / alpha_s, 1.0)[..., None]
        pi = self.stationary()
        to_xt = ratio * torch.nn.functional.one_hot(xt, self.vocab_size) + (1.0 - ratio) * pi[xt][..., None]
        joint = to_xt * self.marginal(x0, alpha_s)
        total = joint.sum(dim=-1, keepdim=True)
        if (total <= 0).any():
            raise ValueError("xt holds a token that cannot come from its x0 under this kernel at these times")
        return joint / total
