"""What a run costs: what its processes wrote down, of every attempt."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifact import read_json
from pipeline.stage import environment
from pipeline.storage import Place, open_storage
from tests.support.fabricated import fabricate_run, fabricate_turn, failure, usage
from tests.support.toy_stages.burn.config import BurnConfig
from tests.support.toy_workflow import STAGES, fabricate, toy_plan, wait_until
from tests.workflows.conftest import Dlm
from workflows.cost import Cost, cost_of, total_of
from workflows.plan import make_plan
from workflows.runs import create_run
from workflows.step import Step, Workflow
from workflows.store import Store
from workflows.usage import UsageMeter

ROOT = Path(__file__).parents[2]


def test_cost_adds_ranks_turns_and_shards_of_each_attempt(store):
    run = fabricate_run(store, toy_plan())
    fabricate_turn(run, 1, "total", "000001", usage_0=usage(1.0, 10.0, 2), usage_1=usage(2.0, 10.0, 2))
    fabricate_turn(run, 1, "total", "000002", usage_0=usage(4.0, 5.0, 2), failure_0=failure())
    fabricate_turn(run, 2, "total", "000003", usage_0=usage(8.0, 1.0, 2), done=None)
    fabricate_turn(run, 2, "double-list", usage_0=usage(16.0, 1.0), done=[])
    fabricate_turn(run, 2, "double-0", usage_0=usage(32.0, 1.0))
    fabricate_turn(run, 2, "double-0", "000001-2", usage_0=usage(64.0, 1.0))
    assert cost_of(run) == [
        Cost("source", 0, 0, 0.0, 0.0, 0.0),
        Cost("double", 2, 3, 112.0, 3.0, 0.0),
        Cost("aside", 0, 0, 0.0, 0.0, 0.0),
        Cost("total", 1, 3, 7.0, 25.0, 50.0),
        Cost("total", 2, 1, 8.0, 1.0, 2.0),
    ]
    assert total_of(cost_of(run)) == Cost("total", 0, 7, 127.0, 29.0, 52.0)


def test_cost_in_hours_and_of_cached_steps_is_printed(dlm, store):
    plan = toy_plan()
    fabricate(store, plan, "source")
    run = fabricate_run(store, plan, [("step_cached", "source", {})])
    fabricate_turn(run, 1, "total", usage_0=usage(7200.0, 1800.0, 4))
    found = json.loads(dlm("cost", "r1", "--json").stdout)
    assert (found["total"]["cpu_hours"], found["total"]["gpu_hours"]) == (2.0, 2.0)
    rows = {row["step"]: row for row in found["rows"]}
    assert (rows["source"]["status"], rows["source"]["cpu_s"]) == ("cached", 0.0)
    lines = [line.split() for line in dlm("cost").stdout.splitlines()]
    assert lines[1] == ["source", "0", "0.0s", "0.0s", "0.0000", "0.0000", "cached", "from", "run", "test"]
    assert lines[-1] == ["total", "1", "30m00s", "2h00m", "2.0000", "2.0000"]


def test_meter_counts_children_while_they_live_and_after_their_end(tmp_path):
    place = Place(open_storage(str(tmp_path)))
    code = "import time\nwhile time.process_time() < 0.6: pass\ntime.sleep(60)"

    def used_s() -> float:
        return read_json(place / "usage-0.json")["cpu_s"] if (place / "usage-0.json").exists() else 0.0

    with UsageMeter(place, 0):
        child = subprocess.Popen([sys.executable, "-c", code])
        try:
            wait_until(lambda: used_s() >= 0.6, "the child is counted")
        finally:
            child.kill()
            child.wait()
    assert used_s() >= 0.6


def accounts(log: Path) -> dict[str, float]:
    """Execution -> CPU-seconds, as the stage itself counted them."""
    return {path.name: float(path.read_text()) for path in log.iterdir() if path.read_text()}


def work_on(store: Store, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.toy_workflow", *arguments, "--store", store.url],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def killed_twice(store: Store, log: Path, config: BurnConfig, rest_s: float) -> dict[str, float]:
    """Run r1: coordinators killed a while after the burning of each of two attempts, then one that ends it."""
    steps = (Step("burn", f"{STAGES}.burn", config),)
    create_run(store, make_plan(Workflow("burn", "", steps), environment()), "local", "r1")
    for attempt in ("1", "2"):
        process = work_on(store, "resume", "r1")
        try:
            wait_until(lambda a=attempt: accounts(log).get(a, 0.0) >= config.cpu_s, f"attempt {attempt} works", 50.0)
            time.sleep(rest_s)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert work_on(store, "resume", "r1").wait(50.0) == 0
    return accounts(log)


def assert_costs(dlm: Dlm, used: dict[str, float]) -> None:
    found = json.loads(dlm("cost", "r1", "--json").stdout)
    assert {str(row["attempt"]) for row in found["rows"]} == set(used) == {"1", "2", "3"}
    assert found["total"]["cpu_s"] == pytest.approx(sum(used.values()), rel=0.02)
    for row in found["rows"]:
        assert row["cpu_s"] == pytest.approx(used[str(row["attempt"])], rel=0.05), "each attempt is counted"


def test_cost_of_a_run_killed_twice_is_the_cpu_time_of_its_attempts(dlm, store, log):
    config = BurnConfig(cpu_s=1.5, killed=2, log=str(log))
    assert_costs(dlm, killed_twice(store, log, config, rest_s=0.5))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_cost_of_a_run_killed_twice_in_the_middle_of_its_work(dlm, store, log):
    """What a worker used since it last wrote that down is lost: half a percent, and at most a tenth of a second."""
    config = BurnConfig(cpu_s=8.0, killed=2, rests=False, log=str(log))
    assert_costs(dlm, killed_twice(store, log, config, rest_s=0.0))
