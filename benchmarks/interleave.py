"""Timing of several variants in turn, so that whatever the machine does meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleave(
    variants: Mapping[str, Callable[[int], object]],
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round; variants are called with the round and start one later each time."""
    names = list(variants)
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            variants[name](number)
            times_s[name].append(clock() - start)
    return times_s


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of theirs over median of ours: above 1, ours takes less."""
    return statistics.median(theirs) / statistics.median(ours)
