"""The supervisor of a coordinator, around children that do as they are told."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalExecutor
from pipeline.artifact import json_bytes
from tests.support.executors import NUM_CPUS
from tests.support.fabricated import begin, end
from tests.support.toy_workflow import coordinate, fabricate, is_gone, toy_plan, wait_until
from workflows import runs, supervise
from workflows.store import EventLog, RunPlace, Store, open_store
from workflows.submit import end_of
from workflows.supervise import Supervisor, has_ended, is_final, newest_attempt, published

ROOT = Path(__file__).parents[2]
CHILD = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
starts = folder / "starts"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
plan = (folder / "plan").read_text().split(",")
def stop(n, frame):
    with (folder / "heard").open("a") as file: file.write(f"{n}\\n")
    time.sleep(0.5)
    sys.exit(75)
if plan[0] == "work":
    signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
with starts.open("a") as file: file.write(f"{os.getpid()}\\n")
word, _, made = plan[min(number, len(plan) - 1)].partition("+")
if made: (folder / f"made-{number}").touch()
if word in ("work", "deaf"): time.sleep(60)
if word.startswith("-"): os.kill(os.getpid(), -int(word))
sys.exit(int(word))
"""
DRIVER = f"""
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
from pathlib import Path
from workflows.supervise import Supervisor
folder = Path(sys.argv[1])
def made():
    if (folder / "outage").exists(): raise ConnectionError("no store")
    return frozenset(path.name for path in folder.glob("made-*"))
sys.exit(Supervisor([sys.executable, "-c", {CHILD!r}, str(folder)], made, float(sys.argv[2])).run())
"""


class Supervised:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, plan: str, backoff_s: float = 0.02, **options: object) -> "subprocess.Popen[str]":
        (self.folder / "plan").write_text(plan)
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.folder), str(backoff_s)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        return self.process

    def run(self, plan: str) -> tuple[int, str]:
        process = self.start(plan)
        _, stderr = process.communicate(timeout=50)
        return process.returncode, stderr

    @property
    def pids(self) -> list[int]:
        path = self.folder / "starts"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def child(self) -> psutil.Process:
        wait_until(lambda: self.pids, "the child works")
        return psutil.Process(self.pids[-1])

    def heard(self) -> list[int]:
        path = self.folder / "heard"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    made = Supervised(tmp_path)
    yield made
    if made.process is not None:
        for pid in made.pids:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        made.process.kill()
        made.process.communicate()


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 75])
def test_endings_of_the_coordinator_are_final(supervised, code):
    assert supervised.run(f"{code}")[0] == code
    assert len(supervised.pids) == 1


@pytest.mark.parametrize("death", ["-9", "-11", "1", "130"])
def test_coordinator_that_dies_is_started_again(supervised, death):
    code, stderr = supervised.run(f"{death},0")
    assert code == 0
    assert len(supervised.pids) == 2
    assert "started again" in stderr
    assert ("SIGKILL" in stderr) == (death == "-9")


@pytest.mark.parametrize(("death", "code"), [("-9", 137), ("1", 1)])
def test_without_progress_three_new_starts_are_all(supervised, death, code):
    assert supervised.run(death)[0] == code
    assert len(supervised.pids) == 4


def test_progress_gives_three_new_starts_again(supervised):
    assert supervised.run("1,1,1,1+made,1,1,1+made,1,1,0")[0] == 0
    assert len(supervised.pids) == 10


def test_store_that_cannot_be_read_is_no_progress_and_no_end(supervised):
    (supervised.folder / "outage").touch()
    code, stderr = supervised.run("1+made")
    assert code == 1
    assert len(supervised.pids) == 4
    assert "no store" in stderr


def test_job_whose_coordinator_never_began_is_noted_in_the_store(store, monkeypatch):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    monkeypatch.setenv("DLM_JOB_ID", "r1-a1")
    command = [
        sys.executable,
        "-m",
        "workflows.supervise",
        "r1",
        "--store",
        store.url,
        "--address",
        "auto",
        "--nonsense",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert end_of(run, "r1-a1") == "its coordinator ended with code 2, the job's log says why"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_once_and_the_child_may_save(supervised, number):
    process = supervised.start("work")
    supervised.child()
    process.send_signal(number)
    assert process.wait(20) == 75
    assert supervised.heard() == [number]
    assert len(supervised.pids) == 1


def test_child_that_dies_of_the_signal_is_not_started_again(supervised):
    process = supervised.start("deaf")
    supervised.child()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert len(supervised.pids) == 1


def test_signal_while_it_waits_to_start_again_ends_it(supervised):
    process = supervised.start("1", backoff_s=30.0)
    child = supervised.child()
    wait_until(lambda: is_gone(child), "the child is gone")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    assert len(supervised.pids) == 1


def test_ray_tells_the_child_itself_so_the_supervisor_does_not(supervised, tmp_path):
    """Ray's JobSupervisor signals every descendant of a job's command: twice would end it before it has saved."""
    process = supervised.start("work")
    child = supervised.child()
    code = f"import os; [os.kill(pid, 15) for pid in ({process.pid}, {child.pid})]; import time; time.sleep(2)"
    script = tmp_path / "ray::JobSupervisor.run"
    script.write_text(code)
    teller = subprocess.Popen([sys.executable, str(script)])
    assert process.wait(20) == 75
    teller.wait()
    assert supervised.heard() == [signal.SIGTERM]


def test_child_is_asked_to_stop_when_the_supervisor_is_killed(supervised):
    process = supervised.start("work")
    child = supervised.child()
    process.kill()
    wait_until(lambda: is_gone(child), "the child is gone")
    assert supervised.heard() == [signal.SIGTERM]


def test_committed_steps_and_shards_are_progress(store, log):
    plan = toy_plan(log)
    fabricate(store, plan, "source", "aside")
    run = runs.create_run(store, plan, "local", "r1")
    before = published(store, run)
    coordinate(store, run, lambda: LocalExecutor(NUM_CPUS))
    new = published(store, run) - before
    assert {name for name in new if name.startswith("step ")} == {"step double", "step total"}
    assert len([name for name in new if "/shards/" in name]) == 3


def test_run_that_is_not_there_is_a_usage_error(store):
    command = [sys.executable, "-m", "workflows.supervise", "r1", "--store", store.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 2
    assert "there is no run 'r1'" in done.stderr


@pytest.mark.parametrize(
    ("kinds", "is_over"),
    [
        ([], False),
        (["run_started"], False),
        (["run_started", "step_started", "run_ended"], True),
        (["run_started", "run_ended", "run_started", "step_committed"], False),
    ],
)
def test_attempt_without_its_last_word_has_not_ended(tmp_path, kinds: list[str], is_over: bool):
    run = open_store(tmp_path).create_run("r1", {})
    log = EventLog(run, 1)
    for kind in kinds:
        log.write(kind)
    assert has_ended(run, before=0) is is_over


@pytest.mark.parametrize(
    ("code", "endings", "final"),
    [
        (0, ["succeeded"], False),
        (2, [], True),
        (3, ["failed"], True),
        (4, ["failed"], True),
        (5, ["failed"], False),
        (137, [], False),
        (75, ["stopped"], False),
        (75, [], False),
        (75, ["stopped", "cancelled"], True),
        (75, ["cancelled", "stopped"], False),
    ],
)
def test_what_another_cluster_would_do_no_good_is_final(tmp_path, code: int, endings: list[str], final: bool):
    run = open_store(tmp_path).create_run("r1", {})
    log = EventLog(run, 1)
    for status in endings:
        log.write("run_ended", status=status)
    assert is_final(code, run, before=0) is final


def test_attempt_that_did_not_end_is_not_final_because_the_one_before_was_cancelled(tmp_path):
    run = open_store(tmp_path).create_run("r1", {})
    first = EventLog(run, 1)
    first.write("run_started")
    first.write("run_ended", status="cancelled")
    assert is_final(75, run, before=0)
    EventLog(run, 2).write("run_started")
    assert not is_final(75, run, before=0)


@pytest.mark.parametrize("status", ["stopped", "cancelled"])
def test_end_of_an_earlier_attempt_is_not_that_of_a_coordinator_that_was_let_down_before_it_began(
    store, monkeypatch, status: str
):
    run = runs.create_run(store, toy_plan(), "ray", "r1")
    begin(run, []).release()
    end(run, 1, status)
    starts: list[int] = []
    monkeypatch.setattr(Supervisor, "_run_once", lambda self: (starts.append(1) or 75, False))
    monkeypatch.setattr(supervise, "_MAX_BACKOFF_S", 0.01)
    monkeypatch.setattr("cluster.jobs.stop_own_job", lambda: pytest.fail("it is not for good"))
    with pytest.raises(SystemExit, match="75"):
        supervise._supervise(["r1", "--store", store.url, "--stop-own-job"])
    assert len(starts) == 4


def test_end_that_its_own_coordinator_wrote_is_final(store, monkeypatch):
    run = runs.create_run(store, toy_plan(), "ray", "r1")
    begin(run, []).release()
    end(run, 1, "stopped")

    def run_once(supervisor: Supervisor) -> tuple[int, bool]:
        begin(run, []).release()
        end(run, 2, "cancelled")
        return 75, False

    stopped: list[bool] = []
    monkeypatch.setattr(Supervisor, "_run_once", run_once)
    monkeypatch.setattr("cluster.jobs.stop_own_job", lambda: stopped.append(True))
    monkeypatch.setattr(supervise, "_STOPPED_S", 0.0)
    with pytest.raises(SystemExit, match="75"):
        supervise._supervise(["r1", "--store", store.url, "--stop-own-job"])
    assert (stopped, newest_attempt(run)) == ([True], 2)


def with_another_schema(store: Store, run: RunPlace) -> None:
    (store.root / "store.json").write(json_bytes({"schema_version": 99, "id": "x"}))


def with_a_damaged_plan(store: Store, run: RunPlace) -> None:
    (run.directory / "run.json").write(b'{"plan"')


def with_a_stage_that_is_not_here(store: Store, run: RunPlace) -> None:
    plan = json.loads((run.directory / "run.json").read_bytes())
    plan["plan"]["steps"][0]["stage"] = "own_stages"
    (run.directory / "run.json").write(json_bytes(plan))


@pytest.mark.parametrize(
    ("made", "code", "told"),
    [
        (with_another_schema, 2, ""),
        (with_a_damaged_plan, 3, "its supervisor ended with code 3: "),
        (with_a_stage_that_is_not_here, 2, "its supervisor ended with code 2: stage 'own_stages'"),
    ],
)
def test_end_of_the_supervisor_itself_is_noted_and_stops_its_job(store, monkeypatch, capsys, made, code, told):
    run = runs.create_run(store, toy_plan(), "ray", "r1")
    made(store, run)
    stopped: list[bool] = []
    monkeypatch.setattr("cluster.jobs.stop_own_job", lambda: stopped.append(True))
    monkeypatch.setattr(supervise, "_STOPPED_S", 0.0)
    monkeypatch.setenv("DLM_JOB_ID", "r1-a1")
    with pytest.raises(SystemExit, match=str(code)):
        supervise._supervise(["r1", "--store", store.url, "--stop-own-job"])
    assert stopped == [True]
    assert end_of(run, "r1-a1").startswith(told)
    assert bool(end_of(run, "r1-a1")) is bool(told)
    assert "supervisor: error: " in capsys.readouterr().err


def test_store_that_does_not_answer_the_supervisor_is_tried_again_on_another_cluster(store, monkeypatch):
    def silent(url: str) -> Store:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("workflows.store.open_store", silent)
    monkeypatch.setattr("cluster.jobs.stop_own_job", lambda: pytest.fail("it is not for good"))
    with pytest.raises(SystemExit, match="75"):
        supervise._supervise(["r1", "--store", store.url, "--stop-own-job"])


def test_job_of_its_own_is_stopped_where_a_new_attempt_would_end_no_better(store, monkeypatch, capsys):
    stopped: list[bool] = []
    monkeypatch.setattr("cluster.jobs.stop_own_job", lambda: stopped.append(True))
    monkeypatch.setattr(supervise, "_STOPPED_S", 0.0)
    words = ["r1", "--store", store.url]
    for more, times in (([], 0), (["--stop-own-job"], 1)):
        with pytest.raises(SystemExit, match="2"):
            supervise._supervise([*words, *more])
        assert len(stopped) == times
    assert "would end no better" in capsys.readouterr().err


def test_coordinator_that_the_store_has_let_down_is_started_again(monkeypatch):
    codes = iter([75, 75, 75])
    supervisor = Supervisor(["x"], frozenset, 0.01, has_ended=iter([False, False, True]).__next__)
    monkeypatch.setattr(Supervisor, "_run_once", lambda self: (next(codes), False))
    assert supervisor.run() == 75
    assert next(codes, None) is None, "started three times: it was let down twice"


def test_coordinator_of_a_store_that_never_answers_is_given_up(monkeypatch):
    def silent() -> bool:
        raise ConnectionError("nobody answers")

    starts: list[int] = []
    supervisor = Supervisor(["x"], frozenset, 0.01, has_ended=silent)
    monkeypatch.setattr(Supervisor, "_run_once", lambda self: (starts.append(1) or 75, False))
    assert supervisor.run() == 75
    assert len(starts) == 4
