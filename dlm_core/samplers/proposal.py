"""From logits to tokens and how sure they are: temperature, truncation, suppression, the draw.

What lives here: one position by itself.  What must not: which positions are taken (the files of the rules).

Everything is computed in float64: float32 Gumbel noise cuts the tails off and so lowers the temperature (arXiv
2409.02908).  M positions, V vocab_size.
"""

import itertools
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
    keeps the most likely tokens up to and with the one that brings their sum to top_p or beyond.  What is as likely as
    the last one that is kept is kept too: which of these a sort has first depends on the device and the batch.
    ``suppressed`` ids are never drawn.  Raises ValueError for a value out of range, and for top_k or top_p at
    temperature 0, which they cannot change.
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
    """Of the distribution of the score, in nats; of no meaning where it was not asked for."""
    is_usable: Bool[Tensor, " M"]
    """Whether the logits give a distribution: no nan, no inf, and not -inf for every id that may be drawn."""


def draw(
    proposal: Proposal,
    logits: Float[Tensor, "M V"],
    u: Float[Tensor, " M"],
    score: Score | None = None,
    *,
    is_tempered: bool = False,
    held: Int[Tensor, " M"] | None = None,
    with_entropy: bool = False,
) -> Drawn:
    """Draw one id a row by inverting the cumulative distribution at u, and score it.

    The score is of softmax(logits), as LLaDA (arXiv 2502.09992) has it, or, ``is_tempered``, of the distribution that
    is drawn from, as Dream (2508.15487) has it; at temperature 0 both are softmax(logits).  Rows that give no
    distribution get a score and a token without meaning: ``is_usable`` tells.  ``held`` are ids that are scored in
    place of the drawn ones, where they are not negative.  The entropy comes with the score "entropy", and with any
    other if ``with_entropy``.  Raises ValueError for a suppressed id that the logits lack, and if
    none is left.
    """
    vocab_size = logits.shape[1]
    if lacking := [i for i in proposal.suppressed if i >= vocab_size]:
        raise ValueError(f"the id {lacking[0]} is to be suppressed; the logits have the ids 0..{vocab_size - 1}")
    if len(set(proposal.suppressed)) == vocab_size:
        raise ValueError(f"all ids 0..{vocab_size - 1} are suppressed or the mask; none is left to be drawn")
    size = max(1, _chunk_bytes(logits.device) // (torch.float64.itemsize * vocab_size))
    parts = [
        _draw_rows(proposal, *rows, score, is_tempered, with_entropy)
        for rows in zip(
            logits.detach().split(size),
            u.split(size),
            itertools.repeat(None) if held is None else held.split(size),
            strict=False,
        )
    ]
    return parts[0] if len(parts) == 1 else Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk_bytes(device: torch.device) -> int:
    """Room for one float64 copy of a chunk of rows: on a CPU what its caches keep from one pass to the next."""
    return 2 << 20 if device.type == "cpu" else 1 << 30


def _draw_rows(
    proposal: Proposal,
    logits: Float[Tensor, "M V"],
    u: Float[Tensor, " M"],
    held: Int[Tensor, " M"] | None,
    score: Score | None,
    is_tempered: bool,
    with_entropy: bool,
) -> Drawn:
    is_greedy = proposal.temperature == 0.0
    allowed = logits.to(logits.dtype if is_greedy and score is None else torch.float64, copy=True)
    for token_id in proposal.suppressed:
        allowed[:, token_id] = -torch.inf
    if is_greedy:
        best, x0 = allowed.max(dim=-1)
        if score is None:
            return _unscored(x0, best.isfinite())
        weights = allowed.sub_(best[:, None]).exp_()
        return Drawn(x0, *_scores(weights, x0, held, score, with_entropy), best.isfinite())
    best = allowed.amax(dim=-1)  # nan where any is
    is_usable = best.isfinite()
    allowed -= best[:, None]
    plain = None
    if proposal.temperature != 1.0:
        plain = allowed.exp() if score is not None and not is_tempered else None
        allowed /= proposal.temperature  # no temperature is so low that a quotient is inf
    weights = allowed.exp_()
    kept = _truncated(weights, proposal)
    x0 = _inverse_cdf(kept, u)
    if score is None:
        return _unscored(x0, is_usable)
    untempered = weights if plain is None else plain
    return Drawn(x0, *_scores(kept if is_tempered else untempered, x0, held, score, with_entropy), is_usable)


def _unscored(x0: Int[Tensor, " M"], is_usable: Bool[Tensor, " M"]) -> Drawn:
    none = torch.zeros_like(x0, dtype=torch.float64)
    return Drawn(x0, none, none, is_usable)


def _truncated(weights: Float[Tensor, "M V"], proposal: Proposal) -> Float[Tensor, "M V"]:
    """With 0 for what is cut off."""
    if proposal.top_p == 1.0 and proposal.top_k is None:
        return weights
    probs = weights / _row_sums(weights)[:, None]
    if proposal.top_p < 1.0:
        ordered = probs.sort(dim=-1, descending=True).values
        is_kept = ordered.cumsum(dim=-1) - ordered < proposal.top_p
        least = ordered.masked_fill(~is_kept, torch.inf).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
    if proposal.top_k is not None and proposal.top_k < probs.shape[-1]:
        least = probs.topk(proposal.top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
    return probs


def _row_sums(values: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
    """The same of a row in any company: of a single one torch adds up parts, one for each thread."""
    return values.expand(2, -1).sum(dim=-1)[:1] if len(values) == 1 else values.sum(dim=-1)


def _inverse_cdf(weights: Float[Tensor, "M V"], u: Float[Tensor, " M"]) -> Int[Tensor, " M"]:
    cumulative = weights.cumsum(dim=-1)
    targets = (u * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=weights.shape[-1] - 1)


def _scores(
    weights: Float[Tensor, "M V"],
    x0: Int[Tensor, " M"],
    held: Int[Tensor, " M"] | None,
    score: Score,
    with_entropy: bool,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Score and entropy of weights, which are used up."""
    total = _row_sums(weights)
    if score == "entropy" or with_entropy:
        weights /= total[:, None]
        entropy, total = -_row_sums(torch.special.xlogy(weights, weights)), torch.ones_like(total)
    else:
        entropy = torch.zeros_like(total)
    if score == "probability":
        token = x0 if held is None else torch.where(held < 0, x0, held)
        return weights.gather(-1, token[:, None]).squeeze(1) / total, entropy
    if score == "margin":
        best, place = weights.max(dim=-1)
        second = weights.scatter_(1, place[:, None], 0.0).amax(dim=-1)  # topk sorts whole rows
        return (best - second) / total, entropy
    return -entropy, entropy
