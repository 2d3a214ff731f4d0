"""Programs under test, one or many: each in a fresh interpreter, isolated, bounded and gone afterwards."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.sandbox.launcher import KILLED
from pipeline.sandbox.leftovers import delete_tree
from pipeline.sandbox.limits import Limits, Outcome, SandboxError

_GRACE_S = 60.0
"""For the launcher, which keeps the time of the program, to start and to clean up on a busy machine."""
_ROOT = str(Path(__file__).resolve().parents[2])
_LAUNCH = f"import sys; sys.path.insert(0, {_ROOT!r}); from pipeline.sandbox.launcher import main; main()"


def run_isolated(program: str, *, namespaces: bool, limits: Limits) -> Outcome:
    """Run a program in namespaces or with rlimits alone; whether that is permitted is for others to ask."""
    if namespaces:
        return _launch(program, None, limits)
    folder = Path(tempfile.mkdtemp(prefix="dlm-sandbox-"))
    try:
        return _launch(program, folder, limits)
    finally:
        delete_tree(folder)


def run_all(programs: Sequence[str], *, namespaces: bool, limits: Limits, workers: int) -> list[Outcome]:
    """Run programs, some at a time; the outcomes in their order."""

    def run(program: str) -> Outcome:
        return run_isolated(program, namespaces=namespaces, limits=limits)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, programs))


def _launch(program: str, folder: Path | None, limits: Limits) -> Outcome:
    # not that of a virtual environment, which has nothing to run on in a bare root
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    word = secrets.token_hex(16)
    task = {
        "namespaces": folder is None, "folder": str(folder), "python": python, "parent": os.getpid(),
        "word": word, "program": program, "limits": asdict(limits),
    }  # fmt: skip
    process = subprocess.Popen(
        [python, "-I", "-S", "-B", "-c", _LAUNCH],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        report, trouble = process.communicate(json.dumps(task), timeout=limits.wall_s + _GRACE_S)
    except subprocess.TimeoutExpired:
        raise SandboxError(f"the launcher did not end within {_GRACE_S:g} s after the program's time") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if report:
        return _outcome(json.loads(report), word, limits)
    if process.returncode == KILLED or process.returncode < 0:
        return Outcome("killed", "with the process that watched it: the machine may be out of memory", 0.0, "")
    raise SandboxError(trouble.strip().rpartition("\n")[2] or f"the launcher ended with {process.returncode}")


def _outcome(report: dict[str, Any], word: str, limits: Limits) -> Outcome:
    answer, code = report["answer"], report["status"]

    def outcome(kind: Any, detail: str) -> Outcome:
        return Outcome(kind, " ".join(detail.split()), report["seconds"], report["output"])

    if report["is_late"]:
        return outcome("timeout", f"ran for more than {limits.wall_s:g} s")
    if code == 0 and answer == word:
        return outcome("passed", "")
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report["cpu_s"] >= limits.cpu_s):
        return outcome("timeout", f"took more than {limits.cpu_s} s of processor time")
    if code < 0:
        return outcome("killed", f"by {_signal_name(-code)}")
    if code == 0 and answer[:1] == "M":
        return outcome("out_of_memory", answer[1:])
    if code == 0 and answer[:1] == "F":
        return outcome("failed", answer[1:])
    return outcome("failed", f"left with exit code {code} before the end of the program")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
