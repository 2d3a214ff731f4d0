"""Conditional likelihood the way public scripts of masked diffusion compute it, written afresh as a yardstick.

One request at a time; a batch is copies of one row; counts of masks evenly spaced over the answer's tokens from a
random one on, within the batch; a permutation drawn for every copy; logits of every position over the whole vocabulary,
of which the masked ones are taken.  What LLaDA's evaluation (arXiv 2502.09992, algorithm 3) does, in its shapes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class OneByOne:
    """An estimate, and its standard error from the spread of the batches' means."""

    nats: float
    mc_se: float


@torch.no_grad()
def one_by_one(
    model: nn.Module,
    context: Sequence[int],
    answer: Sequence[int],
    *,
    mask_token_id: int,
    num_masks: int,
    batch_rows: int,
    generator: torch.Generator,
    target_offset: int = 0,
) -> OneByOne:
    """-log p(answer | context) <= E (n / k) sum_{masked} -log p,  mean over num_masks copies of the row.

    A model with a ``target_offset`` of 1 has all its logits moved by one place, as Dream's scripts do it.
    """
    row = torch.tensor([*context, *answer])
    copies = row.repeat(batch_rows, 1)
    num_context, n = len(context), len(answer)
    means: list[float] = []
    for _ in range(num_masks // batch_rows):
        is_masked, counts = _masks(num_context, n, batch_rows, generator)
        xt = torch.where(is_masked, mask_token_id, copies)
        logits = model(xt).view(batch_rows, len(row), -1)
        if target_offset:
            logits = torch.cat([logits[:, :target_offset], logits[:, :-target_offset]], dim=1)
        losses = F.cross_entropy(logits[is_masked], copies[is_masked], reduction="none")
        share = (counts / n)[:, None].expand(-1, len(row))[is_masked]
        means.append(float((losses / share).sum()) / batch_rows)
    spread = torch.tensor(means, dtype=torch.float64)
    return OneByOne(float(spread.mean()), float(spread.std()) / math.sqrt(len(means)))


def _masks(num_context: int, n: int, num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first = int(torch.randint(1, n + 1, (1,), generator=generator))
    counts = first + torch.arange(num_rows) * n // num_rows  # rounded down: to the nearest even number is no even law
    counts = (counts - 1) % n + 1
    is_masked = torch.zeros(num_rows, num_context + n, dtype=torch.bool)
    for place in range(num_rows):
        chosen = torch.randperm(n, generator=generator)[: int(counts[place])]
        is_masked[place, num_context + chosen] = True
    return is_masked, counts
