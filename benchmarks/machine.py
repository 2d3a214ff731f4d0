"""The machine a benchmark runs on: what it is, and whether it can be trusted at the moment."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

MAX_FORK_JOIN_P95_US = 100.0
"""A quiet machine needs 10 to 25; when the host holds back a core it is hundreds."""
MIN_THREAD_SCALING = 0.6
"""Rate of a matrix product with all threads over threads x the rate with one; near 1 unless others use the cores."""
MAX_RATE_CHANGE = 1.25
"""Between the rates of a matrix product before and after, either way."""

_WARM_UP_S = 1.0  # until then a new thread may still share a core with the first
_MATMUL_SIZE = 1024
_NUM_MATMULS = 41
_FORK_JOIN_ELEMENTS = 200_000
_NUM_FORK_JOINS = 500


@dataclass(frozen=True)
class Probe:
    """Rates and latencies of a moment."""

    matmul_gflops: float
    """Median rate of a float32 matrix product on all threads."""
    matmul_gflops_one_thread: float
    fork_join_us: float
    """Median time of adding a number to 200,000, all threads."""
    fork_join_p95_us: float
    num_threads: int

    @property
    def thread_scaling(self) -> float:
        """1 if every thread works at the rate of one alone."""
        return self.matmul_gflops / (self.num_threads * self.matmul_gflops_one_thread)


def describe() -> dict[str, Any]:
    """CPU, memory and versions; nothing that names the host, its user or a path."""
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": len(psutil.Process().cpu_affinity()),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def probe() -> Probe:
    """Measure the rate of matrix products and the time to start and join threads; about two seconds."""
    num_threads = torch.get_num_threads()
    left, right = torch.randn(2, _MATMUL_SIZE, _MATMUL_SIZE)
    numbers = torch.zeros(_FORK_JOIN_ELEMENTS)
    deadline = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < deadline:
        torch.mm(left, right)
    fork_joins = _times_s(lambda: numbers.add_(1), _NUM_FORK_JOINS)
    together_s = statistics.median(_times_s(lambda: torch.mm(left, right), _NUM_MATMULS))
    torch.set_num_threads(1)
    alone_s = statistics.median(_times_s(lambda: torch.mm(left, right), _NUM_MATMULS))
    torch.set_num_threads(num_threads)
    gflop = 2 * _MATMUL_SIZE**3 / 1e9
    return Probe(
        matmul_gflops=gflop / together_s,
        matmul_gflops_one_thread=gflop / alone_s,
        fork_join_us=1e6 * statistics.median(fork_joins),
        fork_join_p95_us=1e6 * statistics.quantiles(fork_joins, n=20)[-1],
        num_threads=num_threads,
    )


def doubts(probes: list[Probe]) -> list[str]:
    """Why the measurements among these probes cannot be trusted: what was measured, what was expected."""
    found = []
    for number, one in enumerate(probes, start=1):
        if one.fork_join_p95_us > MAX_FORK_JOIN_P95_US:
            found.append(
                f"probe {number}: starting and joining {one.num_threads} threads took {one.fork_join_p95_us:.0f} us "
                f"(95th percentile); expected at most {MAX_FORK_JOIN_P95_US:.0f}"
            )
        if one.thread_scaling < MIN_THREAD_SCALING:
            found.append(
                f"probe {number}: {one.num_threads} threads multiply matrices at {one.matmul_gflops:.0f} GFLOP/s and "
                f"one at {one.matmul_gflops_one_thread:.0f}; expected at least {MIN_THREAD_SCALING} of "
                f"{one.num_threads} times that"
            )
    rates = [one.matmul_gflops for one in probes]
    if rates and max(rates) > MAX_RATE_CHANGE * min(rates):
        found.append(
            f"the rate of a matrix product went between {min(rates):.0f} and {max(rates):.0f} GFLOP/s during the run; "
            f"expected a factor of at most {MAX_RATE_CHANGE}"
        )
    return found


def _times_s(work: Callable[[], object], num_times: int) -> list[float]:
    times = []
    for _ in range(num_times):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
