"""The fixed list of the shards of a corpus, and what identifies each."""

import itertools
from collections.abc import Iterator
from typing import Any

from pipeline.config import to_json
from pipeline.corpus.columns import open_parquet
from pipeline.corpus.config import CorpusConfig
from pipeline.corpus.files import SourceFile, content_of, list_source, open_source
from pipeline.corpus.hub import hub_pieces, is_pinned
from pipeline.corpus.identity import datasets_of, how_a_shard_is_read
from pipeline.corpus.pieces import Piece, cut_bytes, cut_row_groups, cut_runs
from pipeline.errors import UserError
from pipeline.stage import Shard

_MAX_PIECES = 100_000
"""The number of a shard has five digits, by which files are sorted."""


def plan_shards(config: CorpusConfig) -> list[Shard]:
    """All shards, by source, file and range: the order of the documents, whoever reads them and when."""
    shards: list[Shard] = []
    for name in sorted(config.source):
        how = how_a_shard_is_read(config, name)
        for number, piece in enumerate(_pieces(config, name)):
            if number == _MAX_PIECES:
                raise UserError(
                    f"corpus.source.{name} makes more than {_MAX_PIECES} shards of about {config.shard_bytes} bytes; "
                    "raise corpus.shard_bytes"
                )
            shard = {"name": f"{name}-{number:05d}", "source": name, "is_first": not number, "piece": to_json(piece)}
            if not piece.dataset or is_pinned(config):
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
    for item in datasets_of(config, name):
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
    try:
        with open_source(file) as handle:
            metadata = open_parquet(file, handle).metadata
    except ConnectionError as error:
        raise UserError(f"corpus.source: {error}. Check the URL, the network and who may read it") from None
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
