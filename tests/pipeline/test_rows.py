"""Packed rows on disk: unpacked they are the documents again; damage is found before anything is parsed."""

import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.data.rows as rows_module
import pipeline.data.shards as shards
from pipeline.artifact import MANIFEST, Manifest, read_json, write_json
from pipeline.data.packing import PackingPolicy, RowPlan, plan_rows
from pipeline.data.rows import INDEX_SUFFIX, open_row_shard, open_rows, write_index
from pipeline.data.verified import Verified
from pipeline.errors import CorruptionError, UserError, classify
from tests.pipeline.conftest import cut_end, flip_bit
from tests.support.packed import VOCAB_SIZE, numbered_documents, write_rows, write_shard
from tests.support.tiny_run import forge

DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 2), max_size=30), max_size=8)


@pytest.mark.parametrize("policy", ["concatenate", "best_fit", "document"])
@given(groups=st.lists(DOCUMENTS, min_size=1, max_size=3), blocks=st.integers(1, 4), block_size=st.integers(1, 4))
def test_unpacking_gives_the_documents_back(
    tmp_path_factory: pytest.TempPathFactory,
    policy: PackingPolicy,
    groups: list[list[list[int]]],
    blocks: int,
    block_size: int,
) -> None:
    root = tmp_path_factory.mktemp("rows") / "rows"
    rows = write_rows(root, {"text": groups}, blocks * block_size, policy, block_size)
    for number, documents in enumerate(groups):
        found = [(place, tokens.tolist()) for place, tokens in rows.documents(number)]
        assert found == [(place, document) for place, document in enumerate(documents) if document]


def test_documents_that_straddle_record_batches_come_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_TOKENS", 7)
    documents = numbered_documents([5, 9, 3, 20, 1, 6])
    for policy in ("concatenate", "best_fit"):
        rows = write_rows(tmp_path / policy, {"text": [documents]}, 8, policy)
        assert len(rows.open_shard(0).tokens.pieces) > 1
        assert [tokens.tolist() for _, tokens in rows.documents(0)] == documents


def test_opening_a_thousand_shards_reads_manifests_only(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", {"text": [numbered_documents([9, 4])] * 1000}, 8)
    for path in (tmp_path / "rows").glob("*.arrow"):
        os.truncate(path, 0)
        os.truncate(path, next(r.size_bytes for r in rows.files.values() if r.path == path.name))
    start = time.perf_counter()
    again = open_rows(tmp_path / "rows")
    assert time.perf_counter() - start < 5
    assert again.num_rows == 2000
    with pytest.raises(CorruptionError, match="SHA-256"):
        again.open_shard(0)


@pytest.mark.parametrize("suffix", [".arrow", INDEX_SUFFIX])
def test_a_flipped_bit_is_refused_before_the_file_is_parsed(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows", {"text": [numbered_documents([9, 4])]}, 8)
    monkeypatch.setattr(rows_module, "open_row_shard", lambda *_: pytest.fail("it was parsed"))
    flip_bit(tmp_path / "rows" / f"train-text-00000{suffix}", 700)
    with pytest.raises(CorruptionError, match="SHA-256 differs"):
        rows.open_shard(0)


def test_a_missing_or_shortened_file_is_refused_when_opened(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", {"text": [numbered_documents([9, 4])]}, 8)
    victim = tmp_path / "rows" / f"train-text-00000{INDEX_SUFFIX}"
    cut_end(victim, 3)
    with pytest.raises(CorruptionError, match="bytes, the manifest says"):
        open_rows(tmp_path / "rows")
    victim.unlink()
    with pytest.raises(CorruptionError, match="is missing"):
        open_rows(tmp_path / "rows")


def _bad(**changes: list[int]) -> RowPlan:
    good = plan_rows(np.array([5, 6, 2]), 4, "concatenate")
    values = {name: getattr(good, name).tolist() for name in ("row_starts", "length", "document", "offset")} | changes
    types = {"row_starts": np.int64, "length": np.int32, "document": np.int32, "offset": np.int64}
    return RowPlan(**{name: np.array(value, dtype=types[name]) for name, value in values.items()})


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (_bad(length=[4, 1, 3, 3, 2, 1, -3]), "does not have 4 tokens"),
        (_bad(document=[0, 0, 1, 1, 2, 2, 2]), "padding is marked in one column"),
        (_bad(row_starts=[0, 1, 1, 5, 7]), "not runs of its segments"),
    ],
)
def test_an_index_that_makes_no_sense_is_corruption(tmp_path: Path, plan: RowPlan, words: str) -> None:
    assert len(_bad().length) == 7, "the cases spell out seven segments"
    write_shard(tmp_path / "a.arrow", numbered_documents([5, 6, 2]), VOCAB_SIZE)
    write_index(tmp_path / "a.rows.arrow", plan)
    with pytest.raises(CorruptionError, match=words):
        open_row_shard(tmp_path / "a.arrow", tmp_path / "a.rows.arrow", 4)


def test_an_index_of_another_shard_or_length_is_corruption(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.arrow", numbered_documents([5]), VOCAB_SIZE)
    write_index(tmp_path / "a.rows.arrow", plan_rows(np.array([5, 6, 2]), 4, "concatenate"))
    with pytest.raises(CorruptionError, match="outside the 5 tokens"):
        open_row_shard(tmp_path / "a.arrow", tmp_path / "a.rows.arrow", 4)
    with pytest.raises(CorruptionError, match="does not have 8 tokens"):
        open_row_shard(tmp_path / "a.arrow", tmp_path / "a.rows.arrow", 8)
    with pytest.raises(CorruptionError, match="not a valid index"):
        open_row_shard(tmp_path / "a.arrow", tmp_path / "a.arrow", 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": VOCAB_SIZE + 1}, "a vocabulary of 500"),
        ({"shards": [{"name": "train-text-00000", "source": "text", "rows": 9, "docs": 2, "tokens": 13}]}, "2 rows"),
        ({"shards": [{"name": "elsewhere", "source": "text", "rows": 2, "docs": 2, "tokens": 13}]}, "elsewhere"),
        ({"shards": [{"name": "train-text-00000"}]}, "does not hold packed rows"),
        ({"shards": None}, "does not hold packed rows"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_corruption(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    write_rows(tmp_path / "rows", {"text": [numbered_documents([9, 4])]}, 8)
    path = tmp_path / "rows" / MANIFEST
    manifest = read_json(path)
    manifest["stats"] |= change
    write_json(path, manifest)
    with pytest.raises(CorruptionError, match=words):
        open_rows(tmp_path / "rows").open_shard(0)


def test_something_else_than_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished artifact"):
        open_rows(tmp_path)
    write_json(tmp_path / MANIFEST, Manifest("tokenization", "f" * 64, 1, {}, {}, [], {"shards": []}))
    with pytest.raises(UserError, match="an output of the stage tokenization; rows are what the stage packing makes"):
        open_rows(tmp_path)


def test_a_shard_is_verified_once_for_all_who_share_the_record_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows", {"text": [numbered_documents([9, 4])]}, 8)
    hashed: list[str] = []
    real = rows_module.checked_record
    monkeypatch.setattr(rows_module, "checked_record", lambda d, r: (hashed.append(r.path), real(d, r))[1])
    for _ in range(3):
        open_rows(tmp_path / "rows").open_shard(0, Verified(tmp_path / "verified"))
    assert len(hashed) == 2
    path = tmp_path / "rows" / "train-text-00000.arrow"
    os.utime(path, ns=(1, 1))
    rows.open_shard(0, Verified(tmp_path / "verified"))
    assert len(hashed) == 4
    write_shard(path, numbered_documents([9, 4], first=3), VOCAB_SIZE)
    for _ in range(2):
        with pytest.raises(CorruptionError):
            rows.open_shard(0, Verified(tmp_path / "verified"))
    forge(tmp_path / "rows", path.name)
    open_rows(tmp_path / "rows").open_shard(0, Verified(tmp_path / "verified"))
    assert json.loads((tmp_path / "rows" / MANIFEST).read_text())["stats"]["seq_len"] == 8


def test_a_file_that_is_gone_is_corruption_and_one_that_cannot_be_read_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows", {"text": [numbered_documents([9, 4])]}, 8)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(pa, "memory_map", fail)
        with pytest.raises(OSError, match="Input/output error") as raised:
            rows.open_shard(0)
        assert classify(raised.value) == "transient"
    (tmp_path / "rows" / f"train-text-00000{INDEX_SUFFIX}").unlink()
    for verified in (None, Verified(tmp_path / "verified")):
        with pytest.raises(CorruptionError, match="is missing although it was committed"):
            rows.open_shard(0, verified)
