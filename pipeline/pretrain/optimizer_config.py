"""How weights are updated: the rule, its numbers, the learning rate, the averages.  No torch."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from dlm_core.models.config import Architecture
from pipeline.pretrain.lr_schedule import LRSchedule


@dataclass(frozen=True)
class LRScale:
    """Learning rates of some parameters as multiples of the rate of all others; 0 freezes them."""

    experts: float = 1.0
    """Of routed experts."""
    embedding: float = 1.0
    mask_embedding: float = 1.0
    """Of the mask token's row of the embedding, over and above ``embedding``: an autoregressive model never saw it."""

    def __post_init__(self) -> None:
        for name in ("experts", "embedding", "mask_embedding"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number, not negative")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon for the matrices of the layers and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    """Peak of the schedule, the same for AdamW and Muon, whose updates are scaled to be as large."""
    lr_schedule: LRSchedule = field(default_factory=LRSchedule)
    lr_scale: LRScale = field(default_factory=LRScale)
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices, not to norms and biases."""
    max_grad_norm: float = 1.0
    muon_momentum: float = 0.95
    muon_iterations: int = 5
    """Newton-Schulz iterations that make a momentum orthogonal."""
    ema_decay: float = 0.0
    """Of an average of the weights, min(ema_decay, (1 + n) / (10 + n)) after n updates; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "max_grad_norm", "muon_iterations"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a positive number")
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be a number, not negative")
        for other in dataclasses.fields(self):
            value = getattr(self, other.name)
            if other.name.startswith("muon_") and self.kind != "muon" and value != other.default:
                raise ValueError(f"{other.name} is {value}, but kind is {self.kind}; leave it out, or set kind to muon")

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of step 0..num_steps-1."""
        return self.lr * self.lr_schedule.scale_at(step, num_steps)

    def check_fits(self, architecture: Architecture) -> None:
        """ValueError for a rate of parameters that the model does not have."""
        if self.lr_scale.experts != 1.0 and architecture.moe is None:
            raise ValueError(
                f"optimizer.lr_scale.experts is {self.lr_scale.experts}, but the architecture has no experts; leave it "
                "out"
            )
