"""Runs on a Ray cluster of nodes with addresses of their own, reached over a network that can fail."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ray_cluster import ROOT, cluster_env
from tests.support.ray_namespaces import Machines, can_make_namespaces, machines
from tests.support.ray_token import TOKEN
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, toy_workflow, wait_until
from workflows.store import RunPlace, Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not can_make_namespaces(), reason="this machine allows no network namespaces"),
]
LONG_S = 150.0


@pytest.fixture
def cluster() -> Iterator[Machines]:
    with machines(0, 1, 1) as found:
        yield found


def dlm(*words: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.support.toy_workflow", *words],
        cwd=ROOT, env=cluster_env(token), capture_output=True, text=True, timeout=LONG_S, check=False,
    )  # fmt: skip


def submit(cluster: Machines, store: Store, recipe: str, **settings: Any) -> RunPlace:
    sets = [word for path, value in settings.items() for word in ("--set", f"{path.replace('__', '.')}={value}")]
    where = ("--address", cluster.dashboard, "--store", store.url, "--python", sys.executable)
    done = dlm("submit", recipe, *where, "--run-id", "r1", *sets)
    assert done.returncode == 0, done.stderr
    return store.run("r1")


def of_kind(run: RunPlace, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == kind]


def starts(log: Path) -> list[list[int]]:
    path = log / "starts"
    return [list(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def counted(log: Path) -> list[int]:
    path = log / "ticks"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_run_over_machines_finishes_and_without_a_token_nothing_is_sent(cluster, store, log):
    refused = dlm("submit", "toy", "--address", cluster.dashboard, "--store", store.url, token="")
    assert refused.returncode == 2
    assert "is not this machine, and there is no Ray token" in refused.stderr
    wrong = dlm("submit", "toy", "--address", cluster.dashboard, "--store", store.url, token="another-token-0123")
    assert wrong.returncode == 2
    assert "does not take this token" in wrong.stderr
    run = submit(cluster, store, "toy", **{f"{step.name}__log": str(log) for step in toy_workflow().steps})
    wait_until(lambda: of_kind(run, "run_ended"), "the run ends", LONG_S)
    assert of_kind(run, "run_ended")[0]["status"] == "succeeded"
    assert executions(log) == ONCE


def test_machine_that_loses_power_is_done_without(cluster, store, log):
    run = submit(cluster, store, "relay", relay__ticks=150, relay__log=log, relay__min_workers=1)
    wait_until(lambda: len(counted(log)) > 5, "the gang counts", LONG_S)
    second = next(start for start in starts(log) if start[0] == 1)
    cluster.machine_of(second[2]).lose_power()
    wait_until(lambda: of_kind(run, "run_ended"), "the run ends", LONG_S)
    assert of_kind(run, "run_ended")[0]["status"] == "succeeded"
    assert starts(log)[-1][:2] == [0, 1]
    assert starts(log)[-1][3] > 5


def test_rank_that_is_cut_off_and_lives_on_publishes_nothing_more(cluster, store, log):
    run = submit(cluster, store, "relay", relay__ticks=200, relay__log=log, relay__min_workers=1)
    wait_until(lambda: len(counted(log)) > 5, "the gang counts", LONG_S)
    first = next(start for start in starts(log) if start[0] == 0)
    cluster.machine_of(first[2]).cut_off()
    wait_until(lambda: of_kind(run, "run_ended"), "the run ends", LONG_S)
    assert of_kind(run, "run_ended")[0]["status"] == "succeeded"
    heir = starts(log)[-1]
    assert heir[:2] == [0, 1]
    after = counted(log)[counted(log).index(heir[3]) + 1 :]
    assert sorted(after)[-1] == 200
    (committed,) = of_kind(run, "step_committed")
    assert committed["step"] == "relay"
