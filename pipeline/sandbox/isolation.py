"""Which isolation this machine allows, found by trying; code under test runs in no weaker one unasked."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.sandbox import seccomp
from pipeline.sandbox.limits import Limits, Outcome, SandboxError
from pipeline.sandbox.runner import run_all, run_isolated

NAMESPACES, RLIMITS_ALONE = "namespaces", "rlimits alone"


@dataclass(frozen=True)
class Isolation:
    """What stands between code under test and this machine."""

    name: str
    """``namespaces`` or ``rlimits alone``."""
    words: str
    """In words, for a report."""


def choose_isolation(*, allow_unsandboxed: bool) -> Isolation:
    """The strongest isolation that works here; UserError where that is not namespaces and nobody allowed less."""
    trouble = _trouble(namespaces=True)
    filtered = sys.platform == "linux" and seccomp.filter_program() is not None
    calls = "a filter of system calls" if filtered else "no filter of system calls"
    if trouble is None:
        kinds = "user, process, mount, network, IPC and UTS namespaces"
        return Isolation(NAMESPACES, f"{kinds}, a read-only root, rlimits, {calls}")
    if not allow_unsandboxed:
        raise UserError(
            f"code under test cannot be kept apart from this machine: user and network namespaces are not allowed "
            f"here ({trouble}). Run on Linux 5.12 or later where they are (in a container: with a seccomp profile that "
            "allows unshare and mount), or set allow_unsandboxed of the task to true to run the code with rlimits alone"
        )
    weaker = _trouble(namespaces=False)
    if weaker is not None:
        raise UserError(f"code under test cannot be run, not even with rlimits alone: {weaker}. Run as another user")
    return Isolation(RLIMITS_ALONE, f"rlimits and a time limit alone, {calls}; no namespaces ({trouble})")


def run_code(program: str, *, isolation: Isolation, limits: Limits | None = None) -> Outcome:
    """Run a program and tell what became of it: it has passed only if it came to its end.

    Raises SandboxError where nothing can be told, for the sandbox itself did not work.
    """
    return run_isolated(program, namespaces=isolation.name == NAMESPACES, limits=limits or Limits())


def run_many(
    programs: Sequence[str], *, isolation: Isolation, limits: Limits | None = None, workers: int = 1
) -> list[Outcome]:
    """Run programs, some at a time; the outcomes in their order, whichever ends first."""
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    return run_all(programs, namespaces=isolation.name == NAMESPACES, limits=limits or Limits(), workers=workers)


@functools.cache
def _trouble(*, namespaces: bool) -> str | None:
    """What stands against an isolation here; None where a program ran in it."""
    if sys.platform != "linux" and namespaces:
        return f"{sys.platform} has none"
    try:
        outcome = run_isolated("pass", namespaces=namespaces, limits=Limits())
    except (SandboxError, OSError) as error:
        return str(error)
    return None if outcome.kind == "passed" else f"a program that does nothing {outcome.kind}: {outcome.detail}"
