"""Functions for executors to call."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LONG_S = 60.0


def write_down(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Say and write what this process was given."""
    rank = os.environ.get("RANK", "none")
    sys.stdout.write(f"rank {rank} says {payload['word']}\n")
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "DLM_GPUS",
        "CUDA_VISIBLE_DEVICES",
    )
    found = {name: os.environ.get(name) for name in names}
    (Path(payload["out"]) / f"{payload['word']}-{rank}.json").write_text(json.dumps({**found, "pid": os.getpid()}))


def wait_for(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """As ``write_down``, and end once there is a file "go"."""
    write_down(payload, notice)
    while not (Path(payload["out"]) / "go").exists():
        time.sleep(0.01)


def fail(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Raise on the rank of the payload, and sleep on the others."""
    _start(payload)
    if os.environ.get("RANK", "0") == payload["rank"]:
        raise RuntimeError("no good")
    time.sleep(_LONG_S)


def fail_over_a_secret(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Raise with what this process alone knows to be a secret, in the error and in its cause."""
    os.environ[payload["name"]] = payload["value"]
    try:
        raise KeyError(payload["value"])
    except KeyError as error:
        raise RuntimeError(f"{payload['value']} is wrong") from error


def be_killed(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Be killed on the rank of the payload; on the others, raise because of it or sleep."""
    _start(payload)
    if os.environ.get("RANK", "0") == payload["rank"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if payload.get("peers_raise"):
        raise RuntimeError("connection closed by peer")
    time.sleep(_LONG_S)


def raise_or_abort(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Raise on the rank of the payload; the others abort, as libraries of collectives do when they lose a peer."""
    _start(payload)
    if os.environ.get("RANK", "0") == payload["rank"]:
        raise RuntimeError("no good")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()


def sleep(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Sleep for long, with a process of its own that does as well."""
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({_LONG_S})"])
    _start(payload)
    time.sleep(_LONG_S)


def ignore_requests_to_end(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Sleep for long, deaf to SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep(payload, notice)


def _start(payload: dict[str, Any]) -> None:
    """Say that this process runs, and wait for the other ranks to say so."""
    out = Path(payload["out"])
    path = out / f"{os.environ.get('RANK', '0')}.pid"
    path.with_suffix(".writing").write_text(str(os.getpid()))
    path.with_suffix(".writing").replace(path)  # so that whoever sees the file reads the whole number
    while len(list(out.glob("*.pid"))) < int(os.environ.get("WORLD_SIZE", "1")):
        time.sleep(0.01)
