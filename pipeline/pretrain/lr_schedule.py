"""The learning rate of a step as a share of the peak: a pure function of the step and of how many steps there are.

Nothing is held between steps: a resumed training needs its step alone.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_USED_BY: dict[str, tuple[str, ...]] = {
    "final_scale": ("linear", "cosine", "wsd", "step_down"),
    "decay_share": ("wsd", "step_down"),
    "decay": ("wsd",),
    "drop_share": ("step_down",),
    "drop_scale": ("step_down",),
}
"""Kinds that each option means something to; beside any other it is refused."""

_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda elapsed: 1.0 - elapsed,
    "cosine": lambda elapsed: 0.5 * (1.0 + math.cos(math.pi * elapsed)),
    "1-sqrt": lambda elapsed: 1.0 - math.sqrt(elapsed),
}
"""From 1 to 0 over the share of the decay that has elapsed."""


@dataclass(frozen=True)
class LRSchedule:
    """Linear warm-up, then what ``kind`` says; scales are shares of the peak rate, shares are of all steps.

    * constant: the peak to the end (MDLM, arXiv 2406.07524)
    * linear, cosine: from the end of the warm-up down to ``final_scale``
    * wsd: the peak, then down to ``final_scale`` over the last ``decay_share`` (warm-up, stable, decay; 2404.06395; the
      form 1-sqrt is that of 2405.18392)
    * step_down: the peak for ``drop_share``, then ``drop_scale``, over the last ``decay_share`` linearly down to
      ``final_scale`` (LLaDA, 2502.09992; the defaults are its 1.2, 0.8 and 0.3 of 2.3 trillion tokens)
    """

    kind: Literal["linear", "constant", "cosine", "wsd", "step_down"] = "linear"
    warmup_steps: int = 50
    final_scale: float = 0.0
    decay_share: float = 0.13
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Form of the fall of "wsd"."""
    drop_share: float = 0.52
    drop_scale: float = 0.25

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must not be negative")
        for name in ("final_scale", "drop_scale", "drop_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0.0 < self.decay_share <= 1.0:
            raise ValueError(f"decay_share is {self.decay_share}; it must lie in (0, 1]")
        for field in dataclasses.fields(self):
            users, value = _USED_BY.get(field.name, (self.kind,)), getattr(self, field.name)
            if self.kind not in users and value != field.default:
                raise ValueError(
                    f"{field.name} is {value}, but the schedule is {self.kind}, which has no use for it. Leave it out, "
                    f"or set kind to {' or '.join(users)}"
                )
        if self.kind == "step_down" and self.drop_share + self.decay_share > 1.0:
            raise ValueError(
                f"drop_share {self.drop_share} and decay_share {self.decay_share} sum to more than 1: the rate would "
                "decay before it drops. Lower one of them"
            )
        if self.kind == "step_down" and self.final_scale > self.drop_scale:
            raise ValueError(
                f"final_scale {self.final_scale} is above drop_scale {self.drop_scale}, so that the rate would rise at "
                "the end; lower it"
            )

    def scale_at(self, step: int, num_steps: int) -> float:
        """Share of the peak rate at step 0..num_steps-1, in [0, 1]; ``final_scale`` would be that of the step after.

        Where a warm-up runs into a decay the smaller of the two holds.
        """
        return min(self._warmup(step), self._after_warmup(step, num_steps))

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup_steps + 1))

    def _after_warmup(self, step: int, num_steps: int) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            left = (num_steps - step) / max(1, num_steps - self.warmup_steps)
            return self.final_scale + (1.0 - self.final_scale) * left
        if self.kind == "cosine":
            return self._fallen("cosine", 1.0, self.warmup_steps, step, num_steps)
        decay_from = num_steps - round(self.decay_share * num_steps)
        if self.kind == "wsd":
            return self._fallen(self.decay, 1.0, decay_from, step, num_steps)
        if step < min(decay_from, round(self.drop_share * num_steps)):
            return 1.0
        return self._fallen("linear", self.drop_scale, decay_from, step, num_steps)

    def _fallen(self, form: str, high: float, begin: int, step: int, num_steps: int) -> float:
        """``high`` until ``begin``, then in the given form down to ``final_scale``, reached after the last step."""
        elapsed = max(0, step - begin) / max(1, num_steps - begin)
        return self.final_scale + (high - self.final_scale) * _FALLS[form](elapsed)
