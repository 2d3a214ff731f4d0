"""Programs under test that can be found among the processes of this machine."""

import functools
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.sandbox.isolation import Isolation, choose_isolation, run_code
from pipeline.sandbox.limits import Limits, Outcome

WALL_S = 30.0
"""Far above what any of the programs takes on a busy machine."""
_GONE_S = 20.0


@functools.cache
def are_namespaces_allowed() -> bool:
    """Whether this machine allows what the strongest isolation needs."""
    try:
        choose_isolation(allow_unsandboxed=False)
    except UserError:
        return False
    return True


def new_marker() -> str:
    """A word that no other process has among its arguments."""
    return f"marker-{secrets.token_hex(8)}"


def marked(program: str, marker: str) -> str:
    """A program that turns into one whose arguments name the marker."""
    arguments = f"[sys.executable, '-I', '-S', '-c', {program!r}, {marker!r}]"
    return f"import os, sys\nos.execv(sys.executable, {arguments})"


def is_alive(marker: str) -> list[int]:
    """Processes that carry the marker and have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                found.append(int(name))
        except OSError:  # it has ended
            continue
    return found


def ancestors(pid: int) -> list[int]:
    """Parent, grandparent and so on; none of a process that has ended."""
    found: list[int] = []
    try:
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
            found.append(pid)
    except OSError:
        return []
    return found


def run_limited(program: str, isolation: Isolation, wall_s: float = WALL_S, cpu_s: int = 5, **limits: int) -> Outcome:
    """Run a program that is small."""
    return run_code(program, isolation=isolation, limits=Limits(wall_s=wall_s, cpu_s=cpu_s, **limits))


def verdict(outcome: Outcome) -> tuple[str, str]:
    """What does not depend on the machine."""
    return outcome.kind, outcome.detail


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again."""
    deadline = time.monotonic() + _GONE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
