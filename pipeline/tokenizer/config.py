"""How the vocabulary is made: trained on the corpus, or taken from a file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from pipeline.artifact import file_sha256
from pipeline.config import execution
from pipeline.data.special_tokens import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN
from pipeline.errors import UserError
from pipeline.stage import Stage

MIN_VOCAB_SIZE = 256 + 3


def _absolute(value: Any) -> Any:
    """A path made absolute, so that a plan means the same from anywhere."""
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) and value else value


@dataclass(frozen=True)
class TokenizerConfig:
    """A byte-level BPE with a mask, an end-of-document and a padding token."""

    vocab_size: int = 4096
    """Size asked for, special tokens included; a small corpus may give fewer."""
    max_train_bytes: int = 32_000_000
    """Text that the merges are learned from: batches of the corpus, in order, until this size is reached."""
    file: Annotated[str, BeforeValidator(_absolute)] = execution("")
    """Take this tokenizer.json instead of training one."""
    mask_token: str = MASK_TOKEN
    eos_token: str = EOS_TOKEN
    pad_token: str = PAD_TOKEN

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; a byte-level vocabulary needs at least {MIN_VOCAB_SIZE} "
                "(256 bytes and 3 special tokens)"
            )
        if self.max_train_bytes < 1:
            raise ValueError(f"max_train_bytes is {self.max_train_bytes}; it must be at least 1")
        if len({self.mask_token, self.eos_token, self.pad_token} - {""}) < 3:
            raise ValueError("mask_token, eos_token and pad_token must be three different, non-empty strings")


def external_data(config: TokenizerConfig) -> Any:
    """SHA-256 of the tokenizer file, if one was given."""
    if not config.file:
        return None
    path = Path(config.file).expanduser()
    if not path.is_file():
        raise UserError(f"tokenizer.file: there is no file {config.file!r}")
    return {"sha256": file_sha256(path)}


STAGE = Stage(
    name="tokenizer",
    kind="task",
    config=TokenizerConfig,
    module="pipeline.tokenizer.run",
    inputs=("corpus",),
    external="pipeline.tokenizer.config:external_data",
)
