"""Documents into rows of seq_len.  Today one policy: concatenate and cut (MDLM, LLaDA)."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.shards import TokenStream
from pipeline.errors import UserError


@dataclass(frozen=True)
class PackedRows:
    """The stream of all documents cut every seq_len tokens; documents may straddle rows."""

    stream: TokenStream
    seq_len: int

    @property
    def num_full_rows(self) -> int:
        """Rows without padding; the remainder of the stream is not among them."""
        return self.stream.num_tokens // self.seq_len

    @property
    def num_rows(self) -> int:
        """All rows, a last partial one included."""
        return -(-self.stream.num_tokens // self.seq_len)

    def row(self, index: int, pad_token_id: int) -> tuple[np.ndarray, int]:
        """One row, padded at the end, and the number of its real tokens."""
        tokens = self.stream.read(index * self.seq_len, self.seq_len)
        padded = np.full(self.seq_len, pad_token_id, dtype=np.int64)
        padded[: len(tokens)] = tokens
        return padded, len(tokens)

    def doc_ids(self, index: int) -> np.ndarray:
        """Document of every real token of a row, numbered from 0 over the whole stream."""
        start = index * self.seq_len
        stop = min(start + self.seq_len, self.stream.num_tokens)
        return np.searchsorted(self.stream.doc_starts, np.arange(start, stop), side="right") - 1


def pack_for_training(stream: TokenStream, seq_len: int) -> PackedRows:
    """Rows for training; UserError if there is not a single full one."""
    rows = PackedRows(stream, seq_len)
    if rows.num_full_rows == 0:
        raise UserError(
            f"seq_len is {seq_len}, but the training corpus has only {stream.num_tokens} tokens. "
            "Add text to corpus.source or lower pretrain.seq_len"
        )
    return rows
