"""Stages of the pipeline run alone, one after another, in a work directory: what is there already is not made again."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.command import RefusedError
from benchmarks.process import ROOT
from pipeline.artifact import Manifest, open_artifact, write_json
from pipeline.stage import Stage

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
_LOG_CHARS = 2000
_POLL_S = 0.1
_GRACE_S = 10.0
"""For the other ranks to write down what they died of."""


def run_stage(stage: Stage, config: Any, inputs: Mapping[str, Path], out: Path, workers: int = 1) -> Manifest:
    """``python -m pipeline.STAGE`` on so many ranks, or what an earlier call has left in ``out``.

    A call that was interrupted is gone on with.  RefusedError if the stage fails, with the end of its log, or if this
    process is asked to end, which its ranks are given the time to do.
    """
    file = out.with_name(f"{out.name}.config.json")
    logs = [out.with_name(f"{out.name}.rank{rank}.log") for rank in range(workers)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, config)
    given = [word for name, path in inputs.items() for word in ("--input", f"{name}={path.resolve()}")]
    module = stage.module.removesuffix(".run")
    command = [sys.executable, "-m", module, "--config", str(file.resolve()), *given, "--out", str(out.resolve())]
    print(f"{time.strftime('%H:%M:%S')} {stage.name}: {out}", file=sys.stderr, flush=True)
    with _interruptible():
        shared = os.environ | _ENVIRONMENT | {"WORLD_SIZE": str(workers), "MASTER_PORT": str(_free_port())}
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                ranks.append(_start(command, log, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            codes = _wait(ranks)
        except KeyboardInterrupt:
            _stop(ranks)
            raise RefusedError(f"stopped in {stage.name} of {out}; the same command goes on from there") from None
    if any(codes):
        ends = (f"{log} ends with\n{log.read_text(errors='replace')[-_LOG_CHARS:]}" for log in logs)
        raise RefusedError("\n".join([f"{stage.name} ended with exit codes {codes}", *ends]))
    return open_artifact(out)


def _start(command: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A session of its own, or Ctrl-C would reach it as well, and at a second request to end nothing is saved."""
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env, start_new_session=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _interruptible() -> Iterator[None]:
    """A request to end, or a terminal that goes away, is an interrupt like Ctrl-C."""
    kinds = [kind for kind in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(kind) != signal.SIG_IGN]
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all ranks; once one has failed, the others are soon ended, which would wait for it in vain."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if None not in codes:
            return [code for code in codes if code is not None]
        if any(codes):
            deadline_s = time.monotonic() + _GRACE_S
            while time.monotonic() < deadline_s and any(rank.poll() is None for rank in ranks):
                time.sleep(_POLL_S)
            for rank in ranks:
                rank.kill()
            return [rank.wait() for rank in ranks]
        time.sleep(_POLL_S)


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ask the ranks to save and to end, and wait until they have."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        rank.wait()
