"""Runs on a Ray cluster of three nodes, submitted as jobs: what happens when parts of it are lost."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.jobs import OVER, Jobs
from cluster.shapes import resume_command
from tests.support.ray_cluster import ROOT, Running, cluster_env, ray_cluster
from tests.support.ray_token import TOKEN
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, is_gone, toy_workflow, wait_until
from workflows.snapshot import OWN_PACKAGES, code_zip
from workflows.store import RunPlace, Store
from workflows.summary import summarise

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]
LONG_S = 120.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """Three nodes, the head without cores; nothing of it is lost."""
    with ray_cluster(1, 1, 1) as cluster:
        yield cluster


def dlm(*words: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
    """The command line with the toy recipes, as another machine runs it."""
    return subprocess.run(
        [sys.executable, "-m", "tests.support.toy_workflow", *words],
        cwd=ROOT,
        env=cluster_env(token),
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def submit(cluster: Running, store: Store, recipe: str, **settings: Any) -> RunPlace:
    """Hand over run r1."""
    sets = [word for path, value in settings.items() for word in ("--set", f"{path.replace('__', '.')}={value}")]
    where = ("--address", cluster.dashboard, "--store", store.url)
    done = dlm("submit", recipe, *where, "--run-id", "r1", *sets)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "r1"
    return store.run("r1")


def resume(cluster: Running, store: Store) -> None:
    done = dlm("resume", "r1", "--address", cluster.dashboard, "--store", store.url)
    assert done.returncode == 0, done.stderr


def kinds(run: RunPlace) -> list[str]:
    return [event["kind"] for event in run.events()]


def ended(run: RunPlace) -> list[str]:
    """How the attempts of a run ended that did."""
    return [event["status"] for event in run.events() if event["kind"] == "run_ended"]


def starts(log: Path) -> list[tuple[int, int, int, int]]:
    """Rank, ranks, process and count of every start of the relay."""
    path = log / "starts"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(map(int, line.split())) for line in lines if len(line.split()) == 4]


def ticks(log: Path) -> int:
    path = log / "ticks"
    return len(path.read_text().splitlines()) if path.exists() else 0


def of_toy(log: Path, **settings: Any) -> dict[str, Any]:
    return {**{f"{step.name}__log": str(log) for step in toy_workflow().steps}, **settings}


# --- submission -------------------------------------------------------------------------------------------------------


def test_run_is_submitted_with_a_token_finishes_and_a_second_submission_is_no_second_job(shared, store, log):
    run = submit(shared, store, "toy", **of_toy(log))
    submit(shared, store, "toy", **of_toy(log))
    wait_until(lambda: ended(run), "the run ends", LONG_S)
    assert ended(run) == ["succeeded"]
    assert executions(log) == ONCE
    assert kinds(run).count("run_started") == 1
    submit(shared, store, "toy", **of_toy(log))
    wait_until(lambda: len(ended(run)) == 2, "the run ends once more", LONG_S)
    assert ended(run) == ["succeeded", "succeeded"]
    assert executions(log) == ONCE, "nothing was left to do"


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("not-the-token-of-this-cluster", "does not take this token, RAY_AUTH_TOKEN"),
        ("", "wants a token, and there is"),
    ],
)
def test_wrong_or_missing_token_is_refused_and_is_not_shown(shared, store, token, told):
    done = dlm("submit", "toy", "--address", shared.dashboard, "--store", store.url, "--run-id", "r1", token=token)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    assert not token or token not in done.stderr + done.stdout
    assert not (store.root / "runs").names(), "no run is left that nobody works on"


def test_secrets_are_in_no_file_of_the_store(shared, store, log):
    run = submit(shared, store, "toy", **of_toy(log))
    wait_until(lambda: ended(run), "the run ends", LONG_S)
    texts = [path.read_bytes() for path in store.root.path.rglob("*") if path.is_file()]
    assert len(texts) > 20
    assert not any(TOKEN.encode() in text for text in texts)


def test_run_that_was_frozen_is_begun_by_the_command_of_a_rayjob(shared, store, log, tmp_path, monkeypatch):
    sets = [word for path, value in of_toy(log).items() for word in ("--set", f"{path.replace('__', '.')}={value}")]
    frozen = dlm("plan", "toy", "--freeze", "r1", "--store", store.url, *sets)
    assert frozen.returncode == 0, frozen.stderr
    for name, value in cluster_env().items():
        monkeypatch.setenv(name, value)
    code = tmp_path / "code.zip"
    code.write_bytes(code_zip(OWN_PACKAGES))
    _, *words = shlex.split(resume_command("r1", store.url))
    jobs = Jobs(shared.dashboard)
    jobs.submit("rayjob-1", [sys.executable, *words, "--stop-own-job"], code, {}, {})
    wait_until(lambda: (job := jobs.find("rayjob-1")) is not None and job.status in OVER, "the job ends", LONG_S)
    job = jobs.find("rayjob-1")
    assert job is not None
    assert job.status == "SUCCEEDED", jobs.log("rayjob-1")
    assert ended(store.run("r1")) == ["succeeded"]
    assert executions(log) == ONCE


def test_nodes_of_a_cluster_are_waited_for_before_a_run(shared):
    for count, told in ((3, []), (4, ["3 of 4 nodes are there after 1 s: the run begins with these"])):
        command = [sys.executable, "-m", "cluster.nodes", "--wait-for", str(count), "--within", "1"]
        env = cluster_env() | {"RAY_ADDRESS": shared.gcs}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LONG_S, check=False)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if "nodes are there" in line] == told


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_cancel_frees_the_cluster_in_ten_seconds_and_the_run_can_be_resumed(shared, store, log):
    run = submit(shared, store, "relay", relay__ticks=600, relay__log=log)
    wait_until(lambda: ticks(log) > 3, "the gang counts", LONG_S)
    pids = [start[2] for start in starts(log)]
    start_s = time.monotonic()
    done = dlm("cancel", "r1", "--store", store.url, "--grace", "4")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: all(_is_idle(pid) for pid in pids), "the ranks are gone", 10.0)
    assert time.monotonic() - start_s < 10.0
    assert summarise(store, run).status == "cancelled"
    _wait_for_free_cores(shared, 3.0)
    counted = ticks(log)
    resume(shared, store)
    wait_until(lambda: ticks(log) > counted + 3, "it goes on", LONG_S)
    assert starts(log)[-1][3] >= counted - 1, "from where it was"
    assert dlm("cancel", "r1", "--store", store.url, "--grace", "4").returncode == 0


def test_cancel_ends_a_stage_that_does_not_listen(shared, store, log):
    submit(shared, store, "toy", **of_toy(log, source__trouble="hang"))
    wait_until(lambda: (log / "source").exists(), "the source hangs", LONG_S)
    pid = int((log / "source").read_text())
    start_s = time.monotonic()
    done = dlm("cancel", "r1", "--store", store.url, "--grace", "2")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: _is_idle(pid), "the process is gone", 20.0)
    assert time.monotonic() - start_s < 20.0


def _is_idle(pid: int) -> bool:
    """Gone, or back in the pool of Ray's idle workers."""
    try:
        process = psutil.Process(pid)
        return is_gone(process) or "IDLE" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


def _wait_for_free_cores(cluster: Running, cores: float) -> None:
    """Until nothing on the cluster holds a core or a placement group."""
    script = (
        "import ray, ray.util; ray.init(address='auto', log_to_driver=False, logging_level='ERROR');"
        "groups = [g for g in ray.util.placement_group_table().values() if g['state'] != 'REMOVED'];"
        "print(ray.available_resources().get('CPU', 0.0), len(groups))"
    )

    def is_free() -> bool:
        env = {**cluster_env(), "RAY_ADDRESS": cluster.gcs}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        return done.stdout.split()[-2:] == [str(cores), "0"]

    wait_until(is_free, "cores and placement groups are free", 30.0)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_coordinators_killed_again_and_again_lose_nothing_and_leave_nothing(shared, store, log):
    run = submit(shared, store, "toy", **of_toy(log, source__trouble="slow", source__times=1))
    for number in range(1, 6):
        wait_until(lambda number=number: kinds(run).count("run_started") >= number, "an attempt starts", LONG_S)
        time.sleep(1.0 + 0.7 * number)
        if ended(run):
            break
        for process in _processes(store, "workflows.cli"):
            process.send_signal(signal.SIGKILL)
        wait_until(
            lambda number=number: kinds(run).count("run_started") > number or not _processes(store, "supervise"),
            "the supervisor starts it again or gives up",
            LONG_S,
        )
        if not _processes(store, "supervise"):
            resume(shared, store)
    wait_until(lambda: ended(run), "the run ends", LONG_S)
    assert ended(run) == ["succeeded"]
    assert kinds(run).count("run_started") > 5, "it was killed five times"
    committed = [event["step"] for event in run.events() if event["kind"] == "step_committed"]
    assert sorted(committed) == sorted(set(committed)), "each step was committed once"
    _wait_for_free_cores(shared, 3.0)


def _processes(store: Store, module: str) -> list[psutil.Process]:
    """Those of a module that work on the store on the cluster."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = process.cmdline()
            if any(module in word for word in words[:4]) and store.url in words and "auto" in words:
                found.append(process)
    return found


def test_gang_that_loses_a_node_goes_on_with_fewer_ranks_from_where_it_was(store, log):
    with ray_cluster(0, 1, 1) as cluster:
        settings = {"relay__ticks": 120, "relay__log": log, "relay__min_workers": 1}
        run = submit(cluster, store, "relay", **settings)
        wait_until(lambda: ticks(log) > 5, "the gang counts", LONG_S)
        second = next(start for start in starts(log) if start[0] == 1)
        assert {start[1] for start in starts(log)} == {2}
        cluster.tell(f"kill {cluster.node_of(second[2])}")
        wait_until(lambda: ended(run), "the run ends", LONG_S)
        assert ended(run) == ["succeeded"]
        rank, ranks, _, count = starts(log)[-1]
        assert (rank, ranks) == (0, 1)
        assert count > 5
        assert ticks(log) <= 122, "what was counted is not counted again"
        (retry,) = [event for event in run.events() if event["kind"] == "step_retry"]
        assert retry["failure"]["error_class"] == "infra"
        (warning,) = [event["message"] for event in run.events() if event["kind"] == "step_warning"]
        assert warning == "works with 1 of 2 workers: no more found room"


def test_gang_whose_node_is_drained_goes_on_and_nobody_is_charged(store, log):
    with ray_cluster(0, 1, 1) as cluster:
        settings = {"relay__ticks": 150, "relay__log": log, "relay__min_workers": 1}
        run = submit(cluster, store, "relay", **settings)
        wait_until(lambda: ticks(log) > 5, "the gang counts", LONG_S)
        second = next(start for start in starts(log) if start[0] == 1)
        node_id = cluster.tell(f"id {cluster.node_of(second[2])}")["id"]
        drain = [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.gcs),
            *("--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", "20"),
        ]
        subprocess.run(drain, env=cluster_env(), check=True, capture_output=True)
        wait_until(lambda: ended(run), "the run ends", LONG_S)
        assert ended(run) == ["succeeded"]
        (retry,) = [event for event in run.events() if event["kind"] == "step_retry"]
        assert (retry["failure"]["type"], retry["backoff_s"]) == ("Preempted", 0.0)
        assert starts(log)[-1][1] == 1
        assert ticks(log) == 150, "it stopped between two counts"


def test_head_that_is_lost_costs_nothing_that_was_finished(store, log):
    with ray_cluster(1, 1, 1) as cluster:
        run = submit(cluster, store, "relay", relay__ticks=60, relay__log=log)
        wait_until(lambda: ticks(log) > 10, "the gang counts", LONG_S)
        cluster.lose()
    counted = ticks(log)
    assert summarise(store, run).status == "interrupted"
    with ray_cluster(1, 1, 1) as again:
        resume(again, store)
        wait_until(lambda: ended(run), "the run ends", LONG_S)
        assert ended(run) == ["succeeded"]
        assert starts(log)[-1][3] >= counted - 1
        assert ticks(log) <= 61


def test_gang_that_is_too_large_is_given_up_with_what_it_wants_and_what_there_is(shared, store, log):
    run = submit(shared, store, "relay", relay__workers=8, relay__log=log)
    wait_until(lambda: "step_queued" in kinds(run), "it is told to wait", LONG_S)
    (queued, *_) = [event for event in run.events() if event["kind"] == "step_queued"]
    assert queued["reason"].startswith("wants 8 workers with 1 core each; the cluster has 3 cores on 3 nodes")
    assert dlm("cancel", "r1", "--store", store.url, "--grace", "0").returncode == 0
