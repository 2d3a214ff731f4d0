"""Executors that outlive one coordinator, so that tests can share a Ray."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.child import call_function
from cluster.executor import Call, Ended, Executor, Shortage

NUM_CPUS = 4
_DRAIN_S = 60.0
RAY_LIMIT_S = 180
"""Time-out of a test that runs on Ray."""


class Kept(Executor):
    """Passes calls on; ``close`` ends the calls but not the executor behind it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._keys: set[str] = set()

    @property
    def num_cpus(self) -> float:
        return self._executor.num_cpus

    @property
    def may_grow(self) -> bool:
        return self._executor.may_grow

    def shortage(self, call: Call) -> Shortage | None:
        return self._executor.shortage(call)

    def start(self, call: Call) -> None:
        self._keys.add(call.key)
        self._executor.start(call)

    def wait(self, timeout_s: float) -> list[Ended]:
        ended = self._executor.wait(timeout_s)
        self._keys -= {e.key for e in ended}
        return ended

    def cancel(self, *keys: str) -> None:
        self._executor.cancel(*keys)

    def close(self) -> None:
        self._executor.cancel(*self._keys)
        for _ in range(int(_DRAIN_S)):
            if not self._keys:
                return
            self.wait(1.0)
        raise AssertionError(f"cancelled and still running: {self._keys}")


class Inline(Executor):
    """Runs calls in this process, one at each ``wait``: the oldest first, or the newest.

    Remembers in ``started`` what it was given, and in ``most_held`` how many calls it held at a time.
    """

    def __init__(self, num_cpus: float = 2.0, newest_first: bool = False) -> None:
        self._num_cpus, self._newest_first = num_cpus, newest_first
        self._calls: list[Call] = []
        self.started: list[str] = []
        self.most_held = 0

    @property
    def num_cpus(self) -> float:
        return self._num_cpus

    @property
    def may_grow(self) -> bool:
        return False

    def shortage(self, call: Call) -> Shortage | None:
        return None

    def start(self, call: Call) -> None:
        self._calls.append(call)
        self.started.append(call.key)
        self.most_held = max(self.most_held, len(self._calls))

    def wait(self, timeout_s: float) -> list[Ended]:
        if not self._calls:
            time.sleep(min(timeout_s, 0.01))
            return []
        call = self._calls.pop(-1 if self._newest_first else 0)
        try:
            call_function(call.function, call.payload)
        except Exception as error:  # noqa: BLE001 - whatever a call raises is how it ended
            return [Ended(call.key, str(error))]
        return [Ended(call.key)]

    def cancel(self, *keys: str) -> None:
        self._calls = [call for call in self._calls if call.key not in keys]

    def close(self) -> None:
        self._calls.clear()


@contextmanager
def ray_executor() -> Iterator[Executor]:
    """A Ray whose workers can import the tests."""
    from cluster.ray_executor import RayExecutor

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    executor = RayExecutor(num_cpus=NUM_CPUS)
    try:
        yield executor
    finally:
        executor.close()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
