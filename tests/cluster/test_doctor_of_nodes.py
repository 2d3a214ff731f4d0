"""``dlm doctor`` on a Ray cluster of three nodes, and the supervisor in a job of it."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.jobs import OVER, Jobs
from tests.support.checks import of, only, tree
from tests.support.ray_cluster import ROOT, Running, cluster_env, ray_cluster
from tests.support.ray_token import TOKEN
from tests.support.toy_workflow import wait_until
from tests.workflows.test_doctor import WAITING
from tests.workflows.test_supervise import DRIVER
from workflows.doctor import Check, parsed_checks
from workflows.snapshot import OWN_PACKAGES, code_zip
from workflows.store import Store, open_writable_store

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]
LONG_S = 240.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """Three nodes."""
    with ray_cluster(1, 1, 1) as cluster:
        yield cluster


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_writable_store(str(tmp_path / "store"))


def doctor(*words: str, token: str = TOKEN, address: str = "") -> "subprocess.CompletedProcess[str]":
    env = cluster_env(token) | ({"RAY_ADDRESS": address} if address else {})
    command = [sys.executable, "-m", "workflows.cli", "doctor", "--json", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LONG_S, check=False)


def checked(done: "subprocess.CompletedProcess[str]") -> list[Check]:
    checks = parsed_checks(done.stdout)
    assert checks, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == (3 if any(check.status == "failure" for check in checks) else 0)
    return checks


def assert_three_nodes_are_sound(checks: list[Check]) -> None:
    assert only(checks, "nodes", "ok").found == "3 nodes, 3 cores, 0 GPUs"
    for name in ("code", "packages", "gpu", "memory", "disk", "open files"):
        assert len({check.node for check in of(checks, name)}) == 3, name
    assert [check.status for check in of(checks, "store")] == ["ok"] * 4
    assert "the same packages on 3 nodes" in only(checks, "same versions", "ok").found
    assert "3 at once, 10 files" in only(checks, "exclusive create", "ok").found
    assert only(checks, "clock", "ok").node == "all"
    assert only(checks, "all-reduce (gloo)", "ok").found.startswith("3 ranks: ")
    assert {check.found for check in of(checks, "token")} == {"in RAY_AUTH_TOKEN"}
    assert only(checks, "dashboard", "ok")
    assert only(checks, "admission", "ok").found.endswith(" refuses who has no token or a wrong token")


def test_every_node_is_looked_at_from_within(shared, store):
    before = tree(store.root.path)
    assert_three_nodes_are_sound(checked(doctor("--address", "auto", "--store", store.url, address=shared.gcs)))
    assert tree(store.root.path) == before


def test_every_node_is_looked_at_by_a_job(shared, store):
    before = tree(store.root.path)
    checks = checked(doctor("--address", shared.dashboard, "--store", store.url))
    assert_three_nodes_are_sound(checks)
    assert tree(store.root.path) == before


def test_nothing_is_left_behind_by_one_that_is_ended_while_nodes_race(shared, store):
    before = tree(store.root.path)
    command = [sys.executable, "-c", WAITING, store.url, "--address", "auto"]
    env = cluster_env() | {"RAY_ADDRESS": shared.gcs}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(store.root.path.glob(".dlm-*/race/here-*"))) == 3, "they wait for each other", LONG_S)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=LONG_S)
    assert process.returncode == 75, told
    assert tree(store.root.path) == before


@pytest.mark.parametrize("token", ["not-the-token-of-this-cluster", ""])
def test_wrong_or_missing_token_is_a_usage_error(shared, store, token):
    done = doctor("--address", "auto", "--store", store.url, "--no-all-reduce", token=token, address=shared.gcs)
    assert done.returncode == 2, done.stderr
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr


def test_stopped_job_tells_the_coordinator_once(shared, tmp_path, monkeypatch):
    for name, value in cluster_env().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "plan").write_text("work")
    jobs, job_id = Jobs(shared.dashboard), f"supervised-{uuid.uuid4().hex[:6]}"
    code = tmp_path / "code.zip"
    code.write_bytes(code_zip(OWN_PACKAGES))
    jobs.submit(job_id, [sys.executable, "-c", DRIVER, str(tmp_path), "0.1"], code, {}, {})
    wait_until((tmp_path / "starts").exists, "the child works", LONG_S)
    jobs.stop(job_id)

    def is_over() -> bool:
        job = jobs.find(job_id)
        return job is not None and job.status in OVER

    wait_until(is_over, "the job is over", LONG_S)
    assert (tmp_path / "heard").read_text().split() == ["15"], jobs.log(job_id)


@pytest.mark.parametrize(("more", "status"), [([], "FAILED"), (["--stop-own-job"], "STOPPED")])
def test_job_that_kubernetes_is_not_to_try_again_ends_as_stopped(shared, store, tmp_path, monkeypatch, more, status):
    for name, value in cluster_env().items():
        monkeypatch.setenv(name, value)
    jobs, job_id = Jobs(shared.dashboard), f"supervised-{uuid.uuid4().hex[:6]}"
    code = tmp_path / "code.zip"
    code.write_bytes(code_zip(OWN_PACKAGES))
    command = [sys.executable, "-m", "workflows.supervise", "nowhere", "--store", store.url, *more]
    jobs.submit(job_id, command, code, {}, {})

    def found() -> str:
        job = jobs.find(job_id)
        return job.status if job is not None else ""

    wait_until(lambda: found() in OVER, "the job is over", LONG_S)
    assert found() == status, jobs.log(job_id)
    assert "there is no run 'nowhere'" in jobs.log(job_id)


def test_output_is_for_programs(shared, store):
    done = doctor("--address", "auto", "--store", store.url, "--no-all-reduce", address=shared.gcs)
    assert {tuple(sorted(check)) for check in json.loads(done.stdout)["checks"]} == {
        ("found", "name", "node", "status", "todo")
    }


def test_node_that_hangs_is_a_row_and_the_others_are_looked_at(store):
    with ray_cluster(1, 1) as cluster:
        os.kill(cluster.raylets[1], signal.SIGSTOP)
        try:
            done = doctor("--address", "auto", "--store", store.url, address=cluster.gcs)
        finally:
            os.kill(cluster.raylets[1], signal.SIGCONT)
        checks = checked(done)
    assert done.returncode == 3
    silent = only(checks, "answer", "failure")
    assert {check.node for check in of(checks, "code", "ok")} == {node_of(checks, "exclusive create")}
    assert silent.node != node_of(checks, "exclusive create")


def node_of(checks: list[Check], name: str) -> str:
    return only(checks, name, "ok").node
