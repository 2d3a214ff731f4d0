"""A training state made by hand, cut over ranks in several ways, and ranks that are threads of one process."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import fingerprint
from pipeline.pretrain.checkpoint import load_checkpoint_manifest
from pipeline.pretrain.fragments import Run
from pipeline.pretrain.saving import Belonging, Checkpointer
from pipeline.pretrain.writer import Held
from pipeline.stage import StageContext
from pipeline.training_state import MASTER, StateFiles, checkpoint_name, list_checkpoints
from tests.support.tiny_run import tiny

SHAPES: dict[str, list[int]] = {"embed.weight": [7, 5], "gate": [], "norm.weight": [5], "blocks.0.head.weight": [3, 11]}
"""Sizes that nothing divides, so that cuts go through rows and parts are padded."""
KEPT = (MASTER, "exp_avg", "exp_avg_sq")
_GRACE_S = 1.0
Full = dict[tuple[str, str], Tensor]
"""Every element of the state, flat: by (which tensor, parameter)."""


def numel(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    return int(torch.Size(shape).numel())


def distinct(seed: int = 0, kept: Sequence[str] = KEPT, shapes: Mapping[str, Sequence[int]] = SHAPES) -> Full:
    """A state of numbers that are all different."""
    keys = [(which, name) for which in kept for name in shapes]
    sizes = [numel(shapes[name]) for _, name in keys]
    numbers = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed)).float() + 10_000 * (seed + 1)
    return {key: part.clone() for key, part in zip(keys, numbers.split(sizes), strict=True)}


Cut = Callable[[Mapping[str, Sequence[int]], int, int], list[tuple[int, tuple[Run, ...]]]]
"""(shapes, rank, workers) -> size and runs of each flat tensor that a rank holds."""


def like_zero_1(shapes: Mapping[str, Sequence[int]], rank: int, workers: int) -> list[tuple[int, tuple[Run, ...]]]:
    """All parameters in a row, padded, cut into equal slices."""
    sizes = [numel(shape) for shape in shapes.values()]
    size = -(-sum(sizes) // workers)
    begin, runs = rank * size, []
    for name, count, place in zip(shapes, sizes, [0, *accumulate(sizes)], strict=False):
        low, high = max(place, begin), min(place + count, begin + size)
        if low < high:
            runs.append(Run(name, low - place, high - low, low - begin))
    return [(size, tuple(runs))]


def like_zero_3(shapes: Mapping[str, Sequence[int]], rank: int, workers: int) -> list[tuple[int, tuple[Run, ...]]]:
    """Each parameter padded and cut into equal slices; two tensors of these."""
    names, found = list(shapes), []
    for group in (names[:2], names[2:]):
        runs, offset = [], 0
        for name in group:
            count = numel(shapes[name])
            size = -(-count // workers)
            here = max(0, min(size, count - rank * size))
            if here:
                runs.append(Run(name, rank * size, here, offset))
            offset += size
        found.append((offset, tuple(runs)))
    return found


def like_zero_0(shapes: Mapping[str, Sequence[int]], rank: int, workers: int) -> list[tuple[int, tuple[Run, ...]]]:
    """Every rank holds everything; the last one is to write it."""
    return [(numel(shape), (Run(name, 0, numel(shape), 0),)) for name, shape in shapes.items()]


CUTS: dict[str, Cut] = {"0": like_zero_0, "1": like_zero_1, "3": like_zero_3}


class HandState:
    """What one rank holds of a state."""

    def __init__(self, full: Full, cut: Cut, rank: int, workers: int, shapes: Mapping[str, Sequence[int]]) -> None:
        self._holds_all = cut is like_zero_0 and rank != workers - 1
        self.optimizer_steps, self.skipped_steps, self.went_on = 0, 0, -1
        kept = {which for which, _ in full}
        self._held: list[Held] = []
        for size, runs in cut(shapes, rank, workers):
            tensors = {which: torch.full((size,), -1.0) for which in sorted(kept)}
            for which, tensor in tensors.items():
                for run in runs:
                    part = full[which, run.name][run.start : run.start + run.numel]
                    tensor[run.offset : run.offset + run.numel] = part
            self._held.append(Held(tensors, runs))

    def held(self) -> list[Held]:
        return self._held

    def written(self, rank: int) -> list[Held]:
        return [Held(held.tensors, () if self._holds_all else held.runs) for held in self._held]

    def go_on(self, step: int, optimizer_steps: int, skipped_steps: int) -> None:
        self.went_on, self.optimizer_steps, self.skipped_steps = step, optimizer_steps, skipped_steps

    def change(self, by: float) -> None:
        """What an optimizer step does to everything."""
        for held in self._held:
            for tensor in held.tensors.values():
                tensor += by

    def padding(self) -> Iterator[Tensor]:
        """Elements that no run names."""
        for held in self._held:
            is_padding = torch.ones(next(iter(held.tensors.values())).numel(), dtype=torch.bool)
            for run in held.runs:
                is_padding[run.offset : run.offset + run.numel] = False
            yield from (tensor[is_padding] for tensor in held.tensors.values())


def assembled(states: Sequence[HandState], shapes: Mapping[str, Sequence[int]] = SHAPES) -> Full:
    """The whole state, from what the ranks hold."""
    kept = {which for held in states[0].held() for which in held.tensors}
    full = {(which, name): torch.full((numel(shapes[name]),), float("nan")) for which in kept for name in shapes}
    for state in states:
        for held in state.held():
            for which, tensor in held.tensors.items():
                for run in held.runs:
                    part = tensor[run.offset : run.offset + run.numel]
                    full[which, run.name][run.start : run.start + run.numel] = part
    return full


def assert_equal(found: Full, wanted: Full) -> None:
    """Same tensors, bit for bit."""
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


class ThreadRanks:
    """The collectives of ``Ranks`` between threads."""

    device = "cpu"

    def __init__(self, rank: int, workers: int, barrier: threading.Barrier, words: list[Any]) -> None:
        self.rank, self.workers, self._barrier, self._words = rank, workers, barrier, words

    def of_all(self, value: Any) -> list[Any]:
        self._words[self.rank] = value
        self._barrier.wait()
        said = list(self._words)
        self._barrier.wait()
        return said

    def from_first(self, value: Any) -> Any:
        return self.of_all(value)[0]

    def sum(self, value: Any) -> Any:
        return sum(self.of_all(value))

    def any(self, value: bool) -> bool:
        return any(self.of_all(value))


def together(work: Callable[[ThreadRanks], Any], workers: int = 2) -> list[Any]:
    """What every rank returns, or the exception that it raised."""
    barrier, words = threading.Barrier(workers, timeout=20), [None] * workers
    results: list[Any] = [None] * workers

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, workers, barrier, words))
        except Exception as error:  # noqa: BLE001 - given to the test
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not any(isinstance(found, Exception) for found in results):
        time.sleep(0.005)
    for thread in threads:
        thread.join(_GRACE_S)
    barrier.abort()  # a rank that waits for one that has failed waits for ever
    for thread in threads:
        thread.join()
    return results


def succeeded(work: Callable[[ThreadRanks], Any], workers: int = 2) -> list[Any]:
    """What every rank returns; its exception if one raises."""
    results = together(work, workers)
    for result in sorted(results, key=lambda r: isinstance(r, threading.BrokenBarrierError)):
        if isinstance(result, Exception):
            raise result
    return results


def checkpointer(
    directory: Path,
    state: HandState,
    ranks: Any,
    *,
    zero_stage: Any = 1,
    identity: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] = SHAPES,
    fence: Callable[[], None] = lambda: None,
    **changes: Any,
) -> Checkpointer:
    """Of one rank, over a state made by hand."""
    config = tiny(workers=ranks.workers, global_batch_seqs=12, zero_stage=zero_stage, **changes)
    known = dict(identity or {"config": {"lr": 0.1, "data_seed": 0}})
    own = fingerprint(known)
    context = StageContext(directory / "out", directory, own, fence=fence)
    return Checkpointer(config, context, state, ranks, Belonging(own, known, shapes))


def state_of(ranks: ThreadRanks, full: Full, cut: str = "1") -> HandState:
    return HandState(full, CUTS[cut], ranks.rank, ranks.workers, SHAPES)


def saved(directory: Path, step: int) -> Full:
    """All numbers of a published checkpoint, which verifies."""
    path = directory / checkpoint_name(step)
    files = StateFiles(path, load_checkpoint_manifest(path))
    return {key: torch.from_numpy(files.whole(*key)).flatten() for key in distinct()}


def steps_in(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]


def train(saver: Checkpointer, state: HandState, steps: range, every: int = 2) -> list[dict[str, float]]:
    """What the loop does: a step, a poll, a save when it is due.  Returns the figures of every step."""
    figures = []
    for step in steps:
        saver.release_state()
        state.change(by=1.0)
        figures.append(saver.poll())
        if (step + 1) % every == 0:
            saver.save(step + 1)
    return figures
