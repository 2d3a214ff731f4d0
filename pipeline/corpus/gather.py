"""The shards of a corpus put together: names, duplicates over all of them, rejects, counts by source."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import link_or_copy, load_manifest
from pipeline.corpus.config import CorpusConfig, filters_of, for_source
from pipeline.corpus.ledger import tally
from pipeline.corpus.split import INDEX
from pipeline.data.documents import SPLITS, duplicates_file

REJECTS = "rejects.jsonl"
_NUMBERS = ("files", "records", "broken")
_TABLES = ("dropped", "replaced_by_file", "skipped_by_file")
_HASHES_AT_ONCE = 1 << 24
"""Hashes that are compared in one go, of 24 bytes each."""


@dataclass(frozen=True)
class ShardOutput:
    """What one shard left."""

    directory: Path
    source: str
    number: int
    """Its place among the shards of its source."""
    counts: dict[str, Any]

    def index(self, split: str) -> np.ndarray:
        """Hash and size of each document of a split, in memory: a mapped file would stay open, one for each shard."""
        path = self.directory / f"{split}.index.npy"
        return np.load(path) if path.exists() else np.empty(0, INDEX)


def open_shards(directories: Sequence[Path]) -> list[ShardOutput]:
    """The shards in the order of the plan."""
    all_counts = [load_manifest(directory).stats for directory in directories]
    numbers: Counter[str] = Counter()
    found: list[ShardOutput] = []
    for directory, counts in zip(directories, all_counts, strict=True):
        found.append(ShardOutput(directory, counts["source"], numbers[counts["source"]], counts))
        numbers[counts["source"]] += 1
    return found


def gather_split(
    shards: Sequence[ShardOutput], split: str, config: CorpusConfig, out: Path, sources: Mapping[str, dict[str, Any]]
) -> tuple[int, int]:
    """Name the files of a split and list what is left out of them; its documents and bytes.

    Documents, bytes and duplicates are added to the counts of their source.  Where sources hold out different shares, a
    text may stand on both sides: it is left out of training.
    """
    repeated = find_duplicates([partial(shard.index, split) for shard in shards])
    held_out = held_out_elsewhere(shards, config) if split == "train" else None
    drops = {name: filters.drop_duplicates for name, filters in filters_of(config).items()}
    total_docs = total_bytes = 0
    for shard, numbers in zip(shards, repeated, strict=True):
        index = shard.index(split)
        if not len(index):
            continue
        left_out = numbers if drops[shard.source] else numbers[:0]
        counts = sources[shard.source]
        if len(left_out):
            tally(counts["dropped"], "duplicate", len(left_out))
        if held_out is not None:
            both = np.setdiff1d(np.flatnonzero(np.isin(_hashes(index), held_out)), left_out)
            left_out = np.union1d(left_out, both).astype(np.int64)
            if len(both):
                tally(counts["dropped"], "held out elsewhere", len(both))
        name = f"{split}-{shard.source}-{shard.number:05d}.arrow"
        link_or_copy(shard.directory / f"{split}.arrow", out / name)
        if len(left_out):
            np.save(out / duplicates_file(name), left_out)
        num_docs = len(index) - len(left_out)
        num_bytes = int(index["num_bytes"].sum()) - int(index["num_bytes"][left_out].sum())
        counts["docs"] += num_docs
        counts["bytes"] += num_bytes
        counts[f"{split}_docs"] += num_docs
        total_docs += num_docs
        total_bytes += num_bytes
    return total_docs, total_bytes


def held_out_elsewhere(shards: Sequence[ShardOutput], config: CorpusConfig) -> np.ndarray | None:
    """Hashes of all held-out documents; None where sources hold out one share, so that no text is on both sides."""
    if len({for_source(config, name).held_out_fraction for name in config.source}) == 1:
        return None
    return np.concatenate([_hashes(shard.index("held_out")) for shard in shards])


def _hashes(index: np.ndarray) -> np.ndarray:
    """128 bits a document, as one value that can be looked for."""
    return np.stack([index["hash_low"], index["hash_high"]], axis=1).view("S16").ravel()


def find_duplicates(indices: Sequence[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    """For each index, the places whose hash stands earlier in it or in an index before it.

    An index is loaded, once a class and once before, and let go.  The hashes are compared in classes of their lowest
    bits, so many that a class fits into memory.
    """
    if not indices:
        return []
    num_classes = 1 + sum(len(load()) for load in indices) // _HASHES_AT_ONCE
    found: list[list[np.ndarray]] = [[] for _ in indices]
    for number in range(num_classes):
        places: list[np.ndarray] = []
        hashes: list[np.ndarray] = []
        for load in indices:
            index = load()
            places.append(np.flatnonzero(index["hash_low"] % num_classes == number))
            hashes.append(index[["hash_low", "hash_high"]][places[-1]])
        low, high = (np.concatenate([one[half] for one in hashes]) for half in ("hash_low", "hash_high"))
        order = np.lexsort((low, high))  # stable: equal hashes stay in the order of the plan
        same = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
        is_repeated = np.zeros(len(low), bool)
        is_repeated[order[1:][same]] = True
        edges = list(itertools.accumulate(map(len, places), initial=0))
        for one, place, (start, stop) in zip(found, places, itertools.pairwise(edges), strict=True):
            one.append(place[is_repeated[start:stop]])
    return [np.sort(np.concatenate(one)).astype(np.int64) for one in found]


def add_counts(names: Iterable[str], shards: Sequence[ShardOutput]) -> dict[str, dict[str, Any]]:
    """The counts of each source over all its shards; the documents and bytes of its splits are 0 as yet."""
    sources: dict[str, dict[str, Any]] = {
        name: dict.fromkeys((*_NUMBERS, "docs", "bytes", *(f"{split}_docs" for split in SPLITS)), 0)
        | {key: Counter[str]() for key in _TABLES}
        for name in sorted(names)
    }
    for shard in shards:
        total = sources[shard.source]
        for key in _NUMBERS:
            total[key] += shard.counts[key]
        for key in _TABLES:
            for entry, number in shard.counts[key].items():
                tally(total[key], entry, number)
    return sources


def join_rejects(shards: Sequence[ShardOutput], out: Path) -> dict[str, dict[str, Any]]:
    """Write the rejects of all shards in order, lines counted from the beginning of their file.

    Gives the first broken record of each source that has one.
    """
    first: dict[str, dict[str, Any]] = {}
    lines_before = 0
    with (out / REJECTS).open("w") as joined:
        for shard in shards:
            lines_before = lines_before if shard.counts["start"] else 0
            with (shard.directory / REJECTS).open() as lines:
                for line in lines:
                    reject = json.loads(line)
                    reject["line"] += lines_before
                    if reject.pop("broken"):
                        first.setdefault(shard.source, reject)
                    joined.write(json.dumps(reject) + "\n")
            lines_before += shard.counts["lines"]
    return first
