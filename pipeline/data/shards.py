"""Token shards: Arrow IPC files whose values are the flat token stream and whose offsets are the documents.

One column ``tokens: list<uint16 | uint32>``, one list a document, the end-of-document token included.  A
shard is mapped back into memory, and its values are used without a copy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import CorruptionError

_BATCH_TOKENS = 16 * 1024 * 1024


def token_type(vocab_size: int) -> pa.DataType:
    """The narrowest unsigned type that holds every id of a vocabulary."""
    return pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()


def write_shard(path: Path, documents: Iterable[Sequence[int]], vocab_size: int) -> tuple[int, int]:
    """Write documents (token ids) to an Arrow file; returns (number of documents, number of tokens)."""
    value_type = token_type(vocab_size)
    schema = pa.schema([("tokens", pa.list_(value_type))], metadata={"vocab_size": str(vocab_size)})
    num_docs = num_tokens = 0
    pending: list[np.ndarray] = []
    pending_tokens = 0
    dtype = value_type.to_pandas_dtype()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for document in documents:
            pending.append(np.asarray(document, dtype=dtype))
            pending_tokens += len(document)
            if pending_tokens >= _BATCH_TOKENS:
                writer.write_batch(_batch(pending, schema))
                pending, pending_tokens = [], 0
            num_docs += 1
            num_tokens += len(document)
        if pending:
            writer.write_batch(_batch(pending, schema))
    return num_docs, num_tokens


def _batch(documents: list[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
    offsets = np.zeros(len(documents) + 1, dtype=np.int32)
    np.cumsum([len(d) for d in documents], out=offsets[1:])
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(documents)))
    return pa.RecordBatch.from_arrays([lists], schema=schema)


@dataclass(frozen=True)
class TokenStream:
    """The tokens of several shards as one flat stream, with the document boundaries."""

    pieces: tuple[np.ndarray, ...]
    """Flat token arrays, memory-mapped, in order."""
    piece_starts: np.ndarray
    """Index in the stream of the first token of each piece; one longer than ``pieces``."""
    doc_starts: np.ndarray
    """Index in the stream of the first token of each document; one longer than their number."""
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return int(self.piece_starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as int64; shorter at the end of the stream."""
        stop = min(start + length, self.num_tokens)
        out = np.empty(max(0, stop - start), dtype=np.int64)
        filled = 0
        piece = int(np.searchsorted(self.piece_starts, start, side="right")) - 1
        while filled < len(out):
            offset = start + filled - int(self.piece_starts[piece])
            part = self.pieces[piece][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            piece += 1
        return out


def _map_shard(path: Path) -> tuple[int, list[pa.ListArray]]:
    """Vocabulary size and the documents of each batch, after a full validation."""
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            vocab_size = int((reader.schema.metadata or {})[b"vocab_size"])
            wanted = pa.schema([("tokens", pa.list_(token_type(vocab_size)))])
            if not reader.schema.equals(wanted):
                raise ValueError(f"its columns are {reader.schema.to_string(show_schema_metadata=False)}")
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if batch.column(0).null_count or batch.column(0).values.null_count:
                raise ValueError("it holds nulls")
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise CorruptionError(f"{path} is not a valid token shard: {error}") from error
    return vocab_size, [batch.column(0) for batch in batches]


def open_stream(paths: Sequence[Path]) -> TokenStream:
    """Map shards into memory, fully validated, in the order given.

    The paths must have been verified against their manifest (artifact.checked_files): Arrow does not check
    offsets by itself and would read outside the file.  Raises CorruptionError.
    """
    if not paths:
        raise CorruptionError("there is no token shard to open")
    pieces: list[np.ndarray] = []
    boundaries: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    total = 0
    vocab_sizes: set[int] = set()
    for path in paths:
        vocab_size, lists_of_batches = _map_shard(path)
        vocab_sizes.add(vocab_size)
        for lists in lists_of_batches:
            offsets = lists.offsets.to_numpy()
            values = lists.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]
            boundaries.append(offsets[1:].astype(np.int64) - offsets[0] + total)
            pieces.append(values)
            total += len(values)
    if len(vocab_sizes) != 1:
        raise CorruptionError(f"shards of different vocabularies {sorted(vocab_sizes)} in {paths[0].parent}")
    (vocab_size,) = vocab_sizes
    highest = max((int(piece.max()) for piece in pieces if len(piece)), default=0)
    if highest >= vocab_size:
        raise CorruptionError(f"token id {highest} in {paths[0].parent}, the vocabulary has {vocab_size}")
    starts = np.cumsum([0] + [len(piece) for piece in pieces])
    return TokenStream(tuple(pieces), starts, np.concatenate(boundaries), vocab_size)
