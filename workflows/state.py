"""Where the steps of a run stand while a coordinator drives them; rebuilt from the store whenever one starts."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.executor import Call
from pipeline.storage import Place
from workflows.lease import Lease
from workflows.plan import PlannedStep
from workflows.retries import Retries
from workflows.shards import FanOut
from workflows.worker import Failure, Piece

StepStatus = Literal[
    "pending", "waiting", "queued", "running", "committed", "cached", "failed", "blocked", "stopped", "skipped"
]
OVER: frozenset[StepStatus] = frozenset({"committed", "cached", "failed", "blocked", "stopped", "skipped"})
"""Nothing more will happen to a step."""
ACTIVE: frozenset[StepStatus] = frozenset({"queued", "running"})
"""Calls of a step were given to the executor."""


@dataclass
class Flight:
    """A call that was given to the executor."""

    call: Call
    piece: Piece
    work: Place
    given_at_s: float = field(default_factory=time.monotonic)
    has_begun: bool = False


@dataclass
class StepState:
    """Where a step stands."""

    step: PlannedStep
    status: StepStatus = "pending"
    reason: str = ""
    inputs: dict[str, Place] = field(default_factory=dict[str, Place])
    """The committed artifacts that it reads, once all are there."""
    output: Place | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict[str, Any])
    first_progress: tuple[float, float] | None = None
    """Time and count of the first report of this attempt, from which the rate is told."""
    failure: Failure | None = None
    lease: Lease | None = None
    attempt: Place | None = None
    flights: dict[str, Flight] = field(default_factory=dict[str, Flight])
    """Calls that are not over, by key."""
    fan_out: FanOut | None = None
    """Of a map step, once its shards are known."""
    retries: Retries = field(default_factory=Retries)
    retry_at_s: float = 0.0
    refused_since_s: float | None = None
    """Since when the storage has taken nothing of what is to be committed."""
    _turns: Counter[str] = field(default_factory=Counter[str])

    def next_turn(self, shard: str) -> int:
        """How many times a shard was started by this coordinator, with this one."""
        self._turns[shard] += 1
        return self._turns[shard]

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in OVER
