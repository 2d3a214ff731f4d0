"""A program of its own, start to finish: wall clock, and CPU time of all its processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.command import RefusedError

ROOT = Path(__file__).parents[1]
_LOG_CHARS = 2000
_GONE_WITHIN_S = 10.0
_CALL = """
import importlib, sys
module, name = sys.argv[1].split(":")
getattr(importlib.import_module(module), name)(*sys.argv[2:])
"""  # no module of ours: whatever the program doesn't import itself would be counted as its own


@dataclass(frozen=True)
class Cost:
    """What a program took, from its start to its end, imports included."""

    wall_s: float
    cpu_s: float
    """User and system time of the process and of every descendant that was waited for, as the kernel adds it up."""
    is_stopped: bool = False
    """It was not at its end when its time was over."""


def run_program(function: str, *arguments: str, log: Path, env: Mapping[str, str] | None = None) -> Cost:
    """Call ``module:function`` with strings in a new interpreter; RefusedError with the end of its log if it fails."""
    return run_command([sys.executable, "-c", _CALL, function, *arguments], log=log, env=env, name=function)


@contextmanager
def _killed_after(limit_s: float, group: int) -> Iterator[list[psutil.Process]]:
    """A process group that dies after so many seconds, or as soon as we are interrupted; its leader's descendants.

    Those that lead groups of their own are known only as long as the leader is there.
    """
    descendants: list[psutil.Process] = []

    def kill() -> None:
        with suppress(psutil.NoSuchProcess):
            descendants.extend(psutil.Process(group).children(recursive=True))
        os.killpg(group, signal.SIGKILL)
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    timer = threading.Timer(limit_s, kill)
    timer.start()
    try:
        yield descendants
    except BaseException:
        kill()
        raise
    finally:
        timer.cancel()


def _await_end(descendants: Sequence[psutil.Process], name: str) -> None:
    """Return once none is left: one that was killed takes its time, which would be the next program's."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while left := [process for process in descendants if _is_alive(process)]:
        if time.monotonic() > deadline:
            raise RefusedError(f"{name}: processes of it are left after {_GONE_WITHIN_S:.0f} s: {left}")
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_command(
    command: Sequence[str],
    *,
    log: Path,
    name: str,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    limit_s: float | None = None,
) -> Cost:
    """Run a program to its end; RefusedError with its name and the end of its log if it fails.

    Args:
        limit_s: it and its children are killed after so many seconds, which is no failure.
    """
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=output,
            stderr=output,
            env=os.environ | (env or {}),
            # A group of its own can be killed at once, but gets no Ctrl-C from the terminal.
            process_group=None if limit_s is None else 0,
        )
        with nullcontext([]) if limit_s is None else _killed_after(limit_s, process.pid) as descendants:
            _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if limit_s is not None and wall_s >= limit_s and process.returncode == -signal.SIGKILL:
        _await_end(descendants, name)
        return Cost(wall_s, usage.ru_utime + usage.ru_stime, is_stopped=True)
    if process.returncode:
        tail = log.read_text(errors="replace")[-_LOG_CHARS:]
        raise RefusedError(f"{name} ended with exit code {process.returncode}:\n{tail}")
    return Cost(wall_s, usage.ru_utime + usage.ru_stime)
