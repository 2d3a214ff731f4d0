"""Runs handed over to a cluster whose dashboard answers what a test wants."""

import json
import re
import time
from pathlib import Path

import pytest

from cluster.auth import names_a_secret
from cluster.jobs import ClusterError, Job, Jobs
from pipeline.artifact import json_bytes
from pipeline.errors import UserError
from tests.cluster.test_jobs import TOKEN, Dashboard, code, dashboard
from tests.support.fabricated import age_lease, begin, end, fabricate_run
from tests.support.toy_workflow import fabricate, toy_plan
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.cancel import CancelFile
from workflows.lease import acquire_lease
from workflows.store import EventLog, Store
from workflows.submit import end_of, last_submission, note_end, submit_run

__all__ = ["code", "dashboard"]


def job_id(store: Store, attempt: int) -> str:
    return f"r1-a{attempt}-{store.store_id[:6]}"


def test_run_that_a_job_works_on_gets_no_second_job(dashboard: Dashboard, code: Path, store: Store, log):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 1)
    dashboard.jobs[job_id(store, 1)]["status"] = "RUNNING"
    acquire_lease(run.lease_dir, "the job's")
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 1)
    assert list(dashboard.jobs) == [job_id(store, 1)]


def test_attempt_after_one_that_is_over_is_another_job_that_may_run(
    dashboard: Dashboard, code: Path, store: Store, log
):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    dashboard.jobs[job_id(store, 1)]["status"] = "FAILED"
    CancelFile(run.cancel_file).request(is_cancel=True)
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 2)
    assert not run.cancel_file.exists(), "it was wanted again"
    words = dashboard.asked["entrypoint"].split()
    assert words[1:5] == ["-m", "workflows.supervise", "r1", "--store"]
    assert TOKEN not in str(dashboard.asked)


def test_second_job_with_the_same_options_is_the_first_and_with_others_is_refused(
    dashboard: Dashboard, code: Path, store: Store, log, monkeypatch
):
    for name in ("HF_HOME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    run = runs.create_run(store, toy_plan(log), "ray", "r1")

    def hand_over(python: str = "", env_names: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> str:
        return submit_run(store, run, Jobs(dashboard.url), code, python, env_names, words).job_id

    assert hand_over(env_names=("HF_HOME",), words=("--until", "double")) == job_id(store, 1)
    assert hand_over() == hand_over(words=("--until", "double")) == job_id(store, 1)
    assert hand_over(env_names=("HF_HOME",), words=("--until", "double")) == job_id(store, 1)
    for options in ({"words": ("--only", "source")}, {"python": "python9"}, {"env_names": ("OMP_NUM_THREADS",)}):
        with pytest.raises(
            UserError, match=r"r1-a1-\w{6} works on run r1 already, with --env HF_HOME --until double; .*dlm c"
        ):
            hand_over(**options)
    dashboard.jobs[job_id(store, 1)]["status"] = "FAILED"
    assert hand_over(words=("--only", "source")) == job_id(store, 2)
    assert dashboard.asked["runtime_env"]["env_vars"]["HF_HOME"] == "1", "as before"
    assert dashboard.asked["entrypoint"].endswith("--only source")


def test_resume_on_a_cluster_takes_the_options_of_a_job_and_one_here_refuses_them(
    dashboard: Dashboard, store: Store, log, dlm: Dlm, monkeypatch
):
    monkeypatch.setenv("HF_HOME", "/models")
    runs.create_run(store, toy_plan(log), "ray", "r1")
    options = ["--env", "HF_HOME", "--python", "python9"]
    done = dlm("resume", "r1", "--address", dashboard.url, *options)
    assert done.code == 0, done.stderr
    assert dashboard.asked["entrypoint"].startswith("python9 -m workflows.supervise r1")
    assert dashboard.asked["runtime_env"]["env_vars"]["HF_HOME"] == "/models"
    for option in (options[:2], options[2:]):
        for where in ([], ["--address", "auto"]):
            refused = dlm("resume", "r1", *where, *option)
            assert refused.code == 2
            assert f"{option[0]} is for a job on a cluster" in refused.stderr


def status_of(dlm: Dlm, *more: str) -> tuple[str, int | None, str]:
    done = dlm("status", "r1", "--json", *more)
    assert done.code == 0, done.stderr
    value = json.loads(done.stdout)
    return value["status"], value["exit_code"], value["detail"]


def test_job_that_ended_before_its_coordinator_began_is_told_by_whoever_sees_it(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm
):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    status, exit_code, detail = status_of(dlm, "--address", dashboard.url)
    assert (status, exit_code) == ("submitted", None)
    assert f"job {job_id(store, 1)} waits at {dashboard.url}; it was handed over on 20" in detail
    assert f"dlm status r1 --address {dashboard.url}" in detail
    listed = dlm("list").stdout.splitlines()[1]
    assert listed.endswith(f"job {job_id(store, 1)} waits at {dashboard.url}"), "the rest is told by dlm status"
    dashboard.jobs[job_id(store, 1)] |= {"status": "FAILED", "message": f"no such interpreter {TOKEN}"}
    assert status_of(dlm)[0] == "submitted", "nobody has looked"
    watched = dlm("status", "r1", "--watch", "--address", dashboard.url)
    assert watched.code == 75
    assert f"go on with: dlm resume r1 --address {dashboard.url}" in watched.stdout
    told = (
        "interrupted",
        75,
        f"job {job_id(store, 1)} ended before it began to work on it; failed: no such interpreter ***",
    )
    assert status_of(dlm) == told
    assert dlm("status", "r1", "--watch").code == 75
    lease = begin(run, [])
    assert status_of(dlm)[0] == "running"
    end(run, 1, "failed")
    lease.release()
    assert status_of(dlm) == ("failed", 3, "")
    assert "--address" not in dlm("status", "r1").stdout, "it was begun on this machine since"


def test_resumed_run_waits_for_its_new_job(dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm):
    run = fabricate_run(store, toy_plan(log), [("step_started", "source", {"epoch": 1})])
    end(run, 1, "failed")
    assert status_of(dlm)[0] == "failed"
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 2)
    assert status_of(dlm)[0] == "submitted"
    note_end(run, job_id(store, 2), "failed: no such node")
    assert status_of(dlm)[::2] == (
        "failed",
        f"job {job_id(store, 2)} ended before it began to work on it; failed: no such node",
    )


def test_job_that_a_cluster_does_not_know_ends_the_watch(dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    refused = dlm("status", "r1", "--address", dashboard.url)
    assert (refused.code, "was not handed over to a cluster" in refused.stderr) == (2, True)
    submit_run(store, run, Jobs(dashboard.url), code)
    dashboard.jobs.clear()
    watched = dlm("status", "r1", "--watch", "--address", dashboard.url)
    assert watched.code == 2
    assert f"knows no job {job_id(store, 1)}: it has been started anew since it took it. To hand" in watched.stderr
    record = run.directory / "jobs" / f"{job_id(store, 1)}.json"
    record.write(record.read_bytes().replace(dashboard.url.encode(), b"http://192.0.2.9:8265"))
    watched = dlm("status", "r1", "--watch", "--address", dashboard.url)
    assert f"knows no job {job_id(store, 1)}: it is not the one at http://192.0.2.9:8265. To hand" in watched.stderr


def test_job_that_is_cancelled_before_it_began_leaves_no_run_that_waits(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("workflows.commands.submitting._BEYOND_GRACE_S", 0.1)

    def stop(jobs, stopped: str) -> None:
        dashboard.jobs[stopped]["status"] = "STOPPED"

    monkeypatch.setattr("cluster.jobs.Jobs.stop", stop)
    submit_run(store, runs.create_run(store, toy_plan(log), "ray", "r1"), Jobs(dashboard.url), code)
    assert dlm("cancel", "r1", "--grace", "0").code == 0
    assert status_of(dlm)[:2] == ("interrupted", 75)


def test_run_that_nobody_has_begun_says_since_when(store: Store, log, dlm: Dlm):
    runs.create_run(store, toy_plan(log), "local", "r1")
    status, exit_code, detail = status_of(dlm)
    assert (status, exit_code) == ("submitted", None)
    assert re.fullmatch(r"created on \d{4}-\d\d-\d\d \d\d:\d\d; nobody has begun to work on it", detail)


def test_job_that_cannot_be_asked_does_not_keep_a_run_from_being_cancelled(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("cluster.jobs._TRIES", 1)
    monkeypatch.setattr("workflows.commands.submitting._BEYOND_GRACE_S", 0.1)
    monkeypatch.setattr("workflows.commands.submitting._GIVE_UP_S", 0.1)
    monkeypatch.setattr("workflows.commands.submitting._end_by_force", lambda run, holder, job: None)
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    acquire_lease(run.lease_dir, "the job's")
    dashboard.version = "1.2.3"  # of a cluster that nobody here can talk to
    done = dlm("cancel", "r1", "--grace", "0")
    assert done.code == 75
    assert "its job cannot be asked" in done.stderr
    assert run.cancel_file.exists()
    assert last_submission(run) is not None
    assert dlm("cancel", "r1", "--undo").code == 0
    assert not run.cancel_file.exists()


@pytest.mark.parametrize("is_made", [False, True])
def test_request_stays_where_the_cluster_of_a_job_that_has_not_begun_does_not_answer(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch, is_made: bool
):
    monkeypatch.setattr("cluster.jobs._TRIES", 1)
    plan = toy_plan(log)
    if is_made:
        fabricate(store, plan)
    run = runs.create_run(store, plan, "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    dashboard.version = "1.2.3"  # of a cluster that nobody here can talk to
    done = dlm("cancel", "r1", "--grace", "0")
    assert (done.code, run.cancel_file.exists()) == (75, True)
    assert "its job cannot be asked" in done.stderr
    assert "dlm cancel r1 --undo" in done.stderr


def test_run_that_is_made_and_whose_cluster_knows_no_job_is_left_as_it_is(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm
):
    plan = toy_plan(log)
    fabricate(store, plan)
    run = runs.create_run(store, plan, "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    dashboard.jobs.clear()
    done = dlm("cancel", "r1")
    assert (done.code, done.stderr.endswith("nothing works on run r1\n")) == (0, True), done.stderr
    assert not run.cancel_file.exists()


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_job_handed_over_while_another_coordinator_works_waits_for_it_and_leaves_it_its_request_to_stop(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch, is_cancelled: bool
):
    monkeypatch.setattr("workflows.commands.submitting.code_archive", lambda plan, folder: code)
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    began_s = time.monotonic()
    lease = begin(run, [])
    if is_cancelled:
        CancelFile(run.cancel_file).request(60.0, is_cancel=True)
    for _ in range(2):  # the second finds the first one's job
        done = dlm("resume", "r1", "--address", dashboard.url)
        assert done.code == 0, done.stderr
        assert list(dashboard.jobs) == [job_id(store, 2)]
        waits = r"is at work \(test\), last heard of (\d+) s ago; the job waits for it to end, 130 s at most"
        told = re.search(waits, done.stderr)
        assert told is not None, done.stderr
        assert int(told[1]) <= time.monotonic() - began_s + 0.5, "rounded to whole seconds"
        assert ("stops the job too: to take it back, dlm cancel r1 --undo" in done.stderr) is is_cancelled
        assert run.cancel_file.exists() is is_cancelled
    lease.release()
    done = dlm("resume", "r1", "--address", dashboard.url)
    assert (done.code, "is at work" in done.stderr) == (0, False)
    assert not run.cancel_file.exists(), "nobody is left who has to see it"


def test_request_to_a_job_that_was_killed_is_taken_back_before_its_lease_is_stale(
    dashboard: Dashboard, code: Path, store: Store, log
):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    age_lease(acquire_lease(run.lease_dir, "the job's"), 20.0)
    EventLog(run, 1).write("run_started", job=job_id(store, 1))
    CancelFile(run.cancel_file).request(60.0, is_cancel=True)
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 1)
    assert run.cancel_file.exists(), "it is there and has to see it"
    dashboard.jobs[job_id(store, 1)]["status"] = "STOPPED"
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 2)
    assert not run.cancel_file.exists()


def test_job_that_works_is_not_said_to_wait_for_itself(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("workflows.commands.submitting.code_archive", lambda plan, folder: code)
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    resume = ("resume", "r1", "--address", dashboard.url)
    assert dlm(*resume).code == 0
    dashboard.jobs[job_id(store, 1)]["status"] = "RUNNING"
    begin(run, [])
    done = dlm(*resume)
    assert (done.code, "is at work" in done.stderr) == (0, False)


@pytest.mark.parametrize(("has_begun", "is_left"), [(False, False), (True, True)])
def test_run_that_waits_for_its_job_is_wanted_again_when_it_is_submitted_again(
    dashboard: Dashboard, code: Path, store: Store, log, has_begun: bool, is_left: bool
):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    if has_begun:
        acquire_lease(run.lease_dir, "the job's")
    CancelFile(run.cancel_file).request(is_cancel=True)
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 1)
    assert run.cancel_file.exists() is is_left


def test_submitted_run_all_of_whose_steps_are_there_has_succeeded(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm
):
    plan = toy_plan(log)
    fabricate(store, plan)
    submit_run(store, runs.create_run(store, plan, "ray", "r1"), Jobs(dashboard.url), code)
    assert status_of(dlm) == ("succeeded", 0, "finished by run test")


def test_log_that_ray_tells_as_the_end_of_a_job_is_not_told_further(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm
):
    run = runs.create_run(store, toy_plan(log), "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    log_lines = "a line of the log with a key of the cluster\n" * 40
    dashboard.jobs[job_id(store, 1)] |= {"status": "FAILED", "message": f"exit code 1, {'long ' * 80}:\n{log_lines}"}
    _, _, detail = status_of(dlm, "--address", dashboard.url)
    told = end_of(run, job_id(store, 1))
    assert told in detail
    assert told.startswith("failed: exit code 1, long long")
    assert len(told) <= 200
    assert "log" not in detail.partition(": ")[2]
    assert "\n" not in detail


def test_record_of_an_earlier_version_is_read(store: Store, log, dlm: Dlm):
    run = runs.create_run(store, toy_plan(log), "local", "r1")
    old = {"job_id": "r1-a1", "address": "http://127.0.0.1:1", "user": "u", "time": 1.0, "python": "", "env": []}
    (run.directory / "jobs" / "r1-a1.json").write(json_bytes(old))
    assert status_of(dlm)[:2] == ("interrupted", 75)
    assert dlm("list").code == 0


def test_cluster_that_is_silent_for_a_while_does_not_end_the_watch(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("workflows.commands.status._ASK_EVERY_S", 0.0)
    submit_run(store, runs.create_run(store, toy_plan(log), "ray", "r1"), Jobs(dashboard.url), code)
    real, looks = Jobs.of_run, []

    def of_run(jobs: Jobs, *about: str) -> list[Job]:
        looks.append(len(looks))
        if len(looks) in (2, 3):
            raise ClusterError("the cluster does not answer")
        if len(looks) == 4:
            dashboard.jobs[job_id(store, 1)]["status"] = "FAILED"
        return real(jobs, *about)

    monkeypatch.setattr(Jobs, "of_run", of_run)
    watched = dlm("status", "r1", "--watch", "--address", dashboard.url)
    assert (watched.code, len(looks)) == (75, 4), watched.stderr
    assert watched.stderr.count("does not answer; it is asked again") == 1


def test_cluster_that_does_not_answer_at_all_is_refused(
    dashboard: Dashboard, code: Path, store: Store, log, dlm: Dlm, monkeypatch
):
    submit_run(store, runs.create_run(store, toy_plan(log), "ray", "r1"), Jobs(dashboard.url), code)

    def of_run(jobs: Jobs, *about: str) -> list[Job]:
        raise ClusterError("the cluster does not answer")

    monkeypatch.setattr(Jobs, "of_run", of_run)
    watched = dlm("status", "r1", "--watch", "--address", dashboard.url)
    assert (watched.code, watched.stderr.endswith("error: the cluster does not answer\n")) == (5, True), watched.stderr


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
        submit_run(store, run, Jobs(dashboard.url), code, env_names=[name])
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
    submit_run(store, run, Jobs(dashboard.url), code, "py", env_names=["ONE"])

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
