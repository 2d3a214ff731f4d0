"""Rank 0 waits for the others, and fails as a collective does when one of them is gone.

A rank shows that it is alive by a lock on a file, which the kernel drops when it dies.
"""

import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from pipeline.stage import StageContext, Stats
from tests.support.toy_stages.trouble import ToyConfig, execute, toy_inputs

_POLL_S = 0.01
_held: list[IO[str]] = []
"""Locks until the process ends: connections close then too, when the rank has said what went wrong."""


def run(config: ToyConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats | None:
    """The sum of the inputs, times the number of ranks."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    lock = (context.out / f"rank-{rank}.new").open("w")
    _held.append(lock)
    fcntl.flock(lock, fcntl.LOCK_EX)
    Path(lock.name).rename(context.out / f"rank-{rank}.lock")
    execute(f"total-{rank}", config, context, lambda: _meet(context.out, world_size))
    if rank > 0:
        (context.out / f"rank-{rank}.done").touch()
        return None
    for other in range(1, world_size):
        _wait_for(context.out, other)
    value = toy_inputs(inputs) * world_size * config.number
    (context.out / "value.txt").write_text(str(value))
    return {"value": value}


def _meet(out: Path, world_size: int) -> None:
    """Wait until every rank has started."""
    while len(list(out.glob("rank-*.lock"))) < world_size:
        time.sleep(_POLL_S)


def _wait_for(out: Path, rank: int) -> None:
    lock_path, done = out / f"rank-{rank}.lock", out / f"rank-{rank}.done"
    while not done.exists():
        if lock_path.exists() and not _is_locked(lock_path) and not done.exists():
            raise RuntimeError(f"connection closed by rank {rank}")
        time.sleep(_POLL_S)


def _is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
