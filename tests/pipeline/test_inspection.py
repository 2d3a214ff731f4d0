"""What is shown of the data is what is there, and verification finds each kind of damage."""

import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifact import MANIFEST, checked_files, load_manifest, read_json, write_json
from pipeline.data.inspection import (
    LengthHistogram,
    _compare,
    decode_row,
    length_histogram,
    summarise_sources,
    verify,
)
from pipeline.data.loader import Loader
from pipeline.data.rows import ShardRecord, open_rows
from pipeline.data.shards import open_stream
from pipeline.data.vocabulary import Vocabulary, load_vocabulary
from pipeline.errors import CorruptionError
from tests.pipeline.conftest import flip_bit
from tests.support.packed import numbered_documents, write_rows, write_shard
from tests.support.tiny_run import Artifacts, forge


@pytest.fixture(scope="module")
def vocabulary(made: Artifacts) -> Vocabulary:
    """The tiny tokenizer."""
    return load_vocabulary(made.tokenizer)


def copied(made: Artifacts, to: Path) -> Artifacts:
    """Artifacts of one's own, to be damaged."""
    for name in ("corpus", "tokens", "rows"):
        shutil.copytree(getattr(made, name), to / name)
    return replace(made, corpus=to / "corpus", tokens=to / "tokens", rows=to / "rows")


def sentences(made: Artifacts, vocabulary: Vocabulary) -> list[str]:
    """What verification says."""
    return list(verify(made.corpus, made.tokens, made.rows, vocabulary))


def test_sources_are_counted_as_their_files_say(made: Artifacts) -> None:
    rows = open_rows(made.rows)
    (source,) = summarise_sources(made.tokens, rows, {}, num_samples=3 * rows.num_rows)
    paths = checked_files(made.tokens, "train-*.arrow")
    assert (source.source, source.rows, source.share, source.epochs) == ("text", rows.num_rows, 1.0, 3.0)
    assert source.tokens == sum(open_stream([path]).num_tokens for path in paths)
    assert source.docs == sum(len(open_stream([path]).doc_lengths) for path in paths)
    assert source.bytes == load_manifest(made.corpus).stats["train_bytes"]


def test_histogram_counts_every_document_by_the_bits_of_its_length(made: Artifacts) -> None:
    found = length_histogram(made.tokens)
    lengths = np.concatenate([open_stream([p]).doc_lengths for p in checked_files(made.tokens, "train-*.arrow")])
    naive = Counter(int(length).bit_length() - 1 for length in lengths)
    low = found.edges[0].bit_length() - 1
    assert {low + k: count for k, count in enumerate(found.counts) if count} == dict(naive)
    assert found.edges == [1 << (low + k) for k in range(len(found.counts) + 1)]
    assert (found.shards_read, found.shards) == (len(checked_files(made.tokens, "train-*.arrow")),) * 2


def test_histogram_without_a_training_shard_is_empty(made: Artifacts, tmp_path: Path) -> None:
    own = copied(made, tmp_path)
    manifest = read_json(own.tokens / MANIFEST)
    manifest["stats"]["shards"] = [s for s in manifest["stats"]["shards"] if s["split"] != "train"]
    write_json(own.tokens / MANIFEST, manifest)
    assert length_histogram(own.tokens) == LengthHistogram([1], [], 0, 0)


def test_a_decoded_row_is_its_text_cut_where_documents_meet(made: Artifacts, vocabulary: Vocabulary) -> None:
    rows = open_rows(made.rows)
    loader = Loader(rows, 0, vocabulary.special.pad_token_id)
    kinds = set()
    for sample_id in range(rows.num_rows):
        parts = decode_row(loader, vocabulary, sample_id)
        batch = loader.batch(np.array([sample_id]))
        assert sum(part.tokens for part in parts) == rows.seq_len
        for number, part in enumerate(part for part in parts if part.text is not None):
            own = batch.x0[0][batch.doc_ids[0] == number]
            assert part.text == vocabulary.decode(own.tolist())
        kinds.add(tuple(part.text is None for part in parts))
    assert (False, False) in kinds
    assert (False, True) in kinds


def test_verification_names_all_that_it_has_checked(made: Artifacts, vocabulary: Vocabulary) -> None:
    said = sentences(made, vocabulary)
    for name in ("corpus", "tokens", "rows"):
        files = len(load_manifest(getattr(made, name)).files)
        assert f"{name}: {files:,} files" in "\n".join(said)
        assert files > 1
    rows = open_rows(made.rows)
    assert said[-1] == f"rows: {rows.num_rows:,} of 32 tokens, every token of every document in exactly one"


@pytest.mark.parametrize("name", ["corpus", "tokens", "rows"])
def test_a_flipped_bit_anywhere_is_found(made: Artifacts, vocabulary: Vocabulary, name: str, tmp_path: Path) -> None:
    own = copied(made, tmp_path)
    victim = sorted(getattr(own, name).glob("train-*.arrow"))[-1]
    flip_bit(victim, 500)
    with pytest.raises(CorruptionError, match=victim.name):
        sentences(own, vocabulary)


def rewrite(directory: Path, pattern: str, change: Callable[[list[list[int]]], None]) -> None:
    """Change the documents of the first shard of a pattern, and have the manifest agree."""
    path = sorted(directory.glob(pattern))[0]
    stream = open_stream([path])
    documents = [part.tolist() for part in np.split(stream[:], stream.doc_starts[1:-1])]
    change(documents)
    path.unlink()  # it may be one of two names of the same file
    write_shard(path, documents, stream.vocab_size)
    forge(directory, path.name)


def test_the_mask_id_in_a_shard_is_found(made: Artifacts, vocabulary: Vocabulary, tmp_path: Path) -> None:
    own = copied(made, tmp_path)

    def put_mask(documents: list[list[int]]) -> None:
        documents[0][0] = vocabulary.special.mask_token_id

    rewrite(own.tokens, "train-*.arrow", put_mask)
    with pytest.raises(CorruptionError, match="holds the mask id"):
        sentences(own, vocabulary)


def test_rows_that_hold_another_document_are_found(made: Artifacts, vocabulary: Vocabulary, tmp_path: Path) -> None:
    own = copied(made, tmp_path)

    def change_a_token(documents: list[list[int]]) -> None:
        documents[1][0] = (documents[1][0] + 1) % 100 + 100

    rewrite(own.rows, "train-*[0-9].arrow", change_a_token)
    with pytest.raises(CorruptionError, match="do not hold document 1 of"):
        sentences(own, vocabulary)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda documents: documents.pop(), "hold a document 3, which"),
        (lambda documents: documents.append([7]), "do not hold document 4 of"),
        (lambda documents: documents.insert(1, [7]), "do not hold document 1 of"),
        (lambda documents: documents[3].pop(), "do not hold document 3 of"),
    ],
)
def test_rows_of_more_or_fewer_documents_are_found(
    change: Callable[[list[list[int]]], None], words: str, tmp_path: Path
) -> None:
    documents = numbered_documents([5, 0, 9, 3])
    rows = write_rows(tmp_path / "rows", {"text": [documents]}, seq_len=4)
    tokens = tmp_path / "train-text-00000.arrow"
    write_shard(tokens, documents, rows.vocab_size)
    _compare(rows, 0, tokens)
    change(documents)
    write_shard(tokens, documents, rows.vocab_size)
    with pytest.raises(CorruptionError, match=words):
        _compare(rows, 0, tokens)


def test_comparison_of_rows_and_tokens_needs_the_memory_of_a_document(tmp_path: Path) -> None:
    documents = numbered_documents([25_000] * 80)
    rows = write_rows(tmp_path / "rows", {"text": [documents]}, seq_len=1000)
    write_shard(tmp_path / "tokens.arrow", documents, rows.vocab_size)
    shard_bytes = (tmp_path / "tokens.arrow").stat().st_size
    tracemalloc.start()
    try:
        _compare(rows, 0, tmp_path / "tokens.arrow")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < shard_bytes / 4


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("corpus", "train_docs"), ("corpus", "held_out_bytes"), ("tokens", "train_tokens"), ("rows", "rows"),
        ("rows", "padding_share"),
    ],
)  # fmt: skip
def test_a_manifest_that_counts_wrongly_is_found(
    made: Artifacts, vocabulary: Vocabulary, tmp_path: Path, name: str, key: str
) -> None:
    own = copied(made, tmp_path)
    path = getattr(own, name) / MANIFEST
    manifest = read_json(path)
    manifest["stats"][key] += 1
    write_json(path, manifest)
    with pytest.raises(CorruptionError, match="the manifest says"):
        sentences(own, vocabulary)


@pytest.mark.parametrize("key", ["docs", "tokens"])
@pytest.mark.parametrize("name", ["tokens", "rows"])
def test_a_shard_that_is_counted_wrongly_is_found(
    made: Artifacts, vocabulary: Vocabulary, tmp_path: Path, name: str, key: str
) -> None:
    own = copied(made, tmp_path)
    path = getattr(own, name) / MANIFEST
    manifest = read_json(path)
    manifest["stats"]["shards"][0][key] += 1
    write_json(path, manifest)
    with pytest.raises(CorruptionError, match=manifest["stats"]["shards"][0]["name"]):
        sentences(own, vocabulary)


def test_rows_without_a_shard_of_the_tokens_are_found(made: Artifacts, vocabulary: Vocabulary, tmp_path: Path) -> None:
    own = copied(made, tmp_path)
    manifest = read_json(own.rows / MANIFEST)
    lost = manifest["stats"]["shards"].pop()["name"]
    manifest["files"] = [record for record in manifest["files"] if not record["path"].startswith(lost)]
    write_json(own.rows / MANIFEST, manifest)
    with pytest.raises(CorruptionError, match=f"shards of .*{lost}"):
        sentences(own, vocabulary)


def test_a_source_without_rows_is_shown_as_never_seen(made: Artifacts) -> None:
    rows = open_rows(made.rows)
    none = ShardRecord("train-empty-00000", "empty", 0, 0, 0)
    (empty, text) = summarise_sources(made.tokens, replace(rows, shards=(*rows.shards, none)), {}, num_samples=100)
    assert (empty.source, empty.docs, empty.share, empty.epochs) == ("empty", 0, 0.0, None)
    assert text.share == 1.0
