"""Rows by global sample id: complete epochs, exact shares, the same batch however it is cut up."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.data.loader as loader_module
from pipeline.data.loader import Loader, prefetched
from pipeline.data.packing import PackingPolicy
from pipeline.data.rows import PackedRows
from pipeline.errors import CorruptionError, UserError
from tests.pipeline.conftest import flip_bit
from tests.support.packed import PAD, numbered_documents, write_rows

SOURCES = {
    "books": [numbered_documents([17, 3, 40, 8], first=100)],
    "code": [numbered_documents([9, 9, 30], first=7), numbered_documents([50, 2, 2, 2], first=250)],
    "web": [numbered_documents([5] * 9, first=400)],
}
SEQ_LEN = 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PackedRows:
    """Rows of three sources, one of them of two shards."""
    return write_rows(tmp_path_factory.mktemp("loader") / "rows", SOURCES, SEQ_LEN)


def naive_rows(rows: PackedRows, source: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and document ids of every row of a source, read one token at a time."""
    found = []
    for number in rows.by_source[source]:
        shard = rows.open_shard(number)
        for row in range(shard.plan.num_rows):
            tokens: list[int] = []
            ids: list[int] = []
            place, documents = int(shard.start[row]), 0
            for segment in range(int(shard.plan.row_starts[row]), int(shard.plan.row_starts[row + 1])):
                length = int(shard.plan.length[segment])
                stored = length > 0 or segment + 1 < int(shard.plan.row_starts[row + 1])
                for _ in range(abs(length)):
                    tokens.append(int(shard.tokens[place : place + 1][0]) if stored else PAD)
                    ids.append(documents if length > 0 else -1)
                    place += stored
                documents += length > 0
            found.append((tuple(tokens), tuple(ids)))
    return found


def shown(loader: Loader, ids: np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows of a batch in the same form."""
    batch = loader.batch(ids)
    assert batch.x0.dtype == np.int64
    assert batch.sample_ids.tolist() == ids.tolist()
    return [(tuple(x), tuple(d)) for x, d in zip(batch.x0.tolist(), batch.doc_ids.tolist(), strict=True)]


@pytest.mark.parametrize("policy", ["concatenate", "best_fit", "document"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(
    tmp_path: Path, policy: PackingPolicy, block_size: int
) -> None:
    rows = write_rows(tmp_path / "rows", SOURCES, SEQ_LEN, policy, block_size)
    loader = Loader(rows, 0, PAD)
    everything = Counter(row for source in rows.by_source for row in naive_rows(rows, source))
    first, second, third = (shown(loader, np.arange(k * rows.num_rows, (k + 1) * rows.num_rows)) for k in range(3))
    assert Counter(first) == Counter(second) == Counter(third) == everything
    assert first != second != third != first


@settings(deadline=None)
@given(step=st.integers(0, 10**9), seed=st.integers(0, 2**63 - 1), mixed=st.booleans())
def test_the_global_batch_is_the_same_for_any_number_of_ranks_and_any_resume(
    rows: PackedRows, step: int, seed: int, mixed: bool
) -> None:
    mixture = {"code": 3.0, "books": 1.0} if mixed else {}
    ids = np.arange(step * 24, (step + 1) * 24)
    whole = shown(Loader(rows, seed, PAD, mixture), ids)
    for world_size in (1, 2, 3, 4, 8):
        for micro in (24 // world_size, 1):
            resumed = Loader(rows, seed, PAD, mixture)
            parts = [shown(resumed, part) for part in np.array_split(ids, 24 // micro)]
            assert list(itertools.chain(*parts)) == whole


def test_a_mixture_draws_each_source_in_its_share_and_in_its_own_epochs(rows: PackedRows) -> None:
    weights = {"code": 0.5, "books": 0.3, "web": 0.2}
    loader = Loader(rows, 5, PAD, weights)
    of_source = {source: naive_rows(rows, source) for source in rows.by_source}
    owner = {row: source for source, found in of_source.items() for row in found}
    drawn = shown(loader, np.arange(400))
    seen: Counter[str] = Counter()
    for number, row in enumerate(drawn, start=1):
        seen[owner[row]] += 1
        assert all(abs(seen[s] - number * w) < 1 for s, w in weights.items())
    for source, found in of_source.items():
        own = [row for row in drawn if owner[row] == source]
        epochs = [own[i : i + len(found)] for i in range(0, len(own) - len(found) + 1, len(found))]
        assert len(epochs) > 1
        assert all(Counter(epoch) == Counter(found) for epoch in epochs)
    counts = loader.epochs(400)
    assert {s: round(times * len(of_source[s])) for s, times in counts.items()} == dict(seen)


def test_the_order_of_a_source_does_not_depend_on_its_companions(rows: PackedRows) -> None:
    alone = shown(Loader(rows, 1, PAD, {"code": 1}), np.arange(50))
    code = set(naive_rows(rows, "code"))
    beside = [row for row in shown(Loader(rows, 1, PAD, {"code": 1, "web": 1}), np.arange(100)) if row in code]
    assert beside == alone[: len(beside)]
    assert len(beside) == 50


def test_ids_over_several_blocks_and_in_any_order_give_the_rows_of_each(
    rows: PackedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).permutation(300)
    wanted = shown(Loader(rows, 2, PAD), ids)
    monkeypatch.setattr(loader_module, "_BLOCK", 7)
    assert shown(Loader(rows, 2, PAD), ids) == wanted


def test_one_row_less_than_a_batch_wraps_into_the_next_epoch(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", {"text": [numbered_documents([20])]}, SEQ_LEN)
    assert rows.num_rows == 3
    drawn = shown(Loader(rows, 0, PAD), np.arange(12))
    for epoch in range(4):
        assert Counter(drawn[3 * epoch : 3 * epoch + 3]) == Counter(naive_rows(rows, "text"))


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"cod": 1.0}, "names 'cod', which is no source of .*; did you mean code"),
        ({"zzz": 1.0}, "the sources are books, code, web"),
        ({"code": -1.0}, "weight of code is -1.0"),
        ({"code": 1.0, "web": 0.123456789}, "round them"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(rows: PackedRows, mixture: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Loader(rows, 0, PAD, mixture)


@pytest.mark.parametrize("ids", [[], [0.5], 3, [[0, 1]], ["0"], [-1]])
def test_ids_that_are_no_samples_are_refused(rows: PackedRows, ids: object) -> None:
    with pytest.raises(ValueError, match="sample_ids are"):
        Loader(rows, 0, PAD).batch(np.array(ids))


def test_ids_in_a_list_are_those_in_an_array(rows: PackedRows) -> None:
    loader = Loader(rows, 0, PAD)
    assert (loader.batch([3, 1]).x0 == loader.batch(np.array([3, 1])).x0).all()


def test_a_source_without_rows_is_refused_by_name(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", {"empty": [[]], "text": [numbered_documents([9])]}, SEQ_LEN)
    with pytest.raises(UserError, match="no rows of the source empty"):
        Loader(rows, 0, PAD, {"empty": 1, "text": 1})
    assert len(shown(Loader(rows, 0, PAD), np.arange(4))) == 4
    with pytest.raises(UserError, match="has no rows to train on"):
        Loader(write_rows(tmp_path / "none", {"empty": [[]]}, SEQ_LEN), 0, PAD)


def test_a_damaged_shard_is_refused_when_it_is_first_touched(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", {"a": [numbered_documents([9])], "b": [numbered_documents([9])]}, SEQ_LEN)
    flip_bit(tmp_path / "rows" / "train-b-00000.arrow", 700)
    Loader(rows, 0, PAD, {"a": 1}).batch(np.arange(10))
    with pytest.raises(CorruptionError, match="train-b-00000"):
        Loader(rows, 0, PAD).batch(np.arange(10))


def test_prefetched_items_are_the_same_and_made_by_another_thread_a_bounded_way_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[tuple[int, int]]:
        for number in range(20):
            made.append(number)
            yield number, threading.get_ident()

    with prefetched(items(), depth=3) as ahead:
        taken = [next(ahead)]
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three waiting, one in hand
        taken += list(ahead)
    assert [number for number, _ in taken] == list(range(20))
    assert {thread for _, thread in taken} != {threading.get_ident()}


def test_an_error_in_the_prefetch_thread_reaches_the_reader_after_what_came_before() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise CorruptionError("shard 7")

    with prefetched(items()) as ahead:
        assert next(ahead) == 1
        with pytest.raises(CorruptionError, match="shard 7"):
            next(ahead)


def test_leaving_early_ends_the_prefetch_thread() -> None:
    before = threading.active_count()
    with prefetched(itertools.count(), depth=2) as ahead:
        assert next(ahead) == 0
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_no_more_shards_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows", {"text": [numbered_documents([9], first=n) for n in range(8)]}, SEQ_LEN)
    wanted = shown(Loader(rows, 0, PAD), np.arange(64))
    monkeypatch.setattr(loader_module, "_MAX_OPEN_SHARDS", 3)
    loader = Loader(rows, 0, PAD)
    assert shown(loader, np.arange(64)) == wanted
    assert len(loader._open) == 3
