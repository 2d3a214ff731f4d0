"""Commands about clusters: submit a run, and end one wherever it runs."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import psutil
import typer

from cluster.auth import AuthError
from cluster.jobs import OVER, ClusterError, Jobs
from workflows import runs
from workflows.cancel import CancelFile
from workflows.commands.common import (
    DEFAULT_STORE,
    EnvOption,
    FailFastOption,
    PythonOption,
    QueueOption,
    RunArgument,
    SetOption,
    StepsFrom,
    StepsOnly,
    StepsUntil,
    StoreOption,
    UnsandboxedOption,
    find_store,
    find_writable_store,
    option_words,
    parse_settings,
    say,
    store_option,
    typed_command,
)
from workflows.exit_codes import EXIT_INTERRUPTED
from workflows.lease import HEARTBEAT_S, STALE_AFTER_S, Holder, find_holder
from workflows.selection import selection, selection_words
from workflows.snapshot import code_archive
from workflows.store import RunPlace, Store
from workflows.submit import cluster_of, jobs_of, last_submission, submit_run
from workflows.summary import summarise

AddressOption = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_ADDRESS", help="Dashboard of the cluster, http://HOST:8265.", show_envvar=True
    ),
]
_POLL_S = 0.5
_BEYOND_GRACE_S = 5.0
_GIVE_UP_S = 15.0


def submit(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.")],
    address: AddressOption,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody changes it
    store: StoreOption = DEFAULT_STORE,
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="Name of the run; that of an existing one resumes it.")
    ] = None,
    python: PythonOption = "",
    env: EnvOption = [],  # noqa: B006 - as above
    from_: StepsFrom = [],  # noqa: B006 - as above
    until: StepsUntil = [],  # noqa: B006 - as above
    only: StepsOnly = [],  # noqa: B006 - as above
    queue_timeout_s: QueueOption = None,
    fail_fast: FailFastOption = False,
    allow_unsandboxed: UnsandboxedOption = False,
) -> None:
    """Hand a run over to a Ray cluster; with the id of an existing run this is a resume."""
    place = find_writable_store(store)
    if allow_unsandboxed:
        settings = [*settings, *runs.permission(runs.configured(recipe, parse_settings(settings)).steps)]
    plan = runs.plan_recipe(recipe, parse_settings(settings))
    words = [*selection_words(from_, until, only), *option_words(queue_timeout_s, fail_fast)]
    selection(plan, place, from_, until, only)
    if run_id is not None:
        place.run_place(run_id)  # a name that cannot be one is refused before a cluster is looked for
    jobs = Jobs(address)  # before the run is there, which nobody would work on
    run = runs.create_run(place, plan, "ray", run_id, settings, typed_command())
    for line in filter(None, [*runs.advice(plan), runs.code_change(run)]):
        say(f"warning: {line}")
    hand_over(place, run, jobs, python, env, words)


def hand_over(store: Store, run: RunPlace, jobs: Jobs, python: str, env: list[str], words: Sequence[str]) -> None:
    """Submit a job for a run and say how to follow it; ``words`` are further ones of its command."""
    with tempfile.TemporaryDirectory(prefix="dlm-code-") as folder:
        code = code_archive(runs.frozen_plan(run), Path(folder))
        job = submit_run(store, run, jobs, code, python, env, words, say)
    where = store_option(store)
    print(run.run_id)
    say(f"job {job.job_id} at {jobs.url} ({job.status.lower()})")
    _say_who_is_before(store, run)
    say(f"see it: dlm status {run.run_id} --watch{where}, dlm logs {run.run_id} -f{where}")
    say(f"end it: dlm cancel {run.run_id}{where}")


def _say_who_is_before(store: Store, run: RunPlace) -> None:
    """Say who keeps the job that was handed over last from beginning, if anybody does."""
    holder, submission = find_holder(run.lease_dir), last_submission(run)
    if holder is None or holder.is_free or submission is None or submission.attempt <= holder.epoch:
        return
    say(f"{holder}; the job waits for it to end, {STALE_AFTER_S + HEARTBEAT_S:.0f} s at most")
    if run.cancel_file.exists():
        undo = f"dlm cancel {run.run_id} --undo{store_option(store)}"
        say(f"the request to stop that one stops the job too: to take it back, {undo} once that one has ended")


def cancel(
    run_id: RunArgument,
    store: StoreOption = DEFAULT_STORE,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that stages have to save before they are ended.")
    ] = 60.0,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take the request back, for what starts runs by itself (RayJob, Slurm).")
    ] = False,
) -> None:
    """End a run wherever it runs; what was finished is kept, and dlm resume goes on with it."""
    place = find_store(store)
    run = place.run(run_id)
    request, holder = CancelFile(run.cancel_file), find_holder(run.lease_dir)
    is_free = holder is None or holder.is_free
    if undo:
        if not run.cancel_file.exists():
            say(f"run {run_id} was not asked to stop: there is no request to take back")
            return
        request.withdraw()
        say(f"the request to stop run {run_id} was taken back")
        if not is_free:
            say(f"{holder}: if it has seen the request, it stops all the same")
        return
    may_begin = is_free and _may_begin(place, run)
    if is_free and not may_begin and last_submission(run) is None:
        say(f"nothing works on run {run_id}")
        return
    request.request(grace, is_cancel=True)  # before anybody else is asked, who may not answer
    job, was_asked = _live_job(place, run)
    if is_free and job is None:
        if was_asked and not may_begin:
            request.withdraw()
            say(f"nothing works on run {run_id}")
            return
        say(
            f"nothing works on run {run_id} as far as is known; the request was left for a job that begins it later. "
            f"To take it back: dlm cancel {run_id} --undo{store_option(place)}, or dlm resume"
        )
        raise typer.Exit(0 if was_asked else EXIT_INTERRUPTED)
    say(f"asked to stop; stages have {grace:g} s to save")
    if not _ends(run, job, grace + _BEYOND_GRACE_S):
        _end_by_force(run, holder, job)
    if not _ends(run, job, _GIVE_UP_S):
        holder = find_holder(run.lease_dir)
        say(f"the request was left, but {holder or 'its job'} has not answered; it stops when it sees it")
        raise typer.Exit(EXIT_INTERRUPTED)
    if job is not None:
        jobs_of(place, run, job[0])
    there = cluster_of(run)
    where = f" --address {there}" if there else ""
    say(f"cancelled; go on with: dlm resume {run_id}{where}{store_option(place)}")


_LiveJob = tuple[Jobs, str]


def _may_begin(store: Store, run: RunPlace) -> bool:
    """Whether what the store knows nothing of may begin a run: a Slurm job that waits, the next cluster of a RayJob."""
    return summarise(store, run).status != "succeeded" and runs.frozen_executor(run) == "ray"


def _live_job(store: Store, run: RunPlace) -> tuple[_LiveJob | None, bool]:
    """The job that works on a run or waits to, if there is one; and whether its cluster could be asked."""
    submission = last_submission(run)
    if submission is None:
        return None, True
    try:
        jobs = Jobs(submission.address)
        live = [job for job in jobs_of(store, run, jobs) if job.status not in OVER]
    except (AuthError, ClusterError) as error:
        say(f"its job cannot be asked, the request in the store has to do: {error}")
        return None, False
    return (jobs, live[0].job_id) if live else None, True


def _ends(run: RunPlace, job: _LiveJob | None, within_s: float) -> bool:
    """Whether nothing works on a run any more, waiting for that."""
    deadline = time.monotonic() + within_s
    while True:
        holder = find_holder(run.lease_dir)
        is_free = holder is None or holder.is_free
        if is_free and (job is None or _is_over(job)):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)


def _is_over(job: _LiveJob) -> bool:
    found = job[0].find(job[1])
    return found is None or found.status in OVER


def _end_by_force(run: RunPlace, holder: Holder | None, job: _LiveJob | None) -> None:
    """End a coordinator that did not heed the request: its job, or its process if that is of this machine."""
    if job is not None:
        job[0].stop(job[1])
    elif holder is not None and holder.owner.is_here and not holder.owner.is_dead():
        process = psutil.Process(holder.owner.pid)
        process.terminate()
        try:
            process.wait(_BEYOND_GRACE_S)
        except psutil.TimeoutExpired:
            process.kill()
