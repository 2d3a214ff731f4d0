"""Runs on a cluster: each attempt is a job there, which goes on from the store as ``dlm resume`` does."""

import dataclasses
import getpass
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.auth import is_loopback, names_a_secret, redacted, secret_env, secret_values
from cluster.jobs import OVER, Job, Jobs, dashboard_url
from pipeline.artifact import json_bytes, read_json
from pipeline.config import from_json
from pipeline.errors import UserError
from pipeline.storage import Place
from workflows.cancel import CancelFile
from workflows.lease import find_holder
from workflows.store import RunPlace, Store


@dataclass(frozen=True)
class Submission:
    """A job that was handed over for a run."""

    job_id: str
    address: str
    user: str
    time: float
    attempt: int
    """Of the run, which the job's coordinator is to begin: once there is one of this number, the job is out of it."""
    python: str = ""
    """As it was given; empty for what the address decides."""
    env: tuple[str, ...] = ()
    """Names of variables that the job got."""
    words: tuple[str, ...] = ()
    """Further ones of its command."""

    @property
    def options(self) -> str:
        """As they would be typed."""
        python = ["--python", self.python] if self.python else []
        return shlex.join([*python, *(word for name in self.env for word in ("--env", name)), *self.words])


def submit_run(
    store: Store,
    run: RunPlace,
    address: str,
    code: Path,
    python: str = "",
    env_names: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Job:
    """Hand over a job that works on a run, unless one does already: that one is returned.

    UserError if that one was handed over with other options than those given now.

    Args:
        store: where the run lies; the nodes of the cluster must see it under the same name.
        run: what to work on.
        address: of the cluster's dashboard.
        code: archive of the packages that the job runs.
        python: interpreter on the cluster; by default as for the job before, and for the first that of this process
            on a cluster of this machine.
        env_names: variables of this environment that the job gets; by default as for the job before, and none of them
            for an empty name.
        words: further ones of its command, such as --until STEP.
    """
    if store.root.is_local and not is_loopback(address) and not store.root.path.is_absolute():
        raise UserError(f"--store {store.url} is relative; give the path that all nodes see")
    last = last_submission(run)  # what was said of the cluster then holds
    attempt = (holder.epoch if (holder := find_holder(run.lease_dir)) else 0) + 1
    names = tuple(name for name in env_names if name) if env_names or last is None else last.env
    if not env_names and (unset := [name for name in names if not os.environ.get(name)]):
        raise UserError(
            f"the last job of run {run.run_id} was given {unset[0]}, which is not set here: export it, or name what "
            "the job is to get instead (--env NAME for each, --env '' for nothing)"
        )
    submission = Submission(
        "",
        dashboard_url(address),
        _user(),
        time.time(),
        attempt,
        python or (last.python if last else ""),
        names,
        tuple(words),
    )
    env = _public_env(submission.env)
    jobs = Jobs(address)
    known = jobs_of(run, jobs)
    if live := [job for job in known if job.status not in OVER]:
        if python or env_names or words:
            _require_same(run, live[0], submission)
        return live[0]
    python = submission.python or (sys.executable if is_loopback(address) else "python")
    command = [python, "-m", "workflows.supervise", run.run_id, "--store", store.url, "--address", "auto", *words]
    number = attempt
    while (job_id := f"{run.run_id}-a{number}") in {job.job_id for job in known}:
        number += 1
    CancelFile(run.cancel_file).withdraw()
    job = jobs.submit(job_id, command, code, {**env, "DLM_JOB_ID": job_id}, {"run": run.run_id, "user": _user()})
    submission = dataclasses.replace(submission, job_id=job_id, address=jobs.url)
    (run.directory / "jobs" / f"{job_id}.json").write(json_bytes(submission))
    return job


def _require_same(run: RunPlace, live: Job, wanted: Submission) -> None:
    """UserError if a job that works on a run does not do so with the options that are wanted."""
    found = [one for one in _submissions(run) if one.job_id == live.job_id]
    if not found or found[0].options != wanted.options:
        has = f"with {found[0].options}" if found and found[0].options else "without options"
        raise UserError(
            f"job {live.job_id} works on run {run.run_id} already, {has}; it would take no notice of {wanted.options}. "
            f"End it first: dlm cancel {run.run_id}; or leave the options out"
        )


def _public_env(names: Sequence[str]) -> Mapping[str, str]:
    """The variables of these names; UserError for a secret, which everybody who sees the dashboard would read."""
    env = secret_env(names)
    secrets = set(secret_values())
    if leaked := [name for name, value in env.items() if value in secrets or names_a_secret(name)]:
        raise UserError(
            f"--env {leaked[0]} is a secret, and what a job is given is shown on the dashboard. Set it in the "
            "environment of the nodes instead (cluster/README.md says how)"
        )
    return env


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def last_submission(run: RunPlace) -> Submission | None:
    """The job that was handed over last for a run."""
    return max(_submissions(run), key=lambda one: one.time, default=None)


def _submissions(run: RunPlace) -> list[Submission]:
    folder = run.directory / "jobs"
    return [from_json(Submission, read_json(folder / name)) for name in folder.names()]


def jobs_of(run: RunPlace, jobs: Jobs) -> list[Job]:
    """The jobs of a run that a cluster knows.

    How those ended that did is written down, for all who see the store and not the cluster.
    """
    found = jobs.of_run(run.run_id)
    for job in found:
        if job.status in OVER:
            note_end(run, job.job_id, job.status.lower() + (f": {job.message}" if job.message else ""))
    return found


def note_end(run: RunPlace, job_id: str, how: str) -> None:
    """Write down that a job is over; whoever saw it first has the word."""
    record = _end_record(run, job_id)
    if not record.exists():
        record.create(json_bytes({"how": redacted(how), "time": time.time()}))


def end_of(run: RunPlace, job_id: str) -> str:
    """How a job ended, as far as anybody has written it down."""
    try:
        return str(read_json(_end_record(run, job_id))["how"])
    except FileNotFoundError:
        return ""


def _end_record(run: RunPlace, job_id: str) -> Place:
    return run.directory / "job-ends" / f"{job_id}.json"
