import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifact import checked_files, load_manifest, open_artifact
from pipeline.data.shards import open_stream
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import CorruptionError, UserError
from pipeline.tokenization.config import STAGE, TokenizationConfig
from tests.pipeline.conftest import flip_bit, make_artifact


def _texts(corpus: Path, split: str) -> list[str]:
    found: list[str] = []
    for path in checked_files(corpus, f"{split}-*.arrow"):
        with pa.memory_map(str(path)) as source:
            found += pa.ipc.open_file(source).read_all().column("text").to_pylist()
    return found


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_documents_decode_to_the_same_text_and_end_with_eos(
    corpus: Path, tokenizer: Path, tokens: Path, split: str
) -> None:
    vocabulary = load_vocabulary(tokenizer)
    special = vocabulary.special
    stream = open_stream(checked_files(tokens, f"{split}-*.arrow"))
    flat = stream[:]
    assert special.mask_token_id not in flat
    assert special.pad_token_id not in flat
    ends = np.flatnonzero(flat == special.eos_token_id)
    assert (ends + 1).tolist() == stream.doc_starts[1:].tolist()
    documents = np.split(flat, stream.doc_starts[1:-1])
    assert [vocabulary.decode(ids.tolist()) for ids in documents] == _texts(corpus, split)


def test_the_documents_of_this_test_spell_special_tokens_on_the_training_side(corpus: Path) -> None:
    train = "".join(_texts(corpus, "train"))
    assert "[MASK]" in train
    assert "<|endoftext|>" in train


def test_shards_bear_the_names_of_the_text_and_stats_count_them(corpus: Path, tokens: Path, tokenizer: Path) -> None:
    names = [record.path for record in open_artifact(corpus).files if record.path.endswith(".arrow")]
    manifest = open_artifact(tokens)
    assert sorted(record.path for record in manifest.files) == sorted(names)
    assert len(names) > 3
    for split in ("train", "held_out"):
        stream = open_stream(checked_files(tokens, f"{split}-*.arrow"))
        assert manifest.stats[f"{split}_docs"] == len(stream.doc_starts) - 1 == len(_texts(corpus, split))
        assert manifest.stats[f"{split}_tokens"] == stream.num_tokens
    assert manifest.stats["vocab_size"] == load_vocabulary(tokenizer).special.vocab_size


@pytest.mark.parametrize("batch_docs", [1, 7])
def test_shards_do_not_depend_on_batch_docs(
    tmp_path: Path, corpus: Path, tokenizer: Path, tokens: Path, batch_docs: int
) -> None:
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    again = make_artifact(STAGE, TokenizationConfig(batch_docs=batch_docs), inputs, tmp_path / "again")
    assert load_manifest(again).files == load_manifest(tokens).files
    assert load_manifest(again).fingerprint == load_manifest(tokens).fingerprint


def test_leftovers_of_a_killed_attempt_are_not_taken_over(
    tmp_path: Path, corpus: Path, tokenizer: Path, tokens: Path
) -> None:
    from pipeline.stage import StageContext, run_here

    leftover = tmp_path / "state" / "shards" / "train-text-00000"
    leftover.mkdir(parents=True)
    (leftover / "train-text-00000.arrow").write_bytes(b"half")
    (leftover / "stray.arrow").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    context = StageContext(tmp_path / "out", tmp_path / "state", "f")
    run_here(STAGE, TokenizationConfig(), {"corpus": corpus, "tokenizer": tokenizer}, context)
    for record in load_manifest(tokens).files:
        assert (tmp_path / "out" / record.path).read_bytes() == (tokens / record.path).read_bytes()


@pytest.mark.parametrize("name", ["corpus", "tokenizer"])
def test_a_damaged_input_is_refused_and_named(tmp_path: Path, corpus: Path, tokenizer: Path, name: str) -> None:
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    damaged = tmp_path / name
    shutil.copytree(inputs[name], damaged)
    victim = "held_out-text-00000.arrow" if name == "corpus" else "tokenizer.json"
    flip_bit(damaged / victim, 300)
    with pytest.raises(CorruptionError, match=victim):
        make_artifact(STAGE, TokenizationConfig(), {**inputs, name: damaged}, tmp_path / "t")


def test_inputs_exchanged_are_refused(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    with pytest.raises((CorruptionError, UserError)):
        make_artifact(STAGE, TokenizationConfig(), {"corpus": tokenizer, "tokenizer": corpus}, tmp_path / "t")
