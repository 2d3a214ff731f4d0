"""Run mutants in worker processes, each with a private copy of the tree."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.mutants import worker

COPIED = ("dlm_core", "pipeline", "workflows", "cluster", "tests", "pyproject.toml")
TIMEOUT_S = 60.0
"""Processor time that the tests of one mutant may take; taking longer counts as caught."""
NUM_WORKERS = 2
OUTPUT_CHARS = 4000
PASSED, FAILED, INTERRUPTED = 0, 1, 2
"""pytest's exit codes; it calls a file that cannot be imported an interruption."""


@dataclass(frozen=True)
class Job:
    """Tests to run with this source in the place of a file; paths are relative to the root of the tree."""

    path: str
    source: str
    tests: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """How the tests of one job ended."""

    caught: bool
    how: str
    """The first test that failed, or what else stopped them; empty if all passed."""
    seconds: float
    """Processor time."""
    output: str
    """The end of what the tests printed."""


class Worker:
    """A worker process and its copy of the tree."""

    def __init__(self, snapshot: Path, home: Path, timeout_s: float) -> None:
        self.tree, self.log, self.timeout_s = home / "tree", home / "log", timeout_s
        shutil.copytree(snapshot, self.tree)
        environment = os.environ | {
            "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis"),
            "PYTEST_ADDOPTS": "",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, str(self.tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, job: Job) -> Outcome:
        """Run one job.

        Raises RuntimeError when the answer says nothing about the source: the tests ran on other files, there are
        none, pytest itself broke.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = asdict(job) | {"log": str(self.log), "timeout_s": self.timeout_s}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self.process.wait()} while it ran {job.tests}")
        answer = json.loads(line)
        output = self.log.read_text(errors="replace")[-OUTPUT_CHARS:]
        how = self._how(job, answer, output)
        return Outcome(answer["code"] != PASSED, how, answer["seconds"], output)

    def close(self) -> None:
        """End the process, and the tests that it may still be running."""
        self.process.terminate()
        self.process.communicate()

    def _how(self, job: Job, answer: dict, output: str) -> str:
        code = answer["code"]
        if code == -signal.SIGXCPU:
            return f"not done after {self.timeout_s:.0f} s"
        if code < 0:
            return f"ended by signal {-code}"
        if code == worker.WRONG_TREE:
            raise RuntimeError(f"{job.tests} imported files from outside {self.tree}\n{output}")
        if code == worker.NOT_IMPORTED:
            raise RuntimeError(f"{job.tests} never imports {job.path}")
        if code not in (PASSED, FAILED, INTERRUPTED):
            raise RuntimeError(f"{job.tests} ended with code {code}\n{output}")
        named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        return named.group(1).rpartition("::")[2] if named else ""


class Pool:
    """A few workers that share a list of jobs."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.size = len(workers)
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for one in workers:
            self.idle.put(one)

    def run_all(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Outcomes of the jobs in their order, each as soon as it and those before it are there."""
        threads = ThreadPoolExecutor(self.size)
        try:
            yield from threads.map(self._run, jobs)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Job) -> Outcome:
        one = self.idle.get()
        try:
            return one.run(job)
        finally:
            self.idle.put(one)


@contextmanager
def started(
    snapshot: Path, home: Path, *, num_workers: int = NUM_WORKERS, timeout_s: float = TIMEOUT_S
) -> Iterator[Pool]:
    """Workers on copies of the snapshot, under ``home``; ended at the end of the block."""
    with ExitStack() as stack:
        workers = []
        for place in range(num_workers):
            workers.append(Worker(snapshot, home / f"worker_{place}", timeout_s))
            stack.callback(workers[-1].close)
        yield Pool(workers)


def take_snapshot(root: Path, target: Path) -> None:
    """Copy what the tests of the mutated modules need: nothing edited during the run can change its outcome."""
    target.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, target / name)
