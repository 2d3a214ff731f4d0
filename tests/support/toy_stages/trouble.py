"""Stages that do next to nothing, and go wrong on request.

Every execution of a piece appends a line to ``<log>/<piece>``, so that a test can count executions, and the
trouble of a piece can end after the first of them.
"""

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config import execution
from pipeline.errors import CorruptionError, NumericsError, UserError
from pipeline.pretrain.watchdog import Watchdog, WatchdogLimits
from pipeline.stage import StageContext, Stopped

Trouble = Literal[
    "", "user", "numerics", "code", "corruption", "memory", "connection", "connection late", "kill", "kill late",
    "abort at exit", "listen", "stuck", "hang", "slow", "stop", "leave",
]  # fmt: skip
_TICK_S = 0.05
_NUM_TICKS = 600
_LEFT_BEHIND_S = 300.0


@dataclass(frozen=True)
class ToyConfig:
    """A number that identifies the result, and how making it goes."""

    number: int = 1
    path: str = execution("")
    """File outside the store that the source reads; its size is part of the result."""
    log: str = execution("")
    trouble: Trouble = execution("")
    """What befalls a piece: raise UserError, NumericsError, RuntimeError, CorruptionError, MemoryError or
    ConnectionError, that after some quick progress too, be killed, be killed after some progress, abort after its end,
    listen on the port of its gang, hang under a watchdog, hang while ignoring requests to stop, be slow while heeding
    them, stop by itself, or leave a process of its own behind and be slow."""
    where: str = execution("")
    """The pieces that it befalls, such as "total-0" or "double-[0-9]"; all of them if empty."""
    times: int = execution(1)
    """Executions of the piece that it befalls."""
    workers: int = execution(2)

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number is {self.number}; it must not be negative")


def toy_inputs(inputs: Mapping[str, Path]) -> int:
    """Sum of the numbers in the input artifacts."""
    return sum(int((path / "value.txt").read_text()) for path in inputs.values())


def execute(
    piece: str, config: ToyConfig, context: StageContext, meet_others: Callable[[], None] = lambda: None
) -> None:
    """Record one execution of a piece, and have its trouble once the other ranks are there."""
    count = _record(Path(config.log), piece)
    meet_others()
    if count <= config.times and re.fullmatch(config.where or ".*", piece):
        _have_trouble(config.trouble, piece, context)


def executions(log: Path) -> dict[str, int]:
    """Piece -> how many times it was executed."""
    return {path.name: len(path.read_text().splitlines()) for path in log.iterdir()}


def _record(log: Path, piece: str) -> int:
    with (log / piece).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len((log / piece).read_text().splitlines())


def _have_trouble(trouble: Trouble, piece: str, context: StageContext) -> None:
    if trouble == "user":
        raise UserError(f"{piece} does not like its settings")
    if trouble == "numerics":
        raise NumericsError(f"{piece} diverged")
    if trouble == "code":
        raise RuntimeError(f"{piece} has a defect")
    if trouble == "corruption":
        raise CorruptionError(f"{piece} read what was not written")
    if trouble == "memory":
        raise MemoryError(f"{piece} wants more")
    if trouble == "connection late":
        for done in (1, 2, 3):
            context.progress(done, 10)
    if trouble in ("connection", "connection late"):
        raise ConnectionError(f"{piece} was cut off")
    if trouble == "stop":
        raise Stopped(f"{piece} had enough")
    if trouble == "abort at exit":
        atexit.register(os.abort)
    if trouble == "listen":
        socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))).close()
    if trouble == "stuck":
        rank = int(os.environ.get("RANK", "0"))
        with Watchdog(WatchdogLimits(start_s=0.3), rank, 1, context.state, context.failed):
            time.sleep(_TICK_S * _NUM_TICKS)
    if trouble == "kill late":
        context.progress(3, 10)
    if trouble in ("kill", "kill late"):
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "hang":
        time.sleep(_TICK_S * _NUM_TICKS)
    if trouble == "leave":
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({_LEFT_BEHIND_S})"])
    if trouble in ("slow", "leave"):
        for tick in range(_NUM_TICKS):
            context.progress(tick, _NUM_TICKS)
            time.sleep(_TICK_S)
            if context.should_stop():
                raise Stopped(f"{piece} was asked to stop")
