"""What is said of samples: how likely another model finds them, and how varied they are.

Likely alone is not good: text that repeats itself is likely.  So entropy and distinct n-grams stand beside it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_core.cross_entropy import HeadLoss
from dlm_core.likelihood import Scoring, exact_count_bound
from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import Denoiser

BATCH_ROWS = 32
NUM_DRAWS = 16
"""Masks of a row for the bound."""
NOISE_SEED = 1_000


@dataclass(frozen=True)
class Scores:
    """Of rows of tokens; nats, and standard errors over the rows."""

    nll: float
    """A token, exact under the next-token model."""
    nll_se: float
    ppl: float
    """exp(nll): generative perplexity."""
    bound: float
    """A token, of the diffusion model itself: an upper bound."""
    bound_mc_se: float
    """From the masks that were drawn."""
    unigram_entropy: float
    """Of the tokens of a row, the mean over rows; at most log of their number."""
    unigram_entropy_se: float
    distinct_2: float
    """Different pairs of neighbours in all rows, as a share of all pairs."""
    distinct_3: float


def score(x0: Tensor, scorer: Denoiser, denoiser: Denoiser, mask_token_id: int, eos_token_id: int) -> Scores:
    """The first token of a row is scored as the first of a document."""
    rows = torch.cat([next_token_nll(scorer, part, eos_token_id).mean(dim=1) for part in x0.split(BATCH_ROWS)])
    entropy = torch.stack([row_entropy(row) for row in x0])
    given = Scoring(
        x0, torch.ones_like(x0, dtype=torch.bool), mask_token_id, torch.arange(len(x0)), NOISE_SEED, BATCH_ROWS
    )
    bound, mc_se = exact_count_bound(denoiser, given, num_draws=NUM_DRAWS).per_token(x0.numel())
    return Scores(
        nll=float(rows.mean()),
        nll_se=_standard_error(rows),
        ppl=math.exp(float(rows.mean())),
        bound=bound,
        bound_mc_se=mc_se,
        unigram_entropy=float(entropy.mean()),
        unigram_entropy_se=_standard_error(entropy),
        distinct_2=distinct(x0, 2),
        distinct_3=distinct(x0, 3),
    )


def next_token_nll(scorer: Denoiser, x0: Tensor, eos_token_id: int) -> Tensor:
    """-log p of every token [B, L] after those before it, the first after an end of text."""
    seen = torch.cat([torch.full_like(x0[:, :1], eos_token_id), x0[:, :-1]], dim=1)
    every = torch.arange(x0.numel())
    ones = torch.ones(x0.numel(), dtype=torch.float64)
    head = scorer(seen, every, x0.flatten(), ones, mask=AttentionMask("causal"))
    assert isinstance(head, HeadLoss)
    return head.cross_entropy.double().view_as(x0)


def row_entropy(row: Tensor) -> Tensor:
    """Of the frequencies of the tokens of a row."""
    shares = row.unique(return_counts=True)[1].double() / len(row)
    return torch.special.entr(shares).sum()


def distinct(x0: Tensor, n: int) -> float:
    """Different n-grams within rows over all of them."""
    grams = x0.unfold(1, n, 1).reshape(-1, n)
    return len(grams.unique(dim=0)) / len(grams)


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))
