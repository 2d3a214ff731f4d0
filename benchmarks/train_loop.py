"""The loop of the pretraining stage and the bare step of its engine in turn, with torch.save beside its checkpoints."""

import json
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_step import BareStep
from benchmarks.command import RefusedError
from benchmarks.interleave import interleave
from pipeline.pretrain.batches import Batch, micro_batches
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.engine import leave_process_group, prepare_process
from pipeline.pretrain.held import EngineState
from pipeline.pretrain.loop import Training, train
from pipeline.pretrain.run import METRICS_FILE, make_tracker, make_training
from pipeline.pretrain.watchdog import Watchdog
from pipeline.stage import StageContext, Stopped
from pipeline.tracking import MetricsLog, Tracker

LOOP, BARE = "whole loop", "bare step"


@dataclass(frozen=True)
class Timed:
    """What was measured, a number a round."""

    num_params: int
    state_bytes: int
    """Of what a checkpoint holds."""
    tokens_per_step: float
    loop_step_s: list[float]
    """Of all steps between the first and the last of a round, the checkpoint among them included."""
    bare_step_s: list[float]
    checkpoint_stall_s: list[float]
    """For which the loop waited at the checkpoint of a round."""
    torch_save_s: list[float]
    """Until it returns: the file is in the page cache."""
    torch_save_synced_s: list[float]
    """Until the file is on the disk, as a checkpoint of ours is when it is published."""
    parts_ms: dict[str, float]
    """Medians of what a step of the loop has and the bare step has not."""

    def figures(self) -> dict[str, Any]:
        """For the report."""
        times = ("loop_step_s", "bare_step_s", "checkpoint_stall_s", "torch_save_s", "torch_save_synced_s")
        median_s = statistics.median(self.loop_step_s), statistics.median(self.bare_step_s)
        return {
            "num_params": self.num_params,
            "state_bytes": self.state_bytes,
            "tokens_per_s": [round(self.tokens_per_step / s, 1) for s in median_s],
            **{name: [round(s, 5) for s in getattr(self, name)] for name in times},
            "parts_ms": {name: round(ms, 2) for name, ms in self.parts_ms.items()},
        }


@dataclass
class _Stretch:
    """Lets the loop run a stretch of steps, asked to stop like a training before its time limit, and keeps the time."""

    end: int = 0
    done: int = 0
    ends_s: list[float] = field(default_factory=list[float])
    """When each step of the stretch had been told of."""

    def progress(self, done: int, total: int, **figures: float) -> None:
        """What the loop calls at every step."""
        self.done = done
        self.ends_s.append(time.perf_counter())

    def should_stop(self) -> bool:
        """Whether the stretch is over."""
        return self.done >= self.end

    def run(self, training: Training, tracker: Tracker, num_steps: int) -> float:
        """Seconds a step of so many more steps, from the end of the first to that of the last."""
        self.end += num_steps
        self.ends_s.clear()
        with suppress(Stopped):
            train(training, self.done, tracker)
        if len(self.ends_s) != num_steps:
            raise RefusedError(f"the loop took {len(self.ends_s)} steps of {num_steps}")
        return (self.ends_s[-1] - self.ends_s[0]) / (num_steps - 1)


def measure_training(
    config: PretrainConfig, inputs: Mapping[str, Path], root: Path, warm_up_steps: int, bare_steps: int, num_rounds: int
) -> Timed:
    """Rounds of one checkpoint interval of the loop, and so many bare steps; to be called in a process of its own.

    The warm-up is shorter than an interval, so that the checkpoint of a round lies within it: what is written while
    training goes on slows the loop, not the bare step.
    """
    prepare_process(config.threads_per_worker)
    state, out = root / "state", root / "out"
    state.mkdir()
    stretch = _Stretch()
    context = StageContext(out, state, "benchmark", progress=stretch.progress, should_stop=stretch.should_stop)
    with Watchdog(config.watchdog, 0, config.workers, state, context.failed) as watchdog:
        training, first_step = make_training(config, inputs, context, watchdog)
        log = training.checkpointer.log = MetricsLog(state / METRICS_FILE, first_step)
        num_params = training.model_config.num_params()
        bare = BareStep(config, training.engine, training.routers, _batches(training, 0))
        found: dict[str, list[float]] = {LOOP: [], BARE: []}
        plain_s: list[float] = []
        synced_s: list[float] = []
        with make_tracker(config, context, log, num_params) as tracker:

            def loop_round(number: int) -> None:
                found[LOOP].append(stretch.run(training, tracker, config.checkpoint_every_steps))
                plain, synced = save_plainly(training.engine, root / "plain.pt")
                plain_s.append(plain)
                synced_s.append(synced)

            def bare_round(number: int) -> None:
                start_s = time.perf_counter()
                bare.run(bare_steps)
                found[BARE].append((time.perf_counter() - start_s) / bare_steps)

            stretch.run(training, tracker, warm_up_steps)
            bare.run(warm_up_steps // 2)
            interleave({LOOP: loop_round, BARE: bare_round}, num_rounds)
        lines = [json.loads(line) for line in (state / METRICS_FILE).read_text().splitlines()]
        timed = Timed(
            num_params=num_params,
            state_bytes=sum(tensor.nbytes for held in _state(training.engine) for tensor in held.values()),
            tokens_per_step=lines[-1]["tokens"] / len(lines),
            loop_step_s=found[LOOP],
            bare_step_s=found[BARE],
            checkpoint_stall_s=_stalls(lines, warm_up_steps, config.checkpoint_every_steps),
            torch_save_s=plain_s,
            torch_save_synced_s=synced_s,
            parts_ms=_parts_ms(training, lines[warm_up_steps:]),
        )
        leave_process_group()
    return timed


def _batches(training: Training, step: int) -> list[Batch]:
    drawn = training.loader.rank_rows(step, 0)
    return list(micro_batches(training.config, drawn, training.special, step, 0))


def _stalls(lines: list[dict[str, Any]], warm_up_steps: int, every: int) -> list[float]:
    """Seconds for which each round has waited for its checkpoint, copies and agreement of the ranks together.

    Each line has what its step waited.  The first line of a round is left out: it tells of the checkpoint at which the
    round before was stopped.  RefusedError if not one checkpoint was published within its round.
    """
    found: list[float] = []
    for first in range(warm_up_steps, len(lines), every):
        of_round = lines[first + 1 : first + every]
        num_published = sum("checkpoint_s" in line for line in of_round)
        if num_published != 1:
            raise RefusedError(f"{num_published} checkpoints were published in a round of {every} steps; expected 1")
        found.append(sum(line["checkpoint_stall_s"] for line in of_round))
    return found


def _state(engine: Any) -> list[dict[str, torch.Tensor]]:
    """What a checkpoint holds: master weights, state of the optimizer, buffers."""
    return [dict(held.tensors) for held in EngineState(engine).held()]


def save_plainly(engine: Any, path: Path) -> tuple[float, float]:
    """Seconds that torch.save takes for the state, and those until it is on the disk too."""
    start_s = time.perf_counter()
    torch.save(_state(engine), path)
    saved_s = time.perf_counter() - start_s
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    synced_s = time.perf_counter() - start_s
    path.unlink()
    return saved_s, synced_s


def _parts_ms(training: Training, lines: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the wait for rows as the loop tells it, and of their noise, made again."""
    noise_s: list[float] = []
    for step in range(10):
        drawn = training.loader.rank_rows(step, 0)
        start_s = time.perf_counter()
        list(micro_batches(training.config, drawn, training.special, step, 0))
        noise_s.append(time.perf_counter() - start_s)
    return {
        "wait for rows": 1e3 * statistics.median(line["data_wait_s"] for line in lines),
        "noise": 1e3 * statistics.median(noise_s),
    }
