"""Estimators of the likelihood of rows for evaluation: bounds and exact values, each with its standard error.

A denoiser is a function (xt [B, L], select [M]) -> logits [M, V] of the tokens at the flat positions ``select`` of xt,
with -inf for the mask token (``exclude_token``): probability left on the mask is lost from the bound.  That of a block
model, (xt, x0, select) -> logits, also gets the clean rows, of which a block sees those before it.

What lives here: estimators of -log p, given a denoiser as a function.  What must not: models, training losses, the
bound of a corpus (corpus_bound.py).

Shapes: B rows, L seq_len, N draws a row, J jobs (noised copies of rows that go through the denoiser), K blocks of a
row; n is the number of scored tokens of a row.  Rows keep everything that is not scored (prompt, padding) as it is; the
denoiser deals with padding.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.blocks import num_blocks, per_token
from dlm_core.corpus_bound import counts_at, exact_count_weight
from dlm_core.corruption import exact_count_positions, noise_positions
from dlm_core.cross_entropy import Denoise, token_cross_entropy
from dlm_core.noise import Stream, hash_uniform, hash_words
from dlm_core.objectives import prior_loss
from dlm_core.schedules import Schedule

BlockDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(xt [B, L], x0 [B, L], select [M]) -> logits [M, V]: a denoiser whose blocks see the clean blocks before them."""


@dataclass(frozen=True)
class RowEstimate:
    """-log p of the scored tokens of every row, or a bound on it, in nats; independent of the other rows."""

    nats: Float[Tensor, " B"]
    mc_se: Float[Tensor, " B"]
    """Standard error of nats from the drawn masks: 0 where nothing was drawn, nan where one draw tells nothing."""
    is_bound: bool
    """Whether the mean of nats bounds -log p from above; otherwise it is the exact value for a stated order."""

    def per_token(self, num_tokens: int) -> tuple[float, float]:
        """Nats a token over all rows, and its mc_se:  sum nats / num_tokens,  sqrt(sum mc_se^2) / num_tokens.

        The rows are drawn independently, so their squares add.  Raises ValueError without tokens.
        """
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}; it must be at least 1")
        return float(self.nats.sum()) / num_tokens, math.sqrt(float(self.mc_se.square().sum())) / num_tokens


# Bounds of rows


@dataclass(frozen=True)
class Scoring:
    """Which tokens of which rows are scored, and what addresses their noise; all on the host.

    ``scored`` are the tokens whose likelihood is asked for (an answer, or a whole text), and only they are ever masked.
    Raises ValueError for no row, shapes that don't fit, a batch_rows below 1, or a scored token that is the mask.
    """

    x0: Int[Tensor, "B L"]
    scored: Bool[Tensor, "B L"]
    mask_token_id: int
    sample_ids: Int[Tensor, " B"]
    noise_seed: int = 0
    batch_rows: int = 64
    """Noised rows in one call of the denoiser; no effect on the result."""

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows is {self.batch_rows}; it must be at least 1")
        if len(self.x0) == 0:
            raise ValueError("x0 has no row; there is nothing to score")
        if self.mask_token_id < 0:
            raise ValueError(f"mask_token_id is {self.mask_token_id}; ids begin at 0")
        if self.scored.shape != self.x0.shape or self.scored.dtype != torch.bool:
            raise ValueError(
                f"scored is {self.scored.dtype} of the shape {tuple(self.scored.shape)}; "
                f"wanted torch.bool of the shape {tuple(self.x0.shape)} of x0"
            )
        if self.sample_ids.shape != (len(self.x0),):
            raise ValueError(
                f"sample_ids has the shape {tuple(self.sample_ids.shape)} for {len(self.x0)} rows; wanted one each"
            )
        if (self.scored & (self.x0 == self.mask_token_id)).any():
            raise ValueError(f"a scored token is the mask token {self.mask_token_id}; its likelihood is 0")

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Scored tokens of each row."""
        return self.scored.sum(dim=1)


@torch.no_grad()
def _block_losses(
    predict: BlockDenoise,
    s: Scoring,
    rows: Int[Tensor, " J"],
    is_masked: Bool[Tensor, "J L"],
    weight: Float[Tensor, "J L"],
    block_size: int,
) -> Float[Tensor, "J K"]:
    """Weighted cross-entropy of each job's masked tokens by block, float64; where all weigh 0, nothing is computed."""
    seq_len = s.x0.shape[1]
    num = num_blocks(seq_len, block_size)
    asked = is_masked & (weight != 0)
    total = torch.zeros(len(rows) * num, dtype=torch.float64)
    busy = asked.any(dim=1).nonzero().flatten()
    for start in range(0, len(busy), s.batch_rows):
        jobs = busy[start : start + s.batch_rows]
        x0 = s.x0[rows[jobs]]
        xt = torch.where(is_masked[jobs], s.mask_token_id, x0)
        select = asked[jobs].flatten().nonzero().squeeze(1)
        logits = predict(xt, x0, select)
        nats = token_cross_entropy(logits, x0.flatten()[select].to(logits.device)).double().cpu()
        if nats.isnan().any():
            raise FloatingPointError("the denoiser's logits hold nan, or no id of finite logit: no loss is a number")
        block = jobs[select // seq_len] * num + select % seq_len // block_size
        total.index_add_(0, block, nats * weight[jobs].flatten()[select])
    return total.view(len(rows), num)


def _losses(
    predict: BlockDenoise, s: Scoring, rows: Int[Tensor, " J"], is_masked: Tensor, weight: Tensor
) -> Float[Tensor, " J"]:
    return _block_losses(predict, s, rows, is_masked, weight, s.x0.shape[1]).squeeze(1)


def _ignoring_x0(denoise: Denoise) -> BlockDenoise:
    return lambda xt, x0, select: denoise(xt, select)


def _strata(s: Scoring, num_draws: int, stream: Stream, num_groups: int = 1) -> Float[Tensor, "N B K"]:
    """Uniforms of every row and group, one stratum a draw, each with an offset of its own; no row knows another."""
    draws = torch.arange(num_draws)[:, None, None]
    rows = hash_words(s.noise_seed, stream, s.sample_ids)[:, None]
    return (draws + hash_uniform(rows, torch.arange(num_groups), draws)) / num_draws


def _over_strata(losses: Float[Tensor, "N B K"], num_scored: Int[Tensor, "B K"], least: int) -> RowEstimate:
    """Mean over strata, summed over the K groups of a row, which are stratified independently of each other.

    The error comes from neighbours: sum of (g_{j+1} - g_j)^2 / (2 N^2), the end ones twice.  Each stratum's variance is
    then counted at least twice and halved, and what neighbours differ in mean only adds: the mean of the *squared*
    error is too large rather than too small, the more so the more the loss depends on the mask rate and the fewer the
    draws.  The error of a single row of few draws is more often too small than too large; summed over rows it is not.
    One draw tells nothing of a group with ``least`` scored tokens or more; with fewer nothing was drawn.
    """
    num_draws, nats = len(losses), losses.mean(dim=0).sum(dim=-1)
    if num_draws == 1:
        is_drawn = (num_scored >= least).any(dim=-1)
        return RowEstimate(nats, torch.where(is_drawn, torch.nan, torch.zeros_like(nats)), is_bound=True)
    squares = losses.diff(dim=0).square()
    total = (squares.sum(dim=0) + squares[0] + squares[-1]).sum(dim=-1)
    return RowEstimate(nats, torch.sqrt(total / 2) / num_draws, is_bound=True)


def _check_draws(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")


def continuous_bound(
    denoise: Denoise, s: Scoring, schedule: Schedule, *, t_min: float, num_draws: int, num_real_tokens: int
) -> RowEstimate:
    """The NELBO in continuous time, all of it:  reconstruction + diffusion + prior.

    ::

        diffusion       (1 - t_min) E_t nelbo_weight(t) sum_{masked} -log p,   t uniform on [t_min, 1]
        reconstruction  E sum_{masked} -log p  at t_min: of a process that starts there, so that the sum is a bound
        prior           n alpha_1 log(num_real_tokens): what is not masked at t = 1

    MDLM (arXiv 2406.07524) eq. 10; without the first and the last term the integral over [t_min, 1] bounds nothing. t
    is stratified over the draws of a row.  Raises ValueError for less than one draw, no real token, or a t_min outside
    [0, 1) or where nothing is masked: from there the weight grows without limit.
    """
    _check_draws("num_draws", num_draws)
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min is {t_min}; it must lie in [0, 1)")
    first = torch.tensor(t_min, dtype=torch.float64)
    if schedule.mask_prob(first) == 0:
        raise ValueError(f"t_min is {t_min}, where {schedule} masks nothing; take a larger one, e.g. 1e-3")
    t = t_min + (1.0 - t_min) * _strata(s, num_draws, Stream.ROW_STRATUM)[..., 0]
    weight = (1.0 - t_min) * schedule.nelbo_weight(t)
    return _three_terms(denoise, s, schedule, t, weight, first, num_real_tokens)


def discrete_bound(
    denoise: Denoise, s: Scoring, schedule: Schedule, *, num_timesteps: int, num_draws: int, num_real_tokens: int
) -> RowEstimate:
    """The NELBO with T = num_timesteps steps, all of it:  reconstruction + diffusion + prior.

    ::

        diffusion       E_i T (alpha_s - alpha_t) / (1 - alpha_t) sum_{masked} -log p,   t = i / T,  s = (i - 1) / T
        reconstruction  E sum_{masked} -log p  at t = 0, where the schedule masks anything then
        prior           n alpha_1 log(num_real_tokens)

    MDLM (arXiv 2406.07524) eq. 8, with i uniform on 1..T and stratified over the draws of a row.  Raises ValueError for
    less than one draw or one step, or no real token.
    """
    _check_draws("num_draws", num_draws)
    _check_draws("num_timesteps", num_timesteps)
    u = _strata(s, num_draws, Stream.ROW_STRATUM)[..., 0]
    index = 1 + torch.floor(u * num_timesteps).clamp(max=num_timesteps - 1)
    t = index / num_timesteps
    weight = schedule.discrete_weight(index, num_timesteps)
    return _three_terms(denoise, s, schedule, t, weight, torch.tensor(0.0, dtype=torch.float64), num_real_tokens)


def _three_terms(
    denoise: Denoise,
    s: Scoring,
    schedule: Schedule,
    t: Float[Tensor, "N B"],
    weight: Float[Tensor, "N B"],
    first: Float[Tensor, ""],
    num_real_tokens: int,
) -> RowEstimate:
    losses = _bernoulli_losses(denoise, s, schedule.mask_prob(t), weight, first_step=0)
    start = schedule.mask_prob(first)
    if start > 0:
        losses = losses + _bernoulli_losses(denoise, s, start.expand(t.shape), torch.ones_like(t), first_step=len(t))
    alpha_1 = schedule.alpha(torch.ones((), dtype=torch.float64))
    losses = losses + s.lengths * prior_loss(alpha_1, num_real_tokens)
    return _over_strata(losses.unsqueeze(-1), s.lengths[:, None], least=1)


def _bernoulli_losses(
    denoise: Denoise, s: Scoring, mask_prob: Float[Tensor, "N B"], weight: Float[Tensor, "N B"], first_step: int
) -> Float[Tensor, "N B"]:
    """Each row masked token by token, once a draw, with its own probability and weight."""
    num_draws, seq_len = len(mask_prob), s.x0.shape[1]
    is_masked = [
        noise_positions(
            mask_prob[draw][:, None],
            s.sample_ids,
            seq_len,
            noise_seed=s.noise_seed,
            step=first_step + draw,
            maskable=s.scored,
        )
        for draw in range(num_draws)
    ]
    rows = torch.arange(len(s.x0)).repeat(num_draws)
    token_weight = weight.flatten()[:, None].expand(-1, seq_len)
    return _losses(_ignoring_x0(denoise), s, rows, torch.cat(is_masked), token_weight).view(num_draws, -1)


def exact_count_bound(denoise: Denoise, s: Scoring, *, num_draws: int) -> RowEstimate:
    """The NELBO of the scored tokens by masking exact counts:  E_k n / k sum_{masked} -log p,  k uniform on {1..n}.

    LLaDA (arXiv 2502.09992) eq. 6 and algorithm 3, with k stratified over all ``num_draws`` draws of a row.  A row
    whose 2^n - 1 masks are no more than num_draws is enumerated instead: exact, mc_se = 0; so a single token is exact
    with one draw.  Raises ValueError for less than one draw.
    """
    _check_draws("num_draws", num_draws)
    is_short = 2.0 ** s.lengths.double() - 1 <= num_draws
    nats, mc_se = _all_mask_losses(denoise, s, is_short), torch.zeros(len(s.x0), dtype=torch.float64)
    long = (~is_short).nonzero().flatten()
    if len(long):
        losses = _count_losses(_ignoring_x0(denoise), s, s.x0.shape[1], num_draws, long)
        drawn = _over_strata(losses, s.lengths[long][:, None], least=2)
        nats[long], mc_se[long] = drawn.nats, drawn.mc_se
    return RowEstimate(nats, mc_se, is_bound=True)


def _all_mask_losses(denoise: Denoise, s: Scoring, chosen: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Every nonempty subset of a chosen row's scored positions, weighed (n / k) / (n binom(n, k)); 0 for other rows."""
    rows: list[int] = []
    subsets: list[tuple[int, ...]] = []
    for row in chosen.nonzero().flatten().tolist():
        places = s.scored[row].nonzero().flatten().tolist()
        for k in range(1, len(places) + 1):
            for subset in itertools.combinations(places, k):
                rows.append(row)
                subsets.append(subset)
    is_masked = torch.zeros(len(rows), s.x0.shape[1], dtype=torch.bool)
    weight = torch.zeros(len(rows), s.x0.shape[1], dtype=torch.float64)
    lengths = s.lengths.tolist()
    for job, (row, subset) in enumerate(zip(rows, subsets, strict=True)):
        is_masked[job, list(subset)] = True
        weight[job, list(subset)] = 1 / (len(subset) * math.comb(lengths[row], len(subset)))
    at = torch.tensor(rows, dtype=torch.int64)
    losses = _losses(_ignoring_x0(denoise), s, at, is_masked, weight)
    return torch.zeros(len(s.x0), dtype=torch.float64).index_add_(0, at, losses)


def _count_losses(
    predict: BlockDenoise, s: Scoring, block_size: int, num_draws: int, rows: Int[Tensor, " b"]
) -> Float[Tensor, "N b K"]:
    """Rows with an exact count of masks in each of their blocks, the counts stratified over the draws; by block."""
    seq_len = s.x0.shape[1]
    blocks = num_blocks(seq_len, block_size)
    lengths = s.scored.view(-1, blocks, block_size).sum(dim=-1)[rows]
    counts = counts_at(_strata(s, num_draws, Stream.ROW_COUNT, blocks)[:, rows], lengths)
    is_masked = [
        exact_count_positions(counts[draw], s.sample_ids[rows], s.scored[rows], noise_seed=s.noise_seed, step=draw)
        for draw in range(num_draws)
    ]
    weight = [per_token(exact_count_weight(lengths, counts[draw]), seq_len) for draw in range(num_draws)]
    jobs = rows.repeat(num_draws)
    losses = _block_losses(predict, s, jobs, torch.cat(is_masked), torch.cat(weight), block_size)
    return losses.view(num_draws, len(rows), blocks)


def block_bound(denoise: BlockDenoise, s: Scoring, block_size: int, *, num_draws: int) -> RowEstimate:
    """The NELBO of a block-diffusion model, the chain over blocks:  sum_b E_{k_b} n_b / k_b sum_{masked in b} -log p.

    The bound of BD3-LM (arXiv 2503.09573) in its exact-count form: the counts k_b of each block are stratified over
    the draws, and all blocks of a row are scored in one pass, each seeing the clean blocks before it.  Raises
    ValueError for less than one draw, or if block_size doesn't divide the row.
    """
    _check_draws("num_draws", num_draws)
    losses = _count_losses(denoise, s, block_size, num_draws, torch.arange(len(s.x0)))
    return _over_strata(losses, s.scored.view(len(s.x0), -1, block_size).sum(dim=-1), least=2)


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
    bad = (s.lengths[:, None] > wanted) & (ranks != wanted)
    if bad.any():
        row = int((bad.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"the ranks of row {row}'s scored tokens are {rank[row][s.scored[row]].tolist()}; "
            "they must be 0, 1, ..., n - 1, each once"
        )
    return _ordered(_ignoring_x0(denoise), s, rank, int(s.lengths.max()))


def any_order_bound(denoise: Denoise, s: Scoring, *, num_orders: int) -> RowEstimate:
    """The NELBO as the mean of ``ordered_nll`` over random orders, n passes each.

    RADD (arXiv 2406.03736) theorem 2; the slowest of the equal forms, and the most literal.  Raises ValueError for less
    than one order.
    """
    _check_draws("num_orders", num_orders)
    losses: list[Tensor] = []
    for order in range(num_orders):
        address = hash_words(s.noise_seed, Stream.ORDER, order, s.sample_ids)[:, None]
        hashes = hash_words(address, torch.arange(s.x0.shape[1]))
        key = hashes.masked_fill(~s.scored, torch.iinfo(torch.int64).max)
        losses.append(ordered_nll(denoise, s, key.argsort(dim=1).argsort(dim=1)).nats)
    nats = torch.stack(losses)
    one = torch.where(s.lengths > 1, torch.nan, torch.zeros_like(nats[0]))
    mc_se = nats.std(dim=0) / math.sqrt(num_orders) if num_orders > 1 else one
    return RowEstimate(nats.mean(dim=0), mc_se, is_bound=True)


def _ordered(predict: BlockDenoise, s: Scoring, rank: Int[Tensor, "B L"], num_steps: int) -> RowEstimate:
    """Step i asks for the tokens of rank i, with those of higher rank masked as well."""
    total = torch.zeros(len(s.x0), dtype=torch.float64)
    rows = torch.arange(len(s.x0))
    for step in range(num_steps):
        weight = (rank == step).double()
        total += _losses(predict, s, rows, s.scored & (rank >= step), weight)
    return RowEstimate(total, torch.zeros_like(total), is_bound=False)
