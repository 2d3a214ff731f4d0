"""Which tokens of an answer are masked together, and the bound that their losses give.

    bound = (1 / n) sum_k E_S (n / k) sum_{i in S} -log p(x_i | the row without S)

over the subsets S of k of the answer's n tokens, all as likely: LLaDA (arXiv 2502.09992) eq. 6, of which algorithm 3
draws k evenly and a subset for it.  Here

    few tokens    every subset, where there are no more than ``num_masks``: nothing is left to chance
    many          all tokens once (k = n has no other subset); and 1..n - 1, of which every k has one unit of length,
                  cut into H strata: (n - 1) (h / H)^1.5 is where the h-th begins, for subsets of few tokens vary most.
                  Where there are n - 1 strata or more, they begin and end between two counts, or within one; from
                  3 (n - 1) / 2 on each k has its own, and the rest go one by one where the most is claimed.  Two k
                  are drawn in each stratum, a point and its mirror image, and a subset of its own for either.

Within a stratum all k weigh the same, so that the level of the losses adds no noise, and their trend next to none, for
of mirror images one is too high where the other is too low.  What is left is mostly which tokens a subset holds.  That
is taken off by a fit

    fit_i(k) = token_i + a + b sqrt(k / n)
    bound    = (1 / n) sum_i loss_i(k = n)
               + sum_h [ (1 / n) sum_{k in h} sum_i fit_i(k)  +  mean over its two draws of (width_h / k) sum_{i in S}
                         (loss_i - fit_i(k)) ]

The fit of a stratum is one of the losses in all *other* strata: being independent of the draws that it is held against,
it moves no mean, however bad it is.  Given fit and counts the two subsets of a stratum are independent, so that the
difference of what they add is a deviation whose square tells the variance; it tells too much by what trend the fit has
left, in strata that are wide because they are few.  That fits share data adds next to nothing.  So the error is right
for answers of tens of tokens, by Student's t of ``effective_dof`` and, from 64 masks on, unless one token decides over
all others, by the normal law; it is rather too large for hundreds of tokens, or for six and more at 8 masks (tests).
Of any sum of bounds the deviations are the sums of theirs, whether they share masks or not: that of a difference of two
choices, or of two models, is told as small as common masks make it.

What lives here: subsets, weights, the bound and its deviations.  What must not: rows, models.

Shapes: B answers of n tokens each, J subsets, H strata.
"""

import math
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream, hash_uniform, hash_words

MIN_MASKS = 3
"""Of answers of several tokens: all of them once, and a stratum."""
_RIDGE = 0.03
"""Added to the variance of sqrt(k / n), at most 1 / 18, where a slope is fitted to few strata."""
_HELD = 0.3
"""Of a loss of mean weight, at 0, that each token's fit counts; 0.1 to 1 hardly differ."""


class AnswerMasks(NamedTuple):
    """The subsets of B answers."""

    is_masked: Bool[Tensor, "B J n"]
    weight: Float[Tensor, "B J"]
    """Of the sum of a subset's losses."""
    num_strata: int
    """The subsets behind the first are those of so many strata, two by two; 0: these are all subsets."""


def draw_masks(
    num_tokens: int, num_masks: int, mask_ids: Int[Tensor, " B"], noise_seed: int, part: int | Int[Tensor, " B"] = 0
) -> AnswerMasks:
    """At most ``num_masks`` subsets of the tokens of each answer, addressed by (noise_seed, mask id, part).

    With the i-th token of one answer the i-th of another of the same address is masked, as far as their lengths let
    it.  LLaDA (arXiv 2502.09992) eq. 6; see the module.  Raises ValueError for no token, and for a num_masks below 1,
    or below ``MIN_MASKS`` for more than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; an answer has at least 1")
    if num_masks < (least := 1 if num_tokens == 1 else MIN_MASKS):
        raise ValueError(f"num_masks is {num_masks}; for an answer of {num_tokens} tokens it must be at least {least}")
    if num_tokens <= math.log2(num_masks + 1):
        return _every_subset(num_tokens, len(mask_ids))
    address = hash_words(noise_seed, mask_ids, part)
    return _drawn_subsets(num_tokens, (num_masks - 1) // 2, address[:, None])


def _every_subset(n: int, num_rows: int) -> AnswerMasks:
    subsets = [subset for k in range(1, n + 1) for subset in combinations(range(n), k)]
    is_masked = torch.zeros(len(subsets), n, dtype=torch.bool)
    for place, subset in enumerate(subsets):
        is_masked[place, list(subset)] = True
    weight = [1 / (len(subset) * math.comb(n, len(subset))) for subset in subsets]
    shape = (num_rows, len(subsets))
    return AnswerMasks(is_masked.expand(*shape, n), torch.tensor(weight, dtype=torch.float64).expand(shape), 0)


def _drawn_subsets(n: int, num_strata: int, address: Int[Tensor, "B 1"]) -> AnswerMasks:
    edges = _edges(n, num_strata)
    stratum, half = torch.arange(num_strata).repeat_interleave(2), torch.arange(2).repeat(num_strata)
    width = edges.diff()[stratum]
    u = hash_uniform(address, Stream.ANSWER_COUNT, stratum)
    k = 1 + (edges[stratum] + width * torch.where(half == 0, u, 1 - u)).floor().long().clamp(max=n - 2)
    order = hash_words(hash_words(address, Stream.ANSWER_SUBSET, stratum, half)[..., None], torch.arange(n))
    is_masked = order.argsort(dim=-1).argsort(dim=-1) < k[..., None]
    weight = width / (2 * k)
    every = torch.ones(len(address), 1, n, dtype=torch.bool)
    return AnswerMasks(
        torch.cat([every, is_masked], dim=1), torch.cat([torch.full_like(weight[:, :1], 1 / n), weight], 1), num_strata
    )


def _edges(n: int, num_strata: int) -> Float[Tensor, " E"]:
    """Of strata, in [0, n - 1], where k covers [k - 1, k]."""
    if num_strata < n - 1:
        return (n - 1) * (torch.arange(num_strata + 1, dtype=torch.float64) / num_strata) ** 1.5
    k = torch.arange(n)
    share = (k.double() / (n - 1)) ** (2 / 3)
    if 2 * num_strata >= 3 * (n - 1):
        claims = share.diff()[:, None] / torch.arange(num_strata)  # every k has one, the next goes where it is needed
        of_k = (claims.flatten().argsort(descending=True, stable=True)[:num_strata] // num_strata).bincount()
        behind = F.pad(of_k.cumsum(dim=0), (1, 0))
    else:
        behind = (num_strata * share).round().long()  # strata that end at k
    is_edge = torch.cat([behind.diff() > 0, torch.ones(1, dtype=torch.bool)])
    k, behind = k[is_edge], behind[is_edge]
    step = torch.repeat_interleave(behind.diff())
    place = torch.arange(num_strata) - behind[step]
    inner = k[step] + place * (k.diff() / behind.diff().double())[step]
    return torch.cat([inner, torch.tensor([n - 1.0], dtype=torch.float64)])


def bound_of_losses(
    masks: AnswerMasks, losses: Float[Tensor, "B J n"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B H"]]:
    """The bound of every answer from the losses of its masked tokens, in nats, and how each stratum's draws deviate.

    The sum of the squares of the deviations is the variance of the bound.  ``losses`` are 0 where nothing is masked.
    LLaDA (arXiv 2502.09992) eq. 6; see the module.
    """
    if masks.num_strata == 0:
        return (losses.sum(dim=2) * masks.weight).sum(dim=1), torch.zeros(len(losses), 0, dtype=torch.float64)
    n = losses.shape[2]
    held = masks.is_masked[:, 1:].double().unflatten(1, (-1, 2))
    beyond, weight = losses[:, 1:].unflatten(1, (-1, 2)), masks.weight[:, 1:].unflatten(1, (-1, 2))
    fit = _fit(held, beyond)
    k = held.sum(dim=3)
    of_fit = (held * fit.token[:, :, None]).sum(dim=3) + k * (fit.a + fit.b * (k / n).sqrt())
    off = weight * (beyond.sum(dim=3) - of_fit)
    bound = losses[:, 0].sum(dim=1) * masks.weight[:, 0] + (off.sum(dim=2) + fit.mean_over(n)).sum(dim=1)
    return bound, off[..., 0] - off[..., 1]


class _Fit(NamedTuple):
    """For each stratum, of the other ones:  loss of token i among k masked ones = token_i + a + b sqrt(k / n)."""

    token: Float[Tensor, "B H n"]
    a: Float[Tensor, "B H 1"]
    b: Float[Tensor, "B H 1"]

    def mean_over(self, n: int) -> Float[Tensor, "B H"]:
        """The sum over the k of each stratum of the mean over the tokens."""
        edges, k = _edges(n, self.token.shape[1]), torch.arange(1, n, dtype=torch.float64)
        share = (torch.minimum(k, edges[1:, None]) - torch.maximum(k - 1, edges[:-1, None])).clamp(min=0)
        level = self.token.mean(dim=2) + self.a.squeeze(2)
        return share.sum(dim=1) * level + (share * (k / n).sqrt()).sum(dim=1) * self.b.squeeze(2)


def _fit(held: Float[Tensor, "B H 2 n"], losses: Float[Tensor, "B H 2 n"]) -> _Fit:
    """Least squares: of the means of subsets by a and b, then of what is left of a token's losses, weighed 1 / k.

    A token that is masked in no other stratum has 0, and so has everything where there is no other stratum.
    """
    k = held.sum(dim=3)
    x, y = (k / held.shape[3]).sqrt(), losses.sum(dim=3) / k
    num_others = max(1, 2 * (held.shape[1] - 1))
    mean_x, mean_y, mean_xx, mean_xy = (_of_others(v.sum(dim=2)) / num_others for v in (x, y, x * x, x * y))
    b = ((mean_xy - mean_x * mean_y) / (mean_xx - mean_x.square() + _RIDGE))[..., None]
    a = mean_y[..., None] - b * mean_x[..., None]
    share = held / k[..., None]
    seen, seen_x, found = (_of_others(v.sum(dim=2)) for v in (share, share * x[..., None], losses / k[..., None]))
    counted = seen + _HELD / num_others * _of_others((1 / k).sum(dim=2))[..., None]
    token = (found - a * seen - b * seen_x) / torch.where(counted > 0, counted, 1.0)
    return _Fit(token, a, b)


def _of_others(of_strata: Float[Tensor, "B H *rest"]) -> Float[Tensor, "B H *rest"]:
    """Sums over all strata but each."""
    return of_strata.sum(dim=1, keepdim=True) - of_strata
