"""How text is scored with a model: by which bound, or exactly."""

from dataclasses import dataclass
from typing import Literal

Likelihood = Literal["masked_nelbo", "block_nelbo", "autoregressive_nll"]
"""Bound of masked diffusion over whole rows, bound of block diffusion, exact chain of next tokens."""

MIN_REPLICATES = 8
"""Independent drawings of masks; fewer give no usable standard error."""


@dataclass(frozen=True)
class Scoring:
    """With which likelihood rows are scored, and what addresses the noise."""

    likelihood: Likelihood
    block_size: int
    """Of a block_nelbo; 0 otherwise."""
    noise_seed: int
    target_offset: int = 0
    """1 for a shifted model: the first token of a row is given, and token l is asked for at position l - 1."""
    within_documents: bool = False
    """Whether tokens see those of their own document alone."""

    @property
    def is_exact(self) -> bool:
        """Whether one replicate says all."""
        return self.likelihood == "autoregressive_nll"
