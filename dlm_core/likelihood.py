"""Estimators of the likelihood for evaluation: bounds and exact values, each with its standard error.

``mc_se`` is the noise of the drawn times and masks for the given text; ``doc_se`` is the spread over documents.

What lives here: estimators of -log p, given a denoiser as a function.  What must not: models, training losses.

Shapes: B rows, L seq_len, J jobs (noised copies of rows that go through the denoiser), R replicates, n tokens of a row
that are scored.  Rows keep everything that is not scored (prompt, padding) as it is; the denoiser deals with padding.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.blocks import num_blocks, per_token
from dlm_core.corruption import exact_count_positions, noise_positions
from dlm_core.cross_entropy import Denoise, token_cross_entropy
from dlm_core.kernels import reveal_prob
from dlm_core.noise import Stream, hash_permutation, hash_uniform, hash_words, stratified_uniform
from dlm_core.objectives import prior_loss
from dlm_core.schedules import Schedule

BlockDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(xt [B, L], x0 [B, L], select [M]) -> logits [M, V]: a denoiser whose blocks see the clean blocks before them."""


# Estimates


@dataclass(frozen=True)
class RowEstimate:
    """-log p of the scored tokens of every row, or a bound on it, in nats; independent of the other rows."""

    nats: Float[Tensor, " B"]
    mc_se: Float[Tensor, " B"]
    """Standard error of nats from the drawn masks: 0 where nothing was drawn, nan where one draw tells nothing."""
    is_bound: bool
    """Whether the mean of nats bounds -log p from above; otherwise it is the exact value for a stated order."""


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
        """exp(nelbo): an upper bound of the perplexity a token."""
        return math.exp(self.nelbo)

    def bpb_bound(self, num_bytes: int) -> float:
        """Bits a byte:  nelbo * num_tokens / (num_bytes * ln 2)."""
        return self.nelbo * self.num_tokens / (num_bytes * math.log(2))


def estimate_bound(doc_loss_sums: Float[Tensor, "R docs"], doc_tokens: Int[Tensor, " docs"]) -> BoundEstimate:
    """Combine per-replicate, per-document loss sums into a bound with its standard errors.

    nelbo = sum of losses / sum of tokens, averaged over replicates;
    mc_se = std over replicates / sqrt(R);  doc_se is the standard error of a ratio of sums over documents,
    sqrt(D / (D - 1) * sum_d (loss_d - nelbo * tokens_d)^2) / sum_d tokens_d  (nan for a single document).

    Raises ValueError with a single replicate, or without tokens.
    """
    num_replicates, num_docs = doc_loss_sums.shape
    num_tokens = int(doc_tokens.sum())
    if num_replicates < 2:
        raise ValueError("one replicate has no spread; draw at least 2, better 8")
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


# Exact counts over the rows of a corpus


def stratified_counts(noise_seed: int, replicate: int, lengths: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Number of positions to mask in each row: uniform on {1..length}, stratified over the rows.

    count = 1 + floor(u * length) with u one stratum a row; a row of length 0 gets 0.
    """
    u = stratified_uniform(noise_seed, replicate, lengths.shape[0], Stream.COUNT)
    return _counts(u, lengths)


def _counts(u: Tensor, lengths: Tensor) -> Tensor:
    return torch.minimum(1 + torch.floor(u * lengths).to(torch.int64), lengths)


def exact_count_weight(lengths: Int[Tensor, "..."], num_masked: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Weight of the masked cross-entropy when exactly num_masked of length positions are masked.

    length / num_masked: LLaDA (arXiv 2502.09992) eq. 14, RADD (2406.03736) k-DCE.  With num_masked uniform
    on {1..length} its mean equals the continuous-time NELBO for every schedule, with a lower variance.
    """
    return lengths.to(torch.float64) / num_masked.clamp(min=1)


# Bounds of rows


@dataclass(frozen=True)
class Scoring:
    """Which tokens of which rows are scored, and what addresses their noise.

    Raises ValueError for a batch_rows below 1, or a scored token that is the mask.
    """

    x0: Int[Tensor, "B L"]
    scored: Bool[Tensor, "B L"]
    """The tokens whose likelihood is asked for (an answer, or a whole text); only they are ever masked."""
    mask_token_id: int
    sample_ids: Int[Tensor, " B"]
    noise_seed: int = 0
    batch_rows: int = 64
    """Noised rows in one call of the denoiser; no effect on the result."""

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows is {self.batch_rows}; it must be at least 1")
        if (self.scored & (self.x0 == self.mask_token_id)).any():
            raise ValueError(f"a scored token is the mask token {self.mask_token_id}; its likelihood is 0")

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Scored tokens of each row."""
        return self.scored.sum(dim=1)


def _losses(
    predict: BlockDenoise, s: Scoring, rows: Int[Tensor, " J"], is_masked: Tensor, weight: Float[Tensor, "J L"]
) -> Float[Tensor, " J"]:
    """Weighted cross-entropy of each job's masked tokens, float64; tokens of weight 0 are not asked for."""
    losses: list[Tensor] = []
    for part in torch.arange(len(rows)).split(s.batch_rows):
        x0 = s.x0[rows[part]]
        xt = torch.where(is_masked[part], s.mask_token_id, x0)
        select = (is_masked[part] & (weight[part] != 0)).flatten().nonzero().squeeze(1)
        total = torch.zeros(len(part), dtype=torch.float64)
        if len(select):
            nats = token_cross_entropy(predict(xt, x0, select), x0.flatten()[select]).double().cpu()
            at = select.cpu()
            total.index_add_(0, at // x0.shape[1], nats * weight[part].double().cpu().flatten()[at])
        losses.append(total)
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64)


def _ignoring_x0(denoise: Denoise) -> BlockDenoise:
    return lambda xt, x0, select: denoise(xt, select)


def _over_replicates(losses: Float[Tensor, "R B"]) -> RowEstimate:
    """Mean of independent replicates, and its standard error."""
    return RowEstimate(losses.mean(dim=0), losses.std(dim=0) / math.sqrt(len(losses)), is_bound=True)


def _check_replicates(num_replicates: int) -> None:
    if num_replicates < 2:
        raise ValueError(f"num_replicates is {num_replicates}; a standard error needs at least 2, better 8")


def continuous_bound(
    denoise: Denoise, s: Scoring, schedule: Schedule, *, t_min: float, num_replicates: int, num_real_tokens: int
) -> RowEstimate:
    """The NELBO in continuous time, all of it:  reconstruction + diffusion + prior.

    diffusion       (1 - t_min) E_t nelbo_weight(t) sum_{masked} -log p,  t uniform on [t_min, 1], stratified over rows
    reconstruction  E sum_{masked} -log p  at t_min: the part below t_min in one step, at least what it leaves out
    prior           n alpha_1 log(num_real_tokens): what is not masked at t = 1

    MDLM (arXiv 2406.07524) eq. 10; without the first and the last term the integral over [t_min, 1] bounds nothing.
    Raises ValueError for fewer than two replicates, or a t_min outside [0, 1) or where the weight diverges.
    """
    _check_replicates(num_replicates)
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min is {t_min}; it must lie in [0, 1)")
    u = _row_strata(s, num_replicates)
    t = t_min + (1.0 - t_min) * u
    weight = (1.0 - t_min) * schedule.nelbo_weight(t)
    first = torch.tensor(t_min, dtype=torch.float64)
    return _three_terms(denoise, s, schedule, t, weight, first, num_real_tokens)


def discrete_bound(
    denoise: Denoise, s: Scoring, schedule: Schedule, *, num_timesteps: int, num_replicates: int, num_real_tokens: int
) -> RowEstimate:
    """The NELBO with T = num_timesteps steps, all of it:  reconstruction + diffusion + prior.

    diffusion       E_i T (alpha_s - alpha_t) / (1 - alpha_t) sum_{masked} -log p,  t = i/T, s = (i-1)/T, i uniform on
    1..T reconstruction  E sum_{masked} -log p  at t = 0, where the schedule masks anything then prior           n
    alpha_1 log(num_real_tokens)

    MDLM (arXiv 2406.07524) eq. 8.  i is stratified over the rows.  Raises ValueError for fewer than two replicates or
    less than one step.
    """
    _check_replicates(num_replicates)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 1")
    index = 1 + torch.floor(_row_strata(s, num_replicates) * num_timesteps)
    t = index / num_timesteps
    weight = num_timesteps * reveal_prob(schedule.alpha((index - 1) / num_timesteps), schedule.alpha(t))
    return _three_terms(denoise, s, schedule, t, weight, torch.tensor(0.0, dtype=torch.float64), num_real_tokens)


def _row_strata(s: Scoring, num_replicates: int) -> Float[Tensor, "R B"]:
    return torch.stack([stratified_uniform(s.noise_seed, replicate, len(s.x0)) for replicate in range(num_replicates)])


def _three_terms(
    denoise: Denoise,
    s: Scoring,
    schedule: Schedule,
    t: Float[Tensor, "R B"],
    weight: Float[Tensor, "R B"],
    first: Float[Tensor, ""],
    num_real_tokens: int,
) -> RowEstimate:
    losses = _bernoulli_losses(denoise, s, schedule.mask_prob(t), weight, first_step=0)
    start = schedule.mask_prob(first)
    if start > 0:
        once = torch.ones_like(weight)
        losses = losses + _bernoulli_losses(denoise, s, start * once, once, first_step=len(t))
    alpha_1 = schedule.alpha(torch.ones((), dtype=torch.float64))
    return _over_replicates(losses + s.lengths * prior_loss(alpha_1, num_real_tokens))


def _bernoulli_losses(
    denoise: Denoise, s: Scoring, mask_prob: Float[Tensor, "R B"], weight: Float[Tensor, "R B"], first_step: int
) -> Float[Tensor, "R B"]:
    """Each row masked token by token, once a replicate, with its own probability and weight."""
    num_replicates, seq_len = len(mask_prob), s.x0.shape[1]
    is_masked = [
        noise_positions(
            mask_prob[r][:, None],
            s.sample_ids,
            seq_len,
            noise_seed=s.noise_seed,
            step=first_step + r,
            maskable=s.scored,
        )
        for r in range(num_replicates)
    ]
    rows = torch.arange(len(s.x0)).repeat(num_replicates)
    token_weight = weight.flatten()[:, None].expand(-1, seq_len)
    return _losses(_ignoring_x0(denoise), s, rows, torch.cat(is_masked), token_weight).view(num_replicates, -1)


def exact_count_bound(denoise: Denoise, s: Scoring, *, num_draws: int) -> RowEstimate:
    """The NELBO of the scored tokens by masking exact counts:  E_k n / k sum_{masked} -log p,  k uniform on {1..n}.

    LLaDA (arXiv 2502.09992) eq. 6 and algorithm 3, with k stratified over all ``num_draws`` draws of a row and an
    offset of its own in each stratum; the standard error is that of neighbouring strata, sqrt(sum (g_{j+1} - g_j)^2 /
    (2 N (N - 1))), a little too large since neighbours differ in k too.  A row whose 2^n - 1 masks are no more than
    num_draws is enumerated instead: exact, mc_se = 0; so a single token is exact with one draw.  Raises ValueError for
    less than one draw.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; it must be at least 1")
    nats, mc_se = torch.zeros(len(s.x0), dtype=torch.float64), torch.zeros(len(s.x0), dtype=torch.float64)
    is_short = 2.0 ** s.lengths.double() - 1 <= num_draws
    for row in is_short.nonzero().flatten().tolist():
        is_masked, weight = _all_masks(s.scored[row])
        at = torch.full((len(is_masked),), row)
        nats[row] = _losses(_ignoring_x0(denoise), s, at, is_masked, weight).sum()
    long = (~is_short).nonzero().flatten()
    if len(long):
        losses = _exact_count_losses(denoise, s, long, num_draws)
        nats[long] = losses.mean(dim=0)
        squares = losses.diff(dim=0).square().sum(dim=0)
        mc_se[long] = (squares / (2 * num_draws * max(num_draws - 1, 0))).sqrt()  # 0 / 0 for a single draw: nan
    return RowEstimate(nats, mc_se, is_bound=True)


def _all_masks(scored: Bool[Tensor, " L"]) -> tuple[Bool[Tensor, "J L"], Float[Tensor, "J L"]]:
    """Every nonempty subset of the scored positions, weighed (n / k) / (n binom(n, k)) = 1 / (k binom(n, k))."""
    places = scored.nonzero().flatten().tolist()
    subsets = [c for k in range(1, len(places) + 1) for c in itertools.combinations(places, k)]
    is_masked = torch.zeros(len(subsets), len(scored), dtype=torch.bool)
    weight = torch.zeros(len(subsets), len(scored), dtype=torch.float64)
    for job, subset in enumerate(subsets):
        is_masked[job, list(subset)] = True
        weight[job, list(subset)] = 1 / (len(subset) * math.comb(len(places), len(subset)))
    return is_masked, weight


def _exact_count_losses(
    denoise: Denoise, s: Scoring, rows: Int[Tensor, " b"], num_draws: int
) -> Float[Tensor, "draws b"]:
    draws = torch.arange(num_draws)[:, None]
    u = (draws + hash_uniform(hash_words(s.noise_seed, Stream.COUNT, s.sample_ids[rows]), draws)) / num_draws
    lengths = s.lengths[rows]
    counts = _counts(u, lengths)
    is_masked = [
        exact_count_positions(
            counts[draw][:, None], s.sample_ids[rows], s.scored[rows], noise_seed=s.noise_seed, step=draw
        )
        for draw in range(num_draws)
    ]
    weight = exact_count_weight(lengths, counts).flatten()[:, None].expand(-1, s.x0.shape[1])
    return _losses(_ignoring_x0(denoise), s, rows.repeat(num_draws), torch.cat(is_masked), weight).view(num_draws, -1)


def block_bound(denoise: BlockDenoise, s: Scoring, block_size: int, *, num_replicates: int) -> RowEstimate:
    """The NELBO of a block-diffusion model, the chain over blocks:  sum_b E_{k_b} n_b / k_b sum_{masked in b} -log p.

    The bound of BD3-LM (arXiv 2503.09573) in its exact-count form: the counts k_b of all blocks of a row are stratified
    together, and all blocks are scored in one pass, each seeing the clean blocks before it.  Raises ValueError for
    fewer than two replicates, or if block_size doesn't divide the row.
    """
    _check_replicates(num_replicates)
    num_rows, seq_len = s.x0.shape
    blocks = num_blocks(seq_len, block_size)
    lengths = s.scored.view(num_rows, blocks, block_size).sum(dim=-1)
    masks, weights = [], []
    for replicate in range(num_replicates):
        u = stratified_uniform(s.noise_seed, replicate, num_rows * blocks, Stream.COUNT).view(num_rows, blocks)
        counts = _counts(u, lengths)
        masks.append(exact_count_positions(counts, s.sample_ids, s.scored, noise_seed=s.noise_seed, step=replicate))
        weights.append(per_token(exact_count_weight(lengths, counts), seq_len))
    rows = torch.arange(num_rows).repeat(num_replicates)
    losses = _losses(denoise, s, rows, torch.cat(masks), torch.cat(weights))
    return _over_replicates(losses.view(num_replicates, num_rows))


# Exact values


def block_chain_nll(denoise: BlockDenoise, s: Scoring, block_size: int) -> RowEstimate:
    """Exact -log p of a block-diffusion model that fills each block from left to right:  block_size passes.

    sum_b sum_j -log p(x^{b,j} | x^{b,<j}, x^{<b}).  For block_size 1 it is the one likelihood of the model, that of
    BD3-LM (arXiv 2503.09573) table 1.  Raises ValueError if block_size doesn't divide the row.
    """
    num_blocks(s.x0.shape[1], block_size)
    place = (torch.arange(s.x0.shape[1]) % block_size).expand_as(s.x0)
    return _ordered(denoise, s, place, block_size)


def left_to_right_nll(denoise: Denoise, s: Scoring) -> RowEstimate:
    """Exact -log p of the sampler that fills the scored tokens from left to right:  one pass a token.

    sum_i -log p(x_i | x_{<i}, all later scored tokens masked): the chain-rule likelihood of SMDM (arXiv 2410.18514)
    and of Dream's evaluation.  Not the likelihood of any other sampler.
    """
    return ordered_nll(denoise, s, s.scored.cumsum(dim=1) - 1)


def ordered_nll(denoise: Denoise, s: Scoring, rank: Int[Tensor, "B L"]) -> RowEstimate:
    """Exact -log p of the sampler that fills the scored tokens in the order of ``rank`` = 0, 1, ..., n - 1.

    sum_i -log p(x^{order(i)} | x^{order(<i)}): one term of the any-order loss (RADD, arXiv 2406.03736, theorem 2),
    whose mean over all orders is the NELBO.  Raises ValueError unless the ranks of each row's scored tokens are
    0..n-1.
    """
    wanted = torch.arange(s.x0.shape[1]).expand_as(rank)
    ranks = rank.masked_fill(~s.scored, s.x0.shape[1]).sort(dim=1).values
    if (s.scored.sum(dim=1, keepdim=True) > wanted).logical_and(ranks != wanted).any():
        raise ValueError("the ranks of a row's scored tokens must be 0, 1, ..., n - 1, each once")
    return _ordered(_ignoring_x0(denoise), s, rank, int(s.lengths.max()))


def any_order_bound(denoise: Denoise, s: Scoring, *, num_orders: int) -> RowEstimate:
    """The NELBO as the mean of ``ordered_nll`` over random orders, n passes each.

    RADD (arXiv 2406.03736) theorem 2; the slowest of the equal forms, and the most literal.  Raises ValueError for
    fewer than two orders.
    """
    _check_replicates(num_orders)
    seq_len = s.x0.shape[1]
    losses: list[Tensor] = []
    for order in range(num_orders):
        draws = [hash_permutation(seq_len, s.noise_seed, order, int(sample)) for sample in s.sample_ids]
        key = torch.stack(draws).masked_fill(~s.scored, seq_len)
        losses.append(ordered_nll(denoise, s, key.argsort(dim=1).argsort(dim=1)).nats)
    return _over_replicates(torch.stack(losses))


def _ordered(predict: BlockDenoise, s: Scoring, rank: Int[Tensor, "B L"], num_steps: int) -> RowEstimate:
    """Step i asks for the tokens of rank i, with those of higher rank masked as well."""
    total = torch.zeros(len(s.x0), dtype=torch.float64)
    rows = torch.arange(len(s.x0))
    for step in range(num_steps):
        weight = (s.scored & (rank == step)).double()
        total += _losses(predict, s, rows, s.scored & (rank >= step), weight)
    return RowEstimate(total, torch.zeros_like(total), is_bound=False)
