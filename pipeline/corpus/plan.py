"""What a corpus consists of: the fixed list of its shards, and what identifies the data behind them."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

from pipeline.config import to_json
from pipeline.corpus.columns import open_parquet
from pipeline.corpus.config import HUB_PREFIX, CorpusConfig, for_source
from pipeline.corpus.files import SourceFile, content_of, list_source, open_source
from pipeline.corpus.filters import filters_identity
from pipeline.corpus.hub import hub_pieces
from pipeline.corpus.pieces import Piece, cut_bytes, cut_row_groups, cut_runs
from pipeline.errors import UserError
from pipeline.stage import Shard

_MAX_PIECES = 100_000
"""The number of a shard has five digits, by which files are sorted."""


def external_data(config: CorpusConfig) -> Any:
    """What identifies each source: its names and SHA-256 of files (for the hub, name and revision), and how it is read.

    A source is not identified by where it is.
    """
    return {name: _source_identity(config, name) for name in sorted(config.source)}


def _source_identity(config: CorpusConfig, name: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    files = list_source(name, config.source[name])
    for file in files:
        digest.update(os.fsencode(f"{file.name}\0{content_of(file)}\n"))
    found: dict[str, Any] = {**_how_it_is_read(config, name), "files": len(files), "sha256": digest.hexdigest()}
    if datasets := _datasets(config, name):
        found |= {"datasets": datasets, "split": config.hub_split, "revision": config.hub_revision}
    return found


def _how_it_is_read(config: CorpusConfig, name: str) -> dict[str, Any]:
    own = for_source(config, name)
    return {"text_field": own.text_field, "filters": filters_identity(own.filters)}


def _datasets(config: CorpusConfig, name: str) -> list[str]:
    return sorted(item for item in config.source[name].paths if item.startswith(HUB_PREFIX))


def plan_shards(config: CorpusConfig) -> list[Shard]:
    """All shards, by source, file and range: the order of the documents, whoever reads them and when."""
    shards: list[Shard] = []
    for name in sorted(config.source):
        how = {"source": name, **_how_it_is_read(config, name)}
        for number, piece in enumerate(_pieces(config, name)):
            if number == _MAX_PIECES:
                raise UserError(
                    f"corpus.source.{name} makes more than {_MAX_PIECES} shards of about {config.shard_bytes} bytes; "
                    "raise corpus.shard_bytes"
                )
            shard = {"name": f"{name}-{number:05d}", "source": name, "is_first": not number, "piece": to_json(piece)}
            if not piece.dataset or config.hub_revision:
                shard["identity"] = how | _piece_identity(piece)
            shards.append(shard)
    return shards


def _piece_identity(piece: Piece) -> dict[str, Any]:
    return {
        "files": [[file.name, content_of(file)] for file in piece.files],
        "dataset": piece.dataset,
        "range": [piece.start, piece.stop],
    }


def _pieces(config: CorpusConfig, name: str) -> Iterator[Piece]:
    for item in _datasets(config, name):
        yield from hub_pieces(item, config)
    files = list_source(name, config.source[name])
    for is_cut, group in itertools.groupby(files, key=lambda file: _is_cut(file, config.shard_bytes)):
        if not is_cut:
            yield from cut_runs(list(group), config.shard_bytes)
            continue
        for file in group:
            if file.name.endswith(".jsonl"):
                yield from cut_bytes(file, config.shard_bytes)
            else:
                yield from cut_row_groups(file, _row_group_bytes(file), config.shard_bytes)


def _is_cut(file: SourceFile, shard_bytes: int) -> bool:
    return file.size_bytes > shard_bytes and file.name.endswith((".jsonl", ".parquet"))


def _row_group_bytes(file: SourceFile) -> list[int]:
    with open_source(file) as handle:
        metadata = open_parquet(file, handle).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
