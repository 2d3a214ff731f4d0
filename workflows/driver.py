"""Takes the steps of a run attempt from one state to the next: starts, commits, retries, gives up."""

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
from workflows.calls import Site, bring_logs
from workflows.cancel import CancelFile
from workflows.lease import LeaseHeldError, acquire_lease
from workflows.plan import Plan, step_config
from workflows.shards import FanOut, ShardRegistry
from workflows.state import Flight, StepState
from workflows.step import load_stage
from workflows.store import ArtifactPlace, EventLog
from workflows.worker import PREEMPTED, Failure, first_failure, last_words

_COMMIT_FOR_S = 1.0
"""Longest time that is spent at once on committing what was taken over."""
_COMMIT_WITHIN_S = 20.0
"""How long a storage may refuse what a step has made while it takes all else: less than ends the run."""
_LESS_MEMORY = "Let fewer workers run on a node (workers, cpus), or take fewer rows at a time"
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


class StepDriver:
    """The steps of one run attempt.

    A passing error of the storage may leave ``advance`` and ``finished`` halfway: they are then called again.
    """

    def __init__(
        self,
        site: Site,
        plan: Plan,
        options: Options,
        cancel: CancelFile,
        request_stop: Callable[[], None],
        kept_alive: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """``kept_alive`` is for what may take longer than a lease lives without a heartbeat."""
        self._site, self._store, self._run = site, site.store, site.run
        self._options, self._cancel = options, cancel
        self._request_stop, self._kept_alive = request_stop, kept_alive
        self.events = EventLog(site.run, site.attempt)
        self.states = {step.name: StepState(step) for step in plan.steps}
        self.executor: Executor | None = None
        self.is_stopping = False
        self.due: deque[Callable[[], None]] = deque()
        """Leases to give up and the like: what may wait for a storage that does not answer."""

    @property
    def has_adopted(self) -> bool:
        """Whether shards that were taken over wait to be committed."""
        return any(state.fan_out is not None and state.fan_out.has_adopted for state in self.states.values())

    def look_for_request(self, at_once: bool = False) -> None:
        """Start nothing more if the run was asked to stop."""
        if self._cancel.is_requested(at_once):  # a signal may have set it meanwhile
            self.is_stopping = True

    def close(self) -> None:
        """End what runs, and give all leases up."""
        if self.executor is not None:
            self.executor.close()
        for state in self.states.values():
            if state.fan_out is not None:
                state.fan_out.close()
            self._release(state)

    def advance(self, state: StepState) -> None:
        """Start a step that waits, if it is time, or feed its shards."""
        if state.status in ("pending", "waiting") and (self.is_stopping or time.monotonic() >= state.retry_at_s):
            self._consider(state)
        elif state.fan_out is not None and self._or_fail(state, lambda: self._commit_adopted(state), is_repeated=True):
            self._or_fail(state, lambda: self._feed(state))

    # --- one step -----------------------------------------------------------------------------------------------

    def _consider(self, state: StepState) -> None:
        """Start a step if its inputs are there, nobody else builds it and nobody has built it."""
        sources = {name: self.states[source] for name, source in state.step.inputs.items()}
        if failed := [s.step.name for s in sources.values() if s.status in ("failed", "blocked")]:
            state.status, state.reason = "blocked", f"needs {failed[0]}"
            return
        if any(source.status == "skipped" for source in sources.values()):
            state.status, state.reason = "skipped", "was not asked for, nor what it needs"
            return
        if self.is_stopping or any(source.status == "stopped" for source in sources.values()):
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
            self._fail(state, failure("code", "CorruptionError", str(error)))
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
            self._fail(state, failure("user", "UserError", message))
            return
        if state.lease is None and not self._take_lease(state, place):
            return
        if (place.directory / "COMMIT.json").exists():  # by whoever held the lease until now
            self._release(state)
            return
        if self.executor is not None:
            self._or_fail(state, lambda: self._start(state, place))

    def _take_lease(self, state: StepState, place: ArtifactPlace) -> bool:
        try:
            purpose = f"run {self._run.run_id}, step {state.step.name}"
            state.lease = acquire_lease(place.lease_dir, purpose, give_up=self.due.append)
        except LeaseHeldError as error:
            if state.status != "waiting":
                self.events.note("step_waiting", state.step.name, reason=str(error))
            state.status, state.reason = "waiting", str(error)
            state.retry_at_s = time.monotonic() + self._store.root.storage.poll_s
            return False
        state.status, state.reason = "pending", ""
        return True

    def _start(self, state: StepState, place: ArtifactPlace) -> None:
        assert state.lease is not None
        state.attempt = place.new_attempt(state.lease)
        state.status, state.reason, state.progress, state.first_progress = "running", "", {}, None
        state.started_at = state.started_at or time.time()
        self.events.note("step_started", state.step.name, artifact=place.directory.name, epoch=state.lease.epoch)
        is_map = load_stage(state.step.stage).kind == "map"
        self._give(state, self._site.flight(state, "list" if is_map else "whole", state.attempt))

    def _give(self, state: StepState, flight: Flight) -> None:
        assert self.executor is not None
        state.flights[flight.call.key] = flight
        self.executor.start(flight.call)

    def finished(self, ended: Ended) -> None:
        """One call is over: what it left in the store says how.

        Nothing of it is forgotten before all is read, and what it made is committed.
        """
        state = next((s for s in self.states.values() if ended.key in s.flights), None)
        if state is None:
            return
        flight = state.flights[ended.key]
        self.read_progress(state)  # of a piece that died between two looks at it
        bring_logs(flight)
        found = None if (flight.work / "done.json").exists() else _failure_of(flight, ended)
        if found is not None and found.error_class == "stopped":  # its worker may have seen the request first
            self.look_for_request(at_once=True)
        if found is None:
            self._or_fail(state, lambda: self._keep(state, flight, ended), is_repeated=True)
        state.flights.pop(ended.key, None)
        if found is None and state.fan_out is not None:
            self._or_fail(state, lambda: self._feed(state))
        elif found is not None and flight.piece.what == "shard" and found.type != LeaseLostError.__name__:
            self._shard_failed(state, flight, found)
        elif found is not None:
            self.attempt_failed(state, found)

    def _keep(self, state: StepState, flight: Flight, ended: Ended) -> None:
        """Commit what a call has made; to do so again changes nothing."""
        place, piece = self._site.place(state), flight.piece
        assert state.lease is not None
        assert state.attempt is not None
        if piece.what == "list":
            self._plan_shards(state, _read_shards(flight.work / "done.json"))
        elif piece.what == "shard":
            assert state.fan_out is not None
            shard, directory = piece.shard, Place(self._store.root.storage, piece.out)
            if (fingerprint := state.fan_out.fingerprints.get(shard["name"])) is not None:
                # Before the commit: killed between the two, the next attempt takes the shard over from this one.
                ShardRegistry(self._store, load_stage(piece.stage)).register(fingerprint, place, directory)
            self._commit_shard(state, shard, directory)
        else:
            state.output = place.commit(state.attempt, state.lease, self._run.run_id)
            state.status, state.ended_at, state.fan_out = "committed", time.time(), None
            self._release(state)
            elapsed_s = state.ended_at - state.started_at
            self.events.note("step_committed", state.step.name, elapsed_s=elapsed_s)
            if ended.failure:
                self.events.note("step_warning", state.step.name, message=f"after its end: {ended.failure}")

    def read_progress(self, state: StepState) -> None:
        """Look at what the workers of a step reported last."""
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

    # --- the shards of a step -----------------------------------------------------------------------------------

    def _plan_shards(self, state: StepState, shards: list[Shard]) -> None:
        """Find out which shards are committed here, which in another artifact of the stage, and which must run."""
        assert state.lease is not None
        stage, config = load_stage(state.step.stage), step_config(state.step)
        state.lease.check()
        with self._kept_alive():
            committed = self._site.place(state).kept_shards(shards)
            missing = [shard for shard in shards if shard["name"] not in committed]
            shared = [] if state.step.salt else missing  # a step that is made anew takes nothing over
            own = {s["name"]: shard_fingerprint(stage, config, s) for s in shared if "identity" in s}
            fan_out = FanOut(shards, committed, own, deque(missing))
            if own:
                registry = ShardRegistry(self._store, stage)
                fan_out.adopt(registry, config, state.step.fingerprint, self._shards_dir(state, "adopted"))
        state.fan_out, state.progress = fan_out, {"done": len(committed), "total": len(shards)}

    def _shards_dir(self, state: StepState, suffix: str) -> Place:
        """Folder beside the attempt, for shards of the attempt."""
        assert state.attempt is not None
        return state.attempt.parent / f"{state.attempt.name}-shards-{suffix}"

    def _feed(self, state: StepState) -> None:
        """Start as many shards as may run, and finish after the last."""
        fan_out = state.fan_out
        assert fan_out is not None
        assert self.executor is not None
        if self.is_stopping:
            self._stop_adopting(state, fan_out)
            if not state.flights:
                self.attempt_failed(state, failure("stopped", "Stopped", "the run was asked to stop"))
            return
        stage = load_stage(state.step.stage)
        at_most = int(_CALLS_PER_CORE * self.executor.num_cpus / (stage.cpus or 1.0)) + _SPARE_CALLS
        while len(state.flights) < at_most and (shard := fan_out.next_shard(time.monotonic())) is not None:
            turn = state.next_turn(shard["name"])
            out = self._shards_dir(state, str(turn)) / shard["name"]
            self._give(state, self._site.flight(state, "shard", out, shard, turn=turn))
        if fan_out.is_complete and not state.flights:
            assert state.attempt is not None
            shard_dirs = [fan_out.committed[shard["name"]] for shard in fan_out.shards]
            self._give(state, self._site.flight(state, "finish", state.attempt, shard_dirs=shard_dirs))

    def _commit_adopted(self, state: StepState) -> None:
        """Commit shards that were taken over."""
        fan_out = state.fan_out
        assert fan_out is not None
        if self.is_stopping or not fan_out.is_adopting:
            return
        until_s = time.monotonic() + _COMMIT_FOR_S
        while time.monotonic() < until_s and (adopted := fan_out.next_adopted()) is not None:
            self._commit_shard(state, *adopted)
            fan_out.drop_adopted()
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

    def _shard_failed(self, state: StepState, flight: Flight, found: Failure) -> None:
        """Try one shard again while the others go on; the last failure that is let pass ends the step."""
        assert state.fan_out is not None
        shard = flight.piece.shard
        try:
            Place(self._store.root.storage, flight.piece.out).remove()
        except OSError as error:  # a worker that was cut off may still write there; the next turn has another folder
            self.events.note("step_warning", state.step.name, message=f"shard {shard['name']} leaves files: {error}")
        if found.error_class == "stopped" and self.is_stopping:
            return  # the others may still come to their end, until their time is up
        after = state.retries.after_shard(shard["name"], found)
        if isinstance(after, Failure):
            self.abandon(state)
            if after.error_class == "stopped":
                self.stopped(state, after.message)
            else:
                self._fail(state, after)
            return
        state.fan_out.delayed.append((time.monotonic() + after.backoff_s, shard))
        self.events.note(
            "shard_retry", state.step.name, shard=shard["name"], failure=to_json(found), backoff_s=after.backoff_s
        )

    # --- ends ---------------------------------------------------------------------------------------------------

    def _or_fail(self, state: StepState, action: Callable[[], None], is_repeated: bool = False) -> bool:
        """Do something for an attempt, which fails if that does; what is repeated has some time to succeed."""
        try:
            action()
        except (LeaseLostError, CorruptionError, UserError, OSError) as error:
            error_class = classify(error)
            may_pass = is_repeated and error_class == "transient" and isinstance(error, OSError)
            state.refused_since_s = state.refused_since_s or time.monotonic()
            if may_pass and time.monotonic() - state.refused_since_s < _COMMIT_WITHIN_S:
                raise
            state.refused_since_s = None
            self.attempt_failed(state, failure(error_class, type(error).__name__, str(error)))
            return False
        if is_repeated:
            state.refused_since_s = None
        return True

    def attempt_failed(self, state: StepState, found: Failure) -> None:
        """Stop what is left of an attempt; try again where its class of error allows."""
        self.abandon(state)
        if found.error_class == "stopped" or (self.is_stopping and found.error_class == "infra"):
            self.stopped(state, found.message)
            return
        after = state.retries.after(found, float(state.progress.get("done", 0)))
        if isinstance(after, Failure):
            self._fail(state, after)
            return
        what = f"retry {after.number} after" if after.number else "again after"
        state.status, state.reason = "pending", f"{what} {found.type}: {found.message}"
        state.retry_at_s = time.monotonic() + after.backoff_s
        self.events.note("step_retry", state.step.name, failure=to_json(found), backoff_s=after.backoff_s)

    def abandon(self, state: StepState) -> None:
        """Stop what is left of an attempt; the shards that it committed stay."""
        if self.executor is not None:
            self.executor.cancel(*state.flights)
        state.flights.clear()
        if state.fan_out is not None:
            self._stop_adopting(state, state.fan_out)
            state.fan_out = None
        self._release(state)

    def stopped(self, state: StepState, message: str) -> None:
        """Leave a step as one that was asked to stop."""
        state.status, state.reason = "stopped", message
        self.events.note("step_stopped", state.step.name, message=message)

    def _release(self, state: StepState) -> None:
        if state.lease is not None:
            self.due.append(state.lease.release)
            state.lease = None

    def _fail(self, state: StepState, found: Failure) -> None:
        state.status, state.failure, state.reason = "failed", found, found.message
        state.ended_at = time.time()
        self._release(state)
        self.events.note("step_failed", state.step.name, failure=to_json(found))
        if self._options.is_fail_fast and not self.is_stopping:
            self._request_stop()


def failure(error_class: ErrorClass, kind: str, message: str) -> Failure:
    """What went wrong outside of workers."""
    return Failure(error_class, kind, message, "", 0, time.time())


def _failure_of(flight: Flight, ended: Ended) -> Failure:
    """Why a call left no result."""
    if ended.out_of_memory:  # the peers of a rank tell only that it is gone
        told = next((line for line in ended.failure.splitlines() if "memory" in line), ended.failure)
        return failure("memory", "OutOfMemory", f"{told}. {_LESS_MEMORY}")
    found = first_failure(flight.work)
    if found is not None and not (ended.killed and found.error_class == "code"):
        return found
    # A rank that was killed leaves nothing; its peers then fail over a lost connection.
    message = ended.failure or "the worker left without a result"
    kind = PREEMPTED if ended.preempted else "WorkerDied"
    return dataclasses.replace(failure("infra", kind, message), traceback=last_words(flight.work))


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
