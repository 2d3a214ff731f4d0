"""Documents into rows of seq_len: which part of which document stands where.  Arithmetic on lengths, no tokens.

Policies
    concatenate  all documents one after another, cut every seq_len tokens (MDLM, arXiv 2406.07524; LLaDA, 2502.09992)
    best_fit     no document is cut that fits into a row: best-fit decreasing (arXiv 2404.10830)
    document     one document a row, padded (MDLM on LM1B)

Shards are packed one by one: rows end with their shard.  Under each policy every token of every document stands in
exactly one row.  A document that is longer than a row is cut into whole rows and a rest.  With ``block_size`` above 1
each document is padded to a multiple of it, so that no denoising block holds parts of two documents (LLaDA2.0, arXiv
2512.15745).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

PackingPolicy = Literal["concatenate", "best_fit", "document"]

PADDING = -1
"""Document number of padding."""


@dataclass(frozen=True)
class RowPlan:
    """Rows as runs of segments; the lengths of a row's segments add up to seq_len."""

    row_starts: np.ndarray
    """First segment of each row, int64 [num_rows + 1]."""
    length: np.ndarray
    """Tokens of each segment, int32 [num_segments]; negative for padding."""
    document: np.ndarray
    """Document that each segment is part of, int32 [num_segments]; PADDING for padding."""
    offset: np.ndarray
    """Tokens of the document before the segment, int64 [num_segments]."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1


@dataclass(frozen=True)
class _Pieces:
    """Parts of documents that go into a row as a whole, in the order of their rows."""

    row: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    padded: np.ndarray
    """Length with what fills the last block."""

    def take(self, order: np.ndarray, row: np.ndarray) -> "_Pieces":
        """These pieces in another order and other rows."""
        return _Pieces(row, self.document[order], self.offset[order], self.length[order], self.padded[order])


def plan_rows(doc_lengths: np.ndarray, seq_len: int, policy: PackingPolicy, block_size: int = 1) -> RowPlan:
    """Plan the rows of documents of the given lengths (tokens, int64 [num_docs]).

    Raises ValueError for another policy, and for a seq_len that is no multiple of block_size.
    """
    if seq_len < 1 or block_size < 1 or seq_len % block_size:
        raise ValueError(f"seq_len is {seq_len} and block_size {block_size}; seq_len must be a multiple of block_size")
    if policy not in get_args(PackingPolicy):
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(get_args(PackingPolicy))}")
    lengths = np.asarray(doc_lengths, dtype=np.int64)
    if policy == "concatenate":
        return _with_padding(_cut_every(lengths, seq_len, block_size), seq_len)
    pieces = _whole_where_they_fit(lengths, seq_len, block_size)
    if policy == "best_fit":
        rows = _best_fit(pieces.padded, seq_len)
        order = np.lexsort((pieces.offset, pieces.document, rows))
        pieces = pieces.take(order, rows[order])
    return _with_padding(pieces, seq_len)


def _padded(lengths: np.ndarray, block_size: int) -> np.ndarray:
    return -(-lengths // block_size) * block_size


def _cut_every(lengths: np.ndarray, seq_len: int, block_size: int) -> _Pieces:
    padded = _padded(lengths, block_size)
    ends = np.cumsum(padded)
    starts, total = ends - padded, int(padded.sum())
    cuts = np.unique(np.concatenate([starts[padded > 0], np.arange(0, total, seq_len)]))
    size = np.diff(cuts, append=total)
    document = np.searchsorted(ends, cuts, side="right")
    offset = cuts - starts[document]
    return _Pieces(cuts // seq_len, document, offset, np.minimum(size, lengths[document] - offset), size)


def _whole_where_they_fit(lengths: np.ndarray, seq_len: int, block_size: int) -> _Pieces:
    """One piece a document; several, all but the last of seq_len, for one that is longer."""
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    length = np.minimum(seq_len, lengths[document] - offset)
    return _Pieces(np.arange(len(document)), document, offset, length, _padded(length, block_size))


def _best_fit(sizes: np.ndarray, seq_len: int) -> np.ndarray:
    """Row of each piece: longest first, each into the row with the least room that is enough.

    Rows are numbered by the first piece in them.
    """
    room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set while room[r] has a row
    row_of = np.empty(len(sizes), dtype=np.int64)
    num_rows = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        enough = rooms >> size
        if enough:
            left = size + (enough & -enough).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                rooms &= ~(1 << left)
        else:
            left, row = seq_len, num_rows
            num_rows += 1
        row_of[piece] = row
        left -= size
        if left:
            room.setdefault(left, []).append(row)
            rooms |= 1 << left
    _, first_seen, number = np.unique(row_of, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_seen))[number]


def _with_padding(pieces: _Pieces, seq_len: int) -> RowPlan:
    """Write out the padding behind pieces and at the ends of rows as segments of their own."""
    num_rows = int(pieces.row[-1]) + 1 if len(pieces.row) else 0
    filled = np.bincount(pieces.row, weights=pieces.padded, minlength=num_rows).astype(np.int64)
    is_last = np.diff(pieces.row, append=num_rows) > 0
    behind = pieces.padded - pieces.length
    behind[is_last] += seq_len - filled
    num_segments = 1 + (behind > 0)
    ends = np.cumsum(num_segments)
    own, pad = ends - num_segments, ends[behind > 0] - 1
    length = np.zeros(int(num_segments.sum()), dtype=np.int32)
    document = np.full(len(length), PADDING, dtype=np.int32)
    offset = np.zeros(len(length), dtype=np.int64)
    length[own], document[own], offset[own] = pieces.length, pieces.document, pieces.offset
    length[pad] = -behind[behind > 0]
    return RowPlan(np.concatenate([[0], ends[is_last]]).astype(np.int64), length, document, offset)
