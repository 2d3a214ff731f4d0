"""Batches of a step: a pure function of the step and of the rank's place in the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlm_core.corruption import mask_tokens, sample_times
from dlm_core.schedules import LinearSchedule, nelbo_weight
from pipeline.data.order import row_at
from pipeline.data.packing import PackedRows
from pipeline.data.vocabulary import SpecialTokens
from pipeline.pretrain.config import PretrainConfig


@dataclass(frozen=True)
class Batch:
    """A corrupted micro batch."""

    x0: Tensor
    """Clean tokens, int64 [B, L]."""
    xt: Tensor
    """Noised tokens, int64 [B, L]."""
    loss_mask: Tensor
    """Valid tokens, bool [B, L]."""
    t: Tensor
    """Time of each row, float64 [B]."""
    weight: Tensor
    """NELBO weight of each row, float64 [B]."""


def micro_batches(
    config: PretrainConfig, rows: PackedRows, special: SpecialTokens, step: int, rank: int
) -> Iterator[Batch]:
    """The rank's micro batches of one step, noised.

    Sample id = step * global_batch_seqs + place.  The rank takes a contiguous range of places; nothing else
    depends on it, so the global batch and its noise are the same for any number of ranks.
    """
    schedule = LinearSchedule()
    times = sample_times(config.noise_seed, step, config.global_batch_seqs, config.t_min)
    first_place = rank * config.rank_batch_seqs
    for start in range(first_place, first_place + config.rank_batch_seqs, config.rows_per_pass):
        places = range(start, start + config.rows_per_pass)
        sample_ids = [step * config.global_batch_seqs + place for place in places]
        drawn = [
            rows.row(row_at(config.data_seed, rows.num_full_rows, sample_id), special.pad_token_id)
            for sample_id in sample_ids
        ]
        x0 = torch.from_numpy(np.stack([tokens for tokens, _ in drawn]))
        lengths = torch.tensor([length for _, length in drawn])
        loss_mask = torch.arange(config.seq_len) < lengths[:, None]
        t = times[list(places)]
        alpha_t = schedule.alpha(t)
        xt = mask_tokens(
            x0,
            1.0 - alpha_t,
            torch.tensor(sample_ids),
            noise_seed=config.noise_seed,
            step=step,
            mask_token_id=special.mask_token_id,
            maskable=loss_mask,
        )
        yield Batch(x0, xt, loss_mask, t, nelbo_weight(alpha_t, schedule.dalpha(t)))
