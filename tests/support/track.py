"""``python -m tests.support.track ROOT FIRST END [ENDING]``: a training's tracking of the steps FIRST to END - 1."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import psutil

from pipeline import tracking
from tests.support.wandb_file import BLOCK_BYTES, run_files

tracking._INIT_TIMEOUT_S = tracking._FINISH_TIMEOUT_S = 6.0


def _say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


LOST_STEPS = 20
"""Steps at the end of one that is killed, which its files do not get."""


def _writer() -> int:
    """The process beside this one that writes wandb's files."""
    (found,) = (child.pid for child in psutil.Process().children() if child.name() == "wandb-core")
    return found


def _stop_writing(root: Path) -> None:
    """Suspend whoever writes wandb's files once a block of this run's is on the disk."""
    before = {path: path.stat().st_size for path in run_files(root / "wandb")[:-1]}
    while not any(path.stat().st_size > BLOCK_BYTES for path in run_files(root / "wandb") if path not in before):
        time.sleep(0.02)
    os.kill(_writer(), signal.SIGSTOP)


def _die() -> None:
    """Kill both processes, as a machine that fails would."""
    os.kill(_writer(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def main(root: Path, first: int, end: int, ending: str = "finish") -> None:
    """Track; the endings are "finish", "kill", and "full" (the disk of wandb's files, from the start)."""
    run = tracking.WandbRun(root / "wandb", "abcdef", "group", {"lr": 0.5}, lambda text: _say("WARNED", text))
    _say("NEXT", run.next_step)
    start_s = time.monotonic()
    with tracking.Tracker(tracking.MetricsLog(root / "metrics.jsonl", first), run) as tracker:
        if ending == "full":
            resource.prlimit(_writer(), resource.RLIMIT_FSIZE, (4096, 4096))
        for step in range(first, end):
            if ending == "kill" and step == end - LOST_STEPS:
                _stop_writing(root)
            tracker.write({"step": step, "loss": 1.0 / (step + 1), **{f"ce_t{i}": step / (i + 3) for i in range(8)}})
        if ending == "kill":
            _die()
        logged_s = time.monotonic()
    _say("LOGGED_S", logged_s - start_s)
    _say("FINISHED_S", time.monotonic() - logged_s)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
