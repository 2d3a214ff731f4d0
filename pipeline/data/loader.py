"""Rows of a step by their global sample ids: the whole state of the loader is one integer.

(data_seed, sample id) gives the same row for any number of ranks, any micro batch and after any resume:

    sample id  -- mixture -->  source, which of its samples  -- permutation of the epoch -->  row  -->  shard, row in it
"""

import difflib
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.data.mixture import MixtureSchedule, whole_weights
from pipeline.data.order import row_at, stream_number
from pipeline.data.rows import PackedRows
from pipeline.data.shards import FlatTokens, token_type
from pipeline.data.verified import Verified
from pipeline.errors import UserError

EVERYTHING = ""
"""Name of the one pool of rows where no weights are given."""
_BLOCK = 8192
"""Samples whose places are worked out together; has no effect on them."""
_MAX_OPEN_SHARDS = 4096
"""Each is two mappings of memory, of which Linux allows a process some 65,000."""
_POLL_S = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class RowBatch:
    """Rows as the model sees them, on the host."""

    sample_ids: np.ndarray
    """Global sample ids, int64 [rows]."""
    x0: np.ndarray
    """Token ids, int64 [rows, seq_len]; pad_token_id where doc_ids is -1."""
    segments: list[tuple[np.ndarray, int, int]] = field(repr=False)
    """Of each row: lengths of its shard's segments, and which of them are the row."""

    @cached_property
    def lengths(self) -> list[np.ndarray]:
        """Tokens of the segments of each row from left to right, int32; negative for padding."""
        return [lengths[first:stop] for lengths, first, stop in self.segments]

    @cached_property
    def doc_ids(self) -> np.ndarray:
        """Document of each token, counted within its row from 0, int32 [rows, seq_len]; -1 for padding."""
        counts = np.fromiter((stop - first for _, first, stop in self.segments), np.int64, len(self.segments))
        lengths = np.frombuffer(b"".join(self.lengths), dtype=np.int32)  # pyright: ignore[reportArgumentType]
        is_text = lengths > 0
        number = np.cumsum(is_text, dtype=np.int32) - 1
        first = np.cumsum(counts) - counts
        before = np.repeat(number[first] + ~is_text[first], counts)
        ids = np.where(is_text, number - before, -1).astype(np.int32)
        return np.repeat(ids, np.abs(lengths)).reshape(self.x0.shape)


@dataclass(frozen=True)
class _Pool:
    """Rows that one share of the mixture is drawn from."""

    name: str
    shards: np.ndarray
    """Numbers of its shards."""
    row_ends: np.ndarray
    """Rows in its shards up to and including each."""

    @property
    def num_rows(self) -> int:
        return int(self.row_ends[-1])

    def locate(self, data_seed: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard, and row in it, of the pool's samples of these numbers."""
        stream = stream_number(self.name) if self.name else 0
        row = row_at(data_seed, stream, self.num_rows, index)
        place = np.searchsorted(self.row_ends, row, side="right")
        before = np.concatenate([[0], self.row_ends[:-1]])
        return self.shards[place], row - before[place]


class _OpenShard(NamedTuple):
    """What the loop over rows touches, as memory views where single numbers are wanted: NumPy's scalars cost more."""

    tokens: memoryview | FlatTokens
    starts: memoryview
    firsts: memoryview
    lengths: memoryview
    segments: np.ndarray


class Loader:
    """Looks up rows by global sample id.  What it keeps in memory are open shards, mapped from disk."""

    def __init__(
        self,
        rows: PackedRows,
        data_seed: int,
        pad_token_id: int,
        mixture: Mapping[str, float] | None = None,
        verified: Verified | None = None,
    ) -> None:
        """``mixture``: shares of rows by source; without it every row comes once an epoch.

        Raises UserError for a source that is not there or has no rows, for weights that cannot be scheduled, and for a
        padding id outside the vocabulary.
        """
        if not 0 <= pad_token_id < rows.vocab_size:
            raise UserError(f"pad_token_id is {pad_token_id}; it must lie in the vocabulary of {rows.vocab_size}")
        self._rows, self._data_seed, self._verified = rows, data_seed, verified
        self._padding = np.full(rows.seq_len, pad_token_id, dtype=token_type(rows.vocab_size).to_pandas_dtype())
        self._pools, self._schedule = _pools(rows, mixture or {})
        self._open: dict[int, _OpenShard] = {}
        self._blocks: dict[int, tuple[list[int], list[int]]] = {}

    def batch(self, sample_ids: npt.ArrayLike) -> RowBatch:
        """The rows of some global sample ids, integers [rows].

        Raises ValueError for none, negative ones and what is no array of integers, CorruptionError for a damaged shard.
        """
        ids = np.asarray(sample_ids)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
            raise ValueError(f"sample_ids are {sample_ids!r}; one or more integers are needed, none below 0")
        seq_len, padding = self._rows.seq_len, self._padding.data
        tokens: list[Any] = []
        segments: list[Any] = []
        for number, row in zip(*self._places(ids), strict=True):
            values, starts, firsts, lengths, shard_segments = self._open.get(number) or self._open_shard(number)
            start, stop = starts[row], firsts[row + 1]
            last = lengths[stop - 1]
            if last < 0:
                tokens.append(values[start : start + seq_len + last])
                tokens.append(padding[:-last])
            else:
                tokens.append(values[start : start + seq_len])
            segments.append((shard_segments, firsts[row], stop))
        # Joined as bytes, and slices of memory views rather than arrays: the quickest way to put many together.
        flat = np.frombuffer(b"".join(tokens), dtype=self._padding.dtype)
        return RowBatch(ids, flat.astype(np.int64).reshape(-1, seq_len), segments)

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard, and row in it, of each global sample id."""
        source, index = self._schedule.locate(sample_ids)
        shard, row = np.empty_like(index), np.empty_like(index)
        for number, pool in enumerate(self._pools):
            here = np.flatnonzero(source == number)
            shard[here], row[here] = pool.locate(self._data_seed, index[here])
        return shard, row

    def _places(self, sample_ids: np.ndarray) -> tuple[list[int], list[int]]:
        """``locate`` as lists; consecutive ids, which training asks for, are worked out many at a time."""
        first, end = int(sample_ids[0]), int(sample_ids[-1]) + 1
        if end - first != len(sample_ids) or (np.diff(sample_ids) != 1).any():
            return _lists(self.locate(sample_ids))
        shards: list[int] = []
        rows: list[int] = []
        while first < end:
            number, place = divmod(first, _BLOCK)
            if number not in self._blocks:
                block = np.arange(number * _BLOCK, (number + 1) * _BLOCK)
                self._blocks = {**dict(list(self._blocks.items())[-1:]), number: _lists(self.locate(block))}
            stop = min(_BLOCK, place + end - first)
            block_shards, block_rows = self._blocks[number]
            shards += block_shards[place:stop]
            rows += block_rows[place:stop]
            first += stop - place
        return shards, rows

    def epochs(self, sample_id: int) -> dict[str, float]:
        """Times that each source has been shown by the samples before this one (EVERYTHING without a mixture)."""
        counts = self._schedule.num_before(sample_id)
        return {pool.name: count / pool.num_rows for pool, count in zip(self._pools, counts, strict=True)}

    def _open_shard(self, number: int) -> "_OpenShard":
        if len(self._open) >= _MAX_OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        shard = self._rows.open_shard(number, self._verified)
        whole = len(shard.tokens.pieces) == 1
        plan = shard.plan
        self._open[number] = _OpenShard(
            shard.tokens.pieces[0].data if whole else shard.tokens,
            shard.start.data,
            plan.row_starts.data,
            plan.length.data,
            plan.length,
        )
        return self._open[number]


def _lists(columns: tuple[np.ndarray, np.ndarray]) -> tuple[list[int], list[int]]:
    return columns[0].tolist(), columns[1].tolist()


def _pools(rows: PackedRows, mixture: Mapping[str, float]) -> tuple[list[_Pool], MixtureSchedule]:
    if not mixture:
        return [_pool(EVERYTHING, rows, tuple(range(len(rows.shards))))], MixtureSchedule((1,))
    for name in mixture:
        if name not in rows.by_source:
            close = difflib.get_close_matches(name, rows.by_source, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the sources are {', '.join(rows.by_source)}"
            raise UserError(f"the mixture names {name!r}, which is no source of {rows.directory}; {hint}")
    try:
        weights = whole_weights(mixture)
    except ValueError as error:
        raise UserError(str(error)) from None
    names = sorted(weights)
    pools = [_pool(name, rows, rows.by_source[name]) for name in names]
    return pools, MixtureSchedule(tuple(weights[name] for name in names))


def _pool(name: str, rows: PackedRows, shards: tuple[int, ...]) -> _Pool:
    row_ends = np.cumsum([rows.shards[number].rows for number in shards])
    if not len(row_ends) or not row_ends[-1]:
        raise UserError(f"{rows.directory} has no rows{f' of the source {name}' if name else ''} to train on")
    return _Pool(name, np.array(shards), row_ends)


@contextmanager
def prefetched(items: Iterator[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """The same items, made ahead by a thread, at most ``depth`` of them waiting; what raises there raises here."""
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    is_over = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not is_over.is_set():
            try:
                return waiting.put((item, error), timeout=_POLL_S)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if is_over.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001 - raised by the thread that takes the items
            put(None, error)

    def take() -> Iterator[T]:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType]

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        is_over.set()
        thread.join()
