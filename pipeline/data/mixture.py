"""Which source each global sample comes from: a periodic schedule that keeps to the weights at every prefix."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

MAX_PERIOD = 100_000
"""Samples after which a schedule repeats: weights of five decimals fit."""


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The smallest whole numbers in the same proportion, weights read as the decimal numbers that they print as.

    Raises ValueError for no weights, one that is not positive and finite, and a sum above MAX_PERIOD.
    """
    if not weights:
        raise ValueError("the mixture is empty; name at least one source and its weight")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of {name} is {weight}; it must be positive; leave the source out instead")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    denominator = math.lcm(*(weight.denominator for weight in exact.values()))
    counts = {name: int(weight * denominator) for name, weight in exact.items()}
    divisor = math.gcd(*counts.values())
    counts = {name: count // divisor for name, count in counts.items()}
    if sum(counts.values()) > MAX_PERIOD:
        raise ValueError(
            f"the weights {dict(weights)} repeat only after {sum(counts.values())} samples, more than {MAX_PERIOD}; "
            "round them, or give whole numbers such as 1, 1, 1 for thirds"
        )
    return counts


@dataclass(frozen=True)
class MixtureSchedule:
    """Source of every global sample: after n samples source s has had  n * share_s,  give or take less than 1.

    The schedule of a processor shared by tasks of fixed rates (Pfair, Baruah et al., Algorithmica 15, 1996): sample j
    of source s may come from  floor(j / share_s)  on and must have come before  ceil((j + 1) / share_s);  the earliest
    of these deadlines goes first, which meets all of them.
    """

    counts: tuple[int, ...]
    """Samples of each source in a period."""

    @property
    def period(self) -> int:
        """Samples after which the schedule repeats."""
        return sum(self.counts)

    @cached_property
    def source_of(self) -> np.ndarray:
        """Source of each sample of a period, int64 [period]."""
        return np.array(_earliest_deadline_first(self.counts), dtype=np.int64)

    @cached_property
    def number_of(self) -> np.ndarray:
        """How many samples of its source come before each sample of a period, int64 [period]."""
        numbers = np.empty(self.period, dtype=np.int64)
        for source, count in enumerate(self.counts):
            numbers[self.source_of == source] = np.arange(count)
        return numbers

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each global sample, and which of the source's samples it is, counted from 0."""
        cycle, place = np.divmod(sample_ids, self.period)
        source = self.source_of[place]
        return source, cycle * np.array(self.counts, dtype=np.int64)[source] + self.number_of[place]

    def num_before(self, sample_id: int) -> list[int]:
        """Samples of each source among the first ``sample_id``."""
        cycle, place = divmod(sample_id, self.period)
        begun = np.bincount(self.source_of[:place], minlength=len(self.counts))
        return [cycle * count + int(more) for count, more in zip(self.counts, begun, strict=True)]


def _earliest_deadline_first(counts: tuple[int, ...]) -> list[int]:
    period = sum(counts)
    released: list[tuple[int, int]] = []  # (deadline, source)
    waiting = [(0, source, 0) for source in range(len(counts))]  # (release, source, number)
    heapq.heapify(waiting)
    schedule: list[int] = []
    numbers = [0] * len(counts)
    for now in range(period):
        while waiting and waiting[0][0] <= now:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(released, (-(-(number + 1) * period // counts[source]), source))
        _, source = heapq.heappop(released)
        schedule.append(source)
        numbers[source] += 1
        if numbers[source] < counts[source]:
            release = numbers[source] * period // counts[source]
            heapq.heappush(waiting, (release, source, numbers[source]))
    return schedule
