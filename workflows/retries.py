"""What becomes of a step or a shard that failed: tried again after a while, or given up."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.errors import CorruptionError, ErrorClass
from workflows.worker import PREEMPTED, Failure

RETRIES: Mapping[ErrorClass, int] = {"transient": 5, "infra": 20, "memory": 1}
"""Attempts after the first, by error class; the classes that are not named are not retried."""
POISON_FAILURES = 3
"""Failures of one shard, or of a step at exactly the same point, after which it is given up, whatever the class."""
_FINAL: frozenset[ErrorClass] = frozenset({"user", "numerics", "stopped"})
"""Classes of which one failure of one shard ends the step."""
BACKOFF_S = 1.0
_MAX_BACKOFF_S = 60.0


@dataclass
class Retries:
    """The failures of a step in one run attempt."""

    by_class: dict[str, int] = field(default_factory=dict[str, int])
    failed_at: Counter[float] = field(default_factory=Counter[float])
    """How far attempts had come that failed, and how many of them; since there was any progress."""
    furthest: float = 0.0
    of_shards: dict[str, int] = field(default_factory=dict[str, int])
    """By name, over all attempts of the step in this run attempt."""

    def after(self, failure: Failure, done: float) -> "Retry | Failure":
        """What follows the failure of an attempt that had ``done`` so much: a retry, or the failure of the step.

        Progress since the failure before starts all counts anew.  A node that was taken away after a notice counts as
        no failure.  What kills its worker cannot be told from a worker that is lost, so both count towards poison; but
        machines do not fail at exactly the same point again and again, wherever the attempts began.
        """
        if failure.type == PREEMPTED:
            return Retry(0, 0.0)
        if done > self.furthest:
            self.by_class.clear()
            self.failed_at.clear()
            self.furthest = done
        self.failed_at[done] += 1
        if done > 0 and self.failed_at[done] == POISON_FAILURES:
            message = f"failed {POISON_FAILURES} times at the same point ({done:g} done): {failure.message}"
            return replace(failure, error_class="poison", message=message)
        count = self.by_class.get(failure.error_class, 0) + 1
        self.by_class[failure.error_class] = count
        if count > RETRIES.get(failure.error_class, 0):
            return failure
        return Retry(count, backoff_s(count))

    def after_shard(self, shard: str, failure: Failure) -> "Retry | Failure":
        """What follows the failure of one shard: it is tried again by itself, or the step fails and names it."""
        if failure.type == PREEMPTED:
            return Retry(0, 0.0)
        count = self.of_shards[shard] = self.of_shards.get(shard, 0) + 1
        if failure.error_class in _FINAL or failure.type == CorruptionError.__name__:
            return replace(failure, message=f"shard {shard}: {failure.message}")
        if count >= POISON_FAILURES:
            message = f"shard {shard} failed {count} times: {failure.message}"
            return replace(failure, error_class="poison", message=message)
        return Retry(count, backoff_s(count))


@dataclass(frozen=True)
class Retry:
    """Another attempt."""

    number: int
    """1 for the first; 0 for one that nothing has to answer for."""
    backoff_s: float


def backoff_s(failures: int) -> float:
    """Seconds to wait: twice as long each time, and up to half of it less, so that not all come back at once."""
    return min(_MAX_BACKOFF_S, BACKOFF_S * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
