"""Which tokens of an answer are masked together, and the bound that their losses give.

    bound = (1 / n) sum_k E_S (n / k) sum_{i in S} -log p(x_i | the row without S)

over the subsets S of k of the answer's n tokens, all as likely: LLaDA (arXiv 2502.09992) eq. 6, of which algorithm 3
draws k evenly and a subset for it.  Here

    few tokens    every subset, where there are no more than ``num_masks``: nothing is left to chance
    many          all tokens once (k = n has no other subset); and k < n with a probability q_k in proportion to
                  k^(-1/2), about the spread of one subset's loss, in strata of two that have subsets of their own

Most of what varies between subsets is which tokens they hold and how many.  One draw of every stratum makes a half; the
losses of a half are fitted by  fit_i(k) = token_i + a + b sqrt(k / n),  and the other half says how far that is off:

    bound_half = (1 / n) sum_k sum_i fit_i(k)  +  mean over its draws of  (1 / (q_k k)) sum_{i in S} (loss_i - fit_i(k))

up to the exact term of k = n.  The fit of the *other* half is independent of the draws, so that no fit, however bad,
moves the mean; a good one takes most of the variance away.  The bound is the mean of the halves.

Its variance comes from the two draws of a stratum.  Around the fit of the other half they differ by the noise of two
fits as well, and too much; around the mean of both fits by too little, since each fit saw half of the draws.  The mean
of the two is taken: within 5 % of the spread from 64 draws on (tests), a few per cent more from less.

What lives here: subsets, weights, the bound and its variance.  What must not: rows, models.

Shapes: B answers of n tokens each, J subsets, H strata.
"""

import math
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream, hash_uniform, hash_words

MIN_MASKS = 3
"""Of answers of several tokens: all of them once, and a stratum."""
_RIDGE = 1e-6
_HELD = 0.3
"""Of a loss of mean weight, at 0, that each token's fit counts; 0.1 to 1 hardly differ."""


class AnswerMasks(NamedTuple):
    """The subsets of B answers."""

    is_masked: Bool[Tensor, "B J n"]
    weight: Float[Tensor, "B J"]
    """Of the sum of a subset's losses."""
    num_strata: int
    """The subsets behind the first are those of so many strata, two by two; 0: these are all subsets."""


def draw_masks(num_tokens: int, num_masks: int, mask_ids: Int[Tensor, " B"], noise_seed: int) -> AnswerMasks:
    """At most ``num_masks`` subsets of the tokens of each answer, addressed by (noise_seed, mask id).

    With the i-th token of one answer the i-th of another with the same mask id is masked, as far as their lengths let
    it.  LLaDA (arXiv 2502.09992) eq. 6; see the module.  Raises ValueError for no token, and for a num_masks below 1,
    or below ``MIN_MASKS`` for more than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; an answer has at least 1")
    if num_masks < (least := 1 if num_tokens == 1 else MIN_MASKS):
        raise ValueError(f"num_masks is {num_masks}; for an answer of {num_tokens} tokens it must be at least {least}")
    if num_tokens <= math.log2(num_masks + 1):
        return _every_subset(num_tokens, len(mask_ids))
    return _drawn_subsets(num_tokens, (num_masks - 1) // 2, mask_ids, noise_seed)


def _every_subset(n: int, num_rows: int) -> AnswerMasks:
    subsets = [subset for k in range(1, n + 1) for subset in combinations(range(n), k)]
    is_masked = torch.zeros(len(subsets), n, dtype=torch.bool)
    for place, subset in enumerate(subsets):
        is_masked[place, list(subset)] = True
    weight = [1 / (len(subset) * math.comb(n, len(subset))) for subset in subsets]
    shape = (num_rows, len(subsets))
    return AnswerMasks(is_masked.expand(*shape, n), torch.tensor(weight, dtype=torch.float64).expand(shape), 0)


def _drawn_subsets(n: int, num_strata: int, mask_ids: Int[Tensor, " B"], noise_seed: int) -> AnswerMasks:
    q = torch.arange(1, n, dtype=torch.float64).rsqrt()
    q = q / q.sum()
    stratum, half = torch.arange(num_strata).repeat_interleave(2), torch.arange(2).repeat(num_strata)
    address = (mask_ids[:, None], stratum, half)
    u = (stratum + hash_uniform(noise_seed, Stream.ANSWER_COUNT, *address)) / num_strata
    k = 1 + torch.searchsorted(q.cumsum(0), u, right=True).clamp(max=n - 2)
    order = hash_words(hash_words(noise_seed, Stream.ANSWER_SUBSET, *address)[..., None], torch.arange(n))
    is_masked = order.argsort(dim=-1).argsort(dim=-1) < k[..., None]
    weight = 1 / (2 * num_strata * q[k - 1] * k)
    every = torch.ones(len(mask_ids), 1, n, dtype=torch.bool)
    return AnswerMasks(
        torch.cat([every, is_masked], dim=1), torch.cat([torch.full_like(weight[:, :1], 1 / n), weight], 1), num_strata
    )


def bound_of_losses(
    masks: AnswerMasks, losses: Float[Tensor, "B J n"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """The bound of every answer from the losses of its masked tokens, in nats, and the variance of the bound.

    ``losses`` are 0 where nothing is masked.  LLaDA (arXiv 2502.09992) eq. 6; see the module.
    """
    weighted = losses.sum(dim=2) * masks.weight
    if masks.num_strata == 0:
        return weighted.sum(dim=1), torch.zeros(len(losses), dtype=torch.float64)
    n = losses.shape[2]
    halves = [slice(1 + half, None, 2) for half in range(2)]
    fits = [_fit(masks.is_masked[:, half], losses[:, half]) for half in halves]
    mean_fit = _Fit(*((one + other) / 2 for one, other in zip(*fits, strict=True)))
    bound = weighted[:, 0]
    crossed: list[Tensor] = []
    for half, fit in zip(halves, fits[::-1], strict=True):
        off = fit.off(masks.is_masked[:, half], losses[:, half]) * masks.weight[:, half]
        bound = bound + off.sum(dim=1) + fit.total(n) / 2
        crossed.append(off)
    both = [mean_fit.off(masks.is_masked[:, half], losses[:, half]) * masks.weight[:, half] for half in halves]
    too_much, too_little = ((one - other).square().sum(dim=1) for one, other in (crossed, both))
    return bound, (too_much + too_little) / 2


class _Fit(NamedTuple):
    """loss of token i among k masked ones = token_i + a + b sqrt(k / n)."""

    token: Float[Tensor, "B n"]
    a: Float[Tensor, " B"]
    b: Float[Tensor, " B"]

    def off(self, is_masked: Bool[Tensor, "B H n"], losses: Float[Tensor, "B H n"]) -> Float[Tensor, "B H"]:
        """What the losses of each subset add up to beyond the fit."""
        k = is_masked.sum(dim=2)
        of_tokens = ((losses - self.token[:, None]) * is_masked).sum(dim=2)
        return of_tokens - k * (self.a[:, None] + self.b[:, None] * (k / losses.shape[2]).sqrt())

    def total(self, n: int) -> Float[Tensor, " B"]:
        """(1 / n) sum over k < n and i."""
        roots = (torch.arange(1, n, dtype=torch.float64) / n).sqrt().sum()
        return (n - 1) / n * self.token.sum(dim=1) + (n - 1) * self.a + roots * self.b


def _fit(is_masked: Bool[Tensor, "B H n"], losses: Float[Tensor, "B H n"]) -> _Fit:
    """Least squares, in turn: of the means of subsets by a and b, of the losses of a token, weighed 1 / k; twice.

    A token that is never masked has 0.
    """
    held = is_masked.double()
    k = held.sum(dim=2)
    root = (k / losses.shape[2]).sqrt()
    basis = torch.stack([torch.ones_like(root), root], dim=-1)
    square = basis.mT @ basis + _RIDGE * k.shape[1] * torch.eye(2, dtype=torch.float64)
    each = 1 / k
    counted = (held * each[..., None]).sum(dim=1) + _HELD * each.mean(dim=1, keepdim=True)
    token, trend = torch.zeros_like(held[:, 0]), torch.zeros_like(basis[:, 0])
    for _ in range(2):
        means = ((losses - token[:, None]) * held).sum(dim=2) * each
        trend = torch.linalg.solve(square, (basis.mT @ means[..., None])).squeeze(-1)
        beyond = (losses - (basis @ trend[..., None])) * held
        token = (beyond * each[..., None]).sum(dim=1) / counted
    return _Fit(token, *trend.unbind(dim=1))
