"""What is measured in a step beside its loss: time and what was waited for, speed, memory, the norm of the weights."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.fragments import LocalTensor, Run
from pipeline.pretrain.gpus import peak_tflops
from pipeline.pretrain.ranks import Ranks

Wait = Literal["data", "validation"]
_WAIT_KEYS: dict[Wait, str] = {"data": "data_wait_s", "validation": "validation_s"}
MEASURED = frozenset(
    {
        *_WAIT_KEYS.values(),
        "checkpoint_stall_s",
        "checkpoint_s",
        "step_s",
        "tokens_per_s",
        "mfu",
        "peak_resident_bytes",
        "peak_gpu_bytes",
    }
)
"""Keys of a line of metrics that tell of clocks and machines: two runs of one training differ in nothing else."""

_PIECE_NUMEL = 1 << 22
"""Weights that are squared at once: torch makes a float64 copy of them."""


class Stopwatch:
    """Seconds spent inside ``with``; it may be entered within itself, and read meanwhile."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._past_s = self._since_s = 0.0
        self._depth = 0

    @property
    def spent_s(self) -> float:
        """All of them up to now."""
        return self._past_s + (self._clock_s() - self._since_s if self._depth else 0.0)

    def __enter__(self) -> None:
        if not self._depth:
            self._since_s = self._clock_s()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        if self._depth == 1:
            self._past_s = self.spent_s
        self._depth -= 1


class Meter:
    """Clock of one rank's steps.  Every rank has one and calls it alike: norms and memory are of all ranks together."""

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        weights: Sequence[LocalTensor],
        stall: Stopwatch,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            weights: float32 masters that are this rank's own, each element of the model on one rank alone.
            stall: on while training waits for checkpoints.
        """
        self._ranks, self._weights, self._clock_s = ranks, weights, clock_s
        self._norms_every_steps = config.log_norms_every_steps
        self._peak_flops = 1e12 * peak_tflops_per_worker(config, ranks.device) * config.workers
        self._waited_s: dict[Wait, float] = {}
        self._stall = stall
        self.start()

    def start(self) -> None:
        """Start the clock, anew if something has passed that is none of the steps'."""
        self._since_s, self._stall_before_s = self._clock_s(), self._stall.spent_s

    @contextmanager
    def waiting_for(self, what: Wait) -> Iterator[None]:
        """Time that passes inside was spent waiting."""
        start_s = self._clock_s()
        try:
            yield
        finally:
            self._waited_s[what] = self._waited_s.get(what, 0.0) + self._clock_s() - start_s

    def end_step(self, step: int, num_tokens: int, flops_per_token: float) -> dict[str, float]:
        """Figures of the time since the last call, or since the clock was started.

        ``step_s`` is that time without checkpoints and validation, which have figures of their own, and with the wait
        for data.  Its part of what training has waited for checkpoints is ``checkpoint_stall_s``.  ``mfu``, the share
        of the peak that the model's own operations are (PaLM, arXiv 2204.02311, appendix B), stands there if the peak
        is known.  Norms and memory stand in every ``log_norms_every_steps``-th line.

        Args:
            step: which step has ended; collective where its line has norms.
            num_tokens: valid tokens of the global batch.
            flops_per_token: of a forward and a backward pass, without recomputation.
        """
        now_s = self._clock_s()
        waited_s, self._waited_s = self._waited_s, {}
        stall_s = self._stall.spent_s - self._stall_before_s
        step_s = now_s - self._since_s - stall_s - waited_s.get("validation", 0.0)
        self._since_s, self._stall_before_s = now_s, self._stall.spent_s
        tokens_per_s = num_tokens / step_s
        figures = {"step_s": round(step_s, 4), "tokens_per_s": round(tokens_per_s, 1)}
        figures["checkpoint_stall_s"] = round(stall_s, 4)
        figures |= {_WAIT_KEYS[what]: round(seconds, 4) for what, seconds in waited_s.items()}
        if self._peak_flops:
            figures["mfu"] = round(tokens_per_s * flops_per_token / self._peak_flops, 4)
        if self._norms_every_steps and step % self._norms_every_steps == 0:
            figures |= self._norms_and_memory()
        return figures

    def _norms_and_memory(self) -> dict[str, float]:
        """Norm of all weights, and the memory of the rank that has needed most."""
        own = sum_of_squares(self._weights), peak_resident_bytes(), peak_gpu_bytes(self._ranks.device)
        squares, resident, gpu = zip(*self._ranks.of_all(own), strict=True)
        figures = {"weight_norm": math.sqrt(sum(squares)), "peak_resident_bytes": max(resident)}
        return figures | ({"peak_gpu_bytes": max(gpu)} if max(gpu) else {})


def peak_tflops_per_worker(config: PretrainConfig, device: Any) -> float:
    """Peak that MFU is told against, in 10^12 operations a second: as configured, else of a known GPU; 0 if unknown.

    The table has bfloat16 only, so that float32 has no peak unless one is configured.
    """
    if config.peak_tflops_per_worker or device.type != "cuda" or config.precision != "bf16":
        return config.peak_tflops_per_worker
    import torch

    return peak_tflops(torch.cuda.get_device_name(device))


def sum_of_squares(weights: Sequence[LocalTensor]) -> float:
    """Sum in float64 of the squares of all elements that the runs name; padding does not count."""
    import torch

    totals: dict[Any, Any] = {}
    for local in weights:
        flat = local.tensor.detach().reshape(-1)
        total = totals.setdefault(flat.device, torch.zeros((), dtype=torch.float64, device=flat.device))
        for start, end in _stretches(local.runs):
            for piece in flat[start:end].split(_PIECE_NUMEL):
                total += torch.linalg.vector_norm(piece, dtype=torch.float64).square()
    return sum(float(total) for total in totals.values())


def _stretches(runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """Elements of a tensor that runs cover, those that touch as one: a call for each would wait for the device."""
    start = end = 0
    for run in sorted(runs, key=lambda run: run.offset):
        if run.offset != end:
            if end > start:
                yield start, end
            start = run.offset
        end = run.offset + run.numel
    if end > start:
        yield start, end


def peak_resident_bytes() -> int:
    """The most memory that this process has held at once, as resident set.

    Linux keeps it in /proc since the program was started; ``getrusage`` would count what its parent held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes(device: Any) -> int:
    """The most memory that tensors of this process have held on its GPU at once; 0 without one."""
    if device.type != "cuda":
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)
