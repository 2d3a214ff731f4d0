"""From logits to tokens and how sure they are: temperature, truncation, suppression, the draw.

What lives here: one position by itself.  What must not: which positions are taken (the files of the rules).

Everything is computed in float64: float32 Gumbel noise cuts the tails off and so lowers the temperature (arXiv
2409.02908).  M positions, V vocab_size.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Score = Literal["probability", "margin", "entropy"]
"""How sure a prediction is: p of the drawn token, the lead of the best token over the second, or minus the entropy."""


def check_score(score: str) -> None:
    """Raises ValueError for a score that there is not."""
    if score not in get_args(Score):
        raise ValueError(f'score is "{score}"; it must be one of {", ".join(get_args(Score))}')


@dataclass(frozen=True)
class Proposal:
    """The distribution that tokens are drawn from:  softmax(logits / temperature), cut to top_p, then to top_k.

    The order of Dream (arXiv 2508.15487).  Temperature 0 takes the most likely token and cuts nothing else.  top_p
    keeps the most likely tokens up to and with the one that brings their sum to top_p or beyond.  ``suppressed`` ids
    are never drawn.  Raises ValueError for a value out of range, and for top_k or top_p at temperature 0, which they
    cannot change.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    suppressed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more, and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for all ids")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1], where 1 keeps all ids")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p < 1.0):
            raise ValueError("top_k and top_p change nothing at temperature 0; leave them out")
        if any(i < 0 for i in self.suppressed):
            raise ValueError(f"suppressed has the id {min(self.suppressed)}; ids begin at 0")


class Drawn(NamedTuple):
    """One token for each position that was asked for."""

    x0: Int[Tensor, " M"]
    score: Float[Tensor, " M"]
    """The higher, the surer; of no meaning where no score was asked for."""
    entropy: Float[Tensor, " M"]
    """Of the distribution of the score, in nats; of no meaning where no score was asked for."""


def draw(
    proposal: Proposal,
    logits: Float[Tensor, "M V"],
    u: Float[Tensor, " M"],
    score: Score | None = None,
    *,
    is_tempered: bool = False,
    held: Int[Tensor, " M"] | None = None,
) -> Drawn:
    """Draw one id a row by inverting the cumulative distribution at u, and score it.

    The score is of softmax(logits), as LLaDA (arXiv 2502.09992) has it, or, ``is_tempered``, of the distribution that
    is drawn from, as Dream (2508.15487) has it; at temperature 0 both are softmax(logits).  Logits that give no
    distribution (nan, inf, or -inf for every id) make a score and a token without meaning: ``are_usable`` tells.
    ``held`` are ids that are scored in place of the drawn ones, where they are not negative.
    """
    if proposal.suppressed:
        ids = torch.tensor(proposal.suppressed, device=logits.device)
        logits = logits.index_fill(1, ids, -torch.inf)
    if proposal.temperature == 0.0:
        x0 = logits.argmax(dim=-1)
        return Drawn(x0, *_scores(logits.double().softmax(dim=-1), x0, held, score)) if score else _unscored(x0)
    probs = _truncated((logits.double() / proposal.temperature).softmax(dim=-1), proposal)
    x0 = _inverse_cdf(probs, u)
    if score is None:
        return _unscored(x0)
    scored = probs / probs.sum(dim=-1, keepdim=True) if is_tempered else logits.double().softmax(dim=-1)
    return Drawn(x0, *_scores(scored, x0, held, score))


def are_usable(logits: Float[Tensor, "M V"]) -> Bool[Tensor, ""]:
    """Whether every row is a distribution, as a scalar on the device of the logits."""
    return logits.amax(dim=-1).isfinite().all()


def _unscored(x0: Tensor) -> Drawn:
    none = torch.zeros_like(x0, dtype=torch.float64)
    return Drawn(x0, none, none)


def _truncated(probs: Float[Tensor, "M V"], proposal: Proposal) -> Float[Tensor, "M V"]:
    """Weights with 0 for what is cut off; they need not add up to 1."""
    if proposal.top_p < 1.0:
        ordered, ids = probs.sort(dim=-1, descending=True)
        is_kept = ordered.cumsum(dim=-1) - ordered < proposal.top_p
        probs = torch.zeros_like(probs).scatter(-1, ids, torch.where(is_kept, ordered, 0.0))
    if proposal.top_k is not None and proposal.top_k < probs.shape[-1]:
        kept, ids = probs.topk(proposal.top_k, dim=-1)
        probs = torch.zeros_like(probs).scatter(-1, ids, kept)
    return probs


def _inverse_cdf(weights: Float[Tensor, "M V"], u: Float[Tensor, " M"]) -> Int[Tensor, " M"]:
    cumulative = weights.cumsum(dim=-1)
    targets = (u * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=weights.shape[-1] - 1)


def _scores(
    probs: Float[Tensor, "M V"], x0: Int[Tensor, " M"], held: Int[Tensor, " M"] | None, score: Score
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    entropy = -torch.special.xlogy(probs, probs).sum(dim=-1)
    if score == "probability":
        token = x0 if held is None else torch.where(held < 0, x0, held)
        return probs.gather(-1, token[:, None]).squeeze(1), entropy
    if score == "margin":
        best = probs.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1], entropy
    return -entropy, entropy
