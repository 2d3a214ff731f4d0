"""Text to rows on disk: Hugging Face datasets with two ``map``, ours through the workflow engine.

Every side is a program of its own, measured from its start to its end with all its processes.  See README.md for the
method and the results.
"""

import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import tokenization_ours as ours
from benchmarks import tokenization_peers as peers
from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import interleave, median_ratio
from benchmarks.process import Cost, run_program
from benchmarks.text import read_documents
from benchmarks.tokenization_ours import Commit, Output
from pipeline.data.special_tokens import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN

SPECIAL = (MASK_TOKEN, EOS_TOKEN, PAD_TOKEN)
FAST_PACKAGE = "gigatoken"
DATASETS, OURS, OURS_FAST = "datasets", "ours", "ours, fast backend"
WORKERS = {1: "ours, small shards, 1 worker", 2: "ours, small shards, 2 workers"}


@dataclass(frozen=True)
class Size:
    """What is tokenized."""

    text_bytes: int
    shard_bytes: int
    """Of ours."""
    part_bytes: int
    """Text that the gain from a second worker is measured on, in more shards."""
    part_shard_bytes: int
    train_bytes: int
    """Text that the vocabulary is learned from."""
    vocab_size: int
    num_rounds: int
    num_worker_rounds: int
    """Of the gain from a second worker, two wall clocks of a machine that others use too."""
    seq_len: int = 1024
    num_workers: int = 2


FULL = Size(
    text_bytes=256_000_000,
    shard_bytes=64_000_000,
    part_bytes=96_000_000,
    part_shard_bytes=12_000_000,
    train_bytes=16_000_000,
    vocab_size=16_384,
    num_rounds=3,
    num_worker_rounds=7,
)
QUICK = Size(
    text_bytes=4_000_000,
    shard_bytes=2_000_000,
    part_bytes=2_000_000,
    part_shard_bytes=500_000,
    train_bytes=1_000_000,
    vocab_size=2_048,
    num_rounds=1,
    num_worker_rounds=1,
)


@dataclass(frozen=True)
class Text:
    """Documents as lines of JSON."""

    path: Path
    num_bytes: int
    """UTF-8 bytes of the documents."""
    num_docs: int


@dataclass(frozen=True)
class Prepared:
    """What every side starts from."""

    whole: Text
    part: Text
    tokenizer: Path


def prepare(size: Size, paths: tuple[Path, ...], directory: Path) -> Prepared:
    """Write the documents and a byte-level BPE learned from the first of them."""
    found = read_documents(paths, size.text_bytes)
    # The peers would take a special token that a text spells for the token itself.
    documents = [text for text in found if not any(token in text for token in SPECIAL)]
    tokenizer = _train(size, _first(documents, size.train_bytes))
    tokenizer.save(str(directory / "tokenizer.json"))
    return Prepared(
        whole=_write(directory / "whole.jsonl", documents),
        part=_write(directory / "part.jsonl", _first(documents, size.part_bytes)),
        tokenizer=directory / "tokenizer.json",
    )


def _first(documents: list[str], num_bytes: int) -> list[str]:
    ends = np.cumsum([len(text.encode()) for text in documents])
    return documents[: int(np.searchsorted(ends, num_bytes)) + 1]


def _write(path: Path, documents: list[str]) -> Text:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return Text(path, sum(len(text.encode()) for text in documents), len(documents))


def _train(size: Size, documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _run_datasets(size: Size, given: Prepared, out: Path) -> Cost:
    return run_program(
        f"{peers.__name__}:run",
        *(str(given.whole.path), str(given.tokenizer), EOS_TOKEN, str(size.seq_len), str(size.num_workers), str(out)),
        log=out.with_suffix(".log"),
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "TOKENIZERS_PARALLELISM": "false"},
    )


def _run_ours(
    size: Size, given: Prepared, text: Text, out: Path, backend: str, num_workers: int, shard_bytes: int
) -> Cost:
    return run_program(
        f"{ours.__name__}:run",
        *(str(text.path), str(given.tokenizer), str(size.seq_len)),
        *(str(num_workers), backend, str(shard_bytes), str(out)),
        log=out.with_suffix(".log"),
    )


def _sides(size: Size, given: Prepared) -> dict[str, Callable[[Path], Cost]]:
    """How each side is run into an empty directory; without its package the fast backend is left out."""

    def whole(backend: str) -> Callable[[Path], Cost]:
        return lambda out: _run_ours(size, given, given.whole, out, backend, size.num_workers, size.shard_bytes)

    def part(num_workers: int) -> Callable[[Path], Cost]:
        return lambda out: _run_ours(size, given, given.part, out, "tokenizers", num_workers, size.part_shard_bytes)

    sides = {DATASETS: lambda out: _run_datasets(size, given, out), OURS: whole("tokenizers")}
    if importlib.util.find_spec(FAST_PACKAGE) is not None:
        sides[OURS_FAST] = whole("fast")
    return sides | {name: part(num_workers) for num_workers, name in WORKERS.items()}


def check_agreement(theirs: Path, found: Output, seq_len: int) -> int:
    """Number of tokens of all documents; RefusedError unless both sides have the same ones in the same rows.

    Ours holds some documents out: each of theirs must be the next of our training documents or of those held out, and
    our rows must be our training documents one after another.  Their rows lose the end of every batch.
    """
    ids, lengths = peers.read_lists(theirs, "tokenized")
    ends = np.cumsum(lengths)
    places = {"train": 0, "held_out": 0}
    streams = {"train": found.train, "held_out": found.held_out}
    for number, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        document = ids[end - length : end]
        for name, stream in streams.items():
            place = places[name]
            if place < len(stream.doc_lengths) and np.array_equal(_document(stream, place), document):
                places[name] += 1
                break
        else:
            raise RefusedError(f"document {number} has other tokens with datasets than with ours, or another place")
    if any(places[name] != len(stream.doc_lengths) for name, stream in streams.items()):
        raise RefusedError("ours has more documents than datasets")
    if not np.array_equal(found.rows, found.train[:]):
        raise RefusedError("our rows are not our training documents one after another")
    rows, row_lengths = peers.read_lists(theirs, "rows")
    if (row_lengths != seq_len).any() or not len(row_lengths) or not np.array_equal(rows[:seq_len], ids[:seq_len]):
        raise RefusedError(f"the rows of datasets are not its documents in rows of {seq_len}")
    return len(ids)


def _document(stream: ours.TokenStream, number: int) -> np.ndarray:
    return stream[int(stream.doc_starts[number]) : int(stream.doc_starts[number + 1])]


def tokens_per_s(commits: list[Commit], num_workers: int) -> float:
    """Rate of the tokenization stage by the commits of its shards, the processes at its begin and end left out.

    From the commit by which every worker has had a shard, not from the first: else whatever the others had worked on
    until then would count and its time would not.
    """
    first, *later = commits[num_workers - 1 :]
    return sum(commit.tokens for commit in later) / (later[-1].at_s - first.at_s)


@dataclass(frozen=True)
class Measurements:
    """What was found in all rounds."""

    costs: dict[str, list[Cost]]
    stage_tokens_per_s: dict[int, list[float]]
    """Of our tokenization stage, by workers."""
    num_tokens: int
    """Of the whole text, alike for every side."""
    num_shards: dict[str, int]
    """Of our tokenization stage: those of training and those held out."""
    backends: dict[str, list[str]]


def _measure(size: Size, given: Prepared, root: Path) -> Measurements:
    """Run all sides in turn; RefusedError if their tokens differ."""
    sides = _sides(size, given)
    outs = {name: root / f"side-{number}" for number, name in enumerate(sides)}
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    rates: dict[int, list[float]] = {num_workers: [] for num_workers in WORKERS}

    def once(name: str) -> None:
        shutil.rmtree(outs[name], ignore_errors=True)
        costs[name].append(sides[name](outs[name]))
        for num_workers, side in WORKERS.items():
            if name == side:
                rates[num_workers].append(tokens_per_s(ours.read_output(outs[name]).commits, num_workers))

    runs = {name: lambda _, name=name: once(name) for name in sides}
    interleave({name: run for name, run in runs.items() if name not in WORKERS.values()}, size.num_rounds)
    interleave({name: runs[name] for name in WORKERS.values()}, size.num_worker_rounds)
    found = {name: ours.read_output(out) for name, out in outs.items() if name != DATASETS}
    (num_tokens,) = {
        check_agreement(outs[DATASETS], found[name], size.seq_len) for name in found if name not in WORKERS.values()
    }
    return Measurements(
        costs,
        rates,
        num_tokens,
        {name: len(output.commits) for name, output in found.items()},
        {name: sorted({reason.partition(":")[0] for reason in output.backends}) for name, output in found.items()},
    )


def _cpu_s(found: Measurements, side: str) -> list[float]:
    return [cost.cpu_s for cost in found.costs[side]]


def _table(given: Prepared, found: Measurements) -> str:
    rows = []
    for name, costs in found.costs.items():
        if name in WORKERS.values():
            continue
        rates = [given.whole.num_bytes / cost.cpu_s / 1e6 for cost in costs]
        rows.append(
            [
                name,
                f"{statistics.median(rates):.2f}",
                f"{min(rates):.2f}-{max(rates):.2f}",
                f"{found.num_tokens / statistics.median(_cpu_s(found, name)) / 1e6:.3f}",
                f"{statistics.median(cost.wall_s for cost in costs):.1f}",
                f"{median_ratio(_cpu_s(found, name), _cpu_s(found, OURS)):.2f}",
            ]
        )
    lines = [table(["text to rows", "MB/CPU-s", "range", "Mtok/CPU-s", "wall s", "x ours"], rows), ""]
    if OURS_FAST not in found.costs:
        lines[1:1] = [f"{OURS_FAST}: left out, {FAST_PACKAGE} is not installed (pip install 'dlm[fast]')"]
    rows = [
        [
            WORKERS[num_workers],
            f"{statistics.median(rates) / 1e6:.3f}",
            f"{min(rates) / 1e6:.3f}-{max(rates) / 1e6:.3f}",
        ]
        for num_workers, rates in found.stage_tokens_per_s.items()
    ]
    return "\n".join([*lines, table(["tokenization stage", "Mtok/s", "range"], rows)])


def measure(options: Options) -> Measured:
    """Rates of all sides, and how our tokenization stage gains from a second worker."""
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="dlm-tokenization-") as folder:
        given = prepare(size, options.text, Path(folder))
        found = _measure(size, given, Path(folder))
    one, two = (statistics.median(found.stage_tokens_per_s[num_workers]) for num_workers in (1, 2))
    ratios = {"datasets": median_ratio(_cpu_s(found, DATASETS), _cpu_s(found, OURS)), "workers": two / one}
    if OURS_FAST in found.costs:
        ratios["fast"] = median_ratio(_cpu_s(found, DATASETS), _cpu_s(found, OURS_FAST))
    figures = {
        "num_bytes": given.whole.num_bytes,
        "num_docs": given.whole.num_docs,
        "num_tokens": found.num_tokens,
        "num_shards": found.num_shards,
        "cpu_s": {name: [round(cost.cpu_s, 2) for cost in costs] for name, costs in found.costs.items()},
        "wall_s": {name: [round(cost.wall_s, 2) for cost in costs] for name, costs in found.costs.items()},
        "stage_tokens_per_s": {name: [round(r) for r in rates] for name, rates in found.stage_tokens_per_s.items()},
        "backends": found.backends,
    }
    return Measured(_table(given, found), ratios, figures)


if __name__ == "__main__":
    sys.exit(run("tokenization", measure))
