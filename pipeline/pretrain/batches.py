"""Batches of a step: a pure function of the step and of the rank's place in the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dlm_core.corruption import mask_tokens, sample_times
from dlm_core.objectives import Corrupted, Nelbo, Targets, masked_targets
from dlm_core.schedules import LinearSchedule
from pipeline.data.loader import Loader, RowBatch
from pipeline.data.order import hash_words, stream_number
from pipeline.data.special_tokens import SpecialTokens
from pipeline.errors import CorruptionError
from pipeline.pretrain.config import PretrainConfig

_LENGTH_STREAM = stream_number("length of a step")


@dataclass(frozen=True)
class Batch:
    """A micro batch, on the host: what was noised, and what the model is asked for."""

    noised: Corrupted
    targets: Targets


def step_length(config: PretrainConfig, seq_len: int, step: int) -> int:
    """Tokens of the rows that a step trains on, alike on every rank.

    seq_len, but for a share of steps that take a length drawn from U{short_step_min, ..., seq_len} (LLaDA, arXiv
    2502.09992, section 2.2; LLaDA-MoE, 2509.24389): what lies behind is left out of that step.
    """
    chance, place = hash_words(config.data_seed, _LENGTH_STREAM, step, np.arange(2, dtype=np.uint64)).tolist()
    if chance >= int(config.short_step_share * 2**64):
        return seq_len
    shortest = min(config.short_step_min, seq_len)
    return shortest + place % (seq_len - shortest + 1)


def rank_rows(config: PretrainConfig, loader: Loader, step: int, rank: int) -> RowBatch:
    """The rank's rows of a step: sample id = step * global_batch_seqs + place, a contiguous range of places."""
    first = step * config.global_batch_seqs + rank * config.rank_batch_seqs
    return loader.batch(np.arange(first, first + config.rank_batch_seqs))


def micro_batches(
    config: PretrainConfig, drawn: RowBatch, special: SpecialTokens, step: int, rank: int
) -> Iterator[Batch]:
    """The rank's rows of one step, noised, cut into micro batches.

    Nothing depends on the rank but which places it takes: the global batch and its noise are the same for any number of
    ranks.  Raises CorruptionError for a row that holds the mask id.
    """
    objective = Nelbo(LinearSchedule())
    times = sample_times(config.noise_seed, step, config.global_batch_seqs, config.t_min)
    first_place = rank * config.rank_batch_seqs
    length = step_length(config, drawn.x0.shape[1], step)
    is_real = drawn.doc_ids >= 0
    if ((drawn.x0 == special.mask_token_id) & is_real).any():
        raise CorruptionError(f"a row of step {step} holds the mask id {special.mask_token_id}, which no text may have")
    for start in range(0, config.rank_batch_seqs, config.rows_per_pass):
        rows = slice(start, start + config.rows_per_pass)
        x0, is_text = (torch.from_numpy(array[rows, :length]) for array in (drawn.x0, is_real))
        t = times[first_place + start : first_place + start + config.rows_per_pass, None]
        xt = mask_tokens(
            x0,
            objective.schedule.mask_prob(t),
            torch.from_numpy(drawn.sample_ids[rows]),
            noise_seed=config.noise_seed,
            step=step,
            mask_token_id=special.mask_token_id,
            maskable=is_text,
        )
        noised = Corrupted(x0, xt, t.expand(xt.shape), is_text, is_text, special.mask_token_id)
        yield Batch(noised, masked_targets(noised, objective, objective))
