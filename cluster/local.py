"""The executor without Ray: every call in subprocesses of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cluster.child import PARENT_PIPE_ENV
from cluster.executor import GPUS_ENV, Call, Ended, Executor, Shortage
from cluster.gpus import visible_gpus

_POLL_S = 0.01
_KILL_AFTER_S = 10.0
_SETTLES_AFTER_S = 0.5
_CRASHES = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""Signals that a process brings on itself; libraries of collectives abort ranks that have lost a peer."""


@dataclass
class _Running:
    call: Call
    processes: list[subprocess.Popen[bytes]]
    gpu: str = ""
    """That it was given, or shares."""
    failure: str = ""
    killed: bool = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalExecutor(Executor):
    """Subprocesses that end with their parent, at most as many as there are cores.

    A call that wants more cores than the machine has runs alone.  One that wants a GPU sees that alone.
    """

    def __init__(self, num_cpus: int | None = None) -> None:
        self._num_cpus = float(num_cpus or os.cpu_count() or 1)
        self._queue: list[Call] = []
        self._running: dict[str, _Running] = {}
        self._ended: list[Ended] = []
        """Cancelled, or never begun; to be told by the next ``wait``."""
        self._pipe_read, self._pipe_write = os.pipe()

    @cached_property
    def _gpus(self) -> list[str]:
        """What CUDA_VISIBLE_DEVICES calls them.  A gang takes one for each rank, as far as there are any."""
        num_gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else visible_gpus()
        named = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
        return (named or [str(number) for number in range(num_gpus)])[:num_gpus]

    def _gpu_for(self, call: Call) -> str | None:
        """The first GPU of which enough is left; None if there is none."""
        left = dict.fromkeys(self._gpus, 1.0)
        for running in self._running.values():
            if running.gpu:
                left[running.gpu] -= running.call.gpus
        return next((gpu for gpu, share in left.items() if share >= call.gpus - 1e-9), None)

    @property
    def num_cpus(self) -> float:
        """Cores for all calls together."""
        return self._num_cpus

    @property
    def may_grow(self) -> bool:
        """No: it is one machine."""
        return False

    def shortage(self, call: Call) -> Shortage | None:
        """What runs already, for a call that is still in the queue."""
        if call not in self._queue:
            return None
        if call.gpus > len(self._gpus):
            return Shortage(f"wants {call.gpus:g} GPUs; this machine has {len(self._gpus)}", is_beyond=True)
        if call.gpus and self._gpu_for(call) is None:
            return Shortage(f"wants {call.gpus:g} GPUs; all {len(self._gpus)} are taken", is_beyond=False)
        used = sum(_cores(running.call) for running in self._running.values())
        return Shortage(f"wants {_cores(call):g} cores; {used:g} of {self._num_cpus:g} are taken", is_beyond=False)

    def start(self, call: Call) -> None:
        """Queue a call.  What keeps its processes from being started is told by ``wait``."""
        assert call.key not in self._running, f"{call.key} is running already"
        self._queue.append(call)
        self._start_what_fits()

    def _start_what_fits(self) -> None:
        while self._queue:
            call = self._queue[0]
            used = sum(_cores(running.call) for running in self._running.values())
            if self._running and used + _cores(call) > self._num_cpus:
                return
            gpu = self._gpu_for(call) if call.gpus else ""
            if gpu is None:
                return
            self._queue.pop(0)
            try:
                self._running[call.key] = _Running(call, self._spawn(call, gpu), gpu)
            except OSError as error:
                self._ended.append(Ended(call.key, str(error)))

    def _spawn(self, call: Call, gpu: str) -> list[subprocess.Popen[bytes]]:
        """All processes of a call, or none and OSError."""
        call.log_dir.mkdir(parents=True, exist_ok=True)
        payload_path = call.log_dir / "payload.json"
        payload_path.write_text(json.dumps(call.payload))
        port = _free_port() if call.gang_sizes else 0
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(_processes(call)):
                processes.append(self._spawn_rank(call, rank, port, payload_path, gpu))
        except OSError:
            _stop(processes)
            raise
        return processes

    def _spawn_rank(self, call: Call, rank: int, port: int, payload: Path, gpu: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, **call.env, PARENT_PIPE_ENV: str(self._pipe_read), "PYTHONUNBUFFERED": "1"}
        env[GPUS_ENV] = str(int(rank < len(self._gpus))) if call.gang_sizes else f"{call.gpus:g}"
        if gpu:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        if call.gang_sizes:
            size = str(_processes(call))
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_SIZE": size}
            env |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with (call.log_dir / f"rank-{rank}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "cluster.child", call.function, str(payload)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=[self._pipe_read],
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> list[Ended]:
        """Calls that have ended; the rest of a gang is killed with its first casualty."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended, self._ended = self._ended, []
            for key, running in list(self._running.items()):
                codes = [process.poll() for process in running.processes]
                if any(codes) and not running.failure:
                    code, rank = min(_casualties(running.processes), key=_tells_later)
                    running.killed = code < 0 and -code not in _CRASHES
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    running.failure = f"rank {rank} ended with {how}"
                    _stop(running.processes)
                    codes = [0] * len(codes)
                if None not in codes:
                    del self._running[key]
                    ended.append(Ended(key, running.failure, running.killed))
            if ended:
                self._start_what_fits()
            if ended or time.monotonic() >= deadline:
                return ended
            time.sleep(_POLL_S)

    def cancel(self, *keys: str) -> None:
        """Stop the processes of calls; they have at most twice _KILL_AFTER_S, however many they are."""
        self._queue = [call for call in self._queue if call.key not in keys]
        running = [self._running.pop(key) for key in keys if key in self._running]
        _stop([process for call in running for process in call.processes])
        self._ended += [Ended(key, "cancelled") for key in keys]

    def close(self) -> None:
        """Stop everything."""
        self._queue.clear()
        _stop([process for call in self._running.values() for process in call.processes])
        self._running.clear()
        for fd in (self._pipe_write, self._pipe_read):
            os.close(fd)


def _processes(call: Call) -> int:
    """All that a gang may have: what one machine has does not change."""
    return call.gang_sizes[-1] if call.gang_sizes else 1


def _cores(call: Call) -> float:
    return call.cpus * _processes(call)


def _casualties(processes: list[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """(exit code, rank) of those that failed, one at least, after a moment in which others may end that failed before.

    A process that was killed can be waited for once all its threads are gone: peers that complain may be so earlier.
    """
    deadline = time.monotonic() + _SETTLES_AFTER_S
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return [(code, rank) for rank, code in enumerate(codes) if code]


def _tells_later(bad: tuple[int, int]) -> tuple[int, int]:
    """Order of (exit code, rank): a signal from outside explains more than an exit code, and this more than a crash."""
    code, rank = bad
    return (0 if code < 0 and -code not in _CRASHES else 1 if code > 0 else 2), rank


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Terminate process groups, kill what is left after a while, and reap."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            os.killpg(process.pid, number)
        deadline = time.monotonic() + _KILL_AFTER_S
        while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
