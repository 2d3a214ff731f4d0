"""An all-reduce between machines: whether it gives the right numbers, and how long it takes.

Every rank is a process of its own, which is ended when its time is over: a collective that waits for a peer behind a
closed port cannot be interrupted.  ``python -m cluster.all_reduce`` is one rank.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal

Backend = Literal["gloo", "nccl"]
JOIN_S = 60.0
"""Time that all ranks have to find each other and to finish."""
_MIB = 2**20
_SIZES_MIB = {1: 9, 64: 3}
"""Sizes -> how often each is timed."""
_PATTERN, _WEIGHTS = 97, 16
"""What ranks add repeats after so many numbers and ranks: every sum is a float32 without rounding."""
_MESSAGE_CHARS = 400


@dataclass(frozen=True)
class Gang:
    """Who takes part, the same for all ranks."""

    backend: Backend
    size: int
    host: str
    port: int

    @property
    def address(self) -> str:
        """Where the ranks meet."""
        return f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True)
class Measured:
    """Seconds of an all-reduce by MiB."""

    size: int
    times_s: dict[int, float]

    def __str__(self) -> str:
        def told(mib: int, time_s: float) -> str:
            bus = 2 * (self.size - 1) / self.size * mib * _MIB / time_s / 1e9
            return f"{mib} MiB in {time_s * 1e3:.3g} ms" + (f" ({bus:.3g} GB/s)" if self.size > 1 else "")

        ranks = f"{self.size} rank{'' if self.size == 1 else 's'}"
        return f"{ranks}: " + ", ".join(told(mib, time_s) for mib, time_s in self.times_s.items())


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def run_ranks(gang: Gang, first: int, count: int, is_in_cluster: bool, within_s: float = JOIN_S) -> Measured | None:
    """Run ranks of a gang on this machine, a GPU each with NCCL; what rank 0 measured, if it is one of them.

    They meet as those of a stage do.  RuntimeError with the words of the rank that failed first, or that waits after
    the time is over.
    """
    if is_in_cluster:
        from cluster.gloo import use_node_address

        use_node_address()
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    deadline = time.monotonic() + within_s
    processes: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as files:
        logs: list[IO[str]] = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        files.callback(_end, processes)
        for place, log in enumerate(logs):
            flags = [f"--{name}={value}" for name, value in vars(gang).items()]
            command = [sys.executable, "-m", "cluster.all_reduce", *flags, f"--rank={first + place}", f"--gpu={place}"]
            processes.append(
                subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True)
            )
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
        for place, process in enumerate(processes):
            if process.poll():
                raise RuntimeError(f"rank {first + place}: {_last_words(logs[place])}")
        for place, process in enumerate(processes):
            if process.poll() is None:
                raise RuntimeError(f"rank {first + place} was not through after {within_s:.0f} s")
        return _measured(_text(logs[0]), gang.size) if first == 0 else None


def _end(processes: Sequence["subprocess.Popen[str]"]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


def _last_words(log: IO[str]) -> str:
    """The error of a process: the line of its exception, not what stands around it."""
    lines = [line.strip() for line in _text(log).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return ((errors or lines)[-1] if lines else "it ended without a word")[:_MESSAGE_CHARS]


def _measured(text: str, size: int) -> Measured:
    value: dict[str, float] = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    return Measured(size, {int(mib): time_s for mib, time_s in value.items()})


def _rank(gang: Gang, rank: int, gpu: int) -> dict[int, float]:
    import torch
    import torch.distributed as dist

    device = torch.device(f"cuda:{gpu}") if gang.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=JOIN_S)
    dist.init_process_group(gang.backend, init_method=gang.address, rank=rank, world_size=gang.size, timeout=limit)
    factor = sum(other % _WEIGHTS + 1 for other in range(gang.size))

    def once(base: Any) -> float:
        values = base * (rank % _WEIGHTS + 1)
        dist.barrier()
        start_s = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - start_s
        wrong = int((values != base * factor).sum())
        if wrong:
            raise ArithmeticError(f"{wrong} of {values.numel()} sums are wrong: this network or this library corrupts")
        return elapsed_s

    times_s: dict[int, float] = {}
    for mib, repeats in _SIZES_MIB.items():
        base = (torch.arange(mib * _MIB // 4, device=device) % _PATTERN + 1).float()
        once(base)
        times_s[mib] = statistics.median(once(base) for _ in range(repeats))
    dist.barrier()
    return times_s


def main(words: Sequence[str] | None = None) -> None:
    """One rank: prints its times as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("gloo", "nccl"), required=True)
    parser.add_argument("--host", required=True)
    for name in ("size", "port", "rank", "gpu"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(words)
    times_s = _rank(Gang(given.backend, given.size, given.host, given.port), given.rank, given.gpu)
    print(json.dumps(times_s), flush=True)  # noqa: T201
    os._exit(0)  # libraries of collectives have been seen to abort in the interpreter's farewell


if __name__ == "__main__":
    main()
