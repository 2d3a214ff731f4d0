"""Batches of a step: a pure function of the step and of the rank's place in the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.ar_init import add_mask_noise, anneal_ratio, mask_noise_std
from dlm_core.blocks import num_blocks, per_token
from dlm_core.corpus_bound import counts_at
from dlm_core.corruption import mask_exact_count, mask_tokens, mask_within, maskable_positions, sample_times
from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import Perturb
from dlm_core.noise import stratified_uniform
from dlm_core.objectives import (
    Cart,
    Corrupted,
    ExactCount,
    InverseMaskProb,
    Nelbo,
    OneMinusT,
    Targets,
    Uniform,
    Weighting,
    masked_targets,
    next_token_targets,
)
from dlm_core.schedules import SCHEDULES, ClippedSchedule, Schedule
from pipeline.data.loader import Loader, RowBatch
from pipeline.data.order import hash_words, stream_number
from pipeline.data.rows import PackedRows
from pipeline.data.special_tokens import SpecialTokens
from pipeline.data.verified import Verified
from pipeline.errors import CorruptionError
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.objective import ALL_RATES, ObjectiveConfig, fractions_within, has_count_within
from pipeline.pretrain.phases import Span

_LENGTH_STREAM = stream_number("length of a step")


@dataclass(frozen=True)
class Rows:
    """Some rows of a step's global batch, as long as the step wants them, on the host."""

    ids: Int[Tensor, " B"]
    """Addresses of their noise: sample id * pieces of a packed row + piece."""
    x0: Int[Tensor, "B L"]
    doc_ids: Int[Tensor, "B L"]
    """Document of each token, -1 for padding."""

    @property
    def is_text(self) -> Bool[Tensor, "B L"]:
        """Positions that are no padding."""
        return self.doc_ids >= 0


@dataclass(frozen=True)
class Batch:
    """A micro batch, on the host: what the model sees, and what it is asked for."""

    xt: Int[Tensor, "B L"]
    x0: Int[Tensor, "B L"] | None
    """The clean half, for block diffusion alone."""
    mask: AttentionMask
    targets: Targets
    t: Float[Tensor, "B L"]
    """Time of each token; nan where the objective has none."""
    is_text: Bool[Tensor, "B L"]
    perturb: Perturb | None = None
    """Noise on the embeddings."""

    def arguments(self, device: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What ``Denoiser.forward`` takes, on a device: positional arguments, and those by name."""
        asked, mask = self.targets, self.mask.to(device)
        columns = (self.xt, asked.select, asked.targets, asked.weight)
        named: dict[str, Any] = {"mask": mask}
        named |= {} if self.x0 is None else {"x0": self.x0.to(device)}
        named |= {} if self.perturb is None else {"perturb": self.perturb}
        return tuple(column.to(device) for column in columns), named


class PhasedLoader:
    """The rows of every step; where a phase has another mixture than the one before, the order begins anew."""

    def __init__(
        self, config: PretrainConfig, rows: PackedRows, pad_token_id: int, verified: Verified | None = None
    ) -> None:
        self._config = config
        self._parts: list[tuple[int, Loader]] = []
        """First sample id of a mixture, and the loader of the rows from there on."""
        before = None
        for span in config.spans:
            if span.mixture != before:
                seed = config.data_seed + len(self._parts)
                loader = Loader(rows, seed, pad_token_id, span.mixture, verified)
                self._parts.append((span.first_step * config.global_batch_seqs, loader))
                before = span.mixture

    def rank_rows(self, step: int, rank: int) -> RowBatch:
        """The rank's rows of a step: sample id = step * global_batch_seqs + place, a contiguous range of places."""
        size = self._config.rank_batch_seqs
        first = step * self._config.global_batch_seqs + rank * size
        start, loader = next((start, loader) for start, loader in reversed(self._parts) if start <= first)
        drawn = loader.batch(np.arange(first - start, first - start + size))
        return RowBatch(drawn.sample_ids + start, drawn.x0, drawn.segments)

    def epochs(self, sample_id: int) -> dict[str, float]:
        """Times that each source has been shown by the samples before this one; "" without a mixture."""
        shown: dict[str, float] = {}
        stops = [start for start, _ in self._parts[1:]] + [sample_id]
        for (start, loader), stop in zip(self._parts, stops, strict=True):
            if start < sample_id:
                for name, times in loader.epochs(min(stop, sample_id) - start).items():
                    shown[name] = shown.get(name, 0.0) + times
        return shown


def step_length(config: PretrainConfig, seq_len: int, step: int) -> int:
    """Tokens of the rows that a step trains on, alike on every rank.

    seq_len, but for a share of steps that take a length drawn from U{short_step_min, ..., seq_len} (LLaDA, arXiv
    2502.09992, section 2.2; LLaDA-MoE, 2509.24389), in whole blocks: what lies behind is left out of that step.
    """
    chance, place = hash_words(config.data_seed, _LENGTH_STREAM, step, np.arange(2, dtype=np.uint64)).tolist()
    if chance >= int(config.short_step_share * 2**64):
        return seq_len
    shortest = min(config.short_step_min, seq_len)
    length = shortest + place % (seq_len - shortest + 1)
    block_size = config.span_at(step).block_size or 1
    return -(-length // block_size) * block_size


def is_short(config: PretrainConfig, packed_len: int, step: int) -> bool:
    """Whether the rows of a step are cut to a random length."""
    seq_len = config.span_at(step).seq_len or packed_len
    return step_length(config, seq_len, step) < seq_len


def step_rows(config: PretrainConfig, drawn: RowBatch, step: int) -> Rows:
    """The rank's packed rows as the rows of a step: cut into the pieces of its phase, then to the step's length."""
    packed_len = drawn.x0.shape[1]
    seq_len = config.span_at(step).seq_len or packed_len
    pieces = packed_len // seq_len
    length = step_length(config, seq_len, step)
    x0, doc_ids = (
        torch.from_numpy(array).reshape(-1, seq_len)[:, :length] for array in (drawn.x0, drawn.doc_ids.astype(np.int64))
    )
    ids = torch.from_numpy(drawn.sample_ids)[:, None] * pieces + torch.arange(pieces)
    return Rows(ids.flatten(), x0, doc_ids)


def step_strata(config: PretrainConfig, rows: Rows, step: int, rank: int) -> Float[Tensor, "B K"]:
    """A number for each of the rank's rows of a step, or for each block, in strata over the global batch.

    Times, or uniform where exact counts are to be drawn from them.  All of the global batch are made: ask once a step.
    """
    o, block_size = config.objective, config.span_at(step).block_size
    num_rows, seq_len = rows.x0.shape
    num_groups = num_blocks(seq_len, block_size) if block_size else 1
    num_own = num_rows * num_groups
    if o.masking == "exact_count":
        strata = stratified_uniform(config.noise_seed, step, config.workers * num_own)
    else:
        strata = sample_times(config.noise_seed, step, config.workers * num_own, o.t_min)
    return strata[rank * num_own : (rank + 1) * num_own].view(num_rows, num_groups)


def step_kind(config: PretrainConfig, packed_len: int, step: int) -> tuple[str, int]:
    """Steps of one kind take about as long as each other, alike on every rank.

    The first of a phase has masks of its own, and compiled layers are compiled again for rows of another length.
    """
    span = config.span_at(step)
    name = f"{span.name}, annealing" if config.adaptation.is_annealing(step) else span.name
    return name, step_length(config, span.seq_len or packed_len, step) if config.compile else 0


def micro_batches(
    config: PretrainConfig,
    drawn: RowBatch,
    special: SpecialTokens,
    step: int,
    rank: int,
    mask_rates: tuple[float, float] | None = None,
) -> Iterator[Batch]:
    """The rank's rows of one step, noised, cut into micro batches.

    Nothing depends on the rank but which places it takes: the global batch and its noise are the same for any number of
    ranks.  ``mask_rates`` are those of the objective unless a search has found others.  Raises CorruptionError for a
    row that holds the mask id.
    """
    rows, span, o = step_rows(config, drawn, step), config.span_at(step), config.objective
    if ((rows.x0 == special.mask_token_id) & rows.is_text).any():
        raise CorruptionError(f"a row of step {step} holds the mask id {special.mask_token_id}, which no text may have")
    size = len(rows.x0) // config.grad_accum_steps
    strata = None if o.kind == "autoregressive" else step_strata(config, rows, step, rank)
    for start in range(0, len(rows.x0), size):
        part = slice(start, start + size)
        micro = Rows(rows.ids[part], rows.x0[part], rows.doc_ids[part])
        if strata is None:
            yield autoregressive_batch(o, micro)
        else:
            yield diffusion_batch(config, micro, strata[part], span, special, step, mask_rates or o.mask_rates)


def autoregressive_batch(objective: ObjectiveConfig, rows: Rows) -> Batch:
    """Rows as they are, every token asked for at the position before it; a document's first one only within a row."""
    t = torch.full(rows.x0.shape, torch.nan, dtype=torch.float64)
    mask = AttentionMask("causal", doc_ids=_who_is_apart(objective, rows))
    return Batch(rows.x0, None, mask, next_token_targets(rows.x0, rows.is_text), t, rows.is_text)


def diffusion_batch(
    config: PretrainConfig,
    rows: Rows,
    strata: Float[Tensor, "B K"],
    span: Span,
    special: SpecialTokens,
    step: int,
    mask_rates: tuple[float, float],
) -> Batch:
    """Rows with the step's noise, from their part of ``step_strata``: one number for each row, or for each block."""
    o = config.objective
    seq_len = rows.x0.shape[1]
    maskable = maskable_positions(rows.is_text, keep_first=o.target_offset == 1)
    address = {"noise_seed": config.noise_seed, "step": step, "mask_token_id": special.mask_token_id}
    if o.masking == "exact_count":
        sizes = maskable.view(*strata.shape, -1).sum(dim=-1)
        counts = counts_at(strata, sizes)
        t = counts / sizes.clamp(min=1)
        xt = mask_exact_count(rows.x0, counts, rows.ids, maskable=maskable, **address)
    else:
        t = strata
        schedule = _schedule(o, mask_rates)
        if mask_rates == ALL_RATES:
            xt = mask_tokens(rows.x0, schedule.mask_prob(t), rows.ids, maskable=maskable, **address)
        else:
            xt = _mask_at_rates(rows, schedule.mask_prob(t), mask_rates, maskable, o.t_min, address)
    noised = Corrupted(rows.x0, xt, per_token(t.double(), seq_len), rows.is_text, maskable, special.mask_token_id)
    weighting, bound = _weightings(o, span.block_size, mask_rates)
    targets = masked_targets(noised, weighting, bound, target_offset=o.target_offset)
    doc_ids = _who_is_apart(o, rows)
    if span.block_size:
        mask = AttentionMask("block_diffusion", block_size=span.block_size, doc_ids=doc_ids)
    elif config.adaptation.is_annealing(step):
        ratio = anneal_ratio(step, config.adaptation.anneal_steps)
        mask = AttentionMask("annealed", ratio=ratio, noise_seed=config.noise_seed, step=step, doc_ids=doc_ids)
    else:
        mask = AttentionMask("full", doc_ids=doc_ids)
    perturb = _mask_noise(config, rows, xt == special.mask_token_id, step)
    return Batch(xt, rows.x0 if span.block_size else None, mask, targets, noised.t, rows.is_text, perturb)


def _mask_noise(config: PretrainConfig, rows: Rows, is_masked: Bool[Tensor, "B L"], step: int) -> Perturb | None:
    """Noise on the embedded mask in the first steps, None later."""
    a = config.adaptation
    if not a.is_noisy(step):
        return None
    std = mask_noise_std(step, a.mask_noise_std, a.mask_noise_steps)
    address: dict[str, Any] = {"std": std, "noise_seed": config.noise_seed, "step": step}
    return partial(add_mask_noise, is_masked=is_masked, sample_ids=rows.ids, **address)


def _mask_at_rates(
    rows: Rows,
    prob: Float[Tensor, "B K"],
    mask_rates: tuple[float, float],
    maskable: Bool[Tensor, "B L"],
    t_min: float,
    address: dict[str, int],
) -> Int[Tensor, "B L"]:
    """Rows with masked fractions of their groups inside ``mask_rates``.

    A group that padding, or a short step, leaves few tokens of may have no count with such a fraction: its tokens are
    masked independently, at a rate that is inside.
    """
    low, high = fractions_within(mask_rates, t_min)
    by_group = maskable.view(len(prob), prob.shape[1], -1)
    group_size = by_group.shape[-1]
    sizes, which = by_group.sum(dim=-1).unique(return_inverse=True)
    has_count = torch.tensor([has_count_within(size, (low, high)) for size in sizes.tolist()])
    bound = has_count[which].repeat_interleave(group_size, dim=1)
    within = mask_within(rows.x0, prob, rows.ids, low=low, high=high, maskable=maskable & bound, **address)
    return torch.where(bound, within, mask_tokens(rows.x0, prob, rows.ids, maskable=maskable & ~bound, **address))


def _who_is_apart(o: ObjectiveConfig, rows: Rows) -> Tensor | None:
    """Numbers of what may not attend to each other: documents, or text and padding; None where all may."""
    if o.within_documents:
        return rows.doc_ids
    return None if rows.is_text.all() else rows.is_text.long()


def _schedule(o: ObjectiveConfig, mask_rates: tuple[float, float]) -> Schedule:
    return SCHEDULES[o.schedule] if mask_rates == ALL_RATES else ClippedSchedule(*mask_rates)


def _weightings(
    o: ObjectiveConfig, block_size: int, mask_rates: tuple[float, float]
) -> tuple[Weighting, Weighting | None]:
    """The weighting that is trained with, and the bound that is watched beside it where the sampled times allow one."""
    if o.masking == "exact_count":
        exact = ExactCount(block_size or None)
        return exact, exact
    schedule = _schedule(o, mask_rates)
    bound = Nelbo(schedule) if mask_rates == ALL_RATES else None
    weightings: dict[str, Weighting | None] = {
        "nelbo": bound,
        "inverse_mask_prob": InverseMaskProb(schedule),
        "uniform": Uniform(),
        "one_minus_t": OneMinusT(),
        "cart": Cart(o.cart_p) if o.cart_p else None,
    }
    weighting = weightings[o.weighting]
    assert weighting is not None, "the configuration refuses it"
    return weighting, bound
