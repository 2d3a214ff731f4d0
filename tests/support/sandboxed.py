"""Programs under test that can be found among the processes of this machine."""

import functools
import os
import secrets
from pathlib import Path

from pipeline.errors import UserError
from pipeline.sandbox.isolation import choose_isolation


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
