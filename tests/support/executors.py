"""Executors that outlive one coordinator, so that tests can share a Ray."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.executor import Call, Ended, Executor

NUM_CPUS = 4
_DRAIN_S = 60.0
RAY_LIMIT_S = 180
"""Time-out of a test that runs on Ray."""


class Kept(Executor):
    """Passes calls on; ``close`` ends the calls but not the executor behind it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._keys: set[str] = set()

    def start(self, call: Call) -> None:
        self._keys.add(call.key)
        self._executor.start(call)

    def wait(self, timeout_s: float) -> list[Ended]:
        ended = self._executor.wait(timeout_s)
        self._keys -= {e.key for e in ended}
        return ended

    def cancel(self, key: str) -> None:
        self._executor.cancel(key)

    def close(self) -> None:
        for key in self._keys:
            self._executor.cancel(key)
        for _ in range(int(_DRAIN_S)):
            if not self._keys:
                return
            self.wait(1.0)
        raise AssertionError(f"cancelled and still running: {self._keys}")


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
