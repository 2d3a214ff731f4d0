"""Where a run and its steps stand, from what the store knows; no process is asked."""

import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from cluster.auth import redacted, secret_values
from pipeline.artifact import read_json
from pipeline.errors import CorruptionError, UserError, classify
from workflows import runs
from workflows.causes import failure_words
from workflows.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNSCHEDULABLE
from workflows.lease import STALE_AFTER_S, Holder, find_holder
from workflows.plan import Plan, PlannedStep
from workflows.progress import progress_words
from workflows.step import load_stage
from workflows.store import RunPlace, Store
from workflows.submit import end_of, last_submission, was_taken
from workflows.turns import Turn, find_turns

RunStatus = Literal[
    "running", "succeeded", "partial", "failed", "stopped", "cancelled", "interrupted", "submitted", "damaged",
]  # fmt: skip
UNFINISHED: frozenset[RunStatus] = frozenset({"partial", "failed", "stopped", "cancelled", "interrupted"})
"""There is more to make, and nobody does."""
Event = dict[str, Any]
_OLD_S = 60.0
"""Progress that was reported longer ago is shown with its age."""


@dataclass(frozen=True)
class Problem:
    """Why a step failed."""

    error_class: str
    type: str
    message: str
    rank: int | None
    """The one that told it; None where workers were killed, or none had begun."""
    logs: list[str]
    """Where the output lies of the processes that failed."""


@dataclass(frozen=True)
class StepSummary:
    """A step of a run."""

    step: str
    status: str
    elapsed_s: float | None = None
    """Time that making its artifact took, in whichever run."""
    detail: str = ""
    artifact: str = ""
    """Path or URL of what was committed; before that, of the folder where it will be."""
    from_run: str = ""
    """The other run that made what this one found there."""
    progress: dict[str, Any] | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class RunSummary:
    """A run."""

    run_id: str
    workflow: str
    status: RunStatus
    attempts: int
    started_at: float | None
    ended_at: float | None
    """When the last attempt said that it had ended."""
    heartbeat_age_s: float | None
    """Since the coordinator was last heard of; None if none is at work."""
    detail: str
    """What has to be known with the status: before the first semicolon in a few words."""
    steps: list[StepSummary]

    @property
    def is_stale(self) -> bool:
        """Whether the coordinator was not heard of for so long that anybody may take over."""
        return self.heartbeat_age_s is not None and self.heartbeat_age_s > STALE_AFTER_S

    @property
    def error(self) -> tuple[str, Problem] | None:
        """The first step that failed, and why."""
        return next(((step.step, step.error) for step in self.steps if step.error is not None), None)

    @property
    def exit_code(self) -> int | None:
        """What a command that waits for the run ends with; None while there is something to wait for."""
        if self.status in ("submitted", "running"):
            return EXIT_INTERRUPTED if self.is_stale else None
        if self.status in ("succeeded", "partial"):
            return 0  # all that was asked for is there
        if self.status in ("stopped", "cancelled", "interrupted"):
            return EXIT_INTERRUPTED
        classes = {step.error.error_class for step in self.steps if step.error is not None}
        return EXIT_UNSCHEDULABLE if classes == {"unschedulable"} else EXIT_FAILED


def summary_json(summary: RunSummary) -> dict[str, Any]:
    """A summary for programs; the names and their meaning stay."""
    found = summary.error
    return {
        **{name: value for name, value in vars(summary).items() if name != "steps"},
        "exit_code": summary.exit_code,
        "error": None if found is None else {**_problem_json(found[1]), "step": found[0]},
        "steps": [
            {**vars(step), "error": None if step.error is None else _problem_json(step.error)} for step in summary.steps
        ],
    }


def _problem_json(problem: Problem) -> dict[str, Any]:
    return {"class": problem.error_class, **{k: v for k, v in vars(problem).items() if k != "error_class"}}


def read_events(run: RunPlace, known: dict[str, Event]) -> list[Event]:
    """All events in the order of attempts and sequence numbers; those that are known by name are not read again.

    Messages in them are for whoever looks: the secrets of this machine are replaced.
    """
    folder = run.directory / "events"
    names = folder.names()
    if new := [name for name in names if name not in known]:
        secrets = secret_values()
        for name in new:
            known[name] = json.loads(redacted(json.dumps(read_json(folder / name)), secrets))
    return [known[name] for name in names]


def summarise(store: Store, run: RunPlace, known: dict[str, Event] | None = None) -> RunSummary:
    """Status of a run and its steps.  A run whose coordinator is gone without a word is interrupted.

    ``known`` keeps the events from one call to the next.
    """
    plan = runs.frozen_plan(run)
    # The lease first: a run that ends in between has written its end before it gives the lease up.
    holder = find_holder(run.lease_dir)
    events = read_events(run, {} if known is None else known)
    started = [event for event in events if event["kind"] == "run_started"]
    ended = [event for event in events if event["kind"] == "run_ended"]
    attempt = started[-1]["attempt"] if started else 0
    status, detail = _run_status(run, holder, attempt, ended[-1] if ended else None)
    turns = functools.cache(lambda: [t for t in find_turns(run, [s.name for s in plan.steps]) if t.attempt == attempt])
    steps: dict[str, StepSummary] = {}
    for step in plan.steps:
        own = [event for event in events if event["step"] == step.name and event["kind"].startswith("step_")]
        steps[step.name] = _summarise_step(_Seen(store, run, plan, status, attempt, turns), step, own, steps)
    if status in (*UNFINISHED, "submitted") and all(_is_made(step) for step in steps.values()):
        status, detail = "succeeded", _finished_by(steps.values(), events)
    elif status == "partial":
        left_out = what_was_left_out([step.step for step in steps.values() if not _is_made(step)], len(steps))
        detail = "; ".join(filter(None, [left_out, detail]))
    age_s = holder.age_s if holder is not None and status == "running" else None
    return RunSummary(
        run_id=run.run_id,
        workflow=plan.workflow,
        status=status,
        attempts=len(started),
        started_at=started[0]["time"] if started else None,
        ended_at=ended[-1]["time"] if ended and status != "running" else None,
        heartbeat_age_s=age_s,
        detail=detail,
        steps=list(steps.values()),
    )


def summarise_or_say_why(store: Store, run: RunPlace) -> RunSummary:
    """A summary even of a run that cannot be read, for a list that must not stop there."""
    try:
        return summarise(store, run)
    except (CorruptionError, UserError) as error:
        problem = Problem(classify(error), type(error).__name__, str(error), None, [])
        step = StepSummary("", "damaged", detail=str(error), error=problem)
        return RunSummary(run.run_id, "", "damaged", 0, None, None, None, str(error), [step])


def _run_status(run: RunPlace, holder: Holder | None, attempt: int, ended: Event | None) -> tuple[RunStatus, str]:
    """Status and detail."""
    has_ended = ended is not None and ended["attempt"] == attempt
    age_s = None if holder is None else holder.age_s
    if age_s is not None and not (has_ended and age_s > STALE_AFTER_S):
        return "running", ""
    epoch = 0 if holder is None else holder.epoch
    if attempt > epoch:
        return "running", ""  # taken up since the lease was read
    job = last_submission(run)
    detail = ""
    if job is not None and job.attempt > epoch:  # no coordinator has come of it
        if not (how := end_of(run, job.job_id)):
            asked = f"dlm status {run.run_id} --address {job.address} asks there what has become of it"
            if was_taken(run, job.job_id):
                return "submitted", (
                    f"job {job.job_id} waits at {job.address}; it was handed over on {_when(job.time)} and has not "
                    f"begun; {asked}"
                )
            return "submitted", (
                f"job {job.job_id} is not known to be at {job.address}; handing it over began on {_when(job.time)}; "
                f"{asked}, and dlm resume {run.run_id} --address {job.address} hands it over, without starting a "
                "second one"
            )
        detail = f"job {job.job_id} ended before it began to work on it; {how}"
    if has_ended:
        assert ended is not None
        return ended["status"], detail
    if epoch or job is not None:
        return "interrupted", detail
    created_at = (run.directory / "run.json").modified()
    return "submitted", f"created on {_when(created_at)}; nobody has begun to work on it"


def _when(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s):%Y-%m-%d %H:%M}"


def what_was_left_out(steps: Sequence[str], num_steps: int) -> str:
    """Of a run that was asked for a part of its steps."""
    return f"{num_steps - len(steps)} of {num_steps} steps made, left out: {', '.join(steps)}"


def _is_made(step: StepSummary) -> bool:
    return step.status in ("committed", "cached")


def _finished_by(steps: Iterable[StepSummary], events: Sequence[Event]) -> str:
    """The other runs that made what this one did not come to."""
    found = {event["step"] for event in events if event["kind"] in ("step_cached", "step_committed")}
    others = sorted({step.from_run for step in steps if step.step not in found and step.from_run})
    return f"finished by {'run' if len(others) == 1 else 'runs'} {', '.join(others)}" if others else ""


@dataclass(frozen=True)
class _Seen:
    """What is known of the run while its steps are looked at."""

    store: Store
    run: RunPlace
    plan: Plan
    status: RunStatus
    attempt: int
    """The last one; 0 before the first."""
    turns: Callable[[], list[Turn]]
    """Of the last attempt."""


def _summarise_step(seen: _Seen, step: PlannedStep, own: list[Event], others: dict[str, StepSummary]) -> StepSummary:
    try:
        stage = load_stage(step.stage)
    except UserError as error:  # of a recipe of the user's own, looked at from elsewhere: the rest can be told
        return StepSummary(step.name, "unknown", detail=str(error))
    place = seen.store.artifact(stage.name, step.fingerprint)
    where = str(place.directory)
    try:
        committed = place.committed_manifest()
    except CorruptionError as error:
        return StepSummary(step.name, "damaged", detail=str(error), artifact=where)
    if committed is not None:
        attempt, manifest = committed
        made_by = place.made_by()
        if made_by == seen.run.run_id:
            return StepSummary(step.name, "committed", manifest.elapsed_s, artifact=str(attempt))
        return StepSummary(
            step.name, "cached", manifest.elapsed_s, f"from run {made_by}", str(attempt), from_run=made_by
        )
    last = own[-1] if own and own[-1]["attempt"] == seen.attempt else None
    if last is None:
        status, detail = _not_begun(seen, step, own, others)
        return StepSummary(step.name, status, detail=detail, artifact=where)
    if last["kind"] == "step_failed":
        problem = _problem(seen, step, last["failure"])
        return StepSummary(step.name, "failed", detail=problem.message, artifact=where, error=problem)
    if last["kind"] in ("step_cached", "step_committed"):
        return StepSummary(step.name, "pending", detail="its artifact was there and was deleted since", artifact=where)
    if last["kind"] in ("step_stopped", "step_skipped"):
        detail = last.get("message", "was not asked for")
        return StepSummary(step.name, last["kind"].removeprefix("step_"), detail=detail, artifact=where)
    if seen.status == "running":
        if last["kind"] == "step_retry":
            failure = last["failure"]
            words = failure_words(failure["type"], failure["message"])
            detail = f"again after {failure['error_class']} {failure['type']}: {words}"
            return StepSummary(step.name, "pending", detail=detail, artifact=where)
        if last["kind"] == "step_waiting" or (last["kind"] == "step_queued" and not _has_begun(seen, step, own)):
            return StepSummary(step.name, last["kind"].removeprefix("step_"), detail=last["reason"], artifact=where)
    progress = _latest_progress(seen, step)
    if seen.status == "running":
        return StepSummary(step.name, "running", detail=_told(progress or {}), artifact=where, progress=progress)
    return StepSummary(step.name, "interrupted", detail=_told(progress), artifact=where, progress=progress)


def _not_begun(seen: _Seen, step: PlannedStep, own: list[Event], others: dict[str, StepSummary]) -> tuple[str, str]:
    """Status and detail of a step that the last attempt did not come to."""
    sources = [others[source] for source in step.inputs.values()]
    if failed := [source.step for source in sources if source.status in ("failed", "blocked")]:
        return "blocked", f"needs {failed[0]}"
    if any(source.status == "skipped" for source in sources):
        return "skipped", "was not asked for, nor what it needs"
    if seen.status in ("stopped", "cancelled"):
        return "stopped", "the run was asked to stop"
    if not own:
        return "pending", ""
    what = {"step_failed": "failed", "step_stopped": "stopped"}.get(own[-1]["kind"], "begun")
    message = own[-1].get("failure", own[-1]).get("message", "")
    return "pending", f"{what} in attempt {own[-1]['attempt']}" + (f": {message}" if message else "")


def _has_begun(seen: _Seen, step: PlannedStep, own: list[Event]) -> bool:
    """Whether a call of the step runs that waited for a place before."""
    epoch = next((event["epoch"] for event in reversed(own) if event["kind"] == "step_started"), 0)
    turns = [turn for turn in seen.turns() if turn.step == step.name and turn.epoch == epoch]
    return any(turn.ranks("usage") and not turn.is_over for turn in turns)


def _problem(seen: _Seen, step: PlannedStep, failure: dict[str, Any]) -> Problem:
    """The failure with its logs: of the rank that told it, or of all ranks of a turn that was killed."""
    own = [turn for turn in seen.turns() if turn.step == step.name]
    made_good = {turn.call for turn in own if turn.is_done}
    logs: list[str] = []
    rank: int | None = None
    for turn in own:
        if _has_told(turn, failure):
            rank = failure["rank"]
            logs = [str(turn.log(failure["rank"]))]
            break
        if turn.call not in made_good:
            logs = [str(turn.log(rank)) for rank in turn.ranks("rank")]
    return Problem(failure["error_class"], failure["type"], failure["message"], rank, logs)


def _has_told(turn: Turn, failure: dict[str, Any]) -> bool:
    """Whether it is this failure that was written down there."""
    rank = failure["rank"]
    if rank not in turn.ranks("failure"):
        return False
    return read_json(turn.folder / f"failure-{rank}.json")["time"] == failure["time"]


def _latest_progress(seen: _Seen, step: PlannedStep) -> dict[str, Any] | None:
    """What was last reported of a step; of a map step, how many of its shards are committed."""
    turns = [turn for turn in seen.turns() if turn.step == step.name]
    stage = load_stage(step.stage)
    if stage.kind == "map":
        listed = [turn for turn in turns if turn.call == f"{step.name}-list" and turn.is_done]
        if not listed:
            return None
        total = len(read_json(listed[-1].folder / "done.json"))
        done = len((seen.store.artifact(stage.name, step.fingerprint).directory / "shards").names())
        return {"done": done, "total": total, "figures": {}, "time": time.time()}
    reported = [turn for turn in turns if "progress.json" in turn.files]
    return read_json(reported[-1].folder / "progress.json") if reported else None


def _told(progress: dict[str, Any] | None) -> str:
    if progress is None:
        return ""
    age_s = time.time() - progress.get("time", time.time())
    old = [f"({age_s / 60:.0f} min ago)"] if age_s > _OLD_S else []
    return "  ".join([*progress_words(progress), *old])
