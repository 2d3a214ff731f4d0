"""Notices that a rank makes no progress, says where, shows what every thread was doing, and ends the process.

Collectives wait for long for a rank that was stopped, and a data loader for ever.  The watch is kept outside the
training thread, twice: by a thread, which knows the phase and asks after the other ranks; and, since no thread runs
while another holds the interpreter, by a timer in C that the first one keeps putting off.
"""

import faulthandler
import json
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from pipeline.errors import HangError

Activity = Literal["start", "restore", "data", "step", "checkpoint", "evaluation", "end"]

_STDERR = 2
"""The log of the rank, whatever ``sys.stderr`` has become."""
_EXIT_HANG = 75
_GRACE_SHARE, _LEAST_GRACE_S = 0.25, 2.0
"""Of a limit, and at least: time that the thread has to end the process before the timer does."""
_MOST_BETWEEN_LOOKS_S = 1.0
_MOST_BETWEEN_SIGNS_S = 15.0
_MEDIAN_OF = 100
"""Steps whose median is taken."""


@dataclass(frozen=True)
class WatchdogLimits:
    """Longest times without progress, in seconds, after which a rank is ended and the training goes on from its last
    checkpoint.  To sit in a debugger, make them long.
    """

    start_s: float = 600.0
    first_step_s: float = 600.0
    """Of the first step of each kind and its data: compilation, the first collectives."""
    step_s: float = 60.0
    """Of a step, and of the wait for its data; more if steps take long."""
    step_medians: float = 10.0
    """A step has this many times the median step, if that is more than ``step_s``; at most the longest limit here."""
    checkpoint_s: float = 1800.0
    """Of saving, of restoring, and of writing the artifact."""
    evaluation_s: float = 1800.0
    """Of one batch of an evaluation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < (value := getattr(self, field.name)) < math.inf:
                raise ValueError(f"{field.name} is {value}; it must be positive and finite")

    @property
    def longest_s(self) -> float:
        """No phase may take longer."""
        return max(self.start_s, self.first_step_s, self.step_s, self.checkpoint_s, self.evaluation_s)


def collective_timeout(limits: WatchdogLimits) -> timedelta:
    """Of collectives: past all limits and their grace, so that the watchdog, which names the phase, is first."""
    return timedelta(seconds=limits.longest_s + 2 * _grace_s(limits.longest_s))


def _grace_s(limit_s: float) -> float:
    return max(_LEAST_GRACE_S, _GRACE_SHARE * limit_s)


class _Sign(NamedTuple):
    """The last sign of progress."""

    phase: Activity
    step: int
    at_s: float
    limit_s: float
    kind: Hashable = None

    def __str__(self) -> str:
        return f"phase {self.phase!r}" + (f" of step {self.step}" if self.step >= 0 else "")


class Watchdog:
    """The watch over one rank, from ``with`` to its end.

    ``failed`` is told the HangError before the process ends with exit code 75; the timer, which can't tell anybody,
    ends it with 1, the stacks in the log.
    """

    def __init__(
        self, limits: WatchdogLimits, rank: int, workers: int, state: Path, failed: Callable[[BaseException], None]
    ) -> None:
        self._limits, self._rank, self._workers = limits, rank, workers
        self._state, self._failed = state, failed
        self._steps_s = deque[float](maxlen=_MEDIAN_OF)
        self._ended = set[tuple[Activity, Hashable]]()
        self._last = _Sign("start", -1, time.monotonic(), limits.start_s)
        self._look, self._is_over = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def phase(self, phase: Activity, step: int = -1, kind: Hashable = None) -> None:
        """Begin a phase, which ends the one before.

        ``kind`` says which steps, or their data, are alike: the first of a kind has ``first_step_s``.
        """
        now = time.monotonic()
        before = self._last
        self._ended.add((before.phase, before.kind))
        if before.phase == "step":
            self._steps_s.append(now - before.at_s)
        self._last = _Sign(phase, step, now, self._limit_s(phase, kind), kind)
        if not 0.5 < self._last.limit_s / before.limit_s < 2.0:
            self._look.set()  # the timer still runs on the limit before

    def beat(self) -> None:
        """Show progress within a phase of many parts, of which each has the limit for itself."""
        self._last = self._last._replace(at_s=time.monotonic())

    def _limit_s(self, phase: Activity, kind: Hashable) -> float:
        limits = self._limits
        if phase == "start":
            return limits.start_s
        if phase == "evaluation":
            return limits.evaluation_s
        if phase not in ("data", "step"):
            return limits.checkpoint_s
        usual_s = limits.step_medians * statistics.median(self._steps_s) if self._steps_s else 0.0
        least_s = limits.step_s if (phase, kind) in self._ended else limits.first_step_s
        return min(max(least_s, usual_s), limits.longest_s)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._look.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if error is None:
            _sign_file(self._state, self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        shown_s, is_asked = -math.inf, False
        while True:
            self._look.clear()  # before what it tells of is looked at
            if self._is_over:
                return
            last, now = self._last, time.monotonic()
            every_s = min(_MOST_BETWEEN_SIGNS_S, last.limit_s / 4)
            left_s = last.limit_s - (now - last.at_s)
            if left_s <= 0 and last is self._last:
                self._give_up(last)
            left_s = max(left_s, 0.0)
            faulthandler.dump_traceback_later(left_s + _grace_s(last.limit_s), exit=True, file=_STDERR)
            if now - shown_s >= every_s or is_asked:
                shown_s = now
                with suppress(OSError):  # a full disk is for others to notice
                    self._show(last, every_s)
            is_asked = self._look.wait(min(left_s, last.limit_s / 20, _MOST_BETWEEN_LOOKS_S))

    def _show(self, last: _Sign, every_s: float) -> None:
        """Tell the other ranks that this process runs, and where it is."""
        path = _sign_file(self._state, self._rank)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps({"where": str(last), "every_s": every_s}))
        aside.replace(path)

    def _give_up(self, last: _Sign) -> None:
        others = "; ".join(self._others(last))
        message = f"rank {self._rank} made no progress for {last.limit_s:.4g} s in {last}"
        error = HangError(f"{message}; {others}" if others else message)
        print(f"watchdog: {error}", file=sys.stderr, flush=True)  # noqa: T201
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        self._failed(error)
        os._exit(_EXIT_HANG)

    def _others(self, last: _Sign) -> list[str]:
        """What is known of ranks that are elsewhere or no longer heard of: the hang is more likely theirs.

        Ages are differences of times of files in one directory, which one clock has stamped.
        """
        found: list[str] = []
        with suppress(OSError):
            self._show(last, 0.0)
            now = _sign_file(self._state, self._rank).stat().st_mtime
            for rank in range(self._workers):
                if rank != self._rank:
                    found += self._of_rank(rank, now, str(last))
        return found

    def _of_rank(self, rank: int, now: float, here: str) -> list[str]:
        path = _sign_file(self._state, rank)
        try:
            shown: dict[str, Any] = json.loads(path.read_text())
            age_s = now - path.stat().st_mtime
        except (OSError, json.JSONDecodeError):
            return [f"rank {rank} has left no sign"]
        if age_s > 2 * shown["every_s"] + 1:
            return [f"rank {rank} has not been heard of for {age_s:.0f} s (last in {shown['where']})"]
        return [] if shown["where"] == here else [f"rank {rank} was last seen in {shown['where']}"]


def _sign_file(state: Path, rank: int) -> Path:
    return state / f"alive-{rank}.json"
