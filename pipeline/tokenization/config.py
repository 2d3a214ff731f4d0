"""Documents to token shards, one shard of text at a time."""

from dataclasses import dataclass

from pipeline.config import execution
from pipeline.stage import Stage


@dataclass(frozen=True)
class TokenizationConfig:
    """Everything that matters is in the inputs: the corpus and the tokenizer."""

    batch_docs: int = execution(256)
    """Documents encoded in one call; has no effect on the result."""

    def __post_init__(self) -> None:
        if self.batch_docs < 1:
            raise ValueError(f"batch_docs is {self.batch_docs}; it must be at least 1")


STAGE = Stage(
    name="tokenization",
    kind="map",
    config=TokenizationConfig,
    module="pipeline.tokenization.run",
    inputs=("corpus", "tokenizer"),
)
