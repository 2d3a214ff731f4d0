"""Runs on a cluster: each attempt is a job there, which goes on from the store as ``dlm resume`` does."""

import getpass
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.auth import is_loopback, names_a_secret, secret_env, secret_values
from cluster.jobs import OVER, Job, Jobs
from pipeline.artifact import json_bytes, read_json
from pipeline.errors import UserError
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
    python: str = ""
    """As it was given; empty for what the address decides."""
    env: tuple[str, ...] = ()
    """Names of variables that the job got."""


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

    Args:
        store: where the run lies; the nodes of the cluster must see it under the same name.
        run: what to work on.
        address: of the cluster's dashboard.
        code: archive of the packages that the job runs.
        python: interpreter on the cluster; by default that of this process for a cluster of this machine.
        env_names: variables of this environment that the job gets.
        words: further ones of its command, such as --until STEP.
    """
    if store.root.is_local and not is_loopback(address) and not store.root.path.is_absolute():
        raise UserError(f"--store {store.url} is relative; give the path that all nodes see")
    env = _public_env(env_names)
    jobs = Jobs(address)
    given, python = python, python or (sys.executable if is_loopback(address) else "python")
    command = [python, "-m", "workflows.supervise", run.run_id, "--store", store.url, "--address", "auto", *words]
    known = jobs.of_run(run.run_id)
    if live := [job for job in known if job.status not in OVER]:
        return live[0]
    number = (holder.epoch if (holder := find_holder(run.lease_dir)) else 0) + 1
    while (job_id := f"{run.run_id}-a{number}") in {job.job_id for job in known}:
        number += 1
    CancelFile(run.cancel_file).withdraw()
    job = jobs.submit(job_id, command, code, {**env, "DLM_JOB_ID": job_id}, {"run": run.run_id, "user": _user()})
    submission = Submission(job_id, jobs.url, _user(), time.time(), given, tuple(env_names))
    (run.directory / "jobs" / f"{job_id}.json").write(json_bytes(submission))
    return job


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
    folder = run.directory / "jobs"
    found: list[dict[str, Any]] = [read_json(folder / name) for name in folder.names()]
    return max((Submission(**value) for value in found), key=lambda one: one.time, default=None)
