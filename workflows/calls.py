"""The calls by which steps are worked on: what a worker is told, and how long it may wait for a place to run."""

import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cluster.executor import Call, Executor
from pipeline.config import to_json
from pipeline.stage import Shard
from pipeline.storage import Place
from workflows.copies import scratch
from workflows.plan import gang_sizes, step_config
from workflows.state import Flight, StepState
from workflows.step import load_stage
from workflows.store import ArtifactPlace, EventLog, RunPlace, Store
from workflows.worker import ON_GPUS, Piece

_WORKER = "workflows.worker:run_piece"
_SHOWN_AFTER_S = 5.0
"""A call that waits for so long is told to be queued: the process of one that need not wait takes seconds to start."""


@dataclass(frozen=True)
class Site:
    """What the calls of a run attempt have in common."""

    store: Store
    store_id: str
    run: RunPlace
    attempt: int

    def flight(
        self,
        state: StepState,
        what: Literal["whole", "list", "shard", "finish"],
        out: Place,
        shard: Shard | None = None,
        shard_dirs: Iterable[Place] = (),
        turn: int = 1,
    ) -> Flight:
        """A call for a step that holds its lease, ready to be given to the executor; its reports begin empty.

        ``turn`` counts the starts of a shard: each has a name of its own.
        """
        assert state.lease is not None
        stage, step = load_stage(state.step.stage), state.step
        name = f"{step.name}-{shard['name']}" if shard else step.name if what == "whole" else f"{step.name}-{what}"
        label = f"{state.lease.epoch:06d}" + (f"-{turn}" if turn > 1 else "")
        work = self.run.work_dir(self.attempt, name) / label
        log_dir = work.path if work.is_local else scratch(work)
        if work.is_local:
            shutil.rmtree(log_dir, ignore_errors=True)
            log_dir.mkdir(parents=True)
        piece = Piece(
            what=what,
            stage=step.stage,
            step=step.name,
            config=step.config,
            store=self.store.url,
            store_id=self.store_id,
            inputs={name: place.key for name, place in state.inputs.items()},
            out=out.key,
            state=self.place(state).state.key,
            work=work.key,
            log_dir=str(log_dir),
            fingerprint=step.fingerprint,
            run_id=self.run.run_id,
            lease=state.lease.folder.key,
            lease_epoch=state.lease.epoch,
            lease_token=state.lease.token,
            cancel=self.run.cancel_file.key,
            external=step.external,
            shard=shard or {},
            shard_dirs=[directory.key for directory in shard_dirs],
            started_at=state.started_at,
        )
        config = step_config(step)
        sizes = gang_sizes(stage, config)
        # Shards fill all cores together; a step that runs as a whole may use those that nobody else does.
        env = {"OMP_NUM_THREADS": str(math.ceil(stage.cpus))} if shard else {}
        wants_gpus = getattr(config, "requires_gpus", False) or (
            bool(sizes) and (self.place(state).directory / ON_GPUS).exists()
        )
        gpus = getattr(config, "gpus", 0.0) if shard else 0.0
        call = Call(f"{name}@{label}", _WORKER, to_json(piece), log_dir, stage.cpus, sizes, env, wants_gpus, gpus)
        return Flight(call, piece, work)

    def place(self, state: StepState) -> ArtifactPlace:
        """Where the artifact of a step lies or will lie."""
        return self.store.artifact(load_stage(state.step.stage).name, state.step.fingerprint)


def bring_logs(flight: Flight) -> None:
    """Copy to an object store what this machine has of a call's output that its worker has not brought itself."""
    if flight.work.is_local:
        return
    there = flight.work.sizes()
    for log in flight.call.log_dir.glob("*.log"):
        if there.get(log.name) != log.stat().st_size:
            flight.work.storage.upload(log, f"{flight.work.key}/{log.name}")


class Queue:
    """How long the calls of a run have waited for a place, and why."""

    def __init__(self, executor: Executor, timeout_s: float, events: EventLog) -> None:
        self._executor, self._timeout_s, self._events = executor, timeout_s, events
        self._idle_since_s = time.monotonic()
        self._next_look_s = 0.0

    def look(self, states: Iterable[StepState]) -> list[tuple[StepState, str]]:
        """Note which calls have begun; the steps that have waited for too long, and for what.

        What the whole place does not have is waited for from the beginning; what others of it hold, for as long as no
        call of this run has any of it.
        """
        now = time.monotonic()
        flights = [(state, flight) for state in states for flight in state.flights.values()]
        waiting = [(state, flight) for state, flight in flights if not flight.has_begun]
        if len(waiting) < len(flights):
            self._idle_since_s = now
        if not waiting or now < self._next_look_s:
            return []
        self._next_look_s = now + waiting[0][1].work.storage.poll_s
        overdue: dict[str, tuple[StepState, str]] = {}
        for state, flight in waiting:
            flight.has_begun = any(name.startswith("usage-") for name in flight.work.names())
            if flight.has_begun or now - flight.given_at_s < _SHOWN_AFTER_S:
                continue
            shortage = self._executor.shortage(flight.call)
            if shortage is None:  # it is being started, and holds what the others wait for
                self._idle_since_s = now
                continue
            if not any(other.has_begun for other in state.flights.values()):
                if state.status != "queued":
                    self._events.note("step_queued", state.step.name, reason=shortage.reason)
                state.status, state.reason = "queued", shortage.reason
            since_s = flight.given_at_s if shortage.is_beyond else max(flight.given_at_s, self._idle_since_s)
            limit_s = 0.0 if shortage.is_beyond and not self._executor.may_grow else self._timeout_s
            if now - since_s >= limit_s:
                overdue[state.step.name] = (state, f"{shortage.reason}{_remedy(state, flight)}")
        for state, flight in flights:
            if flight.has_begun and state.status == "queued":
                state.status, state.reason = "running", ""
        return list(overdue.values())


def _remedy(state: StepState, flight: Flight) -> str:
    """What to set so that a gang asks for less."""
    name, config = state.step.name, state.step.config
    options = [
        f"{name}.{field}={value}" for field, value in (("workers", "N"), ("min_workers", "1")) if field in config
    ]
    return f". Set {' or '.join(options)}" if len(flight.call.gang_sizes) == 1 and options else ""
