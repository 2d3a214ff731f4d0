"""A process of the subprocess executor: runs one function, and dies with the process that started it.

It leads a process group, which whatever it starts itself belongs to: the group dies as a whole.
"""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.auth import redacted
from cluster.executor import CallStoppedError

PARENT_PIPE_ENV = "DLM_PARENT_PIPE"


def die_with_parent(read_fd: int) -> None:
    """Kill this process group as soon as the other end of a pipe closes: the kernel does that when the parent dies."""

    def watch() -> None:
        while os.read(read_fd, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def no_notice() -> str:
    """Of a place that nobody takes away."""
    return ""


def call_function(function: str, payload: dict[str, Any], notice: Callable[[], str] = no_notice) -> None:
    """Import ``module:name`` and call it with the payload, and with what tells why it will soon be taken away."""
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(payload, notice)


class CallFailedError(RuntimeError):
    """A call has raised; its log tells where."""


def call_told(function: str, payload: dict[str, Any], notice: Callable[[], str] = no_notice) -> None:
    """``call_function``; CallFailedError if that raises, of which the log tells: the traceback, if it was not stopped.

    Whoever prints a traceback later would print the secrets that may be in it.
    """
    try:
        call_function(function, payload, notice)
    except Exception as error:  # noqa: BLE001 - whatever a call raises is how it ended
        is_stop = isinstance(error, CallStoppedError)
        told = f"stopped: {error}\n" if is_stop else "".join(traceback.format_exception(error))
        sys.stderr.write(redacted(told))
        sys.stderr.flush()
        raise CallFailedError(redacted(f"{type(error).__name__}: {error}")) from None


def main() -> None:
    """``python -m cluster.child MODULE:FUNCTION PAYLOAD.json``.

    A function that returned has succeeded: the process leaves without the interpreter's farewell, in which libraries
    of collectives have been seen to abort, and which would end the other ranks of a gang.
    """
    die_with_parent(int(os.environ.pop(PARENT_PIPE_ENV)))
    function, payload_path = sys.argv[1:]
    try:
        call_told(function, json.loads(Path(payload_path).read_text()))
    except CallFailedError:
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
