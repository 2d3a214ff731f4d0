"""What eases a next-token model into diffusion: attention that opens step by step, noise on the embedded mask."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AdaptationConfig:
    """Aids of the first steps of a training (dlm_core/ar_init.py).

    Raises ValueError for a value out of range, and for one that the others make idle.
    """

    anneal_steps: int = 0
    """Steps over which attention opens from causal to full (DiffuLLaMA, arXiv 2410.17891); 0: full at once, as in
    Dream (2508.15487)."""
    mask_noise_std: float = 0.0
    """Of normal noise on the embedding of every masked token (LLaDA2.0, arXiv 2512.15745, section 7.1), which fades out
    linearly over mask_noise_steps; 0: none."""
    mask_noise_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("anneal_steps", "mask_noise_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0.0 <= self.mask_noise_std < math.inf:
            raise ValueError(f"mask_noise_std is {self.mask_noise_std}; it must be 0 or more, and finite")
        if (self.mask_noise_std > 0.0) != (self.mask_noise_steps > 0):
            raise ValueError(
                f"mask_noise_std is {self.mask_noise_std} and mask_noise_steps {self.mask_noise_steps}; noise needs "
                "both, and none needs neither"
            )

    def is_annealing(self, step: int) -> bool:
        """Whether some of the future is hidden at a step."""
        return step + 1 < self.anneal_steps

    def is_noisy(self, step: int) -> bool:
        """Whether the embedded mask has noise at a step."""
        return step < self.mask_noise_steps
