"""Encode each shard of text into an Arrow shard of token ids, every document closed by its end token."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.artifact import checked_files, link_or_copy
from pipeline.data.documents import read_documents
from pipeline.data.shards import write_shard
from pipeline.data.vocabulary import Vocabulary, load_vocabulary
from pipeline.errors import UserError
from pipeline.stage import Shard, StageContext, Stats
from pipeline.tokenization.config import TokenizationConfig

_COUNTS = "counts.json"


def list_shards(config: TokenizationConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """One shard of tokens for each file of text."""
    files = checked_files(inputs["corpus"], "*.arrow")
    return [{"name": path.stem, "file": path.name} for path in files]


def run_shard(config: TokenizationConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats:
    """Write NAME.arrow with the tokens of one file of text, and its counts."""
    vocabulary = load_vocabulary(inputs["tokenizer"])
    texts = ("".join(parts) for parts in read_documents(inputs["corpus"], shard["file"]))
    encoded = _encode(texts, vocabulary, config.batch_docs, shard["name"].startswith("held_out"))
    path = context.out / f"{shard['name']}.arrow"
    num_docs, num_tokens = write_shard(path, encoded, vocabulary.special.vocab_size)
    counts = {"docs": num_docs, "tokens": num_tokens}
    (context.out / _COUNTS).write_text(json.dumps(counts))
    return counts


def _encode(texts: Iterator[str], vocabulary: Vocabulary, batch_docs: int, is_held_out: bool) -> Iterator[list[int]]:
    eos = vocabulary.special.eos_token_id
    while batch := list(itertools.islice(texts, batch_docs)):
        for text, ids in zip(batch, vocabulary.encode_batch(batch), strict=True):
            if is_held_out and vocabulary.decode(ids) != text:
                raise UserError(
                    "the tokenizer does not give back the text it was given (case, spaces or unknown "
                    "characters are lost), so its tokens give no bound on the text. Use a byte-level "
                    "tokenizer, or train one (tokenizer.file='')"
                )
            if vocabulary.special.mask_token_id in ids:
                raise UserError("the tokenizer gives the mask id for ordinary text; choose another")
            yield [*ids, eos]


def finish(
    config: TokenizationConfig,
    inputs: Mapping[str, Path],
    shard_dirs: Sequence[Path],
    context: StageContext,
) -> Stats:
    """Gather the shards under their names and add up the counts."""
    totals = {"train": {"docs": 0, "tokens": 0}, "held_out": {"docs": 0, "tokens": 0}}
    for directory in shard_dirs:
        (shard,) = directory.glob("*.arrow")
        link_or_copy(shard, context.out / shard.name)
        counts = json.loads((directory / _COUNTS).read_text())
        split = totals[shard.stem.split("-")[0]]
        for key, value in counts.items():
            split[key] += value
    vocab_size = load_vocabulary(inputs["tokenizer"]).special.vocab_size
    return {"vocab_size": vocab_size, **{f"{s}_{k}": v for s, c in totals.items() for k, v in c.items()}}
