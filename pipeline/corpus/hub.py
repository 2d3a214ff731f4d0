"""Datasets of the Hugging Face hub, streamed: nothing is downloaded but what is read."""

import os
import re
from collections.abc import Iterator
from typing import Any

from pipeline.corpus.config import HUB_PREFIX, CorpusConfig
from pipeline.corpus.pieces import Piece
from pipeline.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_pinned(config: CorpusConfig) -> bool:
    """Whether the revision is a commit and not a branch or a tag, which may lead elsewhere tomorrow."""
    return _COMMIT.fullmatch(config.hub_revision) is not None


def _open(item: str, config: CorpusConfig) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"corpus.source {item} needs the package datasets: pip install 'dlm[hub]'") from None
    name = item.removeprefix(HUB_PREFIX)
    path, _, subset = name.partition(":")
    if os.path.exists(path):
        raise UserError(
            f"corpus.source: for {item!r} datasets would open {os.path.abspath(path)}, since it is there, and not the "
            "hub. Name its files or the folder without hf:, or start from another folder"
        )
    try:
        return datasets.load_dataset(
            path, subset or None, split=config.hub_split, revision=config.hub_revision or None, streaming=True
        )
    except (FileNotFoundError, ValueError) as error:
        raise _cannot_open(item, error) from None


def _cannot_open(item: str, error: Exception) -> UserError:
    return UserError(f"datasets.load_dataset cannot open {item.removeprefix(HUB_PREFIX)!r}: {error}")


def hub_pieces(item: str, config: CorpusConfig) -> list[Piece]:
    """One piece for each of the dataset's own shards; UserError if the hub cannot be reached."""
    try:
        num_shards = _open(item, config).num_shards
    except ConnectionError as error:
        raise _cannot_open(item, error) from None
    return [Piece(dataset=item, start=index, stop=num_shards) for index in range(num_shards)]


def read_hub(piece: Piece, config: CorpusConfig) -> Iterator[Any]:
    """The records of one shard of a dataset; ConnectionError, which may pass, if the hub does not answer now."""
    dataset = _open(piece.dataset, config)
    if dataset.num_shards != piece.stop:
        raise UserError(
            f"{piece.dataset} has {dataset.num_shards} shards, {piece.stop} when the run was planned: it has changed. "
            "Start a new run, and pin corpus.hub_revision"
        )
    yield from dataset.shard(num_shards=piece.stop, index=piece.start)
