"""The executor on Ray: one task a call, retries off, gangs through Ray Train.

Without an address it starts a Ray of its own in this process, which ends with it; with one it connects to a cluster.
"""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.connect import connect
from cluster.executor import GPUS_ENV, Call, Ended, Executor, ExecutorLostError, Shortage
from cluster.gang import GANG_LOG, demand_name, has_room, run_gang
from cluster.logged import redirected, run_logged
from cluster.nodes import drain_notice, nodes, remove_placement_groups, shortage, withdraw_demand
from cluster.reaper import dismiss_reaper, start_reaper

_LEAN_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_TOKEN = secrets.token_hex(32)
"""Of every Ray that this process starts: Ray reads it once a process."""
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
_CANCEL_WAIT_S = 15.0
_ANSWER_S = 1.0
_LOW_ON_MEMORY = "killed due to the node running low on memory"
_is_starting = threading.Event()
"""Set while this process starts a Ray."""
_KILL_AFTER_S = 10.0
"""Time that a cancelled task has to end by itself: one that waits outside Python does not hear of it."""


def _run_task(function: str, payload: dict[str, Any], log_dir: str, env: dict[str, str]) -> None:
    import ray

    os.environ.update(env)
    run_logged(function, payload, log_dir, 0, drain_notice({ray.get_runtime_context().get_node_id()}))


def _run_gang(
    function: str,
    payload: dict[str, Any],
    log_dir: str,
    env: dict[str, str],
    sizes: tuple[int, ...],
    cpus: float,
    wants_gpus: bool,
    may_grow: bool,
) -> None:
    os.environ.update(env)
    with redirected(Path(log_dir) / GANG_LOG):
        run_gang(function, payload, sizes, cpus, log_dir, wants_gpus=wants_gpus, may_grow=may_grow)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put this process's signal handlers back afterwards: Ray installs some that end it at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_group() -> None:
    if _is_starting.is_set():
        os.setpgid(0, 0)


os.register_at_fork(after_in_child=_leave_group)


@contextmanager
def _group_of_its_own() -> Iterator[None]:
    """What a Ray is made of is started in groups of its own: a signal to ours would end it before stages have saved."""
    _is_starting.set()
    try:
        yield
    finally:
        _is_starting.clear()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_answering(address: str) -> bool:
    """Whether anything listens there: a GCS that was asked to end closes its port, and may stay for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # it is slow, or this process has too many files open
        return True
    return True


def _lost_process(error: Exception) -> bool:
    """Whether a process or its node is gone; what a function raised arrives as a RayTaskError instead.

    Of a gang, Ray Train tells the failure of each rank: what it raised, or the health check that found it gone.
    """
    from ray.exceptions import RayTaskError, TaskCancelledError

    failures = getattr(error, "worker_failures", None)
    if failures is not None:
        return any(type(failure).__name__.startswith("WorkerHealthCheck") for failure in failures.values())
    return not isinstance(error, RayTaskError | TaskCancelledError)


def _was_preempted(error: Exception) -> bool:
    """Whether Ray knows that a node was taken away after a notice."""
    failures = [error, *getattr(error, "worker_failures", {}).values()]
    return any(type(e).__name__ == "PreemptionError" or getattr(e, "preempted", False) for e in failures)


def _ran_out_of_memory(error: Exception) -> bool:
    """Whether Ray ended a process for want of memory: the error of a task has the name, that of an actor the words."""
    failures = [error, *getattr(error, "worker_failures", {}).values()]
    return any(type(e).__name__ == "OutOfMemoryError" or _LOW_ON_MEMORY in str(e) for e in failures)


class RayExecutor(Executor):
    """Ray tasks; the truth about what they did is in the files they write."""

    def __init__(self, num_cpus: int, address: str = "") -> None:
        """Start a Ray with ``num_cpus`` logical cores in this process, or connect to the cluster at an address."""
        self._is_embedded = not address
        self._num_cpus = float(num_cpus)
        self._refs: dict[Any, str] = {}
        self._gangs: dict[Any, str] = {}
        """What drives a gang, and what its demand is called."""
        self._kill_at_s: dict[Any, float] = {}
        self._reaper = None
        if self._is_embedded:
            os.environ.update(_LEAN_RAY)
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = _TOKEN
        import ray

        self._ray = ray
        with _own_signal_handlers():
            if self._is_embedded:
                self._start(num_cpus)
            else:
                connect(address)
        context = ray.get_runtime_context()
        self._node_id, self._gcs_address = context.get_node_id(), context.gcs_address
        self._raylet = [part for part in psutil.Process().children() if part.name() == "raylet"]

    def _start(self, num_cpus: int) -> None:
        self._reaper = start_reaper()
        try:
            with _group_of_its_own():
                self._ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=_OBJECT_STORE_BYTES,
                )
        except BaseException:
            dismiss_reaper(self._reaper)
            raise

    @property
    def num_cpus(self) -> float:
        """Logical cores for all calls together."""
        return self._num_cpus if self._is_embedded else sum(node.cpus for node in nodes())

    @property
    def may_grow(self) -> bool:
        """Whether nodes may join."""
        return not self._is_embedded

    def shortage(self, call: Call) -> Shortage | None:
        """What the nodes lack; nothing where a log on this machine tells that the call holds what it wants."""
        if (call.log_dir / "rank-0.log").exists() or (call.gang_sizes and has_room(call.log_dir / GANG_LOG)):
            return None
        return shortage(call, nodes())

    def start(self, call: Call) -> None:
        """Submit a call; Ray starts it when there are cores for it.

        What drives a gang runs on the node of this process: if that is lost, so is this attempt of the run anyway.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        call.log_dir.mkdir(parents=True, exist_ok=True)
        # Told in any case: the next task of a process may want none.
        env = call.env if call.gang_sizes else call.env | {GPUS_ENV: f"{call.gpus:g}"}
        common = (call.function, call.payload, str(call.log_dir), env)
        if call.gang_sizes:
            self._free_groups()  # again: of a process that was killed, not all is known to be dead when it ends
            here = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
            task = self._ray.remote(_run_gang)
            task = task.options(num_cpus=0, max_retries=0, name=call.key, scheduling_strategy=here)
            ref = task.remote(*common, call.gang_sizes, call.cpus, call.wants_gpus, self.may_grow)
            self._gangs[ref] = demand_name(str(call.log_dir))
        else:
            task = self._ray.remote(_run_task)
            task = task.options(num_cpus=call.cpus, num_gpus=call.gpus, max_retries=0, name=call.key)
            ref = task.remote(*common)
        self._refs[ref] = call.key

    def wait(self, timeout_s: float) -> list[Ended]:
        """Calls that have ended."""
        if self._is_lost():
            raise ExecutorLostError("the Ray that this run had started has ended: by a signal, or for want of memory")
        if not self._refs:
            time.sleep(timeout_s)
            return []
        self._kill_overdue()
        ready, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=timeout_s)
        return [self._ended(ref) for ref in ready]

    def _is_lost(self) -> bool:
        """Whether a Ray of our own has ended: Ray would look for its parts for a minute, then end this process."""
        return self._is_embedded and not (all(map(_is_alive, self._raylet)) and _is_answering(self._gcs_address))

    def _ended(self, ref: Any) -> Ended:
        key = self._refs.pop(ref)
        self._kill_at_s.pop(ref, None)
        if ref in self._gangs:
            withdraw_demand(self._gangs.pop(ref))
            self._free_groups()
        try:
            self._ray.get(ref)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises is the answer
            told, killed = f"{type(error).__name__}: {error}", _lost_process(error)
            return Ended(key, told, killed, _was_preempted(error), killed and _ran_out_of_memory(error))
        return Ended(key)

    def _free_groups(self) -> None:
        """Give back what controllers of gangs held that have died; in a cluster Ray Train's cleaner does so."""
        if self._is_embedded:
            remove_placement_groups(of_the_dead=bool(self._gangs))

    def cancel(self, *keys: str) -> None:
        """Cancel tasks, and with them the workers that they started."""
        for ref in [ref for ref, name in self._refs.items() if name in keys]:
            self._ray.cancel(ref, force=False, recursive=True)
            self._kill_at_s.setdefault(ref, time.monotonic() + _KILL_AFTER_S)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for ref in [ref for ref, at_s in self._kill_at_s.items() if now >= at_s]:
            del self._kill_at_s[ref]
            self._ray.cancel(ref, force=True, recursive=True)

    def close(self) -> None:
        """Cancel what runs, then stop this process's Ray; what is left of a lost one the reaper ends."""
        if self._is_lost() and self._reaper is not None:
            self._reaper.communicate()  # nobody else may begin what a worker is still at
            return
        self.cancel(*self._refs.values())
        if self._refs:
            self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=_CANCEL_WAIT_S)
        self._ray.shutdown()
        if self._reaper is not None:
            dismiss_reaper(self._reaper)
