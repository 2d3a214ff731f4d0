"""Encode each file of text into an Arrow shard of token ids, every document closed by its end token."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import link_or_copy, load_manifest
from pipeline.data.documents import SPLITS, read_documents, text_files, text_hashes
from pipeline.data.encoding import EncodedBatch, EncodingLimits, build_encoder, encode_documents
from pipeline.data.shards import Segments, ShardWriter
from pipeline.data.special_tokens import load_special_tokens
from pipeline.data.vocabulary import Vocabulary, load_vocabulary
from pipeline.errors import UserError
from pipeline.stage import Shard, StageContext, Stats, Stopped, environment
from pipeline.tokenization.config import TokenizationConfig

_TOKENS = "tokens.arrow"
_SAMPLE_DOCS, _SAMPLE_CHARS = 32, 8192
"""What a fast backend must prove itself on in each shard: so much of its first documents."""


def list_shards(config: TokenizationConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """One shard of tokens for each file of text."""
    tokenizer = {record.path: record.sha256 for record in load_manifest(inputs["tokenizer"]).files}
    texts, version = text_hashes(inputs["corpus"]), environment()["tokenizers"]
    shards: list[Shard] = []
    for split in SPLITS:
        for source, names in text_files(inputs["corpus"], split).items():
            for name in names:
                # Keyed by what the files are, not by what they are called: numbers shift when a file is added before.
                identity = {"text": texts[name], "tokenizer": tokenizer, "split": split, "tokenizers": version}
                stem = name.removesuffix(".arrow")
                shards.append({"name": stem, "file": name, "split": split, "source": source, "identity": identity})
    return shards


def run_shard(config: TokenizationConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats:
    """Write the tokens of one file of text; returns its counts."""
    vocabulary = load_vocabulary(inputs["tokenizer"])
    corpus, name = inputs["corpus"], shard["file"]
    encoder = build_encoder(vocabulary, config.backend, _sample(read_documents(corpus, name)))
    text = _Counted(read_documents(corpus, name))
    batches = encode_documents(encoder, text, EncodingLimits(batch_chars=config.batch_chars))
    if shard["split"] == "held_out":
        batches = _reversible(batches, vocabulary, itertools.chain.from_iterable(read_documents(corpus, name)))
    try:
        with ShardWriter(context.out / _TOKENS, vocabulary.special.vocab_size) as writer:
            for segments in _segments(batches):
                if context.should_stop():
                    raise Stopped(f"stopped while encoding {name}")
                writer.write(segments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return {
        "docs": writer.num_docs,
        "tokens": writer.num_tokens,
        "bytes": text.num_bytes,
        "backend": f"{encoder.backend.name}: {encoder.reason}",
    }


def _sample(documents: Iterator[Iterable[str]]) -> Iterator[str]:
    for parts in itertools.islice(documents, _SAMPLE_DOCS):
        yield next(iter(parts))[:_SAMPLE_CHARS]


class _Counted:
    """Documents whose bytes are counted as they pass."""

    def __init__(self, documents: Iterator[Iterable[str]]) -> None:
        self._documents, self.num_bytes = documents, 0

    def __iter__(self) -> Iterator[Iterable[str]]:
        return map(self._count, self._documents)

    def _count(self, parts: Iterable[str]) -> Iterator[str]:
        for part in parts:
            self.num_bytes += len(part.encode())
            yield part


def _segments(batches: Iterable[EncodedBatch]) -> Iterator[Segments]:
    """Encoded pieces with the number of tokens of their documents before them."""
    carried = 0
    for batch in batches:
        # A piece without ids would be a document of its own: nothing but its offset says where one begins.
        lengths, ends = batch.lengths[batch.lengths > 0], batch.ends_document[batch.lengths > 0]
        if not len(lengths):
            continue
        begins = np.concatenate([[carried == 0], ends[:-1]])
        before = np.cumsum(lengths) - lengths
        document = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
        offsets = before - before[document] + np.where(np.cumsum(begins) == 0, carried, 0)
        yield Segments(batch.ids, lengths, offsets)
        carried = 0 if ends[-1] else int(offsets[-1] + lengths[-1])


def _reversible(
    batches: Iterable[EncodedBatch], vocabulary: Vocabulary, parts: Iterator[str]
) -> Iterator[EncodedBatch]:
    """The same batches, each decoded and compared with the text; UserError where they are not the same."""
    text = ""
    for batch in batches:
        for ids in np.split(batch.ids, np.cumsum(batch.lengths)[:-1]):
            found = vocabulary.decode(ids.tolist())
            while len(text) < len(found) and (part := next(parts, None)) is not None:
                text += part
            if not text.startswith(found):
                raise UserError(_NOT_REVERSIBLE)
            text = text[len(found) :]
        yield batch
    if text or any(parts):
        raise UserError(_NOT_REVERSIBLE)


_NOT_REVERSIBLE = (
    "the tokenizer does not give back the text it was given (case, spaces or unknown characters are lost), so its "
    "tokens give no bound on the text. Use a byte-level tokenizer, or train one (tokenizer.file='')"
)


def finish(
    config: TokenizationConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext
) -> Stats:
    """Gather the shards under the names of their files of text and add up the counts."""
    totals: Counter[str] = Counter()
    backends: Counter[str] = Counter()
    records: list[dict[str, Any]] = []
    for shard, directory in zip(list_shards(config, inputs, context), shard_dirs, strict=True):
        link_or_copy(directory / _TOKENS, context.out / f"{shard['name']}.arrow")
        stats = load_manifest(directory).stats
        backends[stats["backend"]] += 1
        counts = {key: stats[key] for key in ("docs", "tokens", "bytes")}
        records.append({key: shard[key] for key in ("name", "split", "source")} | counts)
        totals.update({f"{shard['split']}_{key}": value for key, value in counts.items()})
    return {
        "vocab_size": load_special_tokens(inputs["tokenizer"]).vocab_size,
        **{f"{split}_{key}": totals[f"{split}_{key}"] for split in SPLITS for key in ("docs", "tokens", "bytes")},
        "backends": dict(backends),
        "shards": records,
    }
