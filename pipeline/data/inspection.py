"""What a person wants to know of the data before and after a training: counts, lengths, shares, a look at some rows."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import checked, checked_files, open_artifact
from pipeline.data.documents import SPLITS, read_rows, text_files
from pipeline.data.loader import Loader
from pipeline.data.mixture import whole_weights
from pipeline.data.rows import PackedRows, open_rows
from pipeline.data.shards import open_stream
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import CorruptionError

MAX_SHARDS_READ = 16
"""Shards whose documents are measured for a histogram; spread over all of them."""


@dataclass(frozen=True)
class SourceSummary:
    """One source of the training data."""

    source: str
    docs: int
    tokens: int
    bytes: int
    rows: int
    share: float
    """Of the rows that training sees."""
    epochs: float | None
    """Times that its rows are shown in the whole training; None without rows, or without a training in the run."""


def summarise_sources(
    tokens: Path, rows: PackedRows, mixture: Mapping[str, float], num_samples: int | None
) -> list[SourceSummary]:
    """Counts of the training split by source; ``num_samples`` is the number of rows that training shows."""
    shards = [shard for shard in open_artifact(tokens).stats["shards"] if shard["split"] == "train"]
    weights = whole_weights(mixture) if mixture else {}
    total = sum(weights.values())
    found: list[SourceSummary] = []
    for source, numbers in rows.by_source.items():
        num_rows = sum(rows.shards[number].rows for number in numbers)
        share = weights.get(source, 0) / total if weights else num_rows / rows.num_rows
        own = [shard for shard in shards if shard["source"] == source]
        docs, num_tokens, num_bytes = (sum(shard[key] for shard in own) for key in ("docs", "tokens", "bytes"))
        epochs = share * num_samples / num_rows if num_samples is not None and num_rows else None
        found.append(SourceSummary(source, docs, num_tokens, num_bytes, num_rows, share, epochs))
    return found


@dataclass(frozen=True)
class LengthHistogram:
    """Documents by length, in tokens."""

    edges: list[int]
    """Powers of two: bin k holds lengths from edges[k] to edges[k + 1] - 1."""
    counts: list[int]
    shards_read: int
    shards: int


def length_histogram(tokens: Path) -> LengthHistogram:
    """Lengths of the training documents in at most MAX_SHARDS_READ shards."""
    names = [shard["name"] for shard in open_artifact(tokens).stats["shards"] if shard["split"] == "train"]
    places = np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_SHARDS_READ)).astype(int))
    paths = [checked(tokens, f"{names[place]}.arrow") for place in places]
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(open_stream([path]).doc_lengths for path in paths)])
    if not len(lengths):
        return LengthHistogram([1], [], len(paths), len(names))
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    low, high = int(exponents.min()), int(exponents.max())
    counts = np.bincount(exponents - low, minlength=high - low + 1)
    return LengthHistogram([1 << e for e in range(low, high + 2)], counts.tolist(), len(paths), len(names))


@dataclass(frozen=True)
class RowPart:
    """A stretch of one row: text of a document, or padding."""

    text: str | None
    """None for padding."""
    tokens: int


def decode_row(loader: Loader, vocabulary: Vocabulary, sample_id: int) -> list[RowPart]:
    """The row of a global sample id, cut where documents meet."""
    batch = loader.batch(np.array([sample_id]))
    (lengths,) = batch.lengths
    edges = np.concatenate([[0], np.cumsum(np.abs(lengths))])
    tokens = batch.x0[0].tolist()
    return [
        RowPart(vocabulary.decode(tokens[edges[k] : edges[k + 1]]) if length > 0 else None, abs(length))
        for k, length in enumerate(lengths.tolist())
    ]


def verify(corpus: Path, tokens: Path, packed: Path, vocabulary: Vocabulary) -> Iterator[str]:
    """Check all there is to check, one sentence each; CorruptionError at the first thing that is wrong.

    Every file has its SHA-256; documents, bytes, tokens and rows are as many as the manifests say; every id lies in the
    vocabulary and none is the mask; the rows hold every token of every training document once.
    """
    for name, directory in (("corpus", corpus), ("tokens", tokens), ("rows", packed)):
        files = checked_files(directory, "*")
        size = sum(path.stat().st_size for path in files)
        yield f"{name}: {len(files):,} files, {size / 1e6:,.1f} MB, every SHA-256 agrees"
    yield _verify_corpus(corpus)
    yield _verify_tokens(tokens, vocabulary)
    yield _verify_rows(packed, tokens)


def _agree(what: str, found: Any, stated: Any) -> None:
    if found != stated:
        raise CorruptionError(f"{what}: found {found}, the manifest says {stated}")


def _verify_corpus(corpus: Path) -> str:
    stats = open_artifact(corpus).stats
    said: list[str] = []
    for split in SPLITS:
        num_docs = num_bytes = 0
        for name in itertools.chain.from_iterable(text_files(corpus, split).values()):
            for rows in read_rows(corpus, name):
                num_docs += sum(rows.starts_document)
                num_bytes += sum(len(text.encode()) for text in rows.texts)
        found = (num_docs, num_bytes)
        _agree(f"(documents, bytes) of {split} in {corpus}", found, (stats[f"{split}_docs"], stats[f"{split}_bytes"]))
        said.append(f"{num_docs:,} documents of {num_bytes:,} bytes ({split})")
    return f"corpus: {', '.join(said)}"


def _verify_tokens(tokens: Path, vocabulary: Vocabulary) -> str:
    stats = open_artifact(tokens).stats
    special = vocabulary.special
    num_docs = num_tokens = 0
    for record in stats["shards"]:
        path = tokens / f"{record['name']}.arrow"
        stream = open_stream([path])
        found = (len(stream.doc_lengths), stream.num_tokens, stream.vocab_size)
        _agree(
            f"(documents, tokens, vocabulary) of {path}", found, (record["docs"], record["tokens"], special.vocab_size)
        )
        if any((piece == special.mask_token_id).any() for piece in stream.pieces):
            raise CorruptionError(f"{path} holds the mask id {special.mask_token_id}")
        num_docs, num_tokens = num_docs + found[0], num_tokens + found[1]
    stated = tuple(stats[f"train_{key}"] + stats[f"held_out_{key}"] for key in ("docs", "tokens"))
    _agree(f"(documents, tokens) of {tokens}", (num_docs, num_tokens), stated)
    return f"tokens: {num_docs:,} documents, {num_tokens:,} tokens, every id inside the vocabulary and none the mask"


def _verify_rows(packed: Path, tokens: Path) -> str:
    rows = open_rows(packed)
    made_of = {shard["name"]: shard for shard in open_artifact(tokens).stats["shards"] if shard["split"] == "train"}
    _agree(f"shards of {packed}", sorted(made_of), sorted(record.name for record in rows.shards))
    for number, record in enumerate(rows.shards):
        shard = made_of[record.name]
        counts = (shard["source"], shard["docs"], shard["tokens"])
        _agree(f"(source, documents, tokens) of {record.name}", counts, (record.source, record.docs, record.tokens))
        _compare(rows, number, tokens / f"{record.name}.arrow")
    num_tokens = sum(record.tokens for record in rows.shards)
    padding_share = 1 - num_tokens / (rows.num_rows * rows.seq_len)
    stated = tuple(rows.stats[key] for key in ("rows", "tokens", "padding_share"))
    _agree(f"(rows, tokens, share of padding) of {packed}", (rows.num_rows, num_tokens, padding_share), stated)
    return f"rows: {rows.num_rows:,} of {rows.seq_len} tokens, every token of every document in exactly one"


def _compare(rows: PackedRows, number: int, path: Path) -> None:
    """CorruptionError unless rows and tokens hold the same documents; one document is in memory at a time."""
    name = rows.shards[number].name
    stream = open_stream([path])
    wanted = np.flatnonzero(stream.doc_lengths).tolist()
    for document, held in itertools.zip_longest(wanted, rows.documents(number)):
        if document is None:
            raise CorruptionError(f"the rows of {name} hold a document {held[0]}, which {path} does not")
        start, stop = stream.doc_starts[document : document + 2].tolist()
        if held is None or held[0] != document or not np.array_equal(held[1], stream[start:stop]):
            raise CorruptionError(f"the rows of {name} do not hold document {document} of {path}")
