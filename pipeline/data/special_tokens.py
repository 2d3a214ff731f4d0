"""The special tokens that diffusion training needs, known without the tokenizer itself."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import checked

MASK_TOKEN, EOS_TOKEN, PAD_TOKEN = "[MASK]", "<|endoftext|>", "[PAD]"

SPECIAL_FILE = "special_tokens.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning of their own; none of them ever comes from ordinary text."""

    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    vocab_size: int
    """Rows that an embedding needs: the highest id plus one."""


def load_special_tokens(artifact: Path | str) -> SpecialTokens:
    """The special ids in a committed tokenizer, their file verified first.  Raises UserError, CorruptionError."""
    return SpecialTokens(**json.loads(checked(Path(artifact), SPECIAL_FILE).read_text()))
