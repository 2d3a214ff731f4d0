"""The coordinator killed a hundred times at random moments: every run ends, with what an undisturbed run makes."""

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalExecutor
from pipeline.artifact import checked_files, load_manifest
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import PIECES, coordinate, is_gone, toy_plan, toy_workflow, wait_until
from tests.workflows.test_kill import toy
from workflows import runs
from workflows.store import RunPlace, Store, open_store
from workflows.summary import summarise

_LIMIT_S = 900
_FIRST = 100
"""The source beside makes a small number: that of another run would be its own."""
_LONGEST_S = 4.0
"""A run takes about as long."""


def _files(store: Store, run: RunPlace) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every step, each verified."""
    found: dict[str, dict[str, str]] = {}
    for name, place in runs.committed_outputs(store, run).items():
        checked_files(place.path, "*")
        found[name] = {record.path: record.sha256 for record in load_manifest(place.path).files}
    return found


def _descendants(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _run_with_kills(store: Store, log: Path, number: int, most: int, chance: random.Random) -> int:
    """Run the workflow to its end, killed at a random moment of each attempt; how many kills that took."""
    settings = {
        **{f"{step.name}__log": str(log) for step in toy_workflow().steps},
        "source__number": str(_FIRST + number),
    }
    run_id, kills = f"r{number}", 0
    while True:
        if (store.root / "runs" / run_id / "run.json").exists():
            process = toy("resume", run_id, "--store", store.url)
        else:  # a new one, or killed before it was a run
            where = ("--store", store.url, "--executor", "local", "--run-id", run_id)
            process = toy("run", "toy", *where, **settings)
        deadline = time.monotonic() + chance.uniform(0.2, _LONGEST_S)
        while process.poll() is None and (kills >= most or time.monotonic() < deadline):
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0, f"after {kills} kills it ended with {process.returncode}"
            return kills
        children = _descendants(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        wait_until(lambda children=children: all(map(is_gone, children)), "no process is left", 20.0)


def _calm_files(folder: Path, number: int) -> dict[str, dict[str, str]]:
    """What a run that nobody disturbs makes."""
    (folder / "log").mkdir(parents=True)
    store = open_store(folder / "store")
    run = runs.create_run(store, toy_plan(folder / "log", source__number=_FIRST + number), "local")
    coordinate(store, run, lambda: LocalExecutor(2))
    return _files(store, run)


def _kill(tmp_path: Path, times: int) -> None:
    """Runs one after another, each of another number, until so many coordinators were killed."""
    store, chance = open_store(tmp_path / "store"), random.Random(7)
    done = number = 0
    while done < times:
        number += 1
        log = tmp_path / f"log-{number}"
        log.mkdir()
        done += _run_with_kills(store, log, number, times - done, chance)
        run = store.run(f"r{number}")
        assert _files(store, run) == _calm_files(tmp_path / f"calm-{number}", number)
        committed = [event["step"] for event in run.events() if event["kind"] == "step_committed"]
        assert len(committed) == len(set(committed)), "a step was committed twice"
        assert set(executions(log)) == PIECES - ({"aside"} if number > 1 else set())
        assert summarise(store, run).status == "succeeded"


def test_coordinator_killed_three_times_at_random_moments_makes_what_a_calm_run_makes(tmp_path):
    _kill(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(_LIMIT_S)
def test_coordinator_killed_a_hundred_times_at_random_moments_makes_what_calm_runs_make(tmp_path):
    _kill(tmp_path, 100)
