"""Which checkpoints a training keeps so that the mean of their weights can be exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AverageConfig:
    """Checkpoints to be averaged by ``convert`` (weights "average").

    last: of the last ``count`` multiples of ``every_steps``.  best: of the ``count`` validations with the lowest loss,
    as LLaDA2.0 merges them (arXiv 2512.15745), among those of the rows and blocks that the training ends with.
    """

    keep: Literal["none", "last", "best"] = "none"
    count: int = 0
    every_steps: int = 0
    """For "last"; "best" takes the steps of validations."""

    def __post_init__(self) -> None:
        if (self.keep == "none") != (self.count == 0) or self.count == 1 or self.count < 0:
            raise ValueError(f'count is {self.count} with keep "{self.keep}"; wanted at least 2, and 0 with "none"')
        if (self.keep == "last") != (self.every_steps > 0):
            raise ValueError(
                f'every_steps is {self.every_steps} with keep "{self.keep}"; wanted at least 1 with "last", and 0 with '
                "another"
            )

    def steps_to_keep(self, num_steps: int, scores: Mapping[int, float]) -> list[int]:
        """Steps, in order, whose checkpoints are needed, given the validation losses by step so far.

        For "last" they are known from the start; of equal losses the earlier step is better.
        """
        if self.keep == "none":
            return []
        if self.keep == "last":
            return list(range(self.every_steps, num_steps + 1, self.every_steps))[-self.count :]
        return sorted(sorted(scores, key=lambda step: (scores[step], step))[: self.count])
