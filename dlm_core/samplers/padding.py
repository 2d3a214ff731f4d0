"""Rows of unlike lengths in one batch: padding before and behind them that no token of theirs sees.

A row is what it is alone: its tokens count their positions from its own beginning, which also addresses its noise.

B rows, L tokens of the batch's rows, padding and all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlm_core.ar_init import shifted
from dlm_core.models.attention import AttentionMask
from dlm_core.samplers.loop import Pass, Predict, without_pass


@dataclass(frozen=True, eq=False)
class Padding:
    """Where the rows of a batch lie in it."""

    before: Int[Tensor, " B"]
    """Tokens of padding before each; on the host."""
    doc_ids: Int[Tensor, "B L"]
    """0 for tokens of the row, 1 for padding."""
    positions: Int[Tensor, "B L"]
    """Of each token in its row; 0 before it."""

    @classmethod
    def around(
        cls, before: Int[Tensor, " B"], lengths: Int[Tensor, " B"], width: int, device: torch.device
    ) -> "Padding":
        """Of rows of these lengths in a batch of ``width``."""
        positions = torch.arange(width) - before[:, None]
        is_row = (positions >= 0) & (positions < lengths[:, None])
        return cls(before, (~is_row).long().to(device), positions.clamp(min=0).to(device))

    def seen(
        self,
        mask: AttentionMask,
        left: int,
        right: int,
        *,
        num_keys: int | None = None,
        rows: Int[Tensor, " R"] | None = None,
    ) -> dict[str, Any]:
        """How a denoiser is to take the tokens left..right - 1 of the rows among so many keys, ``right`` by default.

        With a table of the mask: it is another one in each pass, for which a compiled kernel would be made anew.
        """
        doc_ids, positions = self.doc_ids[:, : right if num_keys is None else num_keys], self.positions[:, left:right]
        if rows is not None:
            doc_ids, positions = doc_ids[rows], positions[rows]
        return {"mask": replace(mask, doc_ids=doc_ids), "positions": positions, "backend": "dense"}


def whole_rows(
    denoiser: Callable[..., Float[Tensor, "M V"]],
    mask: AttentionMask,
    padding: Padding | None = None,
    target_offset: int = 0,
) -> Predict:
    """A ``Denoiser`` of whole rows, each of which sees nothing of its padding.

    With target_offset 1 token l is asked for at l - 1 (Dream, arXiv 2508.15487).
    """

    def predict(xt: Tensor, select: Tensor, which: Pass) -> Tensor:
        assert padding is not None
        denoise = partial(denoiser, **padding.seen(mask, 0, xt.shape[1], rows=which.rows))
        return (shifted(denoise) if target_offset else denoise)(xt, select)

    if padding is not None:
        return predict
    plain = partial(denoiser, mask=mask)
    return without_pass(shifted(plain) if target_offset else plain)
