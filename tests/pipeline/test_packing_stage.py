"""The packing stage: rows of an artifact hold the training documents, whatever the policy; bad settings are refused."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact import load_manifest
from pipeline.config import from_json
from pipeline.data.packing import PackingPolicy, plan_rows
from pipeline.data.rows import INDEX_SUFFIX, open_rows
from pipeline.data.shards import open_stream
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import CorruptionError, UserError
from pipeline.packing.config import STAGE, PackingConfig
from pipeline.packing.run import rows_in_order
from tests.pipeline.conftest import flip_bit
from tests.support.tiny_run import Artifacts, make_artifacts, run_stage


def pack(made: Artifacts, out: Path, **settings: Any) -> Path:
    """Rows of the tiny corpus."""
    return run_stage(STAGE, PackingConfig(**settings), {"tokens": made.tokens, "tokenizer": made.tokenizer}, out)


@pytest.mark.parametrize(
    ("policy", "block_size"),
    [("concatenate", 1), ("concatenate", 8), ("best_fit", 1), ("best_fit", 8), ("document", 1)],
)
def test_rows_hold_every_training_document_once(
    made: Artifacts, tmp_path: Path, policy: PackingPolicy, block_size: int
) -> None:
    out = pack(made, tmp_path / "rows", seq_len=64, policy=policy, block_size=block_size)
    rows = open_rows(out)
    num_docs = 0
    for number, record in enumerate(rows.shards):
        stream = open_stream([made.tokens / f"{record.name}.arrow"])
        wanted = np.split(stream[:], stream.doc_starts[1:-1])
        found = [tokens for _, tokens in rows.documents(number)]
        assert len(found) == len(wanted) == record.docs
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        num_docs += len(found)
    stats = load_manifest(out).stats
    assert num_docs == load_manifest(made.tokens).stats["train_docs"]
    assert stats["tokens"] == load_manifest(made.tokens).stats["train_tokens"]
    assert stats["rows"] == rows.num_rows
    assert stats["padding_share"] == pytest.approx(1 - stats["tokens"] / (rows.num_rows * 64))
    assert (rows.seq_len, rows.vocab_size) == (64, load_vocabulary(made.tokenizer).special.vocab_size)


def test_concatenated_rows_are_another_name_of_the_tokens(made: Artifacts, tmp_path: Path) -> None:
    rows = open_rows(pack(made, tmp_path / "rows", seq_len=64))
    for record in rows.shards:
        name = f"{record.name}.arrow"
        assert os.path.samefile(rows.directory / name, made.tokens / name)
        assert record.rows == -(-record.tokens // 64)


def test_padding_within_a_row_is_the_pad_token(made: Artifacts, tmp_path: Path) -> None:
    rows = open_rows(pack(made, tmp_path / "rows", seq_len=64, policy="best_fit", block_size=16))
    special = load_vocabulary(made.tokenizer).special
    shard = rows.open_shard(0)
    text = sum(int(length) for length in shard.plan.length if length > 0)
    assert (shard.tokens[:] == special.pad_token_id).sum() == shard.tokens.num_tokens - text > 0


def test_rows_are_named_after_their_tokens_and_nothing_is_held_out(made: Artifacts) -> None:
    names = [s["name"] for s in load_manifest(made.tokens).stats["shards"] if s["split"] == "train"]
    assert [record.name for record in open_rows(made.rows).shards] == names
    wanted = sorted([f"{name}.arrow" for name in names] + [f"{name}{INDEX_SUFFIX}" for name in names])
    assert sorted(record.path for record in load_manifest(made.rows).files) == wanted
    assert len(names) > 1


def test_a_row_longer_than_the_corpus_is_refused(made: Artifacts, tmp_path: Path) -> None:
    num_tokens = load_manifest(made.tokens).stats["train_tokens"]
    with pytest.raises(UserError, match=f"seq_len is 1000000, but the training corpus has only {num_tokens} tokens"):
        pack(made, tmp_path / "rows", seq_len=1_000_000)


def test_the_tokenizer_of_other_tokens_is_refused(made: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_artifacts(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made with another tokenizer"):
        run_stage(STAGE, PackingConfig(), {"tokens": made.tokens, "tokenizer": other.tokenizer}, tmp_path / "rows")


def test_a_damaged_token_shard_is_refused_by_name(made: Artifacts, tmp_path: Path) -> None:
    tokens = shutil.copytree(made.tokens, tmp_path / "tokens")
    victim = sorted(tokens.glob("train-*.arrow"))[-1]
    flip_bit(victim, 500)
    with pytest.raises(CorruptionError, match=victim.name):
        run_stage(STAGE, PackingConfig(), {"tokens": tokens, "tokenizer": made.tokenizer}, tmp_path / "rows")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_len": 0}, "seq_len is 0; it must be at least 1"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"seq_len": 30, "block_size": 16}, "seq_len is 30; it must be a multiple of block_size 16"),
        ({"policy": "first_fit"}, "policy is 'first_fit'"),
        ({"sequence_length": 3}, "unknown setting packing.sequence_length"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_json(PackingConfig, settings, where="packing")


def test_rows_of_any_length_are_written_a_bounded_number_of_tokens_at_a_time(
    made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream([made.tokens / f"{open_rows(made.rows).shards[0].name}.arrow"])
    plan = plan_rows(stream.doc_lengths, 32, "best_fit")
    (whole,) = rows_in_order(stream, plan, 32, 0)
    monkeypatch.setattr("pipeline.packing.run._TOKENS_AT_ONCE", 100)
    parts = list(rows_in_order(stream, plan, 32, 0))
    assert max(len(part.values) for part in parts) <= 100
    assert np.array_equal(np.concatenate([part.values for part in parts]), whole.values)
    assert np.array_equal(np.concatenate([part.lengths for part in parts]), whole.lengths)
    monkeypatch.setattr("pipeline.packing.run._TOKENS_AT_ONCE", 1)
    assert len(list(rows_in_order(stream, plan, 32, 0))) == plan.num_rows
