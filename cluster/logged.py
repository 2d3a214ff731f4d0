"""Calls in a worker process of Ray, their output in the log of the run instead of Ray's own."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.child import call_told


@contextmanager
def redirected(path: Path) -> Iterator[None]:
    """Send this process's standard output and error to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(fd) for fd in (1, 2)]
    with path.open("ab") as log:
        for fd in (1, 2):
            os.dup2(log.fileno(), fd)
    try:
        yield
    finally:
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
            os.close(old)


def run_logged(function: str, payload: dict[str, Any], log_dir: str, rank: int, notice: Callable[[], str]) -> None:
    """Call ``module:function`` with its output in ``log_dir``; raises as ``call_told``."""
    with redirected(Path(log_dir) / f"rank-{rank}.log"):
        call_told(function, payload, notice)
