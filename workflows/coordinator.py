"""Runs a frozen plan: starts what is ready, commits what is done, retries what may be retried.

A single-threaded loop over an executor and the store.  It holds no truth: started again, it reads the commits and
goes on.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from cluster.executor import Ended, Executor
from pipeline.artifact import read_json
from pipeline.config import to_json
from pipeline.errors import CorruptionError, ErrorClass, LeaseLostError, UserError, classify
from pipeline.stage import Shard, fault_of_shards, shard_fingerprint
from pipeline.storage import Place
from workflows.calls import Queue, Site, bring_logs
from workflows.cancel import CancelFile
from workflows.lease import Beating, LeaseHeldError, Patience, acquire_lease
from workflows.plan import Plan, step_config
from workflows.shards import FanOut, ShardRegistry
from workflows.state import ACTIVE, Flight, StepState
from workflows.step import load_stage
from workflows.store import ArtifactPlace, EventLog, RunPlace, Store
from workflows.worker import PREEMPTED, Failure, first_failure, last_words

_POLL_S = 0.25
_COMMIT_FOR_S = 1.0
"""Longest time that the loop spends on committing what was taken over before it looks at other things."""
_CALLS_PER_CORE = 2
_SPARE_CALLS = 2
"""Shards of a step that the executor is given at a time: enough to keep it busy, few enough to be forgotten."""


@dataclass(frozen=True)
class Options:
    """How a run attempt goes; nothing of it changes what comes out."""

    queue_timeout_s: float = 600.0
    """Time that a call waits for a place to run, with nothing else of the run running."""
    is_fail_fast: bool = False
    """Stop everything at the first failure, instead of going on with what does not depend on it."""
    is_wanted_again: bool = True
    """Whether somebody asked for this attempt; otherwise a run that was cancelled stays so."""
    selected: frozenset[str] | None = None
    """Steps that are worked on; the others are taken as they are.  None for all."""


class Coordinator:
    """Drives the steps of one run attempt."""

    def __init__(
        self,
        store: Store,
        run: RunPlace,
        plan: Plan,
        make_executor: Callable[[], Executor],
        on_change: Callable[[list[StepState]], None],
        options: Options = Options(),
        **about: str,
    ) -> None:
        """Take the lease on a run; ``about`` says what else is to be known of this attempt."""
        self._store, self._run, self._options = store, run, options
        self._make_executor, self._executor, self._queue = make_executor, None, None
        self._on_change, self._about = on_change, about
        self._run_lease = acquire_lease(run.lease_dir, f"run {run.run_id}")
        self.attempt = self._run_lease.epoch
        self._site = Site(store, run, self.attempt)
        self.events = EventLog(run, self.attempt)
        self.states = {step.name: StepState(step) for step in plan.steps}
        self._beating = Beating()
        self._cancel = CancelFile(run.cancel_file)
        self._cancel.clear(options.is_wanted_again)
        self._is_stopping = False
        self._next_look_s = 0.0
        self._ended: deque[Ended] = deque()
        """Calls that are over, and what has not been done about that yet."""
        self._due: deque[Callable[[], None]] = deque()
        """Leases to give up and the like: what may wait for a storage that does not answer."""
        self._patience = Patience()

    def run(self) -> list[StepState]:
        """Go on until every step is over; the executor is closed and the leases released in any case."""
        self.events.note("run_started", **self._about)
        try:
            self._go_on()
            self.events.note("run_ended", status=self.status)
            self._go_on()
        finally:
            if self._executor is not None:
                self._executor.close()
            for state in self.states.values():
                if state.fan_out is not None:
                    state.fan_out.close()
                self._release(state)
            for action in (*self._due, self._run_lease.release):
                while self._patience.tried(action) is not None:
                    time.sleep(_POLL_S)
        return list(self.states.values())

    def _go_on(self) -> None:
        """Turn by turn, until nothing is left to be done or recorded."""
        is_answering = True
        while True:
            self._beat()
            error = self._patience.tried(self._turn)
            if error is not None and is_answering:
                self.events.note("run_warning", message=f"goes on after {type(error).__name__}: {error}")
            is_answering = error is None
            if is_answering and self._is_settled and all(state.is_over for state in self.states.values()):
                return
            self._listen(0.0 if is_answering and self._has_adopted() else _POLL_S)

    def _turn(self) -> None:
        """What a passing error of the storage may stop anywhere: the next turn does what was left.

        Therefore what cannot be found out twice is forgotten last (``_ended``), and what is to be written is kept until
        it is (``_due``, and the events).
        """
        self._is_stopping |= self._cancel.is_requested()
        while self._ended:
            self._finished(self._ended[0])
            self._ended.popleft()
            self._settle()
        self._settle()
        self._advance()
        self._settle()
        self._on_change(list(self.states.values()))

    @property
    def _is_settled(self) -> bool:
        return not self._ended and not self._due and self.events.is_flushed

    def _settle(self) -> None:
        while self._due:
            self._due[0]()
            self._due.popleft()
        self.events.flush()

    def _listen(self, timeout_s: float) -> None:
        """What the executor has to say, which is made once a step waits for it; errors of either end the run."""
        if self._executor is not None:
            self._ended.extend(self._executor.wait(timeout_s))
        elif any(state.status == "pending" and state.lease is not None for state in self.states.values()):
            with self._kept_alive():
                self._executor = self._make_executor()
            self._queue = Queue(self._executor, self._options.queue_timeout_s, self.events)
        else:
            time.sleep(timeout_s)

    @property
    def status(self) -> str:
        """The run as a whole."""
        statuses = {state.status for state in self.states.values()}
        if "failed" in statuses:
            return "failed"
        if "stopped" in statuses:
            return "cancelled" if self._cancel.is_cancel else "stopped"
        return "partial" if "skipped" in statuses else "succeeded"

    @property
    def is_at_work(self) -> bool:
        """Whether a step has been given to the executor that is not over."""
        return any(state.flights for state in self.states.values())

    def request_stop(self) -> None:
        """Ask every stage to save and stop."""
        self._cancel.request()

    def _kept_alive(self) -> AbstractContextManager[None]:
        """For what may take longer than a lease lives without a heartbeat."""
        held = [state.lease for state in self.states.values() if state.lease is not None]
        return self._beating.meanwhile(self._run_lease, held)

    def _beat(self) -> None:
        held = {state.lease: state for state in self.states.values() if state.lease is not None}
        for lease in self._beating.beat(self._run_lease, list(held)):
            error = LeaseLostError(f"another run took over {lease.folder.parent}")
            self._attempt_failed(held[lease], _failure("infra", type(error).__name__, str(error)))

    def _advance(self) -> None:
        is_time_to_look = time.monotonic() >= self._next_look_s
        if is_time_to_look:
            self._next_look_s = time.monotonic() + self._store.root.storage.poll_s
        for state in self.states.values():
            if state.status in ("pending", "waiting") and (self._is_stopping or time.monotonic() >= state.retry_at_s):
                self._consider(state)
            elif state.fan_out is not None:
                self._or_fail(state, lambda state=state: self._feed(state))
            elif state.status == "running" and is_time_to_look:
                self._read_progress(state)
        if self._queue is not None:
            for state, reason in self._queue.look(self.states.values()):
                self._attempt_failed(state, _failure("unschedulable", "Unschedulable", reason))
        if self._is_stopping:
            for state in self.states.values():
                if state.status == "queued":
                    self._abandon(state)
                    self._stopped(state, "the run was asked to stop before it began")
                elif state.status in ACTIVE and self._cancel.is_overdue():
                    self._abandon(state)
                    self._stopped(state, "it did not stop within the time it was given, and was ended")

    def _consider(self, state: StepState) -> None:
        """Start a step if its inputs are there, nobody else builds it and nobody has built it."""
        sources = {name: self.states[source] for name, source in state.step.inputs.items()}
        if failed := [s.step.name for s in sources.values() if s.status in ("failed", "blocked")]:
            state.status, state.reason = "blocked", f"needs {failed[0]}"
            return
        if any(source.status == "skipped" for source in sources.values()):
            state.status, state.reason = "skipped", "was not asked for, nor what it needs"
            return
        if self._is_stopping or any(source.status == "stopped" for source in sources.values()):
            self._release(state)
            state.status, state.reason = "stopped", "the run was asked to stop"
            return
        inputs = {name: source.output for name, source in sources.items() if source.output is not None}
        if len(inputs) < len(sources):
            return
        state.inputs = inputs
        place = self._site.place(state)
        try:
            committed = place.committed()
        except CorruptionError as error:
            self._fail(state, _failure("code", "CorruptionError", str(error)))
            return
        if committed is not None:
            self._release(state)
            state.status, state.output = "cached", committed
            self.events.cached(state.step.name, place.directory.name)
            return
        if self._options.selected is not None and state.step.name not in self._options.selected:
            state.status, state.reason = "skipped", "was not asked for"
            self.events.note("step_skipped", state.step.name)
            return
        if state.step.accepted:
            message = (
                f"{place.directory} was accepted as it was (--accept-drift) and is gone; made now it would be another "
                f"thing under its address. Make it anew: dlm resume {self._run.run_id} --rebuild {state.step.name}"
            )
            self._fail(state, _failure("user", "UserError", message))
            return
        if state.lease is None:
            try:
                state.lease = acquire_lease(place.lease_dir, f"run {self._run.run_id}, step {state.step.name}")
            except LeaseHeldError as error:
                if state.status != "waiting":
                    self.events.note("step_waiting", state.step.name, reason=str(error))
                state.status, state.reason = "waiting", str(error)
                state.retry_at_s = time.monotonic() + self._store.root.storage.poll_s
                return
            state.status, state.reason = "pending", ""
        if (place.directory / "COMMIT.json").exists():  # by whoever held the lease until now
            self._release(state)
            return
        if self._executor is not None:
            self._or_fail(state, lambda: self._start(state, place))

    def _start(self, state: StepState, place: ArtifactPlace) -> None:
        assert state.lease is not None
        state.attempt = place.new_attempt(state.lease)
        state.status, state.reason, state.progress, state.first_progress = "running", "", {}, None
        state.started_at = state.started_at or time.time()
        self.events.note("step_started", state.step.name, artifact=place.directory.name, epoch=state.lease.epoch)
        is_map = load_stage(state.step.stage).kind == "map"
        self._give(state, self._site.flight(state, "list" if is_map else "whole", state.attempt))

    def _give(self, state: StepState, flight: Flight) -> None:
        assert self._executor is not None
        state.flights[flight.call.key] = flight
        self._executor.start(flight.call)

    def _start_shards(self, state: StepState, shards: list[Shard]) -> None:
        """Find out which shards are committed here, which in another artifact of the stage, and which must run."""
        assert state.lease is not None
        stage, config = load_stage(state.step.stage), step_config(state.step)
        state.lease.check()
        with self._kept_alive():
            committed = self._site.place(state).kept_shards(shards)
            missing = [shard for shard in shards if shard["name"] not in committed]
            shared = [] if state.step.salt else missing  # a step that is made anew takes nothing over
            own = {s["name"]: shard_fingerprint(stage, config, s) for s in shared if "identity" in s}
            state.fan_out = FanOut(shards, committed, own, deque(missing))
            if own:
                registry = ShardRegistry(self._store, stage)
                state.fan_out.adopt(registry, config, state.step.fingerprint, self._shards_dir(state, "adopted"))
        state.progress = {"done": len(committed), "total": len(shards)}
        self._feed(state)

    def _shards_dir(self, state: StepState, suffix: str) -> Place:
        """Folder beside the attempt, for shards of the attempt."""
        assert state.attempt is not None
        return state.attempt.parent / f"{state.attempt.name}-shards-{suffix}"

    def _has_adopted(self) -> bool:
        return any(state.fan_out is not None and state.fan_out.has_adopted for state in self.states.values())

    def _feed(self, state: StepState) -> None:
        """Commit shards that were taken over, start as many as may run, and finish after the last."""
        fan_out = state.fan_out
        assert fan_out is not None
        assert self._executor is not None
        if self._is_stopping:
            self._stop_adopting(state, fan_out)
            if not state.flights:
                self._attempt_failed(state, _failure("stopped", "Stopped", "the run was asked to stop"))
            return
        self._commit_adopted(state, fan_out)
        stage = load_stage(state.step.stage)
        at_most = int(_CALLS_PER_CORE * self._executor.num_cpus / (stage.cpus or 1.0)) + _SPARE_CALLS
        while len(state.flights) < at_most and (shard := fan_out.next_shard(time.monotonic())) is not None:
            turn = state.next_turn(shard["name"])
            out = self._shards_dir(state, str(turn)) / shard["name"]
            self._give(state, self._site.flight(state, "shard", out, shard, turn=turn))
        if fan_out.is_complete and not state.flights:
            assert state.attempt is not None
            shard_dirs = [fan_out.committed[shard["name"]] for shard in fan_out.shards]
            self._give(state, self._site.flight(state, "finish", state.attempt, shard_dirs=shard_dirs))

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
        self.events.note("shards_adopted", state.step.name, adopted=fan_out.num_adopted, **refused)

    def _commit_shard(self, state: StepState, shard: Shard, directory: Place) -> None:
        assert state.fan_out is not None
        assert state.lease is not None
        place = self._site.place(state)
        state.fan_out.committed[shard["name"]] = place.commit_shard(shard["name"], directory, state.lease)
        state.progress["done"] = len(state.fan_out.committed)

    def _or_fail(self, state: StepState, action: Callable[[], None]) -> None:
        """Do something for an attempt, which fails if that does."""
        try:
            action()
        except (LeaseLostError, CorruptionError, UserError, OSError) as error:
            self._attempt_failed(state, _failure(classify(error), type(error).__name__, str(error)))

    def _finished(self, ended: Ended) -> None:
        """One call is over: what it left in the store says how.  Nothing changes before all of that is read."""
        state = next((s for s in self.states.values() if ended.key in s.flights), None)
        if state is None:
            return
        flight = state.flights[ended.key]
        self._read_progress(state)  # of a piece that died between two looks at it
        bring_logs(flight)
        failure = None if (flight.work / "done.json").exists() else _failure_of(flight, ended)
        del state.flights[ended.key]
        if failure is None:
            self._or_fail(state, lambda: self._piece_done(state, flight, ended))
        elif flight.piece.what == "shard" and failure.type != LeaseLostError.__name__:
            self._shard_failed(state, flight, failure)
        else:
            self._attempt_failed(state, failure)

    def _piece_done(self, state: StepState, flight: Flight, ended: Ended) -> None:
        place, piece = self._site.place(state), flight.piece
        assert state.lease is not None
        assert state.attempt is not None
        if piece.what == "list":
            self._start_shards(state, _read_shards(flight.work / "done.json"))
        elif piece.what == "shard":
            assert state.fan_out is not None
            shard, directory = piece.shard, Place(self._store.root.storage, piece.out)
            if (fingerprint := state.fan_out.fingerprints.get(shard["name"])) is not None:
                # Before the commit: killed between the two, the next attempt takes the shard over from this one.
                ShardRegistry(self._store, load_stage(piece.stage)).register(fingerprint, place, directory)
            self._commit_shard(state, shard, directory)
            self._feed(state)
        else:
            state.output = place.commit(state.attempt, state.lease, self._run.run_id)
            state.status, state.ended_at, state.fan_out = "committed", time.time(), None
            self._release(state)
            elapsed_s = state.ended_at - state.started_at
            self.events.note("step_committed", state.step.name, elapsed_s=elapsed_s)
            if ended.failure:
                self.events.note("step_warning", state.step.name, message=f"after its end: {ended.failure}")

    def _shard_failed(self, state: StepState, flight: Flight, failure: Failure) -> None:
        """Try one shard again while the others go on; the last failure that is let pass ends the step."""
        assert state.fan_out is not None
        shard = flight.piece.shard
        try:
            Place(self._store.root.storage, flight.piece.out).remove()
        except OSError as error:  # a worker that was cut off may still write there; the next turn has another folder
            self.events.note("step_warning", state.step.name, message=f"shard {shard['name']} leaves files: {error}")
        after = state.retries.after_shard(shard["name"], failure)
        if isinstance(after, Failure):
            self._abandon(state)
            if after.error_class == "stopped":
                self._stopped(state, after.message)
            else:
                self._fail(state, after)
            return
        state.fan_out.delayed.append((time.monotonic() + after.backoff_s, shard))
        self.events.note(
            "shard_retry", state.step.name, shard=shard["name"], failure=to_json(failure), backoff_s=after.backoff_s
        )

    def _attempt_failed(self, state: StepState, failure: Failure) -> None:
        """Stop what is left of an attempt; try again where its class of error allows."""
        self._abandon(state)
        if failure.error_class == "stopped" or (self._is_stopping and failure.error_class == "infra"):
            self._stopped(state, failure.message)
            return
        after = state.retries.after(failure, float(state.progress.get("done", 0)))
        if isinstance(after, Failure):
            self._fail(state, after)
            return
        what = f"retry {after.number} after" if after.number else "again after"
        state.status, state.reason = "pending", f"{what} {failure.type}: {failure.message}"
        state.retry_at_s = time.monotonic() + after.backoff_s
        self.events.note("step_retry", state.step.name, failure=to_json(failure), backoff_s=after.backoff_s)

    def _abandon(self, state: StepState) -> None:
        """Stop what is left of an attempt; the shards that it committed stay."""
        if self._executor is not None:
            self._executor.cancel(*state.flights)
        state.flights.clear()
        if state.fan_out is not None:
            self._stop_adopting(state, state.fan_out)
            state.fan_out = None
        self._release(state)

    def _release(self, state: StepState) -> None:
        if state.lease is not None:
            self._due.append(state.lease.release)
            state.lease = None

    def _stopped(self, state: StepState, message: str) -> None:
        state.status, state.reason = "stopped", message
        self.events.note("step_stopped", state.step.name, message=message)

    def _fail(self, state: StepState, failure: Failure) -> None:
        state.status, state.failure, state.reason = "failed", failure, failure.message
        state.ended_at = time.time()
        self._release(state)
        self.events.note("step_failed", state.step.name, failure=to_json(failure))
        if self._options.is_fail_fast:
            self._is_stopping = True
            self._due.append(self.request_stop)

    def _read_progress(self, state: StepState) -> None:
        if state.fan_out is not None:
            return
        for flight in state.flights.values():
            try:
                state.progress = read_json(flight.work / "progress.json")
            except FileNotFoundError:
                continue
            if state.first_progress is None:
                state.first_progress = (state.progress["time"], state.progress["done"])
                if (wanted := state.progress.get("wanted_workers")) is not None:
                    message = f"works with {state.progress['workers']} of {wanted} workers: no more found room"
                    self.events.note("step_warning", state.step.name, message=message)


def _failure(error_class: ErrorClass, kind: str, message: str) -> Failure:
    return Failure(error_class, kind, message, "", 0, time.time())


def _failure_of(flight: Flight, ended: Ended) -> Failure:
    """Why a call left no result."""
    failure = first_failure(flight.work)
    if failure is not None and not (ended.killed and failure.error_class == "code"):
        return failure
    # A rank that was killed leaves nothing; its peers then fail over a lost connection.
    message = ended.failure or "the worker left without a result"
    kind = PREEMPTED if ended.preempted else "WorkerDied"
    return dataclasses.replace(_failure("infra", kind, message), traceback=last_words(flight.work))


def _read_shards(record: Place) -> list[Shard]:
    """The shards that a worker has listed; CorruptionError if that is not what the file holds."""
    try:
        shards = read_json(record)
        if fault := fault_of_shards(shards):
            raise CorruptionError(f"{record}: {fault}")
    except CorruptionError as error:
        raise CorruptionError(
            f"{error}. Delete {record.parent} and resume the run, which lists the shards anew"
        ) from None
    return shards
