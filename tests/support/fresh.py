"""What processes of their own are asked for by tests; light to import."""

import os
import signal
import sys
from typing import Any

from pipeline.errors import CorruptionError, UserError


def answer(*given: str) -> Any:
    sys.stdout.write("said on the way\n")
    return {"given": given, "pid": os.getpid()}


def refuse(kind: str) -> None:
    raise {"user": UserError, "corruption": CorruptionError, "other": KeyError}[kind](f"about {kind}")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold(num_bytes: str) -> None:
    """As many bytes as are asked for, for a moment."""
    from benchmarks.conversion_sides import tell_peak

    assert len(b"x" * int(num_bytes)) == int(num_bytes)
    tell_peak()
