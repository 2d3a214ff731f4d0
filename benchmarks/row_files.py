"""Packed rows of made-up documents, as the packing stage leaves them: lengths like those of text, ids of no meaning."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.artifact import MANIFEST, FileRecord, Manifest, link_or_copy, record_file, write_json
from pipeline.data.packing import PackingPolicy, plan_rows
from pipeline.data.rows import INDEX_SUFFIX, PackedRows, ShardRecord, open_rows, write_index
from pipeline.data.shards import Segments, ShardWriter, open_stream
from pipeline.packing.config import PackingConfig
from pipeline.packing.run import keeps_order, rows_in_order

MEDIAN_TOKENS, SIGMA = 400, 1.3
"""Of the log-normal lengths of documents: 930 tokens on average, one in five longer than a row of 1,024."""


@dataclass(frozen=True)
class Documents:
    """Shards of documents, in the order of their names."""

    directory: Path
    sources: tuple[str, ...]
    """Source of each shard."""
    vocab_size: int
    """The highest id is padding, which no document holds."""

    def path(self, number: int) -> Path:
        """The shard of that number."""
        return self.directory / f"{_name(number)}.arrow"


def _name(number: int) -> str:
    return f"train-{number:05d}"


def write_documents(
    directory: Path, num_shards: Mapping[str, int], shard_tokens: int, vocab_size: int, seed: int
) -> Documents:
    """Write shards of documents of log-normal length and uniform ids; ``num_shards`` is by source."""
    directory.mkdir(parents=True)
    sources = tuple(itertools.chain(*([source] * number for source, number in num_shards.items())))
    documents = Documents(directory, sources, vocab_size)
    rng = np.random.default_rng(seed)
    for number in range(len(sources)):
        ends = np.minimum(np.cumsum(_lengths(rng, shard_tokens)), shard_tokens)
        lengths = np.diff(np.unique(ends), prepend=0)
        values = rng.integers(0, vocab_size - 1, shard_tokens, dtype=np.uint16)
        with ShardWriter(documents.path(number), vocab_size) as writer:
            writer.write(Segments(values, lengths, np.zeros(len(lengths), dtype=np.int64)))
    return documents


def _lengths(rng: np.random.Generator, at_least: int) -> np.ndarray:
    """Lengths of documents of so many tokens together, or more."""
    lengths = np.zeros(0, dtype=np.int64)
    while lengths.sum() < at_least:
        drawn = MEDIAN_TOKENS * np.exp(SIGMA * rng.standard_normal(at_least // MEDIAN_TOKENS + 1))
        lengths = np.concatenate([lengths, np.maximum(1, drawn.astype(np.int64))])
    return lengths


def write_rows(directory: Path, documents: Documents, seq_len: int, policy: PackingPolicy) -> PackedRows:
    """Pack every shard of documents and write the manifest of the artifact."""
    directory.mkdir(parents=True)
    config = PackingConfig(seq_len=seq_len, policy=policy)
    records: list[ShardRecord] = []
    for number, source in enumerate(documents.sources):
        stream, name = open_stream([documents.path(number)]), _name(number)
        plan = plan_rows(stream.doc_lengths, seq_len, policy)
        tokens = directory / f"{name}.arrow"
        if keeps_order(config):
            link_or_copy(documents.path(number), tokens)
        else:
            with ShardWriter(tokens, documents.vocab_size) as writer:
                for segments in rows_in_order(stream, plan, seq_len, documents.vocab_size - 1):
                    writer.write(segments)
        write_index(directory / f"{name}{INDEX_SUFFIX}", plan)
        records.append(ShardRecord(name, source, plan.num_rows, len(stream.doc_starts) - 1, stream.num_tokens))
    return _commit(directory, seq_len, documents.vocab_size, records, {})


def multiply_shard(directory: Path, rows: PackedRows, num_shards: int) -> PackedRows:
    """An artifact whose many shards are all the first one of another: links to the same bytes."""
    directory.mkdir(parents=True)
    first = rows.shards[0]
    records = [ShardRecord(_name(number), *list(asdict(first).values())[1:]) for number in range(num_shards)]
    known: dict[str, FileRecord] = {}
    for record in records:
        for suffix in (".arrow", INDEX_SUFFIX):
            link_or_copy(rows.directory / f"{first.name}{suffix}", directory / f"{record.name}{suffix}")
            known[f"{record.name}{suffix}"] = rows.files[f"{first.name}{suffix}"]
    return _commit(directory, rows.seq_len, rows.vocab_size, records, known)


def _commit(
    directory: Path, seq_len: int, vocab_size: int, records: list[ShardRecord], known: Mapping[str, FileRecord]
) -> PackedRows:
    names = [f"{record.name}{suffix}" for record in records for suffix in (".arrow", INDEX_SUFFIX)]
    files = [
        FileRecord(name, known[name].size_bytes, known[name].sha256)
        if name in known
        else record_file(directory, Path(name))
        for name in names
    ]
    stats = {"seq_len": seq_len, "vocab_size": vocab_size, "shards": [asdict(record) for record in records]}
    write_json(directory / MANIFEST, Manifest("packing", "made up", 1, {}, {}, files, stats))
    return open_rows(directory)
