"""Packed rows written by hand: an artifact without the stages before it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.artifact import MANIFEST, Manifest, record_files, write_json
from pipeline.data.packing import PackingPolicy, plan_rows
from pipeline.data.rows import INDEX_SUFFIX, PackedRows, ShardRecord, open_rows, write_index
from pipeline.data.shards import Segments, ShardWriter, open_stream
from pipeline.packing.run import rows_in_order

VOCAB_SIZE, PAD = 500, 499

Documents = Sequence[Sequence[int]]


def numbered_documents(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents whose tokens tell them apart."""
    return [[(first + d * 37 + k) % PAD for k in range(length)] for d, length in enumerate(lengths)]


def write_shard(path: Path, documents: Iterable[Sequence[int]], vocab_size: int) -> tuple[int, int]:
    """Write whole documents (token ids); returns (number of documents, number of tokens)."""
    with ShardWriter(path, vocab_size) as writer:
        for document in documents:
            values = np.asarray(document, dtype=np.int64)
            writer.write(Segments(values, np.array([len(values)]), np.zeros(1, dtype=np.int64)))
    return writer.num_docs, writer.num_tokens


def write_rows(
    directory: Path,
    sources: Mapping[str, Sequence[Documents]],
    seq_len: int,
    policy: PackingPolicy = "concatenate",
    block_size: int = 1,
) -> PackedRows:
    """Commit shards of documents, by source, as packed rows."""
    directory.mkdir()
    records: list[ShardRecord] = []
    for source, shards in sources.items():
        for number, documents in enumerate(shards):
            name = f"train-{source}-{number:05d}"
            path = directory / f"{name}.arrow"
            write_shard(path, documents, VOCAB_SIZE)
            stream = open_stream([path])
            plan = plan_rows(stream.doc_lengths, seq_len, policy, block_size)
            write_index(directory / f"{name}{INDEX_SUFFIX}", plan)
            if policy != "concatenate" or block_size > 1:
                parts = list(rows_in_order(stream, plan, seq_len, PAD))
                path.unlink()
                with ShardWriter(path, VOCAB_SIZE) as writer:
                    for part in parts:
                        writer.write(part)
            records.append(ShardRecord(name, source, plan.num_rows, len(documents), stream.num_tokens))
    stats = {"seq_len": seq_len, "vocab_size": VOCAB_SIZE, "shards": [asdict(record) for record in records]}
    write_json(directory / MANIFEST, Manifest("packing", "f" * 64, 1, {}, {}, record_files(directory), stats))
    return open_rows(directory)
