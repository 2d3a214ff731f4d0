"""Runs a frozen plan: starts what is ready, commits what is done, retries what may be retried.

A single-threaded loop over an executor and the store.  It holds no truth: started again, it reads the commits and
goes on.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress

from cluster.executor import Ended, Executor
from pipeline.errors import LeaseLostError
from workflows.calls import Queue, Site
from workflows.cancel import CancelFile
from workflows.driver import Options, StepDriver, failure
from workflows.lease import Beating, Patience, acquire_lease
from workflows.plan import Plan
from workflows.state import ACTIVE, StepState
from workflows.store import RunPlace, Store

_POLL_S = 0.25
_DEFAULTS = Options()


class Coordinator:
    """Drives the steps of one run attempt."""

    def __init__(
        self,
        store: Store,
        run: RunPlace,
        plan: Plan,
        make_executor: Callable[[], Executor],
        on_change: Callable[[list[StepState]], None],
        options: Options = _DEFAULTS,
        **about: str,
    ) -> None:
        """Take the lease on a run; ``about`` says what else is to be known of this attempt."""
        self._store, self._options = store, options
        self._make_executor, self._queue = make_executor, None
        self._on_change, self._about = on_change, about
        store_id = store.store_id
        self._run_lease = acquire_lease(run.lease_dir, f"run {run.run_id}")
        site = Site(store, store_id, run, self._run_lease.epoch)
        self._beating = Beating()
        self._cancel = CancelFile(run.cancel_file)
        self._driver = StepDriver(site, plan, options, self._cancel, self.request_stop, self._kept_alive)
        self._states = list(self._driver.states.values())
        self._has_begun, self._next_look_s = False, 0.0
        self._ended: deque[Ended] = deque()
        """Calls that are over, and what has not been done about that yet."""
        self._patience = Patience()

    def run(self) -> list[StepState]:
        """Go on until every step is over; the executor is closed and the leases released in any case."""
        events = self._driver.events
        events.note("run_started", **self._about)
        try:
            self._go_on()
            events.note("run_ended", status=self.status)
            self._go_on()
        finally:
            with ExitStack() as last:
                last.callback(self._do_at_last, self._run_lease.release)
                last.callback(self._do_all_due)
                self._driver.close()
        return self._states

    def _do_all_due(self) -> None:
        with ExitStack() as rest:
            for action in self._driver.due:
                rest.callback(self._do_at_last, action)

    def _do_at_last(self, action: Callable[[], None]) -> None:
        with suppress(LeaseLostError):  # ends this attempt anyway
            while self._patience.tried(action) is not None:
                time.sleep(_POLL_S)

    def _go_on(self) -> None:
        """Turn by turn, until nothing is left to be done or recorded."""
        is_answering = True
        while True:
            self._beat()
            error = self._patience.tried(self._turn)
            if error is not None and is_answering:
                message = f"goes on after {type(error).__name__}: {error}"
                self._driver.events.note("run_warning", message=message)
            is_answering = error is None
            self._on_change(self._states)
            if is_answering and self._is_settled and all(state.is_over for state in self._states):
                return
            self._listen(0.0 if is_answering and self._driver.has_adopted else _POLL_S)

    def _turn(self) -> None:
        """What a passing error of the storage may stop anywhere: the next turn does what was left.

        Therefore what cannot be found out twice is forgotten last (``_ended``), and what is to be written is kept until
        it is (``due``, and the events).
        """
        if not self._has_begun:
            self._cancel.clear(self._options.is_wanted_again)
            self._has_begun = True
        self._settle()
        self._driver.look_for_request()
        for _ in range(len(self._ended)):
            self._ended.rotate(-1)  # one that the storage refuses does not keep the others waiting
            self._driver.finished(self._ended[-1])
            self._ended.pop()
            self._settle()
        self._advance()
        self._settle()

    @property
    def _is_settled(self) -> bool:
        return not self._ended and not self._driver.due and self._driver.events.is_flushed

    def _settle(self) -> None:
        due = self._driver.due
        while due:
            due[0]()
            due.popleft()
        self._driver.events.flush()

    def _listen(self, timeout_s: float) -> None:
        """What the executor has to say, which is made once a step waits for it; errors of either end the run."""
        driver = self._driver
        if driver.executor is not None:
            self._ended.extend(driver.executor.wait(timeout_s))
        elif any(state.status == "pending" and state.lease is not None for state in self._states):
            with self._kept_alive():
                driver.executor = self._make_executor()
            self._queue = Queue(driver.executor, self._options.queue_timeout_s, driver.events)
        else:
            time.sleep(timeout_s)

    @property
    def status(self) -> str:
        """The run as a whole."""
        statuses = {state.status for state in self._states}
        if "failed" in statuses:
            return "failed"
        if "stopped" in statuses:
            return "cancelled" if self._cancel.is_cancel else "stopped"
        return "partial" if "skipped" in statuses else "succeeded"

    @property
    def is_at_work(self) -> bool:
        """Whether a step has been given to the executor that is not over."""
        return any(state.flights for state in self._states)

    def request_stop(self) -> None:
        """Start nothing more, and ask every stage to save and stop at the next turn: a signal comes at any moment."""
        self._driver.is_stopping = True
        self._driver.due.append(self._ask_to_stop)

    def _ask_to_stop(self) -> None:
        self._run_lease.check()  # whoever took the run over is not asked
        self._cancel.request()

    def _kept_alive(self) -> AbstractContextManager[None]:
        held = [state.lease for state in self._states if state.lease is not None]
        return self._beating.meanwhile(self._run_lease, held)

    def _beat(self) -> None:
        held = {state.lease: state for state in self._states if state.lease is not None}
        for lease in self._beating.beat(self._run_lease, list(held)):
            error = LeaseLostError(f"another run took over {lease.folder.parent}")
            self._driver.attempt_failed(held[lease], failure("infra", type(error).__name__, str(error)))

    def _advance(self) -> None:
        driver = self._driver
        is_time_to_look = time.monotonic() >= self._next_look_s
        if is_time_to_look:
            self._next_look_s = time.monotonic() + self._store.root.storage.poll_s
        for state in self._states:
            driver.advance(state)
            if state.status == "running" and is_time_to_look:
                driver.read_progress(state)
        if self._queue is not None:
            for state, reason in self._queue.look(self._states):
                driver.attempt_failed(state, failure("unschedulable", "Unschedulable", reason))
        if driver.is_stopping:
            self._end_overdue()

    def _end_overdue(self) -> None:
        """Of a run that stops: what has not begun, and what has had its time."""
        for state in self._states:
            if state.status == "queued":
                self._driver.abandon(state)
                self._driver.stopped(state, "the run was asked to stop before it began")
            elif state.status in ACTIVE and self._cancel.is_overdue():
                self._driver.abandon(state)
                self._driver.stopped(state, "it did not stop within the time it was given, and was ended")
