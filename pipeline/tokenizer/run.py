"""Train a byte-level BPE on the training documents, or check and adopt the tokenizer of a file or a checkpoint."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.artifact import checked, load_manifest
from pipeline.data.documents import Rows, read_rows, text_files
from pipeline.data.special_tokens import SpecialTokens
from pipeline.data.vocabulary import (
    TOKENIZER_FILE,
    find_special_tokens,
    save_vocabulary,
    special_token_id,
    take_literally,
)
from pipeline.errors import UserError
from pipeline.lineage import tokenizer_remedy
from pipeline.stage import StageContext, Stats
from pipeline.tokenizer.config import TokenizerConfig, check_source
from pipeline.tokenizer.mask import spelling, with_mask
from pipeline.weights import load_record


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
        special_tokens=list(config.spellings()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(corpus, config.max_train_bytes), trainer)
    return tokenizer


def _load(path: Path, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust parser raises plain Exception
        raise UserError(f"{name} is not a tokenizer.json: {error}") from None


def run(config: TokenizerConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write tokenizer.json and special_tokens.json."""
    context.progress(0, 1)
    check_source(config, inputs, "tokenizer")
    if "checkpoint" in inputs:
        tokenizer, special, stats = _adopt(config, inputs["checkpoint"])
        name = f"the tokenizer of {inputs['checkpoint']}"
    else:
        path = Path(config.file).expanduser()
        tokenizer = _load(path, f"tokenizer.file {config.file!r}") if config.file else _train(config, inputs["corpus"])
        name = config.file or "the trained tokenizer"
        special = find_special_tokens(tokenizer, *config.spellings(), name)
        stats = {}
    probe = f"{tokenizer.id_to_token(special.mask_token_id)} {tokenizer.id_to_token(special.eos_token_id)} é\t"
    ids = take_literally(tokenizer).encode(probe, add_special_tokens=False).ids
    if not ids:
        raise UserError(f"{name} gives no token for {probe!r}; its vocabulary holds no ordinary text")
    if {special.mask_token_id, special.eos_token_id, special.pad_token_id} & set(ids):
        raise UserError(f"{name} turns text that spells a special token into its id; it cannot be used safely")
    save_vocabulary(tokenizer, special, context.out)
    return {"vocab_size": special.vocab_size, **stats}


def _adopt(config: TokenizerConfig, checkpoint: Path) -> tuple[Tokenizer, SpecialTokens, Stats]:
    """The tokenizer of an imported checkpoint with a mask token; rows of its embedding that no token has stay."""
    name = f"the tokenizer of {checkpoint}"
    record = load_record(checkpoint)
    model = record.model
    if not (checkpoint / TOKENIZER_FILE).is_file():
        remedy = tokenizer_remedy(record.lineage[-1].details if record.lineage else {})
        raise UserError(f"{checkpoint} was imported without a tokenizer. {remedy}")
    tokenizer = _load(checked(checkpoint, TOKENIZER_FILE), name)
    own = {kind: _own_token(tokenizer, checkpoint, kind) for kind in ("mask", "eos", "pad")}
    mask, eos, _ = config.spellings()
    mask = mask if config.mask_token is not None else own["mask"] or mask
    eos = eos if config.eos_token is not None else own["eos"] or eos
    pad = config.pad_token or own["pad"] or eos
    for kind, token in (
        ("eos", eos),
        ("pad", pad),
    ):  # before the mask, which would be told as one of its special tokens
        special_token_id(tokenizer, kind, token, name)
    tokenizer, mask_from = with_mask(tokenizer, config.mask_from, mask, config.rare_token_id, model.vocab_size, name)
    special = find_special_tokens(tokenizer, mask, eos, pad, name)
    if model.mask_token_id not in (None, special.mask_token_id) and config.mask_token is None:
        raise UserError(
            f"the model in {checkpoint} has the mask id {model.mask_token_id}, "
            f"{spelling(tokenizer, model.mask_token_id)!r} in its tokenizer; the mask would become {mask!r}, id "
            f"{special.mask_token_id}, which it has not learned. If that is meant, set tokenizer.mask_token={mask!r}"
        )
    special = replace(special, vocab_size=max(special.vocab_size, model.vocab_size))
    stats = {"mask_from": mask_from, "mask_token_id": special.mask_token_id, "rows": model.vocab_size}
    return tokenizer, special, stats


def _own_token(tokenizer: Tokenizer, checkpoint: Path, kind: str) -> str | None:
    token_id = load_manifest(checkpoint).stats["special_ids"][kind]
    return None if token_id is None else spelling(tokenizer, token_id)
