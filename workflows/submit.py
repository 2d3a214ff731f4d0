"""Runs on a cluster: each attempt is a job there, which goes on from the store as ``dlm resume`` does."""

import dataclasses
import getpass
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.auth import AuthError, is_loopback, names_a_secret, redacted, secret_env, secret_values
from cluster.jobs import OVER, ClusterError, Job, Jobs, SilentError
from pipeline.artifact import json_bytes, read_json
from pipeline.config import from_json
from pipeline.errors import UserError
from pipeline.storage import Place
from workflows.cancel import CancelFile
from workflows.lease import find_holder
from workflows.store import RunPlace, Store

_STORE_CHARS = 6
"""Of a store's id, in that of a job: another store may have a run of the same name."""
_ON_ITS_WAY_S = 120.0
"""How long handing a job over may take: its code is sent, and a cluster that starts has half a minute."""
_MAX_CHARS = 200
"""Of what is told of a job's end."""


@dataclass(frozen=True)
class Submission:
    """A job that was handed over for a run."""

    job_id: str
    address: str
    user: str
    time: float
    attempt: int = 0
    """Of the run, which the job's coordinator is to begin: once there is one of this number, the job is out of it.

    0 in what an earlier version wrote down.
    """
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
    jobs: Jobs,
    code: Path,
    python: str = "",
    env_names: Sequence[str] = (),
    words: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Job:
    """Hand over a job that works on a run, unless one does already: that one is returned.

    UserError if that one was handed over with other options than those given now.  A request to stop the run is taken
    back, unless somebody alive is at work who has to see it.

    Args:
        store: where the run lies; the nodes of the cluster must see it under the same name.
        run: what to work on.
        jobs: of the cluster.
        code: archive of the packages that the job runs.
        python: interpreter on the cluster; by default as for the job before, and for the first that of this process
            on a cluster of this machine.
        env_names: variables of this environment that the job gets; by default as for the job before, and none of them
            for an empty name.
        words: further ones of its command, such as --until STEP.
        tell: gets a line if the cluster takes long.
    """
    if store.root.is_local and not is_loopback(jobs.url) and not store.root.path.is_absolute():
        raise UserError(f"--store {store.url} is relative; give the path that all nodes see")
    known = jobs_of(store, run, jobs)
    wanted = _wanted(run, jobs.url, python, env_names, words)
    has_options = bool(python or env_names or words)
    if live := next((job for job in known if job.status not in OVER), None):
        if has_options:
            _require_same(run, live.job_id, wanted)
        _want_again(run)
        return live
    env = _env(run, wanted, are_kept=not env_names)
    job_id = _next_id(store, run, wanted, known)
    wanted = dataclasses.replace(wanted, job_id=job_id)
    if not _record(run, job_id).create(json_bytes(wanted)):  # by somebody who hands it over at the same time
        if has_options:
            _require_same(run, job_id, wanted)
        wanted = from_json(Submission, read_json(_record(run, job_id)))
        env = _env(run, wanted, are_kept=True)
    _want_again(run)
    about = {"run": run.run_id, "store": store.store_id, "user": wanted.user}
    try:
        job = jobs.submit(job_id, _command(store, run, wanted), code, {**env, "DLM_JOB_ID": job_id}, about, tell)
    except (AuthError, ClusterError) as error:
        found = _taken_all_the_same(run, jobs, job_id, error)
        if found is None:
            note_end(run, job_id, f"it was not handed over: {error}")
            raise
        job = found
    note_taken(run, job_id)
    return job


def _want_again(run: RunPlace) -> None:
    if not _may_be_at_work(run):
        CancelFile(run.cancel_file).withdraw()


def _may_be_at_work(run: RunPlace) -> bool:
    """Whether somebody alive may hold the lease on a run: that of a job that is over is only not stale yet."""
    holder = find_holder(run.lease_dir)
    if holder is None or holder.is_free:
        return False
    begun = (event for event in run.events() if event["kind"] == "run_started" and event["attempt"] == holder.epoch)
    job_id = next((event.get("job", "") for event in begun), "")
    return not (job_id and end_of(run, job_id))


def _taken_all_the_same(run: RunPlace, jobs: Jobs, job_id: str, error: Exception) -> Job | None:
    """The job that could not be handed over, if the cluster has it: then only its answer was lost.

    ClusterError if nobody can tell.
    """
    if isinstance(error, AuthError):  # it would let nobody look either
        return None
    try:
        found = jobs.find(job_id)
    except (AuthError, ClusterError):
        is_known, found = False, None
    else:
        is_known = found is not None or not isinstance(error, SilentError)
    if not is_known:
        raise ClusterError(
            f"{error}; whether job {job_id} was taken is not known. Once the cluster answers, dlm status {run.run_id} "
            f"--address {jobs.url} tells, and dlm resume {run.run_id} --address {jobs.url} hands the run over again "
            "without starting a second job"
        ) from error
    return found


def _wanted(run: RunPlace, url: str, python: str, env_names: Sequence[str], words: Sequence[str]) -> Submission:
    """What is to be handed over, still without an id: of the cluster holds what was said for the job before."""
    last, holder = last_submission(run), find_holder(run.lease_dir)
    attempt = (holder.epoch if holder else 0) + 1
    names = tuple(name for name in env_names if name) if env_names or last is None else last.env
    return Submission(
        "", url, _user(), time.time(), attempt, python or (last.python if last else ""), names, tuple(words)
    )


def _command(store: Store, run: RunPlace, submission: Submission) -> list[str]:
    python = submission.python or (sys.executable if is_loopback(submission.address) else "python")
    command = [python, "-m", "workflows.supervise", run.run_id, "--store", store.url, "--address", "auto"]
    return [*command, *submission.words]


def _next_id(store: Store, run: RunPlace, wanted: Submission, known: Sequence[Job]) -> str:
    """An id that no job of the run had, on whatever cluster; or that of one that somebody is handing over just now."""
    had = {one.job_id for one in _submissions(run) if not _is_on_its_way(run, one, wanted.address)}
    had |= {job.job_id for job in known}
    ids = (f"{run.run_id}-a{number}-{store.store_id[:_STORE_CHARS]}" for number in itertools.count(wanted.attempt))
    return next(job_id for job_id in ids if job_id not in had)


def _is_on_its_way(run: RunPlace, submission: Submission, url: str) -> bool:
    """Whether a job that a cluster does not know may only not have come there yet."""
    if submission.address != url or end_of(run, submission.job_id):
        return False
    record = _record(run, submission.job_id)
    return record.parent.now() - record.modified() < _ON_ITS_WAY_S


def _require_same(run: RunPlace, job_id: str, wanted: Submission) -> None:
    """UserError if a job that works on a run does not do so with the options that are wanted."""
    found = next((one for one in _submissions(run) if one.job_id == job_id), None)
    if found is None or found.options != wanted.options:
        has = f"with {found.options}" if found and found.options else "without options"
        if found and not was_taken(run, job_id):
            raise UserError(
                f"job {job_id} of run {run.run_id} is being handed over to {found.address}, {has}; it would take no "
                f"notice of {wanted.options}. Leave the options out; or, if whoever did so was stopped, try again in "
                f"{_ON_ITS_WAY_S:.0f} s"
            )
        raise UserError(
            f"job {job_id} works on run {run.run_id} already, {has}; it would take no notice of {wanted.options}. "
            f"End it first: dlm cancel {run.run_id}; or leave the options out"
        )


def _env(run: RunPlace, submission: Submission, are_kept: bool) -> Mapping[str, str]:
    """The variables that a job gets; UserError for a secret, which everybody who sees the dashboard would read."""
    if are_kept and (unset := [name for name in submission.env if not os.environ.get(name)]):
        raise UserError(
            f"the last job of run {run.run_id} was given {unset[0]}, which is not set here: export it, or name what "
            "the job is to get instead (--env NAME for each, --env '' for nothing)"
        )
    env = secret_env(submission.env)
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


def _record(run: RunPlace, job_id: str) -> Place:
    return run.directory / "jobs" / f"{job_id}.json"


def jobs_of(store: Store, run: RunPlace, jobs: Jobs) -> list[Job]:
    """The jobs of a run that a cluster knows.

    How those ended that did is written down, for all who see the store and not the cluster.
    """
    found = jobs.of_run(run.run_id, store.store_id)
    for job in found:
        if job.status in OVER:
            note_end(run, job.job_id, job.status.lower() + (f": {job.message}" if job.message else ""))
        else:
            note_taken(run, job.job_id)
    return found


def note_taken(run: RunPlace, job_id: str) -> None:
    """Write down that a cluster has a job: whoever hands it over may be killed before he knows."""
    record = _taken_record(run, job_id)
    if not record.exists():
        record.create(json_bytes({"time": time.time()}))


def was_taken(run: RunPlace, job_id: str) -> bool:
    """Whether a cluster is known to have, or to have had, a job."""
    return _taken_record(run, job_id).exists()


def _taken_record(run: RunPlace, job_id: str) -> Place:
    return run.directory / "jobs-taken" / f"{job_id}.json"


def cluster_of(run: RunPlace) -> str:
    """Address of the cluster that a run was handed over to; empty if it never was, or was begun elsewhere since."""
    job = last_submission(run)
    if job is None:
        return ""
    begun = [event for event in run.events() if event["kind"] == "run_started"]
    is_elsewhere = begun and begun[-1]["attempt"] >= job.attempt and not begun[-1].get("job")
    return "" if is_elsewhere else job.address


def told_of_unknown(run: RunPlace, job: Submission, url: str) -> str:
    """That the cluster at an address knows nothing of a job."""
    if job.address != url:
        why = f"it is not the one at {job.address}"
    elif was_taken(run, job.job_id):
        why = "it has been started anew since it took it"
    else:
        why = "it is not known to have taken it"
    return f"the cluster at {url} knows no job {job.job_id}: {why}"


def note_end(run: RunPlace, job_id: str, how: str) -> None:
    """Write down that a job is over, in a line without secrets; whoever saw it first has the word.

    What Ray tells may have the end of the job's log behind its first line.
    """
    record = _end_record(run, job_id)
    if not record.exists():
        line = redacted(how).strip().partition("\n")[0]
        told = line if len(line) <= _MAX_CHARS else f"{line[: _MAX_CHARS - 1]}…"
        record.create(json_bytes({"how": told, "time": time.time()}))


def end_of(run: RunPlace, job_id: str) -> str:
    """How a job ended, as far as anybody has written it down."""
    try:
        return str(read_json(_end_record(run, job_id))["how"])
    except FileNotFoundError:
        return ""


def _end_record(run: RunPlace, job_id: str) -> Place:
    return run.directory / "job-ends" / f"{job_id}.json"
