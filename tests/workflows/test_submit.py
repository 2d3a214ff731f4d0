"""Runs handed over to a cluster whose dashboard answers what a test wants."""

from pathlib import Path

import pytest

from cluster.auth import names_a_secret
from pipeline.errors import UserError
from tests.cluster.test_jobs import TOKEN, Dashboard, code, dashboard
from tests.support.toy_workflow import toy_plan
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.cancel import CancelFile
from workflows.lease import acquire_lease
from workflows.store import Store
from workflows.submit import last_submission, submit_run

__all__ = ["code", "dashboard"]


def test_run_that_a_job_works_on_gets_no_second_job(dashboard: Dashboard, code: Path, store: Store, log):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    assert submit_run(store, run, dashboard.url, code).job_id == "r1-a1"
    dashboard.jobs["r1-a1"]["status"] = "RUNNING"
    acquire_lease(run.lease_dir, "the job's")
    assert submit_run(store, run, dashboard.url, code).job_id == "r1-a1"
    assert list(dashboard.jobs) == ["r1-a1"]


def test_attempt_after_one_that_is_over_is_another_job_that_may_run(
    dashboard: Dashboard, code: Path, store: Store, log
):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, dashboard.url, code)
    dashboard.jobs["r1-a1"]["status"] = "FAILED"
    CancelFile(run.cancel_file).request(is_cancel=True)
    assert submit_run(store, run, dashboard.url, code).job_id == "r1-a2"
    assert not run.cancel_file.exists(), "it was wanted again"
    words = dashboard.asked["entrypoint"].split()
    assert words[1:5] == ["-m", "workflows.supervise", "r1", "--store"]
    assert TOKEN not in str(dashboard.asked)


def test_job_that_cannot_be_asked_does_not_keep_a_run_from_being_cancelled(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("cluster.jobs._TRIES", 1)
    monkeypatch.setattr("workflows.commands.submitting._BEYOND_GRACE_S", 0.1)
    monkeypatch.setattr("workflows.commands.submitting._GIVE_UP_S", 0.1)
    monkeypatch.setattr("workflows.commands.submitting._end_by_force", lambda run, holder, job: None)
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, dashboard.url, code)
    acquire_lease(run.lease_dir, "the job's")
    dashboard.version = "1.2.3"  # of a cluster that nobody here can talk to
    done = dlm("cancel", "r1", "--grace", "0")
    assert done.code == 75
    assert "its job cannot be asked" in done.stderr
    assert run.cancel_file.exists()
    assert last_submission(run) is not None
    assert dlm("cancel", "r1", "--undo").code == 0
    assert not run.cancel_file.exists()


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD", "DB_PASSWD", "PGPASSWORD", "GITHUB_PAT", "AWS_SECRET_ACCESS_KEY",
     "AZURE_STORAGE_CONNECTION_STRING", "mysql_pwd"],
)  # fmt: skip
def test_variable_that_is_named_like_a_secret_is_not_passed_with_a_job(
    dashboard: Dashboard, code: Path, store: Store, log, monkeypatch, name: str
):
    monkeypatch.setenv(name, "x")
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    with pytest.raises(UserError, match=f"--env {name} is a secret"):
        submit_run(store, run, dashboard.url, code, env_names=[name])
    assert dashboard.jobs == {}


@pytest.mark.parametrize("name", ["HF_HOME", "OMP_NUM_THREADS", "KEYBOARD", "PATH", "MONKEY", "COMPASS"])
def test_variable_with_a_plain_name_is(name: str):
    assert not names_a_secret(name)


def test_names_of_variables_are_those_of_the_last_job_until_others_or_none_are_given(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("workflows.commands.submitting.code_archive", lambda plan, folder: code)
    for name in ("ONE", "TWO"):
        monkeypatch.setenv(name, name.lower())
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, dashboard.url, code, "py", env_names=["ONE"])

    def given(*words: str) -> tuple[str, ...]:
        for job in dashboard.jobs.values():
            job["status"] = "FAILED"
        done = dlm("resume", "r1", "--address", dashboard.url, *words)
        assert done.code == 0, done.stderr
        last = last_submission(run)
        assert last is not None
        assert last.python == "py"
        return tuple(last.env)

    assert given() == ("ONE",)
    assert given("--env", "TWO") == ("TWO",)
    assert given() == ("TWO",)
    monkeypatch.delenv("TWO")
    for job in dashboard.jobs.values():
        job["status"] = "FAILED"
    refused = dlm("resume", "r1", "--address", dashboard.url)
    assert (refused.code, refused.stdout) == (2, "")
    assert "was given TWO, which is not set here" in refused.stderr
    assert "--env '' for nothing" in refused.stderr
    assert given("--env", "") == ()
    assert given() == ()


@pytest.mark.parametrize(("option", "value"), [("--env", "HOME"), ("--env", ""), ("--python", "py")])
def test_options_of_a_job_are_refused_where_there_is_none(store: Store, log, dlm: Dlm, option: str, value: str):
    runs.create_run(store, toy_plan(log), "local", "r1")
    done = dlm("resume", "r1", option, value)
    assert (done.code, done.stdout) == (2, "")
    assert f"{option} is for a job on a cluster: add --address" in done.stderr
