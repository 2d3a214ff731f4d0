"""A process of the subprocess executor: runs one function, and dies with the process that started it.

It leads a process group, which whatever it starts itself belongs to: the group dies as a whole.
"""

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def main() -> None:
    """``python -m cluster.child MODULE:FUNCTION PAYLOAD.json``.

    A function that returned has succeeded: the process leaves without the interpreter's farewell, in which libraries
    of collectives have been seen to abort, and which would end the other ranks of a gang.
    """
    die_with_parent(int(os.environ.pop(PARENT_PIPE_ENV)))
    function, payload_path = sys.argv[1:]
    call_function(function, json.loads(Path(payload_path).read_text()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
