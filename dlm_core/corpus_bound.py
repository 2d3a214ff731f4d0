"""The bound of a corpus from repeated exact-count draws over its rows, with its two standard errors.

``mc_se`` is the noise of the drawn masks for the given text; ``doc_se`` is the spread over documents.

What lives here: what is drawn for, and made of, the losses of a whole corpus.  What must not: the losses of single
rows given a denoiser (likelihood.py), adding up over workers.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlm_core.intervals import t_quantile
from dlm_core.noise import Stream, stratified_uniform


def stratified_counts(noise_seed: int, replicate: int, lengths: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Number of positions to mask in each row: uniform on {1..length}, stratified over the rows.

    count = 1 + floor(u * length) with u one stratum a row; a row of length 0 gets 0.
    """
    u = stratified_uniform(noise_seed, replicate, lengths.shape[0], Stream.COUNT)
    return counts_at(u, lengths)


def counts_at(u: Float[Tensor, "..."], lengths: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Number of positions to mask at the uniforms u:  1 + floor(u * length), and 0 of a length 0."""
    return torch.minimum(1 + torch.floor(u * lengths).to(torch.int64), lengths)


def exact_count_weight(lengths: Int[Tensor, "..."], num_masked: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Weight of the masked cross-entropy when exactly num_masked of length positions are masked.

    length / num_masked: LLaDA (arXiv 2502.09992) eq. 14, RADD (2406.03736) k-DCE.  With num_masked uniform
    on {1..length} its mean equals the continuous-time NELBO for every schedule, with a lower variance.
    """
    return lengths.to(torch.float64) / num_masked.clamp(min=1)


@dataclass(frozen=True)
class BoundEstimate:
    """An estimated bound on the negative log-likelihood of a corpus."""

    nelbo: float
    """Nats a token; an upper bound of the negative log-likelihood in expectation."""
    mc_se: float
    """Standard error of nelbo from the drawn masks, over independent replicates."""
    doc_se: float
    """Standard error of nelbo over documents, as if they were a sample of a population; the noise of the drawn
    masks, averaged over replicates, is part of their spread."""
    num_tokens: int
    num_docs: int
    num_replicates: int

    @property
    def ppl_bound(self) -> float:
        """exp(nelbo): an upper bound of the perplexity a token; inf where float64 can't hold it."""
        return float(torch.tensor(self.nelbo, dtype=torch.float64).exp())

    @property
    def mc_interval(self) -> tuple[float, float]:
        """Holds the bound of this very text with probability 0.95 whatever masks are drawn.

        Student's t (Biometrika 6, 1908): of the 8 replicates that are the fewest, nelbo ± 1.96 mc_se would hold it 91
        times in 100.
        """
        half = t_quantile(float(self.num_replicates - 1)) * self.mc_se
        return self.nelbo - half, self.nelbo + half


def estimate_bound(doc_loss_sums: Float[Tensor, "R docs"], doc_tokens: Int[Tensor, " docs"]) -> BoundEstimate:
    """Combine per-replicate, per-document loss sums into a bound with its standard errors.

    nelbo = sum of losses / sum of tokens, averaged over replicates;
    mc_se = std over replicates / sqrt(R);  doc_se is the standard error of a ratio of sums over documents,
    sqrt(D / (D - 1) * sum_d (loss_d - nelbo * tokens_d)^2) / sum_d tokens_d  (nan for a single document).

    Raises ValueError with a single replicate, without tokens, or for another number of documents.
    """
    num_replicates, num_docs = doc_loss_sums.shape
    if doc_tokens.shape != (num_docs,):
        raise ValueError(
            f"doc_tokens has the shape {tuple(doc_tokens.shape)} for {num_docs} documents; wanted one each"
        )
    num_tokens = int(doc_tokens.sum())
    if num_replicates < 2:
        raise ValueError(f"num_replicates is {num_replicates}, which has no spread; draw at least 2, better 8")
    if num_tokens == 0:
        raise ValueError("there are no tokens to evaluate")
    sums = doc_loss_sums.to(torch.float64)
    per_replicate = sums.sum(dim=1) / num_tokens
    nelbo = per_replicate.mean()
    residuals = sums.mean(dim=0) - nelbo * doc_tokens
    doc_se = (
        math.sqrt(float((residuals**2).sum()) * num_docs / (num_docs - 1)) / num_tokens if num_docs > 1 else math.nan
    )
    return BoundEstimate(
        nelbo=float(nelbo),
        mc_se=float(per_replicate.std()) / math.sqrt(num_replicates),
        doc_se=doc_se,
        num_tokens=num_tokens,
        num_docs=num_docs,
        num_replicates=num_replicates,
    )


def unigram_entropy(token_counts: Int[Tensor, " V"]) -> float:
    """Entropy in nats of the empirical unigram distribution of the given tokens.

    The lowest loss that any context-free predictor can reach on these very tokens, even one fitted to them.
    """
    p = token_counts[token_counts > 0].to(torch.float64)
    p = p / p.sum()
    return float(-(p * p.log()).sum())
