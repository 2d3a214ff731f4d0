"""Jobs that meet others: of the same run, of a run of the same name, of another cluster."""

from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.jobs import ClusterError, Job, Jobs
from pipeline.errors import UserError
from tests.cluster.test_jobs import Dashboard, code, dashboard
from tests.support.toy_workflow import toy_plan
from tests.workflows.conftest import Dlm
from tests.workflows.test_submit import job_id, status_of
from workflows import runs
from workflows.cancel import CancelFile
from workflows.store import RunPlace, Store, open_writable_store
from workflows.submit import end_of, last_submission, note_end, submit_run

__all__ = ["code", "dashboard"]


@pytest.fixture
def run(store: Store, log: Path) -> RunPlace:
    return runs.create_run(store, toy_plan(log), "ray", "r1")


def test_end_of_a_job_of_another_cluster_is_not_taken_for_that_of_the_next_one(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, dlm: Dlm
):
    submit_run(store, run, Jobs(dashboard.url), code)
    dashboard.jobs[job_id(store, 1)]["status"] = "FAILED"
    assert dlm("status", "r1", "--address", dashboard.url).code == 0
    dashboard.jobs.clear()
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 2)
    assert status_of(dlm, "--address", dashboard.url)[:2] == ("submitted", None)
    record = run.directory / "jobs" / f"{job_id(store, 2)}.json"
    record.write(record.read_bytes().replace(dashboard.url.encode(), b"http://another:8265"))
    dashboard.jobs.clear()
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 3)


def test_job_that_its_cluster_has_lost_is_handed_over_under_another_id_once_it_cannot_be_on_its_way(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, monkeypatch
):
    submit_run(store, run, Jobs(dashboard.url), code, words=("--until", "source"))
    dashboard.jobs.clear()
    with pytest.raises(UserError, match="works on run r1 already, with --until source"):
        submit_run(store, run, Jobs(dashboard.url), code, words=("--until", "double"))
    assert dashboard.jobs == {}
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 1)
    assert dashboard.asked["entrypoint"].endswith("--until source"), "as it was written down"
    dashboard.jobs.clear()
    monkeypatch.setattr("workflows.submit._ON_ITS_WAY_S", 0.0)
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 2)


@pytest.mark.parametrize("words", [(), ("--until", "double"), ("--until", "source")])
def test_of_two_who_submit_at_once_the_second_has_the_job_of_the_first_or_is_refused(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, monkeypatch, words: tuple[str, ...]
):
    real = Jobs.of_run

    def of_run(jobs: Jobs, *about: str) -> list[Job]:
        found = real(jobs, *about)
        monkeypatch.setattr(Jobs, "of_run", real)
        submit_run(store, run, Jobs(dashboard.url), code, words=("--until", "source"))  # somebody else
        return found

    monkeypatch.setattr(Jobs, "of_run", of_run)
    if words == ("--until", "double"):
        with pytest.raises(UserError, match=r"works on run r1 already, with --until source; .* of --until double"):
            submit_run(store, run, Jobs(dashboard.url), code, words=words)
    else:
        assert submit_run(store, run, Jobs(dashboard.url), code, words=words).job_id == job_id(store, 1)
    last = last_submission(run)
    assert last is not None
    assert last.words == ("--until", "source")
    assert list(dashboard.jobs) == [job_id(store, 1)]
    assert dashboard.jobs[job_id(store, 1)]["entrypoint"].endswith("--until source")


def test_submission_that_a_cluster_refused_is_no_job_that_is_waited_for(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, dlm: Dlm
):
    dashboard.refusals = ["no such thing"]
    with pytest.raises(ClusterError, match="no such thing"):
        submit_run(store, run, Jobs(dashboard.url), code)
    assert end_of(run, job_id(store, 1)).startswith("it was not handed over: ")
    assert status_of(dlm)[0] == "interrupted"
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 2)


def test_job_that_was_taken_though_the_answer_was_lost_is_the_one_that_was_handed_over(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, dlm: Dlm
):
    dashboard.lost = ["answer"]
    assert submit_run(store, run, Jobs(dashboard.url), code) == Job(job_id(store, 1), "PENDING")
    assert end_of(run, job_id(store, 1)) == ""
    assert status_of(dlm)[:2] == ("submitted", None)


def test_job_whose_client_was_killed_is_not_said_to_be_there_and_the_next_client_hands_it_over(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, dlm: Dlm, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setenv("HF_HOME", "1")
    jobs = Jobs(dashboard.url)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "submit", killed)
        with pytest.raises(Killed):
            submit_run(store, run, jobs, code)
    status, _, detail = status_of(dlm)
    assert status == "submitted"
    assert f"job {job_id(store, 1)} is not known to be at {dashboard.url}" in detail
    assert dlm("list").stdout.rstrip().endswith(f"is not known to be at {dashboard.url}")
    asked = dlm("status", "r1", "--address", dashboard.url)
    assert asked.code == 2
    assert f"knows no job {job_id(store, 1)}: it is not known to have taken it" in asked.stderr
    with pytest.raises(UserError, match=r"is being handed over .*try again in 120 s"):
        submit_run(store, run, jobs, code, env_names=["HF_HOME"])
    assert submit_run(store, run, jobs, code).job_id == job_id(store, 1)
    assert list(dashboard.jobs) == [job_id(store, 1)]
    assert f"job {job_id(store, 1)} waits at {dashboard.url}; " in status_of(dlm)[2]


def test_job_that_is_found_on_its_cluster_is_known_to_have_been_taken(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, dlm: Dlm
):
    jobs = Jobs(dashboard.url)
    dashboard.lost = ["all"]
    with pytest.raises(ClusterError):
        submit_run(store, run, jobs, code)
    assert "is not known to be at" in status_of(dlm)[2]
    dashboard.is_silent = False
    assert f"waits at {dashboard.url}; " in status_of(dlm, "--address", dashboard.url)[2]


@pytest.mark.parametrize("lost", ["asked", "all"])
def test_of_a_job_that_may_have_been_taken_nothing_is_written_down_and_the_next_hand_over_is_the_same(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, dlm: Dlm, lost: Literal["asked", "all"]
):
    jobs = Jobs(dashboard.url)
    dashboard.lost = [lost]
    with pytest.raises(ClusterError, match="does not answer") as error:
        submit_run(store, run, jobs, code)
    for told in (f"whether job {job_id(store, 1)} was taken is not known", f"dlm status r1 --address {dashboard.url}"):
        assert told in str(error.value)
    assert end_of(run, job_id(store, 1)) == ""
    assert status_of(dlm)[:2] == ("submitted", None)
    dashboard.is_silent = False
    assert submit_run(store, run, jobs, code).job_id == job_id(store, 1)
    assert list(dashboard.jobs) == [job_id(store, 1)]


def test_runs_of_one_name_in_two_stores_have_jobs_of_their_own(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, log: Path, tmp_path: Path, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("workflows.commands.submitting._BEYOND_GRACE_S", 0.1)

    def stop(jobs: Jobs, stopped: str) -> None:
        dashboard.jobs[stopped]["status"] = "STOPPED"

    monkeypatch.setattr(Jobs, "stop", stop)
    other = open_writable_store(tmp_path / "other")
    twin = runs.create_run(other, toy_plan(log), "ray", "r1")
    submit_run(store, run, Jobs(dashboard.url), code)
    assert submit_run(other, twin, Jobs(dashboard.url), code).job_id == job_id(other, 1) != job_id(store, 1)
    assert dlm("cancel", "r1", "--grace", "0", "--store", other.url).code == 0
    statuses = {name: job["status"] for name, job in dashboard.jobs.items()}
    assert statuses == {job_id(store, 1): "PENDING", job_id(other, 1): "STOPPED"}
    assert status_of(dlm)[0] == "submitted"


def test_variable_that_is_not_set_any_more_is_not_needed_for_a_job_that_is_there(
    dashboard: Dashboard, code: Path, store: Store, run: RunPlace, monkeypatch
):
    monkeypatch.setenv("HF_HOME", "/models")
    submit_run(store, run, Jobs(dashboard.url), code, env_names=["HF_HOME"])
    monkeypatch.delenv("HF_HOME")
    assert submit_run(store, run, Jobs(dashboard.url), code).job_id == job_id(store, 1)
    note_end(run, job_id(store, 1), "stopped")
    dashboard.jobs.clear()
    CancelFile(run.cancel_file).request(is_cancel=True)
    with pytest.raises(UserError, match="was given HF_HOME, which is not set here"):
        submit_run(store, run, Jobs(dashboard.url), code)
    assert run.cancel_file.exists(), "nothing was handed over"
    assert (run.directory / "jobs").names() == [f"{job_id(store, 1)}.json"]


def test_option_that_is_given_with_its_default_is_an_option(
    dashboard: Dashboard, code: Path, run: RunPlace, dlm: Dlm, monkeypatch
):
    monkeypatch.setattr("workflows.commands.submitting.code_archive", lambda plan, folder: code)
    resume = ("resume", "r1", "--address", dashboard.url)
    assert dlm(*resume, "--queue-timeout", "900").code == 0
    assert dlm(*resume).code == 0
    refused = dlm(*resume, "--queue-timeout", "600")
    assert refused.code == 2
    assert "with --queue-timeout 900; it would take no notice of --queue-timeout 600" in refused.stderr
