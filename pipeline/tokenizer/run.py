"""Train a byte-level BPE on the training documents, or check and adopt a given tokenizer.json."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.documents import Rows, read_rows, text_files
from pipeline.data.vocabulary import find_special_tokens, save_vocabulary, take_literally
from pipeline.errors import UserError
from pipeline.stage import StageContext, Stats
from pipeline.tokenizer.config import TokenizerConfig


def _training_text(corpus: Path, max_bytes: int) -> Iterator[list[str]]:
    """Text of every source in turn, a megabyte or so at a time, until the limit is reached."""
    remaining = max_bytes
    sources = [_rows_of(corpus, names) for names in text_files(corpus, "train").values()]
    for rows in itertools.chain.from_iterable(itertools.zip_longest(*sources)):
        if rows is None:
            continue
        yield rows.texts
        remaining -= sum(len(text.encode()) for text in rows.texts)
        if remaining <= 0:
            return


def _rows_of(corpus: Path, names: Sequence[str]) -> Iterator[Rows]:
    return itertools.chain.from_iterable(read_rows(corpus, name) for name in names)


def _train(config: TokenizerConfig, corpus: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.mask_token, config.eos_token, config.pad_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(corpus, config.max_train_bytes), trainer)
    return tokenizer


def _load(path: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(Path(path).expanduser()))
    except Exception as error:  # noqa: BLE001 - the Rust parser raises plain Exception
        raise UserError(f"tokenizer.file {path!r} is not a tokenizer.json: {error}") from None
    return tokenizer


def run(config: TokenizerConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write tokenizer.json and special_tokens.json."""
    context.progress(0, 1)
    tokenizer = _load(config.file) if config.file else _train(config, inputs["corpus"])
    name = config.file or "the trained tokenizer"
    special = find_special_tokens(tokenizer, config.mask_token, config.eos_token, config.pad_token, name)
    probe = f"{config.mask_token} {config.eos_token} é\t"
    ids = take_literally(tokenizer).encode(probe, add_special_tokens=False).ids
    if not ids:
        raise UserError(f"{name} gives no token for {probe!r}; its vocabulary holds no ordinary text")
    if {special.mask_token_id, special.eos_token_id, special.pad_token_id} & set(ids):
        raise UserError(f"{name} turns text that spells a special token into its id; it cannot be used safely")
    save_vocabulary(tokenizer, special, context.out)
    return {"vocab_size": special.vocab_size}
