"""Rows for training in random order: Hugging Face datasets with torch's DataLoader, a memory map, ours.

Every side gives batches of torch.int64 tokens from the same rows; what is compared is the CPU time of the whole
process, all its threads included.  See README.md for the method and the results.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import loader_peers as peers
from benchmarks.child import in_child, peak_anonymous_bytes
from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import interleave, median_ratio
from benchmarks.loader_peers import DOCUMENTS, TOKENS
from benchmarks.row_files import multiply_shard, write_documents, write_rows
from pipeline.data.loader import Loader, prefetched
from pipeline.data.rows import PackedRows, open_rows
from pipeline.data.verified import Verified

SEED = 0
STEP_S = 0.01
"""Stands for a step of training while the prefetch thread works."""

Batches = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class Size:
    """What is loaded."""

    num_shards: Mapping[str, int]
    """By source."""
    shard_tokens: int
    mixture: Mapping[str, float]
    num_batches: int
    """Of a round."""
    num_rounds: int
    small_shards: int
    """Of the two sizes that peaks of memory are compared at."""
    large_shards: int
    many_shards: int = 1000
    seq_len: int = 1024
    batch_rows: int = 32
    vocab_size: int = 32_768

    @property
    def round_tokens(self) -> int:
        """Tokens of a round."""
        return self.num_batches * self.batch_rows * self.seq_len


FULL = Size(
    num_shards={"web": 6, "code": 4, "books": 2},
    shard_tokens=10_000_000,
    mixture={"web": 0.5, "code": 0.3, "books": 0.2},
    num_batches=1500,
    num_rounds=7,
    small_shards=1,
    large_shards=100,
)
QUICK = Size(
    num_shards={"web": 2, "code": 1, "books": 1},
    shard_tokens=1_000_000,
    mixture=FULL.mixture,
    num_batches=20,
    num_rounds=3,
    small_shards=1,
    large_shards=8,
    many_shards=50,
)

OURS, OURS_FULL = "ours, rows only", "ours, all on"
DATASETS, DATASETS_FULL, MEMMAP = "datasets, rows only", "datasets, all on", "memory map, rows only"


@dataclass(frozen=True)
class Files:
    """Where what the sides read lies below a directory."""

    root: Path

    @property
    def concatenated(self) -> Path:
        """Our artifact of documents cut every seq_len."""
        return self.root / "concatenate"

    @property
    def fitted(self) -> Path:
        """Our artifact of documents fitted into rows."""
        return self.root / "best_fit"

    @property
    def memory_map(self) -> Path:
        """The rows of ``concatenated`` in one array."""
        return self.root / "rows.npy"

    def dataset(self, source: str = "") -> Path:
        """The rows of ``fitted`` of a source as a dataset; without one, those of ``concatenated``."""
        return self.root / f"dataset-{source}"


def _prepare(size: Size, root: Path) -> None:
    """Write the same rows for every side."""
    files = Files(root)
    documents = write_documents(root / "documents", size.num_shards, size.shard_tokens, size.vocab_size, SEED)
    plain = _all_rows(write_rows(files.concatenated, documents, size.seq_len, "concatenate"))
    np.save(files.memory_map, plain[TOKENS].astype(np.uint16))
    peers.save_dataset(files.dataset(), {TOKENS: plain[TOKENS]})
    fitted = write_rows(files.fitted, documents, size.seq_len, "best_fit")
    for source in size.mixture:
        peers.save_dataset(files.dataset(source), _all_rows(fitted, source))


def _all_rows(rows: PackedRows, source: str = "") -> dict[str, np.ndarray]:
    """Tokens and documents of every row, or of every row of a source, once."""
    loader = Loader(rows, SEED, rows.vocab_size - 1, {source: 1} if source else None)
    shards = rows.by_source[source] if source else range(len(rows.shards))
    ids = np.arange(sum(rows.shards[number].rows for number in shards))
    parts = [loader.batch(part) for part in np.array_split(ids, 1 + len(ids) // 1024)]
    return {
        TOKENS: np.concatenate([part.x0.astype(np.int32) for part in parts]),
        DOCUMENTS: np.concatenate([part.doc_ids for part in parts]),
    }


def _ours(loader: Loader, batch_rows: int, with_documents: bool) -> Batches:
    for first in itertools.count(0, batch_rows):
        batch = loader.batch(np.arange(first, first + batch_rows))
        found = {TOKENS: torch.from_numpy(batch.x0)}
        if with_documents:
            found[DOCUMENTS] = torch.from_numpy(batch.doc_ids)
        yield found


def _loader(files: Files, size: Size, with_all: bool, verified: Verified | None = None) -> Loader:
    """Open an artifact: its manifest is read here, its shards later."""
    rows = open_rows(files.fitted if with_all else files.concatenated)
    return Loader(rows, SEED, size.vocab_size - 1, size.mixture if with_all else None, verified)


def _sides(files: Files, size: Size) -> dict[str, Callable[[], Batches]]:
    """How each side is opened."""
    sources = {name: files.dataset(name) for name in size.mixture}
    return {
        OURS: lambda: _ours(_loader(files, size, with_all=False), size.batch_rows, with_documents=False),
        OURS_FULL: lambda: _ours(_loader(files, size, with_all=True), size.batch_rows, with_documents=True),
        DATASETS: lambda: peers.shuffled(files.dataset(), size.batch_rows, SEED),
        DATASETS_FULL: lambda: peers.mixed(sources, size.mixture, size.batch_rows, SEED),
        MEMMAP: lambda: peers.memory_mapped(files.memory_map, size.batch_rows, SEED),
    }


def _row_hashes(batch: Mapping[str, Any]) -> list[int]:
    """A number for each row, tokens and documents together."""
    columns = [np.asarray(batch[name], dtype=np.int32) for name in (TOKENS, DOCUMENTS) if name in batch]
    return [hash(row.tobytes()) for row in np.concatenate(columns, axis=1)]


def _check(name: str, batches: Batches, files: Files, size: Size) -> None:
    """RefusedError unless a side shows int64 rows of the common data, none twice."""
    if name in (OURS_FULL, DATASETS_FULL):
        known = {h for source in size.mixture for h in _row_hashes(_all_rows(open_rows(files.fitted), source))}
    else:
        known = set(_row_hashes({TOKENS: np.load(files.memory_map)}))
    shown: list[int] = []
    for batch in itertools.islice(batches, 4):
        if batch[TOKENS].dtype != torch.int64 or batch[TOKENS].shape != (size.batch_rows, size.seq_len):
            raise RefusedError(
                f"{name!r} gives tokens of {batch[TOKENS].dtype} {list(batch[TOKENS].shape)}; expected int64 "
                f"[{size.batch_rows}, {size.seq_len}]"
            )
        shown += _row_hashes(batch)
    if len(set(shown)) < len(shown) or not known.issuperset(shown):
        raise RefusedError(f"{name!r} shows rows that are not in the data, or some twice within {len(shown)}")


def _take(batches: Batches, number: int) -> None:
    for _ in range(number):
        next(batches)


@dataclass(frozen=True)
class Timed:
    """What each side takes."""

    cpu_s: dict[str, list[float]]
    """Of a round."""
    first_batch_ms: dict[str, float]
    """From nothing opened to the first batch, wall clock; the files are in the page cache."""


def _measure_times(size: Size, root: Path) -> Timed:
    """CPU seconds of every side in every round; RefusedError if one shows other rows."""
    torch.set_num_threads(1)  # copies of this size gain nothing, and threads that wait for work count as CPU time
    files = Files(root)
    first_batch_ms: dict[str, float] = {}
    rounds: dict[str, Callable[[int], object]] = {}
    for name, open_side in _sides(files, size).items():
        start = time.perf_counter()
        batches = open_side()
        next(batches)
        first_batch_ms[name] = 1e3 * (time.perf_counter() - start)
        _check(name, batches, files, size)
        _take(batches, size.num_batches)
        rounds[name] = lambda _, batches=batches: _take(batches, size.num_batches)
    return Timed(interleave(rounds, size.num_rounds, time.process_time), first_batch_ms)


def _measure_latency(size: Size, root: Path) -> dict[str, float]:
    """Milliseconds of our loader with all on, wall clock, its shards verified by another process before."""
    torch.set_num_threads(1)
    verified = Verified(root / "verified")
    files = Files(root)
    in_child(_open_all, size, root)
    start = time.perf_counter()
    batches = _ours(_loader(files, size, with_all=True, verified=verified), size.batch_rows, with_documents=True)
    next(batches)
    found = {"first_batch_ms_verified_before": 1e3 * (time.perf_counter() - start)}
    _take(batches, size.num_batches)
    direct = _waits_ms(batches, size.num_batches, step_s=0)
    with prefetched(batches) as ahead:
        at_once = _waits_ms(ahead, size.num_batches, step_s=0)
        behind_steps = _waits_ms(ahead, size.num_batches, step_s=STEP_S)
    for name, waits in (("batch", direct), ("prefetched", at_once), ("prefetched_behind_steps", behind_steps)):
        found |= {f"{name}_ms_p50": statistics.median(waits), f"{name}_ms_p99": statistics.quantiles(waits, n=100)[-1]}
    return found


def _open_all(size: Size, root: Path) -> None:
    """Verify every shard."""
    rows = open_rows(Files(root).fitted)
    for number in range(len(rows.shards)):
        rows.open_shard(number, Verified(root / "verified"))


def _waits_ms(batches: Batches, number: int, step_s: float) -> list[float]:
    waits: list[float] = []
    for _ in range(number):
        start = time.perf_counter()
        next(batches)
        waits.append(1e3 * (time.perf_counter() - start))
        time.sleep(step_s)
    return waits


def _prepare_memory(size: Size, num_shards: int, root: Path) -> None:
    """A best-fit artifact of so many shards."""
    documents = write_documents(root / "documents", {"web": num_shards}, size.shard_tokens // 2, size.vocab_size, SEED)
    write_rows(root / "rows", documents, size.seq_len, "best_fit")


def _peak_mb(size: Size, root: Path) -> float:
    """Megabytes of memory of our own while batches are loaded from every shard."""
    torch.set_num_threads(1)

    def work() -> None:
        rows = open_rows(root / "rows")
        _take(_ours(Loader(rows, SEED, size.vocab_size - 1), size.batch_rows, with_documents=True), size.num_batches)

    return peak_anonymous_bytes(work) / 1e6


def _open_many_s(size: Size, root: Path) -> float:
    """Seconds to open an artifact of many shards."""
    documents = write_documents(root / "documents", {"web": 1}, 10 * size.seq_len, size.vocab_size, SEED)
    rows = write_rows(root / "one", documents, size.seq_len, "best_fit")
    multiply_shard(root / "many", rows, size.many_shards)
    start = time.perf_counter()
    opened = Loader(open_rows(root / "many"), SEED, size.vocab_size - 1)
    elapsed_s = time.perf_counter() - start
    assert len(opened.locate(np.arange(1))[0]) == 1
    return elapsed_s


def _table(size: Size, timed: Timed) -> str:
    rows = []
    for name, found in timed.cpu_s.items():
        ours = timed.cpu_s[OURS_FULL if name in (OURS_FULL, DATASETS_FULL) else OURS]
        rates = [size.round_tokens / s / 1e6 for s in found]
        rows.append(
            [
                name,
                f"{statistics.median(rates):.0f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                f"{median_ratio(found, ours):.2f}",
                f"{timed.first_batch_ms[name]:.0f}",
            ]
        )
    return table(["rows in random order", "Mtok/CPU-s", "range", "x ours", "first batch ms"], rows)


def measure(options: Options) -> Measured:
    """Rates of every side, then latencies, peaks of memory and the opening of many shards of ours."""
    if options.text:
        raise ValueError("--text: documents are made up here, only their lengths matter; leave it out")
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="dlm-loader-") as folder:
        root = Path(folder)
        in_child(_prepare, size, root, heap=False)
        timed: Timed = in_child(_measure_times, size, root)
        latency: dict[str, float] = in_child(_measure_latency, size, root)
        open_many_s: float = in_child(_open_many_s, size, root / "many")
        peaks: dict[str, float] = {}
        for name, num_shards in (("peak_mb_10mb", size.small_shards), ("peak_mb_1gb", size.large_shards)):
            in_child(_prepare_memory, size, num_shards, root / name, heap=False)
            peaks[name] = in_child(_peak_mb, size, root / name, heap=False)
    ratios = {
        "datasets": median_ratio(timed.cpu_s[DATASETS], timed.cpu_s[OURS]),
        "datasets_full": median_ratio(timed.cpu_s[DATASETS_FULL], timed.cpu_s[OURS_FULL]),
        "memmap": median_ratio(timed.cpu_s[MEMMAP], timed.cpu_s[OURS_FULL]),
    }
    figures = {
        "tokens_per_cpu_s": {n: round(size.round_tokens / statistics.median(t)) for n, t in timed.cpu_s.items()},
        "cpu_s": {name: [round(s, 4) for s in times] for name, times in timed.cpu_s.items()},
        "round_tokens": size.round_tokens,
        "first_batch_ms": {name: round(ms, 1) for name, ms in timed.first_batch_ms.items()},
        **{name: round(ms, 3) for name, ms in latency.items()},
        f"open_{size.many_shards}_shards_s": round(open_many_s, 4),
        **{name: round(mb, 1) for name, mb in peaks.items()},
    }
    more = [[name, str(value)] for name, value in figures.items() if isinstance(value, float)]
    return Measured(f"{_table(size, timed)}\n\n{table(['ours, all on', 'value'], more)}", ratios, figures)


if __name__ == "__main__":
    sys.exit(run("loader", measure))
