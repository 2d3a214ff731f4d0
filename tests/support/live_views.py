"""What the page of a run is made from, made up."""

from typing import Any

from workflows.live.history import Event, tell
from workflows.live.snapshot import Snapshot, StepView
from workflows.plan import PlannedStep

FAILURE = {
    "error_class": "infra", "type": "WorkerDied", "message": "gone", "traceback": "last words", "rank": 1, "time": 0.0,
}  # fmt: skip


def event(time_s: float, kind: str, step: str = "", attempt: int = 1, **details: Any) -> Event:
    return {"time": time_s, "attempt": attempt, "kind": kind, "step": step, **details}


def step_view(name: str, status: str = "committed", inputs: dict[str, str] | None = None) -> StepView:
    planned = PlannedStep(name, "pipeline.corpus", {}, inputs or {}, 1, None, "f" * 64)
    return StepView(name, "corpus", status, "", 0.0, 0.0, 0.0, 0.0, "corpus/ffffffffffff", planned)


def snapshot(steps: list[StepView], events: list[Event], status: str = "running", **changes: Any) -> Snapshot:
    history = tell(events, status == "running", 1000.0)
    head = ("r1", "toy", status, 1.7e9, "/store")
    return Snapshot(
        *head, facts={}, environment={}, steps=tuple(steps), history=history, events=tuple(events), **changes
    )
