"""The dense network of a layer, which is also what shared experts are."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), down(silu(gate) * up); or down(gelu(up)) with biases, as in MDLM (2406.07524)."""

    def __init__(self, d_model: int, d_ff: int, activation: Literal["swiglu", "gelu"] = "swiglu") -> None:
        super().__init__()
        self.is_gated = activation == "swiglu"
        if self.is_gated:
            self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        else:
            self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model, bias=not self.is_gated)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Map each position by itself."""
        if not self.is_gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
