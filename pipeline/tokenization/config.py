"""Documents to token shards, one file of text at a time."""

from dataclasses import dataclass

from pipeline.config import execution
from pipeline.data.backends import BackendName
from pipeline.stage import Stage


@dataclass(frozen=True)
class TokenizationConfig:
    """Everything that matters is in the inputs: the corpus and the tokenizer."""

    backend: BackendName = execution("auto")
    """What encodes: tokenizers; fast, which is gigatoken (pip install 'dlm[fast]'); auto, gigatoken where installed.
    That one is taken only after it gave the ids of tokenizers on a sample of the shard, and goes on being compared."""
    batch_chars: int = execution(1 << 20)
    """Text that is encoded before its ids are written; has no effect on the result."""

    def __post_init__(self) -> None:
        if self.batch_chars < 1:
            raise ValueError(f"batch_chars is {self.batch_chars}; it must be at least 1")


STAGE = Stage(
    name="tokenization",
    kind="map",
    config=TokenizationConfig,
    module="pipeline.tokenization.run",
    inputs=("corpus", "tokenizer"),
    code_version=2,
)
