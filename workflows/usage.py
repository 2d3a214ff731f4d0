"""What a worker uses, written down while it works: a process that is killed tells nothing at its end.

The record is renewed each time that it is half a percent out of date, so what a killed worker used is known to one
percent.
"""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

from cluster.executor import GPUS_ENV
from pipeline.artifact import json_bytes
from pipeline.storage import Place

_SHARE = 0.005
_SHORTEST_S = 0.05
_LONGEST_S = 10.0
_RECORD_BYTES = 512


@dataclass(frozen=True)
class Usage:
    """What one process of a call used so far."""

    cpu_s: float
    """Of the process and of those that it started."""
    elapsed_s: float
    gpus: float
    host: str


def _cpu_s() -> float:
    ended = os.times()
    seconds = time.process_time() + ended.children_user + ended.children_system
    if not _has_children():
        return seconds
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _has_children() -> bool:
    """One call of the kernel.

    To look for them psutil reads a file of every process of the machine; this thread waits for the interpreter's lock
    after each, and a stage that computes in Python lets go of it only every 5 ms.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class UsageMeter:
    """Writes ``usage-<rank>.json`` from a thread until it is left, and once more then.

    On a file system in the place of what stands there, all of one length: a new file each time would take ten calls of
    the kernel, after each of which a stage that computes in Python keeps the interpreter for 5 ms and more.
    """

    def __init__(self, work: Place, rank: int) -> None:
        self._file = work / f"usage-{rank}.json"
        self._gpus, self._host = float(os.environ.get(GPUS_ENV, "0")), os.uname().nodename
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._start_s, self._start_cpu_s = time.monotonic(), _cpu_s()
        self._open_file: int | None = None

    def __enter__(self) -> "UsageMeter":
        self._thread.start()
        return self

    def _write(self) -> None:
        elapsed_s = time.monotonic() - self._start_s
        usage = Usage(_cpu_s() - self._start_cpu_s, elapsed_s, self._gpus, self._host)
        record = json_bytes(usage).ljust(_RECORD_BYTES)
        if self._open_file is not None:
            os.pwrite(self._open_file, record, 0)
            return
        self._file.write(record, is_durable=False)
        if self._file.is_local:
            self._open_file = os.open(self._file.path, os.O_WRONLY)

    def _run(self) -> None:
        shortest_s = max(_SHORTEST_S, self._file.storage.poll_s if not self._file.is_local else 0.0)
        wait_s = _SHORTEST_S  # the first record tells that the call has begun
        while not self._over.wait(wait_s):
            with suppress(OSError):  # for the bill only: never a reason to fail
                self._write()
            wait_s = min(_LONGEST_S, max(shortest_s, _SHARE * (time.monotonic() - self._start_s)))

    def __exit__(self, *details: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            self._write()
        if self._open_file is not None:
            os.close(self._open_file)
