"""Classifier-free guidance of a denoiser."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.samplers.contexts import Context
from dlm_core.samplers.loop import Pass, Predict
from dlm_core.samplers.padding import Padding


def guided_logits(
    conditional: Float[Tensor, "M V"], unconditional: Float[Tensor, "M V"], w: float
) -> Float[Tensor, "M V"]:
    """unconditional + (w + 1) (conditional - unconditional), computed as c + w (c - u):  w = 0 changes nothing.

    The form of LLaDA (arXiv 2502.09992) and SMDM (2410.18514), where ``unconditional`` comes from the same sequence
    with its prompt masked; the samples follow p_c^(1 + w) / p_u^w.  Tutorials write u + w (c - u): their w is this
    one + 1.  An id that either side excludes (logit -inf) is excluded.
    """
    excluded = (conditional == -torch.inf) | (unconditional == -torch.inf)
    return (conditional + w * (conditional - unconditional)).masked_fill(excluded, -torch.inf)


@dataclass
class Guided(Context):
    """``Whole`` under guidance: each pass has every row of it twice, as it is and with its prompt masked.

    What is no mask when the rows begin is the prompt (LLaDA, arXiv 2502.09992), but for its first ``num_given`` tokens,
    which stay in both.  Counts two forward passes for each.  Raises ValueError for a w that is negative or infinite.
    """

    predict: Predict
    w: float
    mask_token_id: int
    num_given: int = 0
    padding: Padding | None = None
    keeps_rows: bool = False
    branches: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0.0 <= self.w < math.inf:
            raise ValueError(f"w is {self.w}; it must be 0 or more, and finite")

    def begin(self, xt: Int[Tensor, "B L"], start: int) -> int:
        """Remember the prompts."""
        places = torch.arange(xt.shape[1], device=xt.device) if self.padding is None else self.padding.positions
        self._is_prompt: Bool[Tensor, "B L"] = (xt != self.mask_token_id) & (places >= self.num_given)
        return 0

    def window(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> Predict:
        """Both branches in one pass."""
        width, seq_len = stop - start, xt.shape[1]

        def predict(window: Tensor, select: Tensor, which: Pass) -> Tensor:
            rows = xt[which.rows]
            whole = torch.cat([rows[:, :start], window, rows[:, stop:]], dim=1)
            bare = whole.masked_fill(self._is_prompt[which.rows], self.mask_token_id)
            asked = select // width * seq_len + select % width + start
            both = Pass(which.rows.repeat(2), None if which.t is None else which.t.repeat(2), which.turn)
            logits = self.predict(torch.cat([whole, bare]), torch.cat([asked, asked + whole.numel()]), both)
            conditional, unconditional = logits.chunk(2)
            return guided_logits(conditional, unconditional, self.w)

        return predict

    def finish(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> int:
        """Nothing to do."""
        return 0
