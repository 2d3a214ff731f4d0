"""Held-out documents into rows of seq_len, concatenated and cut; the last row may be short."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.shards import TokenStream


@dataclass(frozen=True)
class HeldOutRows:
    """The stream of all documents cut every seq_len tokens; documents may straddle rows."""

    stream: TokenStream
    seq_len: int

    @property
    def num_rows(self) -> int:
        """All rows, a last partial one included."""
        return -(-self.stream.num_tokens // self.seq_len)

    def row(self, index: int, pad_token_id: int) -> tuple[np.ndarray, int]:
        """One row, padded at the end, and the number of its real tokens."""
        tokens = self.stream[index * self.seq_len : (index + 1) * self.seq_len]
        padded = np.full(self.seq_len, pad_token_id, dtype=np.int64)
        padded[: len(tokens)] = tokens
        return padded, len(tokens)

    def doc_ids(self, index: int) -> np.ndarray:
        """Document of every real token of a row, numbered from 0 over the whole stream."""
        start = index * self.seq_len
        stop = min(start + self.seq_len, self.stream.num_tokens)
        return np.searchsorted(self.stream.doc_starts, np.arange(start, stop), side="right") - 1
