"""Train a byte-level BPE on the training documents, or check and adopt a given tokenizer.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.artifact import checked_files
from pipeline.data.vocabulary import find_special_tokens, save_vocabulary, take_literally
from pipeline.errors import UserError
from pipeline.stage import StageContext, Stats
from pipeline.tokenizer.config import TokenizerConfig


def _training_text(corpus: Path, max_bytes: int) -> Iterator[list[str]]:
    remaining = max_bytes
    for path in checked_files(corpus, "train-*.arrow"):
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for i in range(reader.num_record_batches):
                texts = reader.get_batch(i).column(0).to_pylist()
                yield texts
                remaining -= sum(len(text.encode()) for text in texts)
                if remaining <= 0:
                    return


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
    tokenizer.no_truncation()
    tokenizer.no_padding()
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
