"""Keeps the coordinator of a run alive: ``python -m workflows.supervise RUN --store URL --address auto``.

Ray does not try a job again.  The coordinator's own endings are final; one that dies is started again, and goes on from
the store.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from workflows.plan import Plan
from workflows.runs import frozen_plan
from workflows.step import load_stage
from workflows.store import RunPlace, Store, open_store

ENDINGS = frozenset({0, 2, 3, 4, 5, 75})
"""Codes with which ``dlm`` says what happened; all others are those of a process that died."""
INTERRUPTED = 75
_MAX_DEATHS = 3
"""Deaths in a row after each of which it is started again, unless something was published in between."""
_BACKOFF_S, _MAX_BACKOFF_S = 2.0, 60.0
_PROGRESS = ("step_committed",)
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1


def published(store: Store, run: RunPlace) -> frozenset[str]:
    """Names of all that a run has made and keeps: its committed steps, their shards, checkpoints."""
    names = {f"{event['kind']} {event['step']}" for event in run.events() if event["kind"] in _PROGRESS}
    plan: Plan = frozen_plan(run)
    for step in plan.steps:
        place = store.artifact(load_stage(step.stage).name, step.fingerprint)
        for folder in (place.directory / "shards", place.state):
            names |= {str(folder / name) for name in folder.names()}
    return frozenset(names)


@dataclass
class Supervisor:
    """Runs a command until it ends by itself."""

    command: Sequence[str]
    published: Callable[[], frozenset[str]]
    """What the command has made so far: it made progress if there is something new."""
    backoff_s: float = _BACKOFF_S
    _child: "subprocess.Popen[bytes] | None" = None
    _asked: list[int] = field(default_factory=list[int])
    """Signals that asked this process to end."""

    def run(self) -> int:
        """The code to exit with: that of the command, 128 and the signal for one that died of it once too often."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        seen, deaths = self.published(), 0
        while True:
            code = self._run_once()
            if code in ENDINGS:
                return code
            if self._asked:
                return INTERRUPTED
            found = self.published()
            deaths = 1 if found - seen else deaths + 1
            seen |= found
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            if deaths > _MAX_DEATHS:
                _say(f"{how}, {deaths} times without anything new in the store: given up")
                return code if code > 0 else 128 - code
            wait_s = min(self.backoff_s * 2 ** (deaths - 1), _MAX_BACKOFF_S)
            _say(f"the coordinator {how}; it is started again in {wait_s:g} s ({deaths} of {_MAX_DEATHS})")
            if self._is_asked_within(wait_s):
                return INTERRUPTED

    def _run_once(self) -> int:
        if self._asked:
            return INTERRUPTED
        self._child = subprocess.Popen(self.command, preexec_fn=_end_with_parent)
        if self._asked:  # while it was being started, nobody was there to be told
            self._child.send_signal(self._asked[0])
        return self._child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)

    def _is_asked_within(self, wait_s: float) -> bool:
        deadline = time.monotonic() + wait_s
        while not self._asked and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return bool(self._asked)


def _end_with_parent() -> None:
    """Have the kernel ask this process to stop when the supervisor is killed: nobody would start it again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(message: str) -> None:
    print(f"supervisor: {message}", file=sys.stderr, flush=True)  # noqa: T201


def main(words: Sequence[str] | None = None) -> int:
    """Supervise the coordinator of a run."""
    parser = argparse.ArgumentParser(prog="python -m workflows.supervise", description=__doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--store", required=True)
    parser.add_argument("--address", default="auto")
    given = parser.parse_args(words)
    store = open_store(given.store)
    run = store.run(given.run)
    resume = ["resume", given.run, "--store", given.store, "--address", given.address]
    command = [sys.executable, "-m", "workflows.cli", *resume]
    return Supervisor(command, lambda: published(store, run)).run()


if __name__ == "__main__":
    sys.exit(main())
