"""The benchmark of the loader: every side shows the same rows, and one that shows others is refused."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import loader, loader_peers, row_files
from benchmarks.command import Options, RefusedError
from benchmarks.loader_peers import DOCUMENTS, TOKENS
from pipeline.data.rows import open_rows

TINY = replace(
    loader.QUICK,
    shard_tokens=20_000,
    num_batches=6,
    num_rounds=2,
    large_shards=3,
    many_shards=20,
    seq_len=64,
    batch_rows=16,
    vocab_size=1000,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> loader.Files:
    root = tmp_path_factory.mktemp("loader")
    loader._prepare(TINY, root)
    return loader.Files(root)


def _take(batches: loader.Batches, num_rows: int) -> Counter[bytes]:
    """Rows of so many batches as they are shown, tokens and documents."""
    shown: Counter[bytes] = Counter()
    for batch in itertools.islice(batches, num_rows // TINY.batch_rows):
        columns = [batch[name].numpy().astype(np.int32) for name in (TOKENS, DOCUMENTS) if name in batch]
        shown.update(row.tobytes() for row in np.concatenate(columns, axis=1))
    return shown


def test_sizes_are_those_that_are_asked_for():
    size = loader.FULL
    assert sum(size.num_shards.values()) * size.shard_tokens * np.dtype(np.uint16).itemsize >= 200e6
    assert len(size.num_shards) == len(size.mixture) == 3
    assert (size.seq_len, size.many_shards) == (1024, 1000)
    assert (size.small_shards * size.shard_tokens, size.large_shards * size.shard_tokens) == (10**7, 10**9)
    assert TINY.round_tokens == 6 * 16 * 64


def test_documents_have_lengths_like_text_and_fill_their_shards(tmp_path):
    documents = row_files.write_documents(tmp_path / "documents", {"a": 1, "b": 2}, 500_000, 1000, seed=0)
    assert documents.sources == ("a", "b", "b")
    for number in range(3):
        stream = row_files.open_stream([documents.path(number)])
        assert stream.num_tokens == 500_000
        assert stream[:].max() == 998
        assert 0.7 * 930 < stream.doc_lengths.mean() < 1.3 * 930
        assert 0.8 * 400 < np.median(stream.doc_lengths) < 1.2 * 400


@pytest.mark.parametrize("policy", ["concatenate", "best_fit"])
def test_rows_hold_every_document_once(tmp_path, policy):
    documents = row_files.write_documents(tmp_path / "documents", {"a": 2}, 5_000, 1000, seed=0)
    rows = row_files.write_rows(tmp_path / "rows", documents, 64, policy)
    for number in range(2):
        stream = row_files.open_stream([documents.path(number)])
        found = dict(rows.documents(number))
        assert sorted(found) == list(range(len(stream.doc_lengths)))
        for document, (start, stop) in enumerate(itertools.pairwise(stream.doc_starts.tolist())):
            np.testing.assert_array_equal(found[document], stream[start:stop])


def test_epoch_of_rows_is_the_same_on_every_side(files):
    num_rows = open_rows(files.concatenated).num_rows // TINY.batch_rows * TINY.batch_rows
    expected = Counter(row.tobytes() for row in np.load(files.memory_map).astype(np.int32))
    sides = loader._sides(files, TINY)
    orders: list[list[bytes]] = []
    for name in (loader.OURS, loader.DATASETS, loader.MEMMAP):
        shown = _take(sides[name](), num_rows)
        assert shown.total() == num_rows
        assert shown <= expected, name
        orders.append(list(shown))
    assert orders[0] != orders[1] != orders[2] != list(expected)


def test_mixed_rows_come_with_their_documents_in_the_shares_of_the_mixture(files):
    fitted = open_rows(files.fitted)
    own = {source: loader._all_rows(fitted, source) for source in TINY.mixture}
    source_of = {
        np.concatenate([tokens, documents]).astype(np.int32).tobytes(): source
        for source, columns in own.items()
        for tokens, documents in zip(columns[TOKENS], columns[DOCUMENTS], strict=True)
    }
    assert len(source_of) == fitted.num_rows
    for name, tolerance in ((loader.OURS_FULL, 0.01), (loader.DATASETS_FULL, 0.1)):  # one draws, ours counts
        shown = _take(loader._sides(files, TINY)[name](), 480)
        assert shown.keys() <= source_of.keys(), name
        shares = Counter(source_of[row] for row in shown.elements())
        for source, share in TINY.mixture.items():
            assert shares[source] / 480 == pytest.approx(share, abs=tolerance), name


def test_side_that_shows_other_rows_is_refused(files):
    batch = next(loader._sides(files, TINY)[loader.OURS]())
    good = batch[TOKENS]
    changed = good.clone()
    changed[3, 5] += 1
    later = next(itertools.islice(loader._sides(files, TINY)[loader.OURS](), 1, None))
    loader._check(loader.OURS, iter([{TOKENS: good}, later]), files, TINY)
    with pytest.raises(RefusedError, match="'ours, rows only' shows rows that are not in the data"):
        loader._check(loader.OURS, iter([{TOKENS: changed}]), files, TINY)
    with pytest.raises(RefusedError, match="or some twice within 32"):
        loader._check(loader.OURS, iter([{TOKENS: good}] * 2), files, TINY)
    with pytest.raises(RefusedError, match=r"tokens of torch.int32 \[16, 64\]; expected int64"):
        loader._check(loader.OURS, iter([{TOKENS: good.to(torch.int32)}]), files, TINY)


def test_side_whose_documents_are_shifted_is_refused(files):
    batch = next(loader._sides(files, TINY)[loader.OURS_FULL]())
    loader._check(loader.OURS_FULL, iter([batch]), files, TINY)
    with pytest.raises(RefusedError, match="'ours, all on' shows rows that are not in the data"):
        loader._check(loader.OURS_FULL, iter([batch | {DOCUMENTS: batch[DOCUMENTS] + 1}]), files, TINY)


def test_datasets_hold_what_they_were_given(tmp_path):
    columns = {TOKENS: np.arange(12).reshape(4, 3), DOCUMENTS: -np.arange(12).reshape(4, 3)}
    loader_peers.save_dataset(tmp_path / "saved", columns)
    (batch,) = itertools.islice(loader_peers.shuffled(tmp_path / "saved", 4, seed=1), 1)
    order = batch[TOKENS][:, 0].argsort()
    for name, column in columns.items():
        assert batch[name].dtype == torch.int64
        np.testing.assert_array_equal(batch[name][order].numpy(), column)


def test_many_shards_are_links_to_one_and_open_as_rows(tmp_path):
    documents = row_files.write_documents(tmp_path / "documents", {"a": 1}, 5_000, 1000, seed=0)
    rows = row_files.write_rows(tmp_path / "one", documents, 64, "best_fit")
    many = row_files.multiply_shard(tmp_path / "many", rows, 3)
    assert many.num_rows == 3 * rows.num_rows
    assert len({(tmp_path / "many" / f"{shard.name}.arrow").stat().st_ino for shard in many.shards}) == 1
    np.testing.assert_array_equal(many.open_shard(2).tokens[:], rows.open_shard(0).tokens[:])


def test_text_is_refused_where_documents_are_made_up(tmp_path):
    with pytest.raises(ValueError, match="--text: documents are made up here"):
        loader.measure(Options(quick=True, text=(tmp_path,)))


@pytest.mark.timeout(180)
def test_run_has_every_ratio_and_figure(monkeypatch):
    monkeypatch.setattr(loader, "QUICK", TINY)
    measured = loader.measure(Options(quick=True, text=()))
    assert measured.ratios.keys() == {"datasets", "datasets_full", "memmap"}
    assert all(ratio > 0 for ratio in measured.ratios.values())
    assert {
        "open_20_shards_s", "peak_mb_10mb", "peak_mb_1gb", "first_batch_ms_verified_before", "prefetched_ms_p99",
        "batch_ms_p99", "prefetched_behind_steps_ms_p99",
    } <= measured.figures.keys()  # fmt: skip
    sides = {loader.OURS, loader.OURS_FULL, loader.DATASETS, loader.DATASETS_FULL, loader.MEMMAP}
    assert set(measured.figures["cpu_s"]) == set(measured.figures["first_batch_ms"]) == sides
    assert all(len(times) == TINY.num_rounds for times in measured.figures["cpu_s"].values())
    assert all(any(line.startswith(name) for line in measured.table.splitlines()) for name in sides)
    json.dumps(measured.figures)
