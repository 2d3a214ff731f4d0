"""Which tokens of an answer are masked together, drawn in balance, and what their losses weigh.

    bound = (1 / n) sum_k m_k,    m_k = E_S (n / k) sum_{i in S} -log p(x_i | the answer but S)

over the subsets S of k of the n tokens, all as likely: LLaDA (arXiv 2502.09992) eq. 6, of which its algorithm 3 draws k
evenly and one subset for each.  Most of what varies from subset to subset is which tokens it holds, and most of it for
small k.  So

    few tokens    every subset, where there are no more than ``num_masks``; nothing is left to chance
    more          for each k the tokens in random order, cut into ceil(n / k) subsets: each token is masked once, or
                  twice and then counts half.  All this several times, but for k = 1 and k = n, which have one outcome
    many          all tokens once; and k with a probability in proportion to k^(-1/2), about the spread of one subset's
                  loss, in strata of two that have subsets of their own

Terms that repeat each other are independent, and nothing else is random: the variance estimated from them has no bias.

What lives here: subsets, weights, the variance of what they add up to.  What must not: losses, rows, models.

Shapes: B answers of n tokens each, J subsets, U terms.
"""

import math
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream, hash_uniform, hash_words

MIN_MASKS = 3
"""Of answers of several tokens: all of them once, and two that repeat each other."""


class AnswerMasks(NamedTuple):
    """The subsets of B answers; their weighted losses add up to the bound of each."""

    is_masked: Bool[Tensor, "B J n"]
    weight: Float[Tensor, "B J n"]
    """Of the loss of a masked token."""
    term: Int[Tensor, " J"]
    """Subsets of one term add up before terms are compared."""
    group: Int[Tensor, " U"]
    """Terms of one group repeat each other; a group of one is exact."""


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
    once, again = cost_of_sweeps(num_tokens)
    num_sweeps = 1 + (num_masks - once) // again
    if num_sweeps >= 2:
        return _sweeps(num_tokens, num_sweeps, mask_ids, noise_seed)
    return _strata(num_tokens, (num_masks - 1) // 2, mask_ids, noise_seed)


def cost_of_sweeps(num_tokens: int) -> tuple[int, int]:
    """Subsets of a first sweep over all k, and of each further one:  sum_k ceil(n / k),  less those of k = 1 and n.

    A sweep is the middle one of the module's three ways (ours); LLaDA (arXiv 2502.09992) draws each subset by itself.
    """
    once = sum(-(-num_tokens // k) for k in range(1, num_tokens + 1))
    return once, once - num_tokens - 1


def variance_of_sum(
    terms: Float[Tensor, "B U"], group: Int[Tensor, " U"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Estimated variance of the sum of each row's terms, and its degrees of freedom (Welch, Biometrika 34, 1947).

    ::

        variance  sum_g r_g / (r_g - 1) sum_{terms of g} (term - their mean)^2,  r_g = terms of g, where more than 1
        dof       variance^2 / sum_g (its part)^2 / (r_g - 1);  inf where the variance is 0
    """
    repeats = torch.bincount(group).double()
    shape = (len(terms), len(repeats))
    mean = torch.zeros(shape, dtype=torch.float64).index_add_(1, group, terms) / repeats
    squares = torch.zeros(shape, dtype=torch.float64).index_add_(1, group, (terms - mean[:, group]).square())
    others = (repeats - 1).clamp(min=1)
    parts = torch.where(repeats > 1, repeats / others * squares, 0.0)
    variance, fourth = parts.sum(dim=1), (parts.square() / others).sum(dim=1)
    dof = torch.where(fourth > 0, variance.square() / fourth, torch.inf)
    return variance, dof


def _every_subset(n: int, num_rows: int) -> AnswerMasks:
    subsets = [subset for k in range(1, n + 1) for subset in combinations(range(n), k)]
    is_masked = torch.zeros(len(subsets), n, dtype=torch.bool)
    weight = torch.zeros(len(subsets), 1, dtype=torch.float64)
    for place, subset in enumerate(subsets):
        is_masked[place, list(subset)] = True
        weight[place] = 1 / (len(subset) * math.comb(n, len(subset)))
    shape = (num_rows, len(subsets), n)
    none = torch.zeros(len(subsets), dtype=torch.int64)
    return AnswerMasks(is_masked.expand(shape), weight.expand(shape), none, none[:1])


def _sweeps(n: int, num_sweeps: int, mask_ids: Int[Tensor, " B"], noise_seed: int) -> AnswerMasks:
    sizes = [(k, sweep) for k in range(1, n + 1) for sweep in range(1 if k in (1, n) else num_sweeps)]
    k, sweep = torch.tensor(sizes).T
    num_subsets = -(-n // k)
    term = torch.repeat_interleave(num_subsets)
    start = (torch.arange(len(term)) - (num_subsets.cumsum(0) - num_subsets)[term]) * k[term]
    rank = _ranks(n, hash_words(noise_seed, Stream.ANSWER_ORDER, mask_ids[:, None], k, sweep))
    is_masked = (rank[:, term] - start[:, None]) % n < k[term][:, None]
    times = 1 + (rank < (num_subsets * k - n)[:, None])
    repeats = torch.where((k == 1) | (k == n), 1, num_sweeps)
    weight = 1 / (n * repeats[:, None] * times).double()
    return AnswerMasks(is_masked, weight[:, term], term, k - 1)


def _strata(n: int, num_strata: int, mask_ids: Int[Tensor, " B"], noise_seed: int) -> AnswerMasks:
    share = torch.arange(1, n, dtype=torch.float64).rsqrt()
    share = share / share.sum()
    stratum = torch.arange(num_strata).repeat_interleave(2)
    which = torch.arange(2).repeat(num_strata)
    address = (mask_ids[:, None], stratum, which)
    u = (stratum + hash_uniform(noise_seed, Stream.ANSWER_COUNT, *address)) / num_strata
    k = 1 + torch.searchsorted(share.cumsum(0), u, right=True).clamp(max=n - 2)
    rank = _ranks(n, hash_words(noise_seed, Stream.ANSWER_SUBSET, *address))
    weight = 1 / (2 * num_strata * share[k - 1] * k)
    all_tokens = torch.ones(len(mask_ids), 1, n, dtype=torch.bool)
    is_masked = torch.cat([all_tokens, rank < k[..., None]], dim=1)
    weight = torch.cat([torch.full_like(weight[:, :1], 1 / n), weight], dim=1)
    group = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + stratum])
    return AnswerMasks(is_masked, weight[..., None].expand(is_masked.shape), torch.arange(len(group)), group)


def _ranks(n: int, addresses: Int[Tensor, "B J"]) -> Int[Tensor, "B J n"]:
    """A random order of n tokens at each address: the place of every token in it."""
    return hash_words(addresses[..., None], torch.arange(n)).argsort(dim=-1).argsort(dim=-1)
