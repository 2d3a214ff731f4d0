"""What happened in a run, told from its events: attempts of steps, failures and what followed them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from workflows.cost import Cost

Event = Mapping[str, Any]
Outcome = Literal["running", "committed", "failed", "tried again", "stopped", "killed"]

_ENDS: Mapping[str, Outcome] = {
    "step_committed": "committed",
    "step_failed": "failed",
    "step_retry": "tried again",
    "step_stopped": "stopped",
}
"""Kinds of events that end an attempt of a step."""
_FAILURES = ("step_failed", "step_retry", "shard_retry")


@dataclass(frozen=True)
class Session:
    """One attempt of the run: the life of one coordinator."""

    attempt: int
    start_s: float
    end_s: float
    """The last that is known of it."""
    outcome: str
    """running, killed, or what the coordinator said at its end."""
    about: str = ""
    """Where it ran, in words."""


@dataclass(frozen=True)
class Span:
    """One attempt of a step."""

    step: str
    attempt: int
    """Of the run."""
    epoch: int
    """Of the lease on the artifact; names the folders of its reports."""
    start_s: float
    end_s: float
    outcome: Outcome
    failure: str = ""


@dataclass(frozen=True)
class Trouble:
    """Failures of a step that are alike, told once."""

    step: str
    error_class: str
    kind: str
    message: str
    traceback: str
    shards: tuple[str, ...]
    attempt: int
    """Of the run, of the last of them."""
    epoch: int
    rank: int
    time_s: float
    count: int
    after: str
    """What followed the last of them."""


@dataclass(frozen=True)
class History:
    """All that the events tell, in their order."""

    sessions: tuple[Session, ...] = ()
    spans: tuple[Span, ...] = ()
    troubles: tuple[Trouble, ...] = ()
    """The latest last."""
    warnings: tuple[str, ...] = ()

    @cached_property
    def _by_step(self) -> Mapping[str, Sequence[Span]]:
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.step, []).append(span)
        return found

    def spans_of(self, step: str) -> Sequence[Span]:
        """Attempts of one step, in their order."""
        return self._by_step.get(step, ())


def tell(events: Sequence[Event], is_alive: bool, now_s: float) -> History:
    """The history of a run; while its coordinator is alive, what has not ended goes on until now."""
    sessions = _sessions(events, is_alive, now_s)
    warned = [event for event in events if event["kind"] in ("step_warning", "run_warning")]
    warnings = tuple(f"{event['step'] or 'the run'}: {event['message']}" for event in warned)
    return History(sessions, _spans(events, {s.attempt: s for s in sessions}), _troubles(events), warnings)


def _sessions(events: Sequence[Event], is_alive: bool, now_s: float) -> tuple[Session, ...]:
    found: dict[int, Session] = {}
    for event in events:
        attempt = event["attempt"]
        session = found.get(attempt, Session(attempt, event["time"], event["time"], "killed"))
        outcome = event["status"] if event["kind"] == "run_ended" else session.outcome
        about = _about(event) if event["kind"] == "run_started" else session.about
        found[attempt] = replace(session, end_s=max(session.end_s, event["time"]), outcome=outcome, about=about)
    if found and is_alive:
        last = found[max(found)]
        if last.outcome == "killed":
            found[last.attempt] = replace(last, end_s=now_s, outcome="running")
    return tuple(found[attempt] for attempt in sorted(found))


def _about(event: Event) -> str:
    told = {key: value for key, value in event.items() if key not in ("time", "attempt", "kind", "step")}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value)


def _spans(events: Sequence[Event], sessions: Mapping[int, Session]) -> tuple[Span, ...]:
    spans: list[Span] = []
    open_at: dict[tuple[int, str], int] = {}
    for event in events:
        key = event["attempt"], event["step"]
        if event["kind"] == "step_started":
            session = sessions[event["attempt"]]
            outcome: Outcome = "running" if session.outcome == "running" else "killed"
            open_at[key] = len(spans)
            start_s = event["time"]
            spans.append(Span(event["step"], event["attempt"], event["epoch"], start_s, session.end_s, outcome))
        elif event["kind"] in _ENDS and (place := open_at.pop(key, None)) is not None:
            said = event["failure"]["message"] if "failure" in event else str(event.get("message", ""))
            spans[place] = replace(spans[place], end_s=event["time"], outcome=_ENDS[event["kind"]], failure=said)
    return tuple(spans)


def _troubles(events: Sequence[Event]) -> tuple[Trouble, ...]:
    """Alike are failures of one step with the same class, type and message; of shards, whatever their names."""
    found: dict[tuple[str, ...], Trouble] = {}
    shards: dict[tuple[str, ...], dict[str, None]] = {}
    epochs: dict[str, int] = {}
    for event in events:
        step = event["step"]
        if event["kind"] == "step_started":
            epochs[step] = event["epoch"]
        if event["kind"] not in _FAILURES:
            continue
        failure = event["failure"]
        key = step, failure["error_class"], failure["type"], failure["message"], event["kind"][:5]
        before = found.pop(key, None)  # put in again at the end: the latest is last
        if "shard" in event:
            shards.setdefault(key, {})[event["shard"]] = None
        found[key] = Trouble(
            step=step,
            error_class=failure["error_class"],
            kind=failure["type"],
            message=failure["message"],
            traceback=failure["traceback"],
            shards=(),
            attempt=event["attempt"],
            epoch=epochs.get(step, 0),
            rank=failure["rank"],
            time_s=event["time"],
            count=1 + (before.count if before else 0),
            after=_after(event),
        )
    return tuple(replace(trouble, shards=tuple(shards.get(key, ()))) for key, trouble in found.items())


def _after(event: Event) -> str:
    if event["kind"] == "step_failed":
        return "the step was given up"
    what = "the shard" if event["kind"] == "shard_retry" else "the step"
    return f"{what} was tried again after {event['backoff_s']:.1f} s"


@dataclass(frozen=True)
class Costs:
    """What a run used, as far as it has been read."""

    of: Mapping[tuple[int, str], Cost] = field(default_factory=dict[tuple[int, str], Cost])
    """(attempt of the run, step) -> cost."""
    last_sign_s: Mapping[tuple[int, str, int], float] = field(default_factory=dict[tuple[int, str, int], float])
    """(attempt, step, epoch) -> seconds after its start at which the last process of it was seen."""
    num_unread: int = 0
    """Calls whose records wait for the next time."""


def with_last_signs(history: History, costs: Costs) -> History:
    """The history with attempts that were killed ending when their processes were last seen, not when others were."""
    spans = tuple(
        replace(span, end_s=span.start_s + sign_s)
        if span.outcome == "killed" and (sign_s := costs.last_sign_s.get((span.attempt, span.step, span.epoch)))
        else span
        for span in history.spans
    )
    ends: dict[int, float] = {}
    for span in spans:
        ends[span.attempt] = max(span.end_s, ends.get(span.attempt, 0.0))
    sessions = tuple(
        replace(session, end_s=max(session.end_s, ends.get(session.attempt, 0.0)))
        if session.outcome == "killed"
        else session
        for session in history.sessions
    )
    return replace(history, spans=spans, sessions=sessions)
