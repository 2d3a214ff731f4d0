"""Packed rows on disk: an index beside each shard of tokens, and the rows of a whole artifact.

``NAME.rows.arrow`` has the columns  ``start: int64``, the place of a row's first token in NAME.arrow,  and
``segments: list<struct<length: int32, document: int32, offset: int64>>``,  the row from left to right (RowPlan).
Padding at the end of a row is not stored with the tokens, padding within it is.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifact import FileRecord, checked_record, open_artifact
from pipeline.data.arrays import to_arrow, to_numpy
from pipeline.data.packing import PADDING, RowPlan
from pipeline.data.shards import FlatTokens, map_batches, open_tokens
from pipeline.data.verified import Verified
from pipeline.errors import CorruptionError, UserError, is_bad_format

INDEX_SUFFIX = ".rows.arrow"
_SEGMENT = pa.struct([("length", pa.int32()), ("document", pa.int32()), ("offset", pa.int64())])
_SCHEMA = pa.schema([("start", pa.int64()), ("segments", pa.list_(_SEGMENT))])


def stored_tokens(plan: RowPlan) -> np.ndarray:
    """Tokens of each row that are stored: all but the padding at its end."""
    if not plan.num_rows:
        return np.zeros(0, dtype=np.int64)
    lengths = np.abs(plan.length).astype(np.int64)
    last = plan.row_starts[1:] - 1
    lengths[last[plan.length[last] < 0]] = 0
    return np.add.reduceat(lengths, plan.row_starts[:-1])


def write_index(path: Path, plan: RowPlan) -> None:
    """Write the index of rows that are stored one after another."""
    stored = stored_tokens(plan)
    columns = [to_arrow(column) for column in (plan.length, plan.document, plan.offset)]
    segments = pa.StructArray.from_arrays(columns, fields=list(_SEGMENT))
    lists = pa.ListArray.from_arrays(to_arrow(plan.row_starts.astype(np.int32)), segments)
    batch = pa.RecordBatch.from_arrays([to_arrow(np.cumsum(stored) - stored), lists], schema=_SCHEMA)
    with pa.ipc.new_file(str(path), _SCHEMA) as writer:
        writer.write_batch(batch)


@dataclass(frozen=True)
class RowShard:
    """One shard of rows, mapped into memory."""

    tokens: FlatTokens
    start: np.ndarray
    """Place of each row's first token, int64 [num_rows]."""
    plan: RowPlan


def open_row_shard(tokens_path: Path, index_path: Path, seq_len: int, trusted: bool = False) -> RowShard:
    """Map a shard whose bytes have been verified; CorruptionError unless every row is whole and in its place.

    ``trusted``: the same bytes have passed before.
    """
    tokens = open_tokens(tokens_path, trusted)
    try:
        _, batches = map_batches(index_path, _SCHEMA, trusted)
        if len(batches) != 1:
            raise ValueError(f"it has {len(batches)} record batches instead of 1")
        lists = batches[0].column(1)
        columns = [to_numpy(lists.values.field(name)) for name in ("length", "document", "offset")]
        plan = RowPlan(to_numpy(lists.offsets), *columns)
        start = to_numpy(batches[0].column(0))
        if not trusted:
            _check_rows(plan, start, seq_len, tokens.num_tokens)
    except (ValueError, OSError, pa.ArrowException) as error:
        if not is_bad_format(error):
            raise
        raise CorruptionError(f"{index_path} is not a valid index of rows: {error}") from error
    return RowShard(tokens, start, plan)


def _check_rows(plan: RowPlan, start: np.ndarray, seq_len: int, num_tokens: int) -> None:
    if not plan.num_rows:
        return
    if plan.row_starts[0] != 0 or not (np.diff(plan.row_starts) > 0).all() or plan.row_starts[-1] != len(plan.length):
        raise ValueError("its rows are not runs of its segments")
    if (np.add.reduceat(np.abs(plan.length).astype(np.int64), plan.row_starts[:-1]) != seq_len).any():
        raise ValueError(f"a row does not have {seq_len} tokens")
    if ((plan.length < 0) != (plan.document == PADDING)).any():
        raise ValueError("padding is marked in one column and not in the other")
    if (start < 0).any() or (start + stored_tokens(plan) > num_tokens).any():
        raise ValueError(f"a row lies outside the {num_tokens} tokens")


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest of packed rows says of one shard."""

    name: str
    source: str
    rows: int
    docs: int
    tokens: int
    """Padding not counted."""


@dataclass(frozen=True)
class PackedRows:
    """The rows of an artifact.  Opening it has read the manifest alone; a shard is verified when it is first opened."""

    directory: Path
    seq_len: int
    vocab_size: int
    shards: tuple[ShardRecord, ...]
    stats: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, FileRecord] = field(repr=False)

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def by_source(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the shards of each source."""
        found: dict[str, list[int]] = {}
        for number, shard in enumerate(self.shards):
            found.setdefault(shard.source, []).append(number)
        return {source: tuple(numbers) for source, numbers in sorted(found.items())}

    def open_shard(self, number: int, verified: Verified | None = None) -> RowShard:
        """Map one shard, after its bytes were compared with the manifest and validated; only once with ``verified``.

        Raises CorruptionError.
        """
        record = self.shards[number]
        tokens, index = (self.files[f"{record.name}{suffix}"] for suffix in (".arrow", INDEX_SUFFIX))
        paths = self.directory / tokens.path, self.directory / index.path

        def verify() -> None:
            for file in (tokens, index):
                checked_record(self.directory, file)
            shard = open_row_shard(*paths, self.seq_len)
            if shard.tokens.vocab_size != self.vocab_size or shard.plan.num_rows != record.rows:
                raise CorruptionError(
                    f"{paths[0]} holds {shard.plan.num_rows} rows of a vocabulary of {shard.tokens.vocab_size}; the "
                    f"manifest says {record.rows} and {self.vocab_size}"
                )

        if missing := [path for path in paths if not path.is_file()]:
            raise CorruptionError(f"{missing[0]} is missing although it was committed")
        if verified is None:
            verify()
        else:
            verified.once(paths, f"{tokens.sha256} {index.sha256}", verify)
        return open_row_shard(*paths, self.seq_len, trusted=True)

    def documents(self, number: int, verified: Verified | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Number and tokens of each document of a shard, put together again from the rows."""
        shard = self.open_shard(number, verified)
        plan = shard.plan
        row = np.repeat(np.arange(plan.num_rows), np.diff(plan.row_starts))
        ends = np.cumsum(np.abs(plan.length).astype(np.int64))
        within = ends - np.abs(plan.length) - row * self.seq_len
        order = np.lexsort((plan.offset, plan.document))
        order = order[plan.document[order] != PADDING]
        edges = np.flatnonzero(np.diff(plan.document[order], prepend=-1, append=np.iinfo(np.int32).max))
        for first, stop in itertools.pairwise(edges):
            own = order[first:stop]
            begins = (shard.start[row[own]] + within[own]).tolist()
            parts = [shard.tokens[b : b + n] for b, n in zip(begins, plan.length[own].tolist(), strict=True)]
            yield int(plan.document[own[0]]), np.concatenate(parts)


def open_rows(directory: Path | str) -> PackedRows:
    """The packed rows of an artifact, from its manifest alone.  Raises UserError, CorruptionError."""
    directory = Path(directory)
    manifest = open_artifact(directory)
    stats = manifest.stats
    if manifest.stage != "packing":
        raise UserError(
            f"{directory} is an output of the stage {manifest.stage}; rows are what the stage packing makes"
        )
    try:
        shards = tuple(ShardRecord(**record) for record in stats["shards"])
        files = {record.path: record for record in manifest.files}
        missing = [s.name for s in shards if not {f"{s.name}.arrow", f"{s.name}{INDEX_SUFFIX}"} <= files.keys()]
        if missing:
            raise ValueError(f"its files of {missing[0]} are not listed")
        return PackedRows(directory, stats["seq_len"], stats["vocab_size"], shards, stats, files)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"{directory} does not hold packed rows: {error}") from None
