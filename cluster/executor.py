"""What the coordinator asks of a place to run: start calls, tell which have ended, stop them.

A call is an importable function and a JSON payload.  It reports through files that its payload names; an executor
says only that it ended, and how if it died.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

GPUS_ENV = "DLM_GPUS"
"""Tells a process how many GPUs it has to itself."""


@dataclass(frozen=True)
class Call:
    """One function to run in a process of its own, or on every rank of a gang."""

    key: str
    """Unique among the calls that are running."""
    function: str
    """``module:function``, called with the payload."""
    payload: dict[str, Any]
    log_dir: Path
    """Where the output of the processes goes, ``rank-0.log`` and so on."""
    cpus: float = 1.0
    """Cores of one process."""
    gang_sizes: tuple[int, ...] = ()
    """None for a single process; otherwise the numbers of ranks that will do, ascending: as many as there is room for
    are started together."""
    env: dict[str, str] = field(default_factory=dict)
    wants_gpus: bool = False
    """Whether every rank of a gang waits for a GPU; otherwise it has one if there are any where it runs."""
    gpus: float = 0.0
    """GPUs that a single process waits for and has to itself, or a part of one that it shares."""


@dataclass(frozen=True)
class Ended:
    """A call that is over."""

    key: str
    failure: str = ""
    """Empty if every process returned; otherwise what the executor saw (an exit code, a lost node)."""
    killed: bool = False
    """Whether a process was ended from outside (a signal, a lost node) instead of raising."""
    preempted: bool = False
    """Whether that was a node taken away after a notice."""
    out_of_memory: bool = False
    """Whether that was for want of memory on its node, as far as the executor knows."""


class CallStoppedError(RuntimeError):
    """A call ends early because it was asked to: that explains itself, without a traceback."""


class ExecutorLostError(RuntimeError):
    """An executor has lost what it runs on, with all calls: nothing more can be done in this process."""


@dataclass(frozen=True)
class Shortage:
    """Why a call waits."""

    reason: str
    """What it wants, and what there is."""
    is_beyond: bool
    """Whether it wants more than there is even when nothing else runs."""


class Executor(Protocol):
    """A place to run calls."""

    @property
    def num_cpus(self) -> float:
        """Cores for all calls together: what is started beyond them waits in the executor."""
        ...

    @property
    def may_grow(self) -> bool:
        """Whether there may be more of everything later."""
        ...

    def start(self, call: Call) -> None:
        """Queue a call; it starts when there are cores for it."""
        ...

    def shortage(self, call: Call) -> Shortage | None:
        """Why a call that was queued has not begun; None if nothing is missing (it is being started)."""
        ...

    def wait(self, timeout_s: float) -> list[Ended]:
        """Calls that have ended since the last time, waiting up to ``timeout_s`` for the first.

        ExecutorLostError if nothing more will be heard of them.
        """
        ...

    def cancel(self, *keys: str) -> None:
        """Stop the processes of calls, all at the same time; each is reported as ended with a failure."""
        ...

    def close(self) -> None:
        """Stop everything that this executor started, and wait until it is gone."""
        ...
