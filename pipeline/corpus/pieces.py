"""A corpus cut into pieces before work starts: what each shard reads.

Small files are read in runs.  Where a run ends is decided by a hash of the file's name and by its size, not by a
count from the beginning: a file that comes, goes or changes leaves every other run as it was.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.corpus.files import SourceFile

_MAX_RUN = 8
"""A run is ended past so many times the size of a shard; chance alone leaves one in 3,000 as long."""


@dataclass(frozen=True)
class Piece:
    """A run of whole files, or a range of one, or one shard of a dataset."""

    files: tuple[SourceFile, ...] = ()
    start: int = 0
    """First byte of a .jsonl, first row group of a .parquet; index of the shard of a dataset."""
    stop: int = -1
    """Where the range ends, -1: with the file; number of shards of a dataset."""
    dataset: str = ""


def ends_run(file: SourceFile, shard_bytes: int) -> bool:
    """Whether a run ends with this file: with probability size / shard_bytes, by a hash of its name."""
    digest = hashlib.blake2b(os.fsencode(file.name), digest_size=8).digest()
    return Fraction(int.from_bytes(digest, "little"), 2**64) < Fraction(file.size_bytes, shard_bytes)


def cut_runs(files: Sequence[SourceFile], shard_bytes: int) -> Iterator[Piece]:
    """Runs of small files; a larger one is a run of its own."""
    run: list[SourceFile] = []
    run_bytes = 0
    for file in files:
        alone = file.size_bytes >= shard_bytes
        if run and alone:
            yield Piece(tuple(run))
            run, run_bytes = [], 0
        run.append(file)
        run_bytes += file.size_bytes
        if alone or ends_run(file, shard_bytes) or run_bytes >= _MAX_RUN * shard_bytes:
            yield Piece(tuple(run))
            run, run_bytes = [], 0
    if run:
        yield Piece(tuple(run))


def cut_bytes(file: SourceFile, shard_bytes: int) -> Iterator[Piece]:
    """Byte ranges of a large .jsonl; a line belongs to the range it starts in."""
    for start in range(0, file.size_bytes, shard_bytes):
        yield Piece((file,), start, min(start + shard_bytes, file.size_bytes))


def cut_row_groups(file: SourceFile, group_bytes: Sequence[int], shard_bytes: int) -> Iterator[Piece]:
    """Ranges of row groups of a large Parquet file, each of at least the size of a shard but the last."""
    start = size = 0
    for number, num_bytes in enumerate(group_bytes):
        size += num_bytes
        if size >= shard_bytes or number == len(group_bytes) - 1:
            yield Piece((file,), start, number + 1)
            start, size = number + 1, 0
