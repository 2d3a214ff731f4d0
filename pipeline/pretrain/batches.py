"""Batches of a step: a pure function of the step and of the rank's place in the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dlm_core.corruption import mask_tokens, sample_times
from dlm_core.objectives import Corrupted, Nelbo, Targets, masked_targets
from dlm_core.schedules import LinearSchedule
from pipeline.data.order import row_at
from pipeline.data.packing import PackedRows
from pipeline.data.vocabulary import SpecialTokens
from pipeline.pretrain.config import PretrainConfig


@dataclass(frozen=True)
class Batch:
    """A micro batch, on the host: what was noised, and what the model is asked for."""

    noised: Corrupted
    targets: Targets


def micro_batches(
    config: PretrainConfig, rows: PackedRows, special: SpecialTokens, step: int, rank: int
) -> Iterator[Batch]:
    """The rank's micro batches of one step, noised.

    Sample id = step * global_batch_seqs + place.  The rank takes a contiguous range of places; nothing else
    depends on it, so the global batch and its noise are the same for any number of ranks.
    """
    objective = Nelbo(LinearSchedule())
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
        is_text = torch.arange(config.seq_len) < lengths[:, None]
        t = times[list(places)][:, None]
        xt = mask_tokens(
            x0,
            objective.schedule.mask_prob(t),
            torch.tensor(sample_ids),
            noise_seed=config.noise_seed,
            step=step,
            mask_token_id=special.mask_token_id,
            maskable=is_text,
        )
        noised = Corrupted(x0, xt, t.expand(xt.shape), is_text, is_text, special.mask_token_id)
        yield Batch(noised, masked_targets(noised, objective, objective))
