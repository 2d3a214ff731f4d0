"""How the vocabulary is made: trained on the corpus, taken from a file, or taken from a checkpoint."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from pipeline.artifact import file_sha256
from pipeline.config import execution
from pipeline.data.special_tokens import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN
from pipeline.errors import UserError
from pipeline.stage import Stage

MIN_VOCAB_SIZE = 256 + 3
MaskSource = Literal["auto", "existing", "unused_row", "rare_token", "new_row"]


def _absolute(value: Any) -> Any:
    """A path made absolute, so that a plan means the same from anywhere."""
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) and value else value


@dataclass(frozen=True)
class TokenizerConfig:
    """A byte-level BPE with a mask, an end-of-document and a padding token; or a given tokenizer made to have them."""

    vocab_size: int = 4096
    """Size asked for, special tokens included; a small corpus may give fewer."""
    max_train_bytes: int = 32_000_000
    """Text that the merges are learned from: batches of the corpus, in order, until this size is reached."""
    file: Annotated[str, BeforeValidator(_absolute)] = execution("")
    """Take this tokenizer.json instead of training one."""
    mask_token: str | None = None
    """null: the one that a checkpoint names, else "[MASK]"."""
    eos_token: str | None = None
    """End of a document; null: the one that a checkpoint names, else "<|endoftext|>"."""
    pad_token: str | None = None
    """null: the one that a checkpoint names, or else its end of a document; without a checkpoint "[PAD]"."""
    mask_from: MaskSource = "auto"
    """Where a checkpoint's tokenizer has its mask from.  existing: it is one of its special tokens.  unused_row: a row
    of the embedding that no token has (Dream, arXiv 2508.15487).  rare_token: an ordinary token is given up for it
    (DiffuLLaMA, 2410.17891).  new_row: the embedding grows by a row.  auto: the first of existing, unused_row and
    new_row that is possible."""
    rare_token_id: int | None = None
    """The token that is given up."""

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; a byte-level vocabulary needs at least {MIN_VOCAB_SIZE} "
                "(256 bytes and 3 special tokens)"
            )
        if self.max_train_bytes < 1:
            raise ValueError(f"max_train_bytes is {self.max_train_bytes}; it must be at least 1")
        mask, *others = self.spellings()
        for name, token in zip(("mask_token", "eos_token", "pad_token"), (mask, *others), strict=True):
            if not token:
                raise ValueError(f"{name} is empty; it must be the spelling of a token, or null")
        if mask in others:
            raise ValueError(f"mask_token is {mask!r}, which is eos_token or pad_token too; the mask has its own")
        if self.mask_from not in get_args(MaskSource):
            raise ValueError(f"mask_from is {self.mask_from!r}; it must be one of {', '.join(get_args(MaskSource))}")
        if (self.mask_from == "rare_token") != (self.rare_token_id is not None):
            raise ValueError(
                f'mask_from is "{self.mask_from}" and rare_token_id {self.rare_token_id}; an id goes with '
                '"rare_token", and with nothing else'
            )
        if self.rare_token_id is not None and self.rare_token_id < 0:
            raise ValueError(f"rare_token_id is {self.rare_token_id}; ids begin at 0")

    def spellings(self) -> tuple[str, str, str]:
        """Mask, end and padding where no checkpoint names them."""
        given = (self.mask_token, self.eos_token, self.pad_token)
        mask, eos, pad = (
            default if one is None else one
            for one, default in zip(given, (MASK_TOKEN, EOS_TOKEN, PAD_TOKEN), strict=True)
        )
        return mask, eos, pad


def external_data(config: TokenizerConfig) -> Any:
    """SHA-256 of the tokenizer file, if one was given."""
    if not config.file:
        return None
    path = Path(config.file).expanduser()
    if not path.is_file():
        raise UserError(f"tokenizer.file: there is no file {config.file!r}")
    return {"sha256": file_sha256(path)}


def check_source(config: TokenizerConfig, inputs: Collection[str], step: str) -> None:
    """UserError unless the vocabulary has one origin, and for a setting that it has no use for."""
    given = [name for name, is_given in (("corpus", "corpus" in inputs), ("file", bool(config.file))) if is_given]
    if "checkpoint" not in inputs:
        if not given:
            raise UserError(
                f"{step} has neither the input corpus to be trained on, nor {step}.file, nor the input checkpoint; "
                "give one of them"
            )
        if config.mask_from not in ("auto", "existing"):
            raise UserError(
                f'{step}.mask_from is "{config.mask_from}", which is for the tokenizer of a checkpoint: a trained one '
                "gets its mask token, a file must have it. Leave it out"
            )
        if len(set(config.spellings())) < 3:
            raise UserError(
                f"{step}.mask_token, eos_token and pad_token are {', '.join(map(repr, config.spellings()))}; without "
                "a checkpoint they must be three different ones"
            )
        return
    if given:
        raise UserError(f"{step} has the input checkpoint and {given[0]}; a vocabulary has one origin, leave one out")
    for name in ("vocab_size", "max_train_bytes"):
        value, default = getattr(config, name), TokenizerConfig.__dataclass_fields__[name].default
        if value != default:
            raise UserError(f"{step}.{name} is {value}, but the tokenizer of a checkpoint is not trained; leave it out")


def check_upstream(config: TokenizerConfig, upstream: Mapping[str, Any], step: str) -> None:
    """``check_source`` for a workflow."""
    check_source(config, upstream, step)


STAGE = Stage(
    name="tokenizer",
    kind="task",
    config=TokenizerConfig,
    module="pipeline.tokenizer.run",
    optional_inputs=("corpus", "checkpoint"),
    external="pipeline.tokenizer.config:external_data",
    check=check_upstream,
    code_version=2,
)
