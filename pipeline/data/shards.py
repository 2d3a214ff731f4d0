"""Token shards: Arrow IPC files whose values are the flat token stream and whose offsets are the documents.

Two columns, ``tokens: list<uint16 | uint32>`` and ``offset: int64``: one list a document, the end-of-document token
included, and offset 0.  A giant document is several lists, with the number of its tokens before each.  A shard is
mapped back into memory, and its values are used without a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from pipeline.data.arrays import to_arrow, to_numpy
from pipeline.errors import CorruptionError, is_bad_format

BATCH_TOKENS = 16 * 1024 * 1024
"""Tokens after which a record batch ends; a list is never cut."""


def token_type(vocab_size: int) -> pa.DataType:
    """The narrowest unsigned type that holds every id of a vocabulary."""
    return pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()


def _schema(vocab_size: int) -> pa.Schema:
    fields = [("tokens", pa.list_(token_type(vocab_size))), ("offset", pa.int64())]
    return pa.schema(fields, metadata={"vocab_size": str(vocab_size)})


@dataclass(frozen=True)
class Segments:
    """Tokens of documents, or of parts of them, one after another."""

    values: np.ndarray
    """Token ids, flat."""
    lengths: np.ndarray
    """Tokens of each segment."""
    offsets: np.ndarray
    """Tokens of its document before each segment: 0 where one begins."""

    def split(self, number: int) -> "tuple[Segments, Segments]":
        """The first ``number`` segments, and the others."""
        at = int(self.lengths[:number].sum())
        head = Segments(self.values[:at], self.lengths[:number], self.offsets[:number])
        return head, Segments(self.values[at:], self.lengths[number:], self.offsets[number:])


class ShardWriter:
    """Writes a shard; where its batches end depends on the tokens alone, not on how they arrive."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._type = token_type(vocab_size)
        self._schema = _schema(vocab_size)
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._pending: list[Segments] = []
        self._pending_tokens = 0
        self.num_docs = self.num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None and self._pending:
            self._flush()
        self._writer.close()
        self._sink.close()

    def write(self, segments: Segments) -> None:
        """Append segments; OverflowError for an id that the vocabulary's type does not hold."""
        self.num_docs += int((segments.offsets == 0).sum())
        self.num_tokens += len(segments.values)
        rest = segments
        while len(rest.lengths):
            room = BATCH_TOKENS - self._pending_tokens
            part, rest = rest.split(int(np.searchsorted(np.cumsum(rest.lengths), room)) + 1)
            self._pending.append(part)
            self._pending_tokens += len(part.values)
            if self._pending_tokens >= BATCH_TOKENS:
                self._flush()

    def _flush(self) -> None:
        columns = ("values", "lengths", "offsets")
        values, lengths, offsets = (np.concatenate([getattr(part, c) for part in self._pending]) for c in columns)
        width = np.iinfo(self._type.to_pandas_dtype())
        if len(values) and not 0 <= values.min() <= values.max() <= width.max:
            raise OverflowError(f"token ids {values.min()} to {values.max()} do not fit into {self._type}")
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(to_arrow(ends), to_arrow(values.astype(width.dtype, copy=False)))
        batch = pa.RecordBatch.from_arrays([lists, to_arrow(offsets.astype(np.int64))], schema=self._schema)
        self._writer.write_batch(batch)
        self._pending, self._pending_tokens = [], 0


@dataclass(frozen=True)
class FlatTokens:
    """The tokens of one or more shards as one flat sequence, mapped into memory."""

    pieces: tuple[np.ndarray, ...]
    """Flat token arrays, in order."""
    piece_starts: np.ndarray
    """Index of the first token of each piece; one longer than ``pieces``."""
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return int(self.piece_starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens [start, stop) in the type they are stored in, without a copy if they lie in one piece."""
        start, stop, _ = where.indices(self.num_tokens)
        first = int(np.searchsorted(self.piece_starts, start, side="right")) - 1
        begin = int(self.piece_starts[first])
        if first < len(self.pieces) and stop - begin <= len(self.pieces[first]):
            return self.pieces[first][start - begin : stop - begin]
        parts = [
            piece[max(0, start - at) : max(0, stop - at)]
            for piece, at in zip(self.pieces[first:], self.piece_starts[first:].tolist(), strict=False)
            if at < stop
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=token_type(self.vocab_size).to_pandas_dtype())


@dataclass(frozen=True)
class TokenStream(FlatTokens):
    """Tokens with the document boundaries."""

    doc_starts: np.ndarray
    """Index of the first token of each document; one longer than their number."""

    @property
    def doc_lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.doc_starts)


def map_batches(path: Path, schema: pa.Schema, trusted: bool = False) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Schema and batches of an Arrow file of these columns, mapped into memory.

    Unless ``trusted`` (the same bytes have passed before) every offset is checked: Arrow does not do so by itself and
    would read outside the file.  Raises ValueError, OSError or pa.ArrowException.
    """
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        if not reader.schema.equals(schema):
            raise ValueError(f"its columns are {reader.schema.to_string(show_schema_metadata=False)}")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    for batch in batches if not trusted else ():
        batch.validate(full=True)
        if any(column.null_count for column in batch.columns):
            raise ValueError("it holds nulls")
    return reader.schema, batches


def _map_shard(path: Path, trusted: bool) -> tuple[int, list[pa.RecordBatch]]:
    """Vocabulary size and batches of a shard."""
    try:
        with pa.memory_map(str(path)) as source:
            vocab_size = int((pa.ipc.open_file(source).schema.metadata or {})[b"vocab_size"])
        _, batches = map_batches(path, _schema(vocab_size), trusted)
        for batch in batches if not trusted else ():
            values = batch.column(0).values
            if values.null_count:
                raise ValueError("it holds nulls")
            highest = to_numpy(values).max(initial=0)
            if len(values) and highest >= vocab_size:
                raise ValueError(f"token id {highest} is outside the vocabulary of {vocab_size}")
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        if not is_bad_format(error):
            raise
        raise CorruptionError(f"{path} is not a valid token shard: {error}") from error
    return vocab_size, batches


def _values(batch: pa.RecordBatch) -> np.ndarray:
    lists = batch.column(0)
    ends = lists.offsets
    return to_numpy(lists.values)[ends[0].as_py() : ends[-1].as_py()]


def open_tokens(path: Path, trusted: bool = False) -> FlatTokens:
    """Map the tokens of one shard; see ``open_stream``."""
    vocab_size, batches = _map_shard(path, trusted)
    pieces = tuple(_values(batch) for batch in batches)
    return FlatTokens(pieces, np.cumsum([0] + [len(piece) for piece in pieces]), vocab_size)


def open_stream(paths: Sequence[Path]) -> TokenStream:
    """Map shards into memory, fully validated, in the order given.

    The paths must have been verified against their manifest (artifact.checked_files).  Raises CorruptionError.
    """
    if not paths:
        raise CorruptionError("there is no token shard to open")
    pieces: list[np.ndarray] = []
    begins: list[np.ndarray] = []
    total = 0
    vocab_sizes: set[int] = set()
    for path in paths:
        vocab_size, batches = _map_shard(path, trusted=False)
        vocab_sizes.add(vocab_size)
        for batch in batches:
            ends = to_numpy(batch.column(0).offsets)
            begins.append((ends[:-1].astype(np.int64) - ends[0] + total)[to_numpy(batch.column(1)) == 0])
            pieces.append(_values(batch))
            total += len(pieces[-1])
    if len(vocab_sizes) != 1:
        raise CorruptionError(f"shards of different vocabularies {sorted(vocab_sizes)} in {paths[0].parent}")
    (vocab_size,) = vocab_sizes
    piece_starts = np.cumsum([0] + [len(piece) for piece in pieces])
    doc_starts = np.concatenate([*begins, np.array([total], dtype=np.int64)])
    if total and doc_starts[0] != 0:
        raise CorruptionError(f"{paths[0]} is not a valid token shard: it begins in the middle of a document")
    return TokenStream(tuple(pieces), piece_starts, vocab_size, doc_starts)
