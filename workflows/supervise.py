"""Keeps the coordinator of a run alive: ``python -m workflows.supervise RUN --store URL --address auto``.

Ray does not try a job again.  The coordinator's own endings are final; one that dies is started again, and goes on from
the store.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from pipeline.errors import UserError
from workflows.exit_codes import EXIT_DRIFT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNSCHEDULABLE, EXIT_USAGE

if TYPE_CHECKING:
    from workflows.store import RunPlace, Store

_FAILED_FOR_GOOD = frozenset({EXIT_USAGE, EXIT_FAILED, EXIT_DRIFT})
"""Codes of a run that ends no better on another cluster."""
ENDINGS = _FAILED_FOR_GOOD | {0, EXIT_UNSCHEDULABLE, EXIT_INTERRUPTED}
"""Codes with which ``dlm`` says what happened; all others are those of a process that died."""
_STOPPED_S = 60.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MAX_DEATHS = 3
"""Deaths in a row after each of which it is started again, unless something was published in between."""
_BACKOFF_S, _MAX_BACKOFF_S = 2.0, 60.0
_LOOK_S = 0.1
_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80
_RAY_JOB = "JobSupervisor"
"""In the title of the process by which Ray runs a job."""


@dataclass
class Supervisor:
    """Runs a command until it ends by itself.  The process must have blocked ``_SIGNALS`` before it had threads."""

    command: Sequence[str]
    published: Callable[[], frozenset[str]]
    """What the command has made so far: it made progress if there is something new."""
    backoff_s: float = _BACKOFF_S
    has_ended: Callable[[], bool] = lambda: True
    """Whether a run that was interrupted was told to stop, and did; otherwise something failed for a while."""

    def run(self) -> int:
        """The code to exit with: that of the command; 128 and the signal for one that died of it once too often."""
        seen, deaths = self._published(frozenset()), 0
        while True:
            code, is_asked = self._run_once()
            if is_asked:
                return code if code in ENDINGS else EXIT_INTERRUPTED
            if code in ENDINGS and (code != EXIT_INTERRUPTED or self._has_ended()):
                return code
            found = self._published(seen)
            deaths = 1 if found - seen else deaths + 1
            seen |= found
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            if deaths > _MAX_DEATHS:
                _say(f"the coordinator {how}; after {_MAX_DEATHS} new starts without progress it is given up")
                return code if code > 0 else 128 - code
            wait_s = min(self.backoff_s * 2 ** (deaths - 1), _MAX_BACKOFF_S)
            _say(f"the coordinator {how}; it is started again in {wait_s:g} s ({deaths} of {_MAX_DEATHS})")
            if signal.sigtimedwait(_SIGNALS, wait_s) is not None:
                return EXIT_INTERRUPTED

    def _published(self, otherwise: frozenset[str]) -> frozenset[str]:
        try:
            return self.published()
        except OSError as error:  # the store may be what the coordinator died of
            _say(f"what the run has made cannot be read now: {error}")
            return otherwise

    def _has_ended(self) -> bool:
        try:
            return self.has_ended()
        except OSError:  # the store does not answer: what the coordinator ended with
            return False

    def _run_once(self) -> tuple[int, bool]:
        """Its code, and whether it was asked to end."""
        child = subprocess.Popen(self.command, preexec_fn=_prepare_child)
        is_asked = False
        while child.poll() is None:
            found = signal.sigtimedwait(_SIGNALS, _LOOK_S)
            if found is not None:
                is_asked = True
                if not _was_sent_to_all(found):
                    child.send_signal(found.si_signo)
        return child.returncode, is_asked


def _was_sent_to_all(found: signal.struct_siginfo) -> bool:
    """Whether the child got this signal too: a second one would not let it save.

    A terminal tells all processes in its foreground, and Ray all that descend from the command of a job.
    """
    if found.si_code == _SI_KERNEL:
        return True
    try:
        return _RAY_JOB in " ".join(psutil.Process(found.si_pid).cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _prepare_child() -> None:
    """Let it hear signals, and be asked to stop when the supervisor is killed: nobody would start it again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def published(store: "Store", run: "RunPlace") -> frozenset[str]:
    """Names of what a run has made and keeps: committed steps, shards, checkpoints."""
    from workflows.runs import frozen_plan  # noqa: PLC0415 - as in main
    from workflows.step import load_stage  # noqa: PLC0415

    names = {f"step {event['step']}" for event in run.events() if event["kind"] == "step_committed"}
    for step in frozen_plan(run).steps:
        place = store.artifact(load_stage(step.stage).name, step.fingerprint)
        for folder in (place.directory / "shards", place.state):
            names |= {
                str(folder / name) for name in folder.names() if name.endswith(".json") or name.startswith("step-")
            }
    return frozenset(names)


def newest_attempt(run: "RunPlace") -> int:
    """The number of the attempt that took the lease on a run last, whether it came to write anything or not."""
    from workflows.lease import find_holder  # noqa: PLC0415 - as in main

    holder = find_holder(run.lease_dir)
    return holder.epoch if holder else 0


def _newest_or_none(run: "RunPlace") -> int:
    try:
        return newest_attempt(run)
    except OSError as error:  # a coordinator may be luckier; what earlier attempts said then counts as well
        _say(f"which attempt of the run was the last cannot be read now: {error}")
        return 0


def has_ended(run: "RunPlace", before: int) -> bool:
    """Whether the last of the attempts that came after the one of number ``before`` came to an end of its own.

    Earlier ones say nothing of a coordinator that was let down before it could write that it had begun.
    """
    return _last_word(run, before).get("kind") == "run_ended"


def _last_word(run: "RunPlace", before: int) -> dict[str, Any]:
    words = [
        event for event in run.events() if event["kind"] in ("run_started", "run_ended") and event["attempt"] > before
    ]
    return words[-1] if words else {}


def is_final(code: int, run: "RunPlace", before: int) -> bool:
    """Whether a run that ended with a code is not to be tried again by itself, though it did not succeed.

    ``before`` as for ``has_ended``.
    """
    if code == EXIT_INTERRUPTED:
        return _last_word(run, before).get("status") == "cancelled"
    return code in _FAILED_FOR_GOOD


def _supervise(words: Sequence[str] | None = None) -> None:
    from cluster.jobs import stop_own_job  # noqa: PLC0415 - as in main
    from workflows.cli import EXPECTED, ending  # noqa: PLC0415
    from workflows.store import open_store  # noqa: PLC0415

    given, more = _parser().parse_known_args(words)
    run: RunPlace | None = None
    try:
        store = open_store(given.store)
        run = store.run_place(given.run)  # that there is none is for the coordinator to say
        before = _newest_or_none(run)
        code = _coordinate(store, run, before, given.address, more)
        how, is_over = f"its coordinator ended with code {code}, the job's log says why", is_final(code, run, before)
    except EXPECTED as error:
        code, message = ending(error)
        how, is_over = f"its supervisor ended with code {code}: {message}", code in _FAILED_FOR_GOOD
        _say(f"error: {message}")
    if run is not None:
        _note_end(run, how)
    if given.stop_own_job and is_over:
        _say(f"the run ended with {code}, and a new attempt would end no better: this job is stopped")
        stop_own_job()
        signal.sigtimedwait(_SIGNALS, _STOPPED_S)  # which is how that is told
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    about = "Whatever else is given is passed on to dlm resume."
    parser = argparse.ArgumentParser(
        prog="python -m workflows.supervise", description=__doc__, epilog=about, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--store", required=True)
    parser.add_argument("--address", default="auto")
    parser.add_argument(
        "--stop-own-job",
        action="store_true",
        help="where a new attempt would end no better, let this job of Ray end as stopped and not as failed: KubeRay "
        "makes a new cluster for each job that failed",
    )
    return parser


def _coordinate(store: "Store", run: "RunPlace", before: int, address: str, more: Sequence[str]) -> int:
    """The code with which the coordinator of a run ended at last."""
    resume = ["resume", run.run_id, "--store", store.url, "--address", address, *more]
    command = [sys.executable, "-m", "workflows.cli", *resume]
    return Supervisor(command, lambda: published(store, run), has_ended=lambda: has_ended(run, before)).run()


def _note_end(run: "RunPlace", how: str) -> None:
    """Write down how the job of this process ended, if it is one."""
    from workflows.submit import note_end  # noqa: PLC0415 - as in main

    if job_id := os.environ.get("DLM_JOB_ID"):
        try:
            note_end(run, job_id, how)
        except (OSError, UserError) as error:  # the store may be what the coordinator died of
            _say(f"the end of the job could not be written down: {error}")


def _say(message: str) -> None:
    sys.stderr.write(f"supervisor: {message}\n")
    sys.stderr.flush()


def main() -> None:
    """Supervise the coordinator of a run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    from workflows import cli  # noqa: PLC0415 - libraries start threads, which must not hear what was blocked before

    cli.main(_supervise)


if __name__ == "__main__":
    main()
