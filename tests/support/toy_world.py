"""A world small enough to enumerate, with its exact conditionals as a denoiser."""

import torch
from torch import Tensor

from tests.support.reference import Joint


class ExactDenoiser:
    """Looks up the logarithm of p(x0 at place | unmasked tokens of xt); counts its calls."""

    def __init__(self, joint: Joint) -> None:
        self.calls = 0
        self._length = joint.length
        self._powers = (joint.num_real + 1) ** torch.arange(joint.length - 1, -1, -1)
        self._table = torch.tensor(
            [[joint.logits(xt, place) for place in range(joint.length)] for xt in joint.noised_sequences()],
            dtype=torch.float64,
        )

    def __call__(self, xt: Tensor, select: Tensor) -> Tensor:
        """Logits [M, V + 1] at the flat positions ``select``."""
        self.calls += 1
        codes = (xt * self._powers).sum(dim=1)
        return self._table[codes[select // self._length], select % self._length]
