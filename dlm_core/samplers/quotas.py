"""How many positions each step takes, where that is known before the first pass; on the host."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

_ROUNDING = 1e-9
"""So that 10 of 30 % are 3, though 10 * 0.3 in binary may lie below."""


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")


@dataclass(frozen=True)
class EvenQuotas:
    """n // T each, and one more in each of the first n % T steps: LLaDA (arXiv 2502.09992), get_num_transfer_tokens.

    Raises ValueError for no step.
    """

    num_steps: int

    def __post_init__(self) -> None:
        _check_steps(self.num_steps)

    def split(self, num_masks: Int[Tensor, " B"]) -> Int[Tensor, "B T"]:
        """They differ by at most 1."""
        steps = torch.arange(self.num_steps)
        return num_masks[:, None] // self.num_steps + (steps < num_masks[:, None] % self.num_steps)


@dataclass(frozen=True)
class TimedQuotas:
    """floor(left (1 - s/t)) from t to s, all that is left in the last step: Dream (arXiv 2508.15487).

    t goes from 1 to t_end in equal steps.  Dream takes the mean of left over the rows of a batch; here a row knows of
    no other.  Its float32 gives other numbers only where a product lies at an integer, as for few of the usual sizes;
    for t_end > 0 and T = n the first step takes none.  Raises ValueError for no step, and for a t_end outside [0, 1).
    """

    num_steps: int
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        _check_steps(self.num_steps)
        if not 0.0 <= self.t_end < 1.0:
            raise ValueError(f"t_end is {self.t_end}; it must lie in [0, 1)")

    def split(self, num_masks: Int[Tensor, " B"]) -> Int[Tensor, "B T"]:
        """Early steps of a short row may take none."""
        times = torch.linspace(1.0, self.t_end, self.num_steps + 1, dtype=torch.float64)
        left, taken = num_masks.clone(), []
        for step in range(self.num_steps):
            share = 1.0 - times[step + 1] / times[step]
            is_last = step == self.num_steps - 1
            taken.append(left if is_last else (left * share + _ROUNDING).floor().long())
            left = left - taken[-1]
        return torch.stack(taken, dim=1)


@dataclass(frozen=True)
class ScheduleQuotas:
    """So many positions stay masked after k steps:  floor(n cos(pi k / 2T)), or floor(n (1 - k/T)).

    MaskGIT (arXiv 2202.04200) finds the cosine, few at first, the best of its schedules.  Raises ValueError for no
    step, and for another shape.
    """

    num_steps: int
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        _check_steps(self.num_steps)
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f'shape is "{self.shape}"; it must be "cosine" or "linear"')

    def split(self, num_masks: Int[Tensor, " B"]) -> Int[Tensor, "B T"]:
        """The differences of what stays."""
        passed = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
        shares = torch.cos(math.pi / 2 * passed) if self.shape == "cosine" else 1.0 - passed
        stays = (num_masks[:, None] * shares + _ROUNDING).floor().long()
        return -stays.diff(dim=1)


Quotas = EvenQuotas | TimedQuotas | ScheduleQuotas
"""Numbers of positions by row and step, which add up to the masks of the row."""
