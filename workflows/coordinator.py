"""Runs a frozen plan: starts what is ready, commits what is done, retries what may be retried.

A single-threaded loop over an executor and the store.  It holds no truth: started again, it reads the commits and
goes on.
"""

import dataclasses
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.executor import Call, Ended, Executor
from pipeline.artifact import read_json
from pipeline.config import to_json
from pipeline.errors import CorruptionError, ErrorClass, LeaseLostError, UserError, classify
from pipeline.stage import Shard, fault_of_shards, shard_fingerprint
from workflows.plan import Plan, PlannedStep, step_config
from workflows.shards import FanOut, ShardRegistry
from workflows.step import load_stage
from workflows.store import (
    HEARTBEAT_S,
    ArtifactPlace,
    EventLog,
    Lease,
    LeaseHeldError,
    RunPlace,
    Store,
    acquire_lease,
)
from workflows.worker import Failure, Piece, first_failure, last_words

StepStatus = Literal["pending", "waiting", "running", "committed", "cached", "failed", "blocked", "stopped"]

RETRIES: Mapping[ErrorClass, int] = {"transient": 5, "infra": 20, "memory": 1}
"""Attempts after the first, by error class; the classes that are not named are not retried."""
_POISON_FAILURES = 3
"""Failures of one shard, or of a step at the same point, after which trying again is given up, whatever the class."""
_FINAL: frozenset[ErrorClass] = frozenset({"user", "numerics", "stopped"})
"""Classes of which one failure of one shard ends the step."""
_SAME_POINT_SHARE = 0.01
"""Progress is reported now and then: points this share of the whole apart count as the same."""
_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 60.0
_POLL_S = 0.25
_COMMIT_FOR_S = 1.0
"""Longest time that the loop spends on committing what was taken over before it looks at other things."""
_CALLS_PER_CORE = 2
_SPARE_CALLS = 2
"""Shards of a step that the executor is given at a time: enough to keep it busy, few enough to be forgotten."""
_WORKER = "workflows.worker:run_piece"


@dataclass
class StepState:
    """Where a step stands; rebuilt from the store whenever a coordinator starts."""

    step: PlannedStep
    status: StepStatus = "pending"
    reason: str = ""
    output: Path | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict[str, Any])
    first_progress: tuple[float, float] | None = None
    """Time and count of the first report of this attempt, from which the rate is told."""
    failure: Failure | None = None
    lease: Lease | None = None
    attempt: Path | None = None
    pieces: dict[str, Piece] = field(default_factory=dict[str, Piece])
    """Calls in flight, by key."""
    fan_out: FanOut | None = None
    """Of a map step, once its shards are known."""
    shard_failures: dict[str, int] = field(default_factory=dict[str, int])
    """By name, over all attempts of the step in this run attempt."""
    failures_by_class: dict[str, int] = field(default_factory=dict[str, int])
    retry_at_s: float = 0.0
    last_done: float = 0.0
    failed_at: list[float] = field(default_factory=list[float])
    """How far each failed attempt had come."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ("committed", "cached", "failed", "blocked", "stopped")


class Coordinator:
    """Drives the steps of one run attempt."""

    def __init__(
        self,
        store: Store,
        run: RunPlace,
        plan: Plan,
        make_executor: Callable[[], Executor],
        on_change: Callable[[list[StepState]], None],
    ) -> None:
        self._store, self._run, self._plan = store, run, plan
        self._make_executor, self._executor = make_executor, None
        self._on_change = on_change
        self._run_lease = acquire_lease(run.lease_dir, f"run {run.run_id}")
        self.attempt = self._run_lease.epoch
        self.events = EventLog(run, self.attempt)
        self.states = {step.name: StepState(step) for step in plan.steps}
        self._next_heartbeat_s = 0.0
        run.cancel_file.unlink(missing_ok=True)

    def run(self) -> list[StepState]:
        """Go on until every step is over; the executor is closed and the leases released in any case."""
        self.events.write("run_started")
        try:
            while not all(state.is_over for state in self.states.values()):
                self._heartbeat()
                self._advance()
                self._on_change(list(self.states.values()))
                if self._executor is not None:
                    for ended in self._executor.wait(0.0 if self._has_adopted() else _POLL_S):
                        self._finished(ended)
                elif any(state.status == "waiting" for state in self.states.values()):
                    time.sleep(_POLL_S)
            self.events.write("run_ended", status=self.status)
            self._on_change(list(self.states.values()))
        finally:
            if self._executor is not None:
                self._executor.close()
            for state in self.states.values():
                if state.fan_out is not None:
                    state.fan_out.close()
                if state.lease is not None:
                    state.lease.release()
            self._run_lease.release()
        return list(self.states.values())

    @property
    def status(self) -> str:
        """The run as a whole."""
        statuses = {state.status for state in self.states.values()}
        if "failed" in statuses:
            return "failed"
        return "stopped" if "stopped" in statuses else "succeeded"

    def request_stop(self) -> None:
        """Ask every stage to save and stop."""
        self._run.cancel_file.touch()

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now < self._next_heartbeat_s:
            return
        self._next_heartbeat_s = now + HEARTBEAT_S
        self._run_lease.heartbeat()
        for state in self.states.values():
            if state.lease is not None:
                state.lease.heartbeat()

    def _place(self, state: StepState) -> ArtifactPlace:
        return self._store.artifact(load_stage(state.step.stage).name, state.step.fingerprint)

    def _advance(self) -> None:
        stopping = self._run.cancel_file.exists()
        for state in self.states.values():
            if state.status in ("pending", "waiting") and (stopping or time.monotonic() >= state.retry_at_s):
                self._consider(state)
            elif state.fan_out is not None:
                self._or_fail(state, lambda state=state: self._feed(state))
            elif state.status == "running":
                self._read_progress(state)

    def _consider(self, state: StepState) -> None:
        """Start a step if its inputs are there, nobody else builds it and nobody has built it."""
        sources = [self.states[name] for name in state.step.inputs.values()]
        if any(source.status in ("failed", "blocked") for source in sources):
            failed = next(s for s in sources if s.status in ("failed", "blocked"))
            state.status, state.reason = "blocked", f"needs {failed.step.name}"
            return
        if self._run.cancel_file.exists() or any(source.status == "stopped" for source in sources):
            state.status, state.reason = "stopped", "the run was asked to stop"
            return
        if any(source.output is None for source in sources):
            return
        place = self._place(state)
        try:
            committed = place.committed()
        except CorruptionError as error:
            self._fail(state, Failure("code", "CorruptionError", str(error), "", 0, time.time()))
            return
        if committed is not None:
            state.status, state.output = "cached", committed
            self.events.write("step_cached", state.step.name, artifact=place.directory.name)
            return
        try:
            state.lease = acquire_lease(place.lease_dir, f"run {self._run.run_id}, step {state.step.name}")
        except LeaseHeldError as error:
            if state.status != "waiting":
                self.events.write("step_waiting", state.step.name, reason=str(error))
            state.status, state.reason = "waiting", str(error)
            return
        if self._executor is None:
            self._executor = self._make_executor()
        self._or_fail(state, lambda: self._start(state, place))

    def _start(self, state: StepState, place: ArtifactPlace) -> None:
        assert state.lease is not None
        place.state.mkdir(parents=True, exist_ok=True)
        state.attempt = place.new_attempt(state.lease)
        state.status, state.reason, state.progress, state.first_progress = "running", "", {}, None
        state.started_at = state.started_at or time.time()
        self.events.write("step_started", state.step.name, artifact=place.directory.name, epoch=state.lease.epoch)
        is_map = load_stage(state.step.stage).kind == "map"
        self._call(state, "list" if is_map else "whole", state.attempt)

    def _call(
        self,
        state: StepState,
        what: Literal["whole", "list", "shard", "finish"],
        out: Path,
        shard: Shard | None = None,
        shard_dirs: list[str] | None = None,
    ) -> None:
        assert state.lease is not None
        assert self._executor is not None
        stage, step = load_stage(state.step.stage), state.step
        name = f"{step.name}-{shard['name']}" if shard else step.name if what == "whole" else f"{step.name}-{what}"
        failures = state.shard_failures.get(shard["name"], 0) if shard else 0
        turn = f"{state.lease.epoch:06d}" + (f"-{failures + 1}" if failures else "")
        work_dir = self._run.work_dir(self.attempt, name) / turn
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        piece = Piece(
            what=what,
            stage=step.stage,
            step=step.name,
            config=step.config,
            inputs={name: str(self.states[source].output) for name, source in step.inputs.items()},
            out=str(out),
            state=str(self._place(state).state),
            work_dir=str(work_dir),
            fingerprint=step.fingerprint,
            run_id=self._run.run_id,
            lease_dir=str(state.lease.directory),
            lease_epoch=state.lease.epoch,
            cancel_file=str(self._run.cancel_file),
            external=step.external,
            shard=shard or {},
            shard_dirs=shard_dirs or [],
            started_at=state.started_at,
        )
        gang_size = step_config(step).workers if stage.kind == "gang" else 0
        # Shards fill all cores together; a step that runs as a whole may use those that nobody else does.
        env = {"OMP_NUM_THREADS": str(math.ceil(stage.cpus))} if shard else {}
        call = Call(f"{name}@{turn}", _WORKER, to_json(piece), work_dir, stage.cpus, gang_size, env)
        state.pieces[call.key] = piece
        self._executor.start(call)

    def _start_shards(self, state: StepState, shards: list[Shard]) -> None:
        """Find out which shards are committed here, which in another artifact of the stage, and which must run."""
        assert state.lease is not None
        stage, config = load_stage(state.step.stage), step_config(state.step)
        state.lease.check()
        committed = self._place(state).kept_shards(shards)
        missing = [shard for shard in shards if shard["name"] not in committed]
        own = {s["name"]: shard_fingerprint(stage, config, s) for s in missing if "identity" in s}
        state.fan_out = FanOut(shards, committed, own, deque(missing))
        if own:
            registry = ShardRegistry(self._store, stage)
            state.fan_out.adopt(registry, config, state.step.fingerprint, self._shards_dir(state, "adopted"))
        state.progress = {"done": len(committed), "total": len(shards)}
        self._feed(state)

    def _shards_dir(self, state: StepState, suffix: str) -> Path:
        """Directory beside the attempt, for shards of the attempt."""
        assert state.attempt is not None
        return state.attempt.with_name(f"{state.attempt.name}-shards-{suffix}")

    def _has_adopted(self) -> bool:
        return any(state.fan_out is not None and state.fan_out.has_adopted for state in self.states.values())

    def _feed(self, state: StepState) -> None:
        """Commit shards that were taken over, start as many as may run, and finish after the last."""
        fan_out = state.fan_out
        assert fan_out is not None
        assert self._executor is not None
        if self._run.cancel_file.exists():
            self._stop_adopting(state, fan_out)
            if not state.pieces:
                message = "the run was asked to stop"
                self._attempt_failed(state, Failure("stopped", "Stopped", message, "", 0, time.time()))
            return
        self._commit_adopted(state, fan_out)
        stage = load_stage(state.step.stage)
        at_most = int(_CALLS_PER_CORE * self._executor.num_cpus / (stage.cpus or 1.0)) + _SPARE_CALLS
        while len(state.pieces) < at_most and (shard := fan_out.next_shard(time.monotonic())) is not None:
            out = self._shards_dir(state, str(state.shard_failures.get(shard["name"], 0) + 1)) / shard["name"]
            out.mkdir(parents=True)
            self._call(state, "shard", out, shard)
        if fan_out.is_complete and not state.pieces:
            shard_dirs = [str(fan_out.committed[shard["name"]]) for shard in fan_out.shards]
            assert state.attempt is not None
            self._call(state, "finish", state.attempt, shard_dirs=shard_dirs)

    def _commit_adopted(self, state: StepState, fan_out: FanOut) -> None:
        if not fan_out.is_adopting:
            return
        until_s = time.monotonic() + _COMMIT_FOR_S
        while time.monotonic() < until_s and (taken := fan_out.take_adopted()) is not None:
            self._commit_shard(state, *taken)
            fan_out.num_adopted += 1
        if not fan_out.is_adopting:
            self._report_adopted(state, fan_out)

    def _stop_adopting(self, state: StepState, fan_out: FanOut) -> None:
        if fan_out.is_adopting:
            fan_out.close()
            self._report_adopted(state, fan_out)

    def _report_adopted(self, state: StepState, fan_out: FanOut) -> None:
        refused = {"refused": len(fan_out.refused), "reason": fan_out.refused[0]} if fan_out.refused else {}
        self.events.write("shards_adopted", state.step.name, adopted=fan_out.num_adopted, **refused)

    def _commit_shard(self, state: StepState, shard: Shard, directory: Path) -> None:
        assert state.fan_out is not None
        assert state.lease is not None
        state.fan_out.committed[shard["name"]] = self._place(state).commit_shard(shard["name"], directory, state.lease)
        state.progress["done"] = len(state.fan_out.committed)

    def _or_fail(self, state: StepState, action: Callable[[], None]) -> None:
        """Do something for an attempt, which fails if that does."""
        try:
            action()
        except (LeaseLostError, CorruptionError, UserError, OSError) as error:
            failure = Failure(classify(error), type(error).__name__, str(error), "", 0, time.time())
            self._attempt_failed(state, failure)

    def _finished(self, ended: Ended) -> None:
        """One call is over: what it left on disk says how."""
        state = next((s for s in self.states.values() if ended.key in s.pieces), None)
        if state is None:
            return
        self._read_progress(state)  # of a piece that died between two looks at it
        piece = state.pieces.pop(ended.key)
        if (Path(piece.work_dir) / "done.json").exists():
            self._or_fail(state, lambda: self._piece_done(state, piece, ended))
        else:
            self._piece_failed(state, piece, ended)

    def _piece_done(self, state: StepState, piece: Piece, ended: Ended) -> None:
        place = self._place(state)
        assert state.lease is not None
        assert state.attempt is not None
        if piece.what == "list":
            self._start_shards(state, _read_shards(Path(piece.work_dir) / "done.json"))
        elif piece.what == "shard":
            assert state.fan_out is not None
            shard, directory = piece.shard, Path(piece.out)
            if (fingerprint := state.fan_out.fingerprints.get(shard["name"])) is not None:
                # Before the commit: killed between the two, the next attempt takes the shard over from this one.
                ShardRegistry(self._store, load_stage(piece.stage)).register(fingerprint, place, directory)
            self._commit_shard(state, shard, directory)
            self._feed(state)
        else:
            state.output = place.commit(state.attempt, state.lease, self._run.run_id)
            state.status, state.ended_at, state.fan_out = "committed", time.time(), None
            state.lease.release()
            state.lease = None
            elapsed_s = state.ended_at - state.started_at
            self.events.write("step_committed", state.step.name, elapsed_s=elapsed_s)
            if ended.failure:
                self.events.write("step_warning", state.step.name, message=f"after its end: {ended.failure}")

    def _piece_failed(self, state: StepState, piece: Piece, ended: Ended) -> None:
        failure = first_failure(Path(piece.work_dir))
        if failure is None or (ended.killed and failure.error_class == "code"):
            # A rank that was killed leaves nothing; its peers then fail over a lost connection.
            message = ended.failure or "the worker left without a result"
            failure = Failure("infra", "WorkerDied", message, last_words(Path(piece.work_dir)), 0, time.time())
        if piece.what == "shard" and failure.type != LeaseLostError.__name__:
            self._shard_failed(state, piece, failure)
        else:
            self._attempt_failed(state, failure)

    def _shard_failed(self, state: StepState, piece: Piece, failure: Failure) -> None:
        """Try one shard again while the others go on; the last failure that is let pass ends the step."""
        assert state.fan_out is not None
        shutil.rmtree(piece.out, ignore_errors=True)
        name = piece.shard["name"]
        count = state.shard_failures[name] = state.shard_failures.get(name, 0) + 1
        is_final = failure.error_class in _FINAL or failure.type == CorruptionError.__name__
        if is_final or count >= _POISON_FAILURES:
            times = "" if is_final else f" failed {count} times"
            failure = dataclasses.replace(failure, message=f"shard {name}{times}: {failure.message}")
            self._abandon(state)
            self._stopped(state, failure) if failure.error_class == "stopped" else self._fail(state, failure)
            return
        backoff_s = _backoff_s(count)
        state.fan_out.delayed.append((time.monotonic() + backoff_s, piece.shard))
        self.events.write("shard_retry", state.step.name, shard=name, failure=to_json(failure), backoff_s=backoff_s)

    def _attempt_failed(self, state: StepState, failure: Failure) -> None:
        """Stop what is left of an attempt; try again where its class of error allows."""
        self._abandon(state)
        if failure.error_class == "stopped" or (self._run.cancel_file.exists() and failure.error_class == "infra"):
            self._stopped(state, failure)
            return
        if (done := float(state.progress.get("done", 0))) > state.last_done:
            state.failures_by_class.clear()
            state.last_done = done
        state.failed_at.append(done)
        last = state.failed_at[-_POISON_FAILURES:]
        near = _SAME_POINT_SHARE * float(state.progress.get("total", 0))
        if done > 0 and len(last) == _POISON_FAILURES and max(last) - min(last) <= near:
            message = f"failed {_POISON_FAILURES} times at the same point ({done:g} done): {failure.message}"
            self._fail(state, dataclasses.replace(failure, message=message))
            return
        count = state.failures_by_class.get(failure.error_class, 0) + 1
        state.failures_by_class[failure.error_class] = count
        if count > RETRIES.get(failure.error_class, 0):
            self._fail(state, failure)
            return
        backoff_s = _backoff_s(count)
        state.status, state.reason = "pending", f"retry {count} after {failure.type}: {failure.message}"
        state.retry_at_s = time.monotonic() + backoff_s
        self.events.write("step_retry", state.step.name, failure=to_json(failure), backoff_s=backoff_s)

    def _abandon(self, state: StepState) -> None:
        """Stop what is left of an attempt; the shards that it committed stay."""
        assert self._executor is not None
        self._executor.cancel(*state.pieces)
        state.pieces.clear()
        if state.fan_out is not None:
            self._stop_adopting(state, state.fan_out)
            state.fan_out = None
        if state.lease is not None:
            state.lease.release()
            state.lease = None

    def _stopped(self, state: StepState, failure: Failure) -> None:
        state.status, state.reason = "stopped", failure.message
        self.events.write("step_stopped", state.step.name, message=failure.message)

    def _fail(self, state: StepState, failure: Failure) -> None:
        state.status, state.failure, state.reason = "failed", failure, failure.message
        state.ended_at = time.time()
        if state.lease is not None:
            state.lease.release()
            state.lease = None
        self.events.write("step_failed", state.step.name, failure=to_json(failure))

    def _read_progress(self, state: StepState) -> None:
        if state.fan_out is not None:
            return
        for piece in state.pieces.values():
            path = Path(piece.work_dir) / "progress.json"
            if path.exists():
                state.progress = read_json(path)
                if state.first_progress is None:
                    state.first_progress = (state.progress["time"], state.progress["done"])


def _read_shards(path: Path) -> list[Shard]:
    """The shards that a worker has listed; CorruptionError if that is not what the file holds."""
    try:
        shards = read_json(path)
        if fault := fault_of_shards(shards):
            raise CorruptionError(f"{path}: {fault}")
    except CorruptionError as error:
        raise CorruptionError(
            f"{error}. Delete {path.parent} and resume the run, which lists the shards anew"
        ) from None
    return shards


def _backoff_s(failures: int) -> float:
    return min(_MAX_BACKOFF_S, _BACKOFF_S * 2 ** (failures - 1))
