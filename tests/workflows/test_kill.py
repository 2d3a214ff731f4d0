import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.executors import RAY_LIMIT_S
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, PIECES, is_gone, toy_workflow, wait_until
from workflows import entry, runs
from workflows.store import Store
from workflows.summary import summarise

ROOT = Path(__file__).parents[2]
DEAD_AFTER_S = 20.0


def toy(*arguments: str, process_group: int | None = None, **settings: str) -> subprocess.Popen[bytes]:
    """Start the command line with the toy recipe."""
    sets = [word for path, value in settings.items() for word in ("--set", f"{path.replace('__', '.')}={value}")]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.toy_workflow", *arguments, *sets],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=process_group,
    )


def start(
    store: Store, log: Path, executor: str, step: str, piece: str, trouble: str, process_group: int | None = None
) -> subprocess.Popen[bytes]:
    """A run r1 that is in the middle of a slow piece when this returns."""
    logs = {f"{s.name}__log": str(log) for s in toy_workflow().steps}
    settings = {**logs, f"{step}__trouble": trouble, f"{step}__where": piece}
    where = ("--store", str(store.root.path), "--executor", executor)
    process = toy("run", "toy", *where, "--run-id", "r1", process_group=process_group, **settings)
    try:
        wait_until(lambda: (log / piece).exists() or process.poll() is not None, f"{piece} runs", 90.0)
        assert process.poll() is None, "the run ended by itself"
        progress = f"work/001/{piece if step == 'double' else step}/*/progress.json"
        wait_until(lambda: list((store.root.path / "runs" / "r1").glob(progress)), f"{piece} makes progress")
    except BaseException:
        process.kill()
        raise
    return process


def finish(store: Store, log: Path, again: set[str]) -> None:
    """Resume r1 to its end; only the pieces of the killed step may have been executed again."""
    assert summarise(store, store.run("r1")).status == "interrupted"
    before = executions(log)
    assert toy("resume", "r1", "--store", str(store.root.path)).wait(timeout=120) == 0
    found = executions(log)
    assert set(found) == PIECES
    assert {name: count for name, count in found.items() if name not in again} == {
        name: 1 for name in ONCE if name not in again
    }
    assert all(found[name] == before.get(name, 0) + 1 for name in again)


def children_of(process: subprocess.Popen[bytes], at_least: int) -> list[psutil.Process]:
    """All descendants, of which there are some."""
    found = psutil.Process(process.pid).children(recursive=True)
    assert len(found) >= at_least
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + DEAD_AFTER_S
    while left := [process for process in processes if not is_gone(process)]:
        assert time.monotonic() < deadline, f"still there {DEAD_AFTER_S:.0f} s later: {[p.name() for p in left]}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("step", "piece", "again"),
    [("double", "double-1", {"double-list", "double-1"}), ("total", "total-1", {"total-0", "total-1"})],
)
def test_coordinator_killed_takes_every_descendant_with_it_and_the_run_resumes(store, log, step, piece, again):
    process = start(store, log, "local", step, piece, "leave")
    if step == "double":
        committed = store.artifact("toy-double", runs.frozen_plan(store.run("r1")).step("double").fingerprint)
        wait_until(lambda: len(committed.committed_shards()) == 2, "the other shards are committed")
    found = children_of(process, at_least=2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_gone(found)
    finish(store, log, again)


def test_coordinator_and_all_its_descendants_killed_the_run_resumes(store, log):
    process = start(store, log, "local", "total", "total-1", "slow")
    found = children_of(process, at_least=2)
    for victim in [psutil.Process(process.pid), *found]:
        victim.kill()
    process.wait()
    assert_gone(found)
    finish(store, log, {"total-0", "total-1"})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_coordinator_on_ray_killed_takes_every_descendant_with_it_and_the_run_resumes(store, log, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = start(store, log, "ray", "double", "double-1", "leave")
    committed = store.artifact("toy-double", runs.frozen_plan(store.run("r1")).step("double").fingerprint)
    wait_until(lambda: len(committed.committed_shards()) == 2, "the other shards are committed")
    found = children_of(process, at_least=3)
    (worker,) = [psutil.Process(int(pid)) for pid in (log / "double-1").read_text().split()]
    assert len(worker.children()) == 1
    assert {worker, *worker.children()} < set(found)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_gone(found)
    finish(store, log, {"double-list", "double-1"})


@pytest.mark.parametrize(("signals", "ends_as"), [([signal.SIGTERM], "stopped"), ([signal.SIGINT] * 2, "interrupted")])
def test_signal_ends_a_run_as_resumable(store, log, signals, ends_as):
    """The first signal lets stages stop; the second does not wait for them."""
    trouble = "slow" if ends_as == "stopped" else "hang"
    logs = {f"{s.name}__log": str(log) for s in toy_workflow().steps}
    settings = {**logs, "source__trouble": trouble}
    process = toy(
        "run", "toy", "--store", str(store.root.path), "--executor", "local", "--run-id", "r1", **settings
    )  # fmt: skip
    wait_until((log / "source").exists, "the source runs")
    found = children_of(process, at_least=1)
    for number in signals:
        process.send_signal(number)
        wait_until((store.root.path / "runs" / "r1" / "cancel").exists, "the request is heard")
    assert process.wait(timeout=30) == 75
    assert_gone(found)
    assert summarise(store, store.run("r1")).status == ends_as


@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_signal_to_a_whole_group_lets_a_stage_on_ray_save(store, log, monkeypatch):
    """As ``timeout`` sends it: what Ray is made of lives on until the stages have stopped."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = start(store, log, "ray", "source", "source", "slow", process_group=0)
    found = children_of(process, at_least=3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert_gone(found)
    assert summarise(store, store.run("r1")).status == "stopped"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ray_that_ends_under_a_run_ends_it_as_resumable(store, log, monkeypatch, number):
    """As a service manager and the kernel end it: Ray itself looks for its parts for a minute and kills the driver."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = start(store, log, "ray", "source", "source", "leave")
    wait_until(lambda: "aside" in runs.committed_outputs(store, store.run("r1")), "what runs beside it is committed")
    found = children_of(process, at_least=3)
    for part in found:
        if part.name() in ("gcs_server", "raylet"):
            part.send_signal(number)
    assert process.wait(timeout=30) == 75
    assert_gone(found)
    finish(store, log, {"source"})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_worker_that_ray_ends_for_want_of_memory_is_tried_once_more(store, log, monkeypatch):
    """Ray's monitor ends the newest task as soon as the machine uses more than a part of its memory: here any."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    logs = {f"{s.name}__log": str(log) for s in toy_workflow().steps}
    where = ("--store", store.url, "--executor", "ray", "--run-id", "r1", "--only", "source")
    assert toy("run", "toy", *where, **logs, source__trouble="leave").wait(timeout=120) == 3
    events = list(store.run("r1").events())
    (retry,), (failed,) = ([e["failure"] for e in events if e["kind"] == k] for k in ("step_retry", "step_failed"))
    for found in (retry, failed):
        assert found["error_class"] == "memory"
        assert "running low on memory" in found["message"]
        assert "\n" not in found["message"]


@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_interrupt_while_ray_starts_ends_the_run_before_its_first_step(store, log):
    logs = {f"{s.name}__log": str(log) for s in toy_workflow().steps}
    process = toy("run", "toy", "--store", str(store.root.path), "--executor", "ray", "--run-id", "r1", **logs)
    events = store.run_place("r1").directory / "events"
    wait_until(events.names, "the run has begun", 60.0)
    wait_until(lambda: len(psutil.Process(process.pid).children()) > 0, "Ray is being started", 60.0)
    found = children_of(process, at_least=1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) == 75
    assert_gone(found)
    assert executions(log) == {}
    assert summarise(store, store.run("r1")).status == "stopped"


def test_interrupt_while_the_command_line_is_imported_ends_in_a_sentence(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == "workflows.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "workflows.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == 75
    assert capsys.readouterr().err == "interrupted before anything had begun\n"


def test_interrupt_before_a_run_exists_ends_in_a_sentence(dlm, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "plan_recipe", interrupted)
    done = dlm("run", "toy")
    assert done.code == 75
    assert done.stderr.strip().splitlines() == [
        "interrupted; if a run had begun, dlm list shows it and dlm resume RUN goes on with it; dlm generate --out "
        "goes on by the same command"
    ]
