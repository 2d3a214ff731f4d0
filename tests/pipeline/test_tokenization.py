import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipeline.artifact import checked_files, load_manifest, open_artifact
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.data.encoding import EncodedBatch, build_encoder, encode_documents
from pipeline.data.loader import Loader
from pipeline.data.rows import open_rows
from pipeline.data.shards import open_stream
from pipeline.data.special_tokens import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import CorruptionError, UserError
from pipeline.packing.config import STAGE as PACKING
from pipeline.packing.config import PackingConfig
from pipeline.stage import Shard, StageContext, Stopped, list_shards, run_here, run_shard, shard_fingerprint
from pipeline.tokenization.config import STAGE, TokenizationConfig
from pipeline.tokenization.run import _reversible, _segments
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from tests.pipeline.conftest import flip_bit, make_artifact, write_jsonl
from tests.support.tiny_run import forge


def _texts(corpus: Path, split: str) -> list[str]:
    """The text of every document, read without the functions that the stages use."""
    found: list[str] = []
    for path in checked_files(corpus, f"{split}-*.arrow"):
        with pa.memory_map(str(path)) as source:
            rows = pa.ipc.open_file(source).read_all().to_pylist()
        documents: list[str] = []
        for row in rows:
            if row["starts_document"]:
                documents.append("")
            documents[-1] += row["text"]
        left_out = path.with_name(f"{path.stem}.duplicates.npy")
        numbers = set(np.load(left_out).tolist()) if left_out.exists() else set()
        found += [text for number, text in enumerate(documents) if number not in numbers]
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


@pytest.mark.parametrize("batch_chars", [1, 700])
def test_shards_do_not_depend_on_batch_chars(
    tmp_path: Path, corpus: Path, tokenizer: Path, tokens: Path, batch_chars: int
) -> None:
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    again = make_artifact(STAGE, TokenizationConfig(batch_chars=batch_chars), inputs, tmp_path / "again")
    assert load_manifest(again).files == load_manifest(tokens).files
    assert load_manifest(again).fingerprint == load_manifest(tokens).fingerprint


def test_leftovers_of_a_killed_attempt_are_not_taken_over(
    tmp_path: Path, corpus: Path, tokenizer: Path, tokens: Path
) -> None:
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


def test_text_that_spells_special_tokens_is_text_up_to_the_rows_of_training(
    tmp_path: Path, corpus: Path, tokenizer: Path, tokens: Path
) -> None:
    vocabulary = load_vocabulary(tokenizer)
    special = vocabulary.special
    rows = open_rows(
        make_artifact(PACKING, PackingConfig(seq_len=16), {"tokens": tokens, "tokenizer": tokenizer}, tmp_path / "rows")
    )
    loader = Loader(rows, 0, special.pad_token_id)
    batch = loader.batch(np.arange(rows.num_rows))
    is_text = batch.doc_ids >= 0
    assert not (batch.x0[is_text] == special.mask_token_id).any()
    assert not (batch.x0[is_text] == special.pad_token_id).any()
    num_docs = load_manifest(tokens).stats["train_docs"]
    assert (batch.x0[is_text] == special.eos_token_id).sum() == num_docs
    found = {vocabulary.decode(ids.tolist()) for n in range(len(rows.shards)) for _, ids in rows.documents(n)}
    assert found == set(_texts(corpus, "train"))
    assert any("[MASK]" in text and "<|endoftext|>" in text for text in found)


def test_a_giant_document_is_the_ids_of_its_whole_text_in_several_segments(tmp_path: Path) -> None:
    source = tmp_path / "giant.txt"
    pieces = [f"def f{n}(x):\n    return x * {n}  # é [MASK] \n\n\n" for n in range(40_000)]
    source.write_text("".join(pieces))
    (tmp_path / "small.txt").write_text("a small one, held out or not")
    config = CorpusConfig(source={"text": Source((str(tmp_path),))}, txt_document_chars=0, held_out_fraction=0.5)
    corpus = make_artifact(CORPUS, config, {}, tmp_path / "corpus")
    tokenizer = make_artifact(TOKENIZER, TokenizerConfig(vocab_size=300), {"corpus": corpus}, tmp_path / "tokenizer")
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    tokens = make_artifact(STAGE, TokenizationConfig(backend="tokenizers"), inputs, tmp_path / "tokens")
    (path,) = [p for p in checked_files(tokens, "*.arrow") if p.stat().st_size > 100_000]
    stream = open_stream([path])
    vocabulary = load_vocabulary(tokenizer)
    wanted = [*vocabulary.tokenizer.encode(source.read_text()).ids, vocabulary.special.eos_token_id]
    assert stream[:].tolist() == wanted
    assert stream.doc_starts.tolist() == [0, len(wanted)]
    with pa.memory_map(str(path)) as mapped:
        offsets = pa.ipc.open_file(mapped).read_all().column("offset").to_pylist()
    assert len(offsets) > 1
    assert offsets == sorted(set(offsets))
    assert offsets[0] == 0


def test_a_tokenizer_that_does_not_give_the_text_back_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"Words with Capitals {number}" for number in range(20)])
    config = CorpusConfig(source={"text": Source((str(tmp_path / "a.jsonl"),))}, held_out_fraction=0.5)
    corpus = make_artifact(CORPUS, config, {}, tmp_path / "corpus")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lower = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    lower.normalizer = normalizers.Lowercase()
    lower.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower.decoder = decoders.ByteLevel()
    lower.add_special_tokens([MASK_TOKEN, EOS_TOKEN, PAD_TOKEN])
    lower.save(str(tmp_path / "lower.json"))
    given = TokenizerConfig(file=str(tmp_path / "lower.json"))
    tokenizer = make_artifact(TOKENIZER, given, {"corpus": corpus}, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="does not give back the text"):
        make_artifact(STAGE, TokenizationConfig(), {"corpus": corpus, "tokenizer": tokenizer}, tmp_path / "t")


def test_counts_of_a_shard_are_those_of_its_text(corpus: Path, tokens: Path) -> None:
    stats = load_manifest(tokens).stats
    for split in ("train", "held_out"):
        assert stats[f"{split}_bytes"] == sum(len(text.encode()) for text in _texts(corpus, split))
        own = [shard for shard in stats["shards"] if shard["split"] == split]
        for key in ("docs", "tokens", "bytes"):
            assert sum(shard[key] for shard in own) == stats[f"{split}_{key}"]
    assert sum(stats["backends"].values()) == len(stats["shards"])


def test_sources_duplicates_and_documents_of_many_rows_are_tokenized_as_documents(
    tmp_path: Path, tokenizer: Path, documents: list[str]
) -> None:
    giant = "the model reads a document of many rows. " * 28_000
    a = write_jsonl(tmp_path / "a.jsonl", [*documents[:30], giant, documents[0]])
    b = write_jsonl(tmp_path / "b.jsonl", [*documents[20:], giant])
    config = CorpusConfig(source={"b_c": Source((str(b),)), "b": Source((str(a),))}, held_out_fraction=0.2)
    corpus = make_artifact(CORPUS, config, {}, tmp_path / "corpus")
    vocabulary = load_vocabulary(tokenizer)
    tokens = make_artifact(STAGE, TokenizationConfig(), {"corpus": corpus, "tokenizer": tokenizer}, tmp_path / "t")
    found: list[str] = []
    for split in ("train", "held_out"):
        stream = open_stream(checked_files(tokens, f"{split}-*.arrow"))
        ids = np.split(stream[:], stream.doc_starts[1:-1])
        assert [vocabulary.decode(one.tolist()) for one in ids] == _texts(corpus, split)
        assert open_artifact(tokens).stats[f"{split}_docs"] == len(ids) == open_artifact(corpus).stats[f"{split}_docs"]
        found += _texts(corpus, split)
    assert sorted(found) == sorted([*documents, giant])


def _shards(corpus: Path, tokenizer: Path, root: Path) -> list[Shard]:
    context = StageContext(root, root, "f")
    return list_shards(STAGE, TokenizationConfig(), {"corpus": corpus, "tokenizer": tokenizer}, context)


def _identities(corpus: Path, tokenizer: Path, root: Path) -> dict[str, str]:
    shards = _shards(corpus, tokenizer, root)
    return {shard["name"]: shard_fingerprint(STAGE, TokenizationConfig(), shard) for shard in shards}


def test_shards_of_another_tokenizer_are_other_shards(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    other = make_artifact(TOKENIZER, TokenizerConfig(vocab_size=290), {"corpus": corpus}, tmp_path / "other")
    again = make_artifact(TOKENIZER, TokenizerConfig(vocab_size=300), {"corpus": corpus}, tmp_path / "again")
    own = _identities(corpus, tokenizer, tmp_path)
    assert _identities(corpus, again, tmp_path) == own
    assert not set(_identities(corpus, other, tmp_path).values()) & set(own.values())


def test_the_same_text_in_both_splits_is_two_shards(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    """A shard of held-out text has been decoded and compared; one of training text has not."""
    twice = tmp_path / "corpus"
    shutil.copytree(corpus, twice)
    train, held_out = "train-text-00000", "held_out-text-00000"
    shutil.copyfile(twice / f"{train}.arrow", twice / f"{held_out}.arrow")
    forge(twice, f"{held_out}.arrow")
    found = _identities(twice, tokenizer, tmp_path)
    assert found[train] == _identities(corpus, tokenizer, tmp_path)[train]
    assert found[train] != found[held_out]


def test_a_shard_stops_between_two_batches_when_asked(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    asked = iter([False, False, True])
    (tmp_path / "out").mkdir()
    context = StageContext(tmp_path / "out", tmp_path, "f", should_stop=lambda: next(asked))
    config = TokenizationConfig(batch_chars=1, backend="tokenizers")
    shard = _shards(corpus, tokenizer, tmp_path)[0]
    with pytest.raises(Stopped, match=shard["file"]):
        run_shard(STAGE, config, {"corpus": corpus, "tokenizer": tokenizer}, shard, context)
    assert next(asked, None) is None


def test_an_error_of_a_document_names_its_file(tmp_path: Path, tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*(f"short {number}" for number in range(9)), "x" * (1 << 22) + "y"])
    config = CorpusConfig(source={"text": Source((str(source),))}, held_out_fraction=0.5)
    corpus = make_artifact(CORPUS, config, {}, tmp_path / "corpus")
    with pytest.raises(UserError, match=r"^(train|held_out)-text-00000\.arrow: document [1-9]: 4,194,305 char"):
        make_artifact(STAGE, TokenizationConfig(), {"corpus": corpus, "tokenizer": tokenizer}, tmp_path / "t")


def test_a_piece_without_ids_begins_no_document() -> None:
    """As a pre-tokenizer that removes spaces gives for a long stretch of them."""
    ends = np.array([False, True, False, False, True])
    batch = EncodedBatch(np.arange(9, dtype=np.uint16), np.array([0, 3, 2, 0, 4]), ends, 0)
    nothing = EncodedBatch(np.zeros(0, np.uint16), np.array([0]), np.array([False]), 2)
    (segments,) = _segments([batch, nothing])
    assert segments.lengths.tolist() == [3, 2, 4]
    assert segments.offsets.tolist() == [0, 0, 2]


def test_an_empty_document_between_others_comes_back_too(tokenizer: Path) -> None:
    texts = ["a b", "", "c"]
    vocabulary = load_vocabulary(tokenizer)
    batches = list(encode_documents(build_encoder(vocabulary, "tokenizers"), ([text] for text in texts)))
    assert list(_reversible(batches, vocabulary, iter(texts))) == batches
    for lost in (["a b", "", "d"], ["a b", "", "c", "", "d"]):
        with pytest.raises(UserError, match="does not give back the text"):
            list(_reversible(batches, vocabulary, iter(lost)))
