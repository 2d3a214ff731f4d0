"""What identifies the data of a corpus; light to import, since every plan asks for it."""

import hashlib
import os
from typing import Any

from pipeline.corpus.config import HUB_PREFIX, CorpusConfig, for_source
from pipeline.corpus.files import content_of, list_source
from pipeline.corpus.filters import filters_identity


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
    found: dict[str, Any] = {**how_it_is_read(config, name), "files": len(files), "sha256": digest.hexdigest()}
    if datasets := datasets_of(config, name):
        found |= {"datasets": datasets, "split": config.hub_split, "revision": config.hub_revision}
    return found


def how_it_is_read(config: CorpusConfig, name: str) -> dict[str, Any]:
    """What changes the documents of a source besides its bytes."""
    own, held_out = for_source(config, name), config.source[name].held_out_fraction
    found = {"text_field": own.text_field, "filters": filters_identity(own.filters, own.filters_setting)}
    return found if held_out is None else {**found, "held_out_fraction": held_out}


def how_a_shard_is_read(config: CorpusConfig, name: str) -> dict[str, Any]:
    """What changes the bytes of a source's shards besides those of its files.

    Whether duplicates stay does not: they are found over all shards, and left out by number.
    """
    how = how_it_is_read(config, name)
    del how["filters"]["settings"]["drop_duplicates"]
    return {"source": name, **how}


def datasets_of(config: CorpusConfig, name: str) -> list[str]:
    """The datasets of the hub in a source, by name."""
    return sorted(item for item in config.source[name].paths if item.startswith(HUB_PREFIX))
