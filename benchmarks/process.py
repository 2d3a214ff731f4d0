"""A program of its own, start to finish: wall clock, and CPU time of all its processes."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import RefusedError

ROOT = Path(__file__).parents[1]
_LOG_CHARS = 2000
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


def run_program(function: str, *arguments: str, log: Path, env: Mapping[str, str] | None = None) -> Cost:
    """Call ``module:function`` with strings in a new interpreter; RefusedError with the end of its log if it fails."""
    return run_command([sys.executable, "-c", _CALL, function, *arguments], log=log, env=env, name=function)


def run_command(
    command: Sequence[str], *, log: Path, name: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Cost:
    """Run a program to its end; RefusedError with its name and the end of its log if it fails."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output, env=os.environ | (env or {}))
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-_LOG_CHARS:]
        raise RefusedError(f"{name} ended with exit code {process.returncode}:\n{tail}")
    return Cost(wall_s, usage.ru_utime + usage.ru_stime)
