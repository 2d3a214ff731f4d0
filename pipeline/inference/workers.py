"""Processes that put questions to one model, each with the weights opened once, and a GPU of its own if there are any.

What comes back does not depend on how many there are: pieces of work are cut before they are handed out, and every
process computes with one thread.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.inference.model import OpenModel, open_model

P = TypeVar("P")
R = TypeVar("R")


class Workers:
    """One model in several processes; a single worker is this process."""

    def __init__(self, weights: Path, tokenizer: Path, device: str = "auto", num_workers: int = 1) -> None:
        self._opened = (weights, tokenizer)
        self._device, self._num_workers = device, num_workers
        self._pool: ProcessPoolExecutor | None = None

    def map(
        self, ask: Callable[[OpenModel, P], R], pieces: Sequence[P], done: Callable[[], object] = lambda: None
    ) -> list[R]:
        """``ask`` of every piece, in their order; they are begun in that order too, so the longest should come first.

        ``done`` is called here after each.  Raises what ``ask`` raises, and RuntimeError where a worker dies.
        """
        if self._num_workers == 1:
            return list(self._alone(ask, pieces, done))
        pool = self._pool = self._pool or self._start()
        waiting = [pool.submit(_ask, self._opened, ask, piece) for piece in pieces]
        try:
            for future in as_completed(waiting):
                future.result()
                done()
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError(
                f"one of {self._num_workers} workers died; most often the system killed it for want of memory, of "
                "which fewer workers, or fewer rows in a batch, need less"
            ) from error
        except BaseException:
            _cancel(waiting)
            raise
        return [future.result() for future in waiting]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _alone(self, ask: Callable[..., Any], pieces: Sequence[Any], done: Callable[[], object]) -> Iterator[Any]:
        with _one_thread():
            model = open_model(*self._opened, self._device)
            for piece in pieces:
                yield ask(model, piece)
                done()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self._num_workers, context, initializer=_begin, initargs=(self._device, context.Value("i", 0))
        )


def _cancel(waiting: Sequence[Future[Any]]) -> None:
    for future in waiting:
        future.cancel()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over parts of a matrix depend on how many threads share them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_own_device = ""
"""Of a worker."""


def _begin(device: str, started: Any) -> None:
    global _own_device
    import torch

    with started.get_lock():
        number = started.value
        started.value += 1
    torch.set_num_threads(1)
    num_gpus = torch.cuda.device_count()
    shares_gpus = device in ("auto", "cuda") and num_gpus > 0
    _own_device = f"cuda:{number % num_gpus}" if shares_gpus else device


def _ask(opened: tuple[Path, Path], ask: Callable[[OpenModel, Any], Any], piece: Any) -> Any:
    return ask(open_model(*opened, _own_device), piece)
