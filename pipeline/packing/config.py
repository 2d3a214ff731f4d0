"""How documents are put into rows."""

from dataclasses import dataclass

from pipeline.data.packing import PackingPolicy
from pipeline.stage import Stage

MAX_SEQ_LEN = 1 << 20


@dataclass(frozen=True)
class PackingConfig:
    """Rows of one length for training."""

    seq_len: int = 256
    """Tokens of a row: the context that a model is trained on."""
    policy: PackingPolicy = "concatenate"
    """concatenate: all documents one after another, cut every seq_len; best_fit: no document is cut that fits into a
    row; document: one document a row, padded."""
    block_size: int = 1
    """Every document is padded to a multiple of this, so that no denoising block holds parts of two."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seq_len > MAX_SEQ_LEN:
            raise ValueError(f"seq_len is {self.seq_len}; it must be at most {MAX_SEQ_LEN}")
        if self.seq_len % self.block_size:
            raise ValueError(f"seq_len is {self.seq_len}; it must be a multiple of block_size {self.block_size}")


STAGE = Stage(
    name="packing",
    kind="map",
    config=PackingConfig,
    module="pipeline.packing.run",
    inputs=("tokens", "tokenizer"),
)
