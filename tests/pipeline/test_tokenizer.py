import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.data.special_tokens import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN
from pipeline.data.vocabulary import Vocabulary, load_vocabulary
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import StageContext
from pipeline.tokenizer.config import STAGE, TokenizerConfig, external_data
from pipeline.tokenizer.run import run
from tests.pipeline.conftest import AWKWARD, flip_bit, make_artifact, write_jsonl

SPECIAL = [MASK_TOKEN, EOS_TOKEN, PAD_TOKEN]


def _byte_level(special: list[str] = SPECIAL) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Path) -> Vocabulary:
    return load_vocabulary(tokenizer)


def _adopt(root: Path, content: Tokenizer | str, **settings: Any) -> Vocabulary:
    """The vocabulary of the stage when it is given a file."""
    path = root / "given.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        content.save(str(path))
    return load_vocabulary(make_artifact(STAGE, TokenizerConfig(file=str(path), **settings), {}, root / "adopted"))


def _ids(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_survives_the_round_trip_without_a_special_id(vocabulary: Vocabulary, text: str) -> None:
    ids = _ids(vocabulary, text)
    special = vocabulary.special
    assert not {special.mask_token_id, special.eos_token_id, special.pad_token_id} & set(ids)
    assert vocabulary.decode(ids) == text


@given(text=st.text() | st.text(alphabet="[MASK]<|endoftext|>PAD \n", max_size=60))
def test_any_text_survives_the_round_trip_without_a_special_id(vocabulary: Vocabulary, text: str) -> None:
    ids = _ids(vocabulary, text)
    assert vocabulary.decode(ids).encode() == text.encode()
    assert all(3 <= token_id < vocabulary.special.vocab_size for token_id in ids)


def test_decode_leaves_special_ids_out(vocabulary: Vocabulary) -> None:
    ids = _ids(vocabulary, "some text")
    special = vocabulary.special
    framed = [special.mask_token_id, *ids, special.eos_token_id, special.pad_token_id, special.pad_token_id]
    assert vocabulary.decode(framed) == "some text"
    assert vocabulary.decode([]) == ""


def test_training_gives_distinct_special_ids_and_every_byte(vocabulary: Vocabulary) -> None:
    special = vocabulary.special
    assert {special.mask_token_id, special.eos_token_id, special.pad_token_id} == {0, 1, 2}
    assert special.vocab_size == 300
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary.tokenizer.get_vocab())


def test_training_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    again = make_artifact(STAGE, TokenizerConfig(vocab_size=300), {"corpus": corpus}, tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_training_on_part_of_the_text_stops_at_the_limit(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    config = TokenizerConfig(vocab_size=300, max_train_bytes=1)
    part = make_artifact(STAGE, config, {"corpus": corpus}, tmp_path / "part")
    assert (part / "tokenizer.json").read_bytes() != (tokenizer / "tokenizer.json").read_bytes()


def test_training_up_to_a_limit_takes_from_every_source_in_turn(tmp_path: Path) -> None:
    texts = {"a": ["alpha beta " * 400 + str(i) for i in range(700)], "b": [f"zuzu {i}" for i in range(300)]}
    source = {name: Source((str(write_jsonl(tmp_path / f"{name}.jsonl", own)),)) for name, own in texts.items()}
    corpus = make_artifact(CORPUS, CorpusConfig(source=source), {}, tmp_path / "corpus")
    found: dict[int, Vocabulary] = {}
    for max_train_bytes in (500_000, 1_200_000):
        config = TokenizerConfig(vocab_size=290, max_train_bytes=max_train_bytes)
        out = tmp_path / str(max_train_bytes)
        found[max_train_bytes] = load_vocabulary(make_artifact(STAGE, config, {"corpus": corpus}, out))
    assert {limit: "zu" in it.tokenizer.get_vocab() for limit, it in found.items()} == {500_000: False, 1_200_000: True}


def test_training_with_other_special_spellings_uses_them(tmp_path: Path, corpus: Path) -> None:
    config = TokenizerConfig(vocab_size=300, mask_token="<m>", eos_token="</s>", pad_token="<p>")
    found = load_vocabulary(make_artifact(STAGE, config, {"corpus": corpus}, tmp_path / "t"))
    assert found.tokenizer.id_to_token(found.special.mask_token_id) == "<m>"
    ids = _ids(found, "a <m> b </s>")
    assert found.decode(ids) == "a <m> b </s>"


def test_training_on_a_damaged_corpus_is_refused(tmp_path: Path, corpus: Path) -> None:
    import shutil

    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    flip_bit(copy / "train-text-00000.arrow", 500)
    with pytest.raises(CorruptionError, match=r"train-text-00000\.arrow"):
        make_artifact(STAGE, TokenizerConfig(vocab_size=300), {"corpus": copy}, tmp_path / "t")


def test_a_given_tokenizer_is_adopted_with_its_ids(tmp_path: Path) -> None:
    found = _adopt(tmp_path, _byte_level())
    assert (found.special.mask_token_id, found.special.eos_token_id, found.special.pad_token_id) == (256, 257, 258)
    assert found.special.vocab_size == 259
    for text in AWKWARD:
        assert found.decode(_ids(found, text)) == text


def test_a_given_tokenizer_with_gaps_counts_rows_up_to_its_highest_id(tmp_path: Path) -> None:
    content = json.loads(_byte_level().to_str())
    content["added_tokens"][2]["id"] = 900
    found = _adopt(tmp_path, json.dumps(content))
    highest = max(found.tokenizer.get_vocab(with_added_tokens=True).values())
    assert found.special.vocab_size == highest + 1


def _with_id(token_id: int) -> str:
    content = json.loads(_byte_level().to_str())
    content["model"]["vocab"]["zz"] = token_id
    return json.dumps(content)


def test_a_given_tokenizer_with_as_many_holes_as_tokens_is_adopted(tmp_path: Path) -> None:
    assert _adopt(tmp_path, _with_id(2 * 260 - 1)).special.vocab_size == 2 * 260


@pytest.mark.parametrize("token_id", [2 * 260, 3_000_000_000])
def test_a_given_tokenizer_with_an_id_far_above_the_others_names_its_token(tmp_path: Path, token_id: int) -> None:
    with pytest.raises(UserError, match=rf"'zz' the id {token_id:,} and has 260 tokens; .* {token_id + 1:,} rows"):
        _adopt(tmp_path, _with_id(token_id))


@pytest.mark.parametrize(("missing", "field"), [(0, "mask"), (1, "eos"), (2, "pad")])
def test_a_given_tokenizer_without_a_special_token_names_it_and_those_it_has(
    tmp_path: Path, missing: int, field: str
) -> None:
    others = [token for place, token in enumerate(SPECIAL) if place != missing]
    with pytest.raises(UserError) as error:
        _adopt(tmp_path, _byte_level([*others, "<extra>"]))
    assert f"no {field} token {SPECIAL[missing]!r}" in str(error.value)
    assert "'<extra>'" in str(error.value)
    assert f"tokenizer.{field}_token" in str(error.value)


def test_a_given_tokenizer_that_cuts_pads_and_frames_texts_does_none_of_it(tmp_path: Path) -> None:
    given_tokenizer = _byte_level([*SPECIAL, "[CLS]"])
    given_tokenizer.enable_truncation(5)
    given_tokenizer.enable_padding(length=50, pad_id=258, pad_token=PAD_TOKEN)
    given_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A <|endoftext|>", special_tokens=[("[CLS]", 259), (EOS_TOKEN, 257)]
    )
    found = _adopt(tmp_path, given_tokenizer)
    encoded = [_ids(found, text) for text in ("short", "a much longer text than five tokens")]
    assert [len(ids) for ids in encoded] == [5, 35]
    assert max(map(max, encoded)) < 256


@pytest.mark.parametrize("content", ["", "{}", "not json", "[1, 2]", '{"version": "1.0", "model": {"type": "Magic"}}'])
def test_a_given_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"given\.json.* is not a tokenizer\.json"):
        _adopt(tmp_path, content)


def test_a_given_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty vocabulary"):
        _adopt(tmp_path, Tokenizer(models.BPE()))


def test_a_given_tokenizer_with_special_tokens_only_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(SPECIAL)
    with pytest.raises(UserError, match="no ordinary text"):
        _adopt(tmp_path, tokenizer)


def test_a_given_tokenizer_whose_mask_is_an_ordinary_word_is_refused(tmp_path: Path) -> None:
    tokenizer = _byte_level(SPECIAL[1:])
    tokenizer.add_tokens([AddedToken(MASK_TOKEN, special=False)])
    with pytest.raises(UserError, match="spells a special token"):
        _adopt(tmp_path, tokenizer)


def test_a_given_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.file: there is no file .*absent\.json"):
        external_data(TokenizerConfig(file=str(tmp_path / "absent.json")))


def test_identity_of_a_given_file_follows_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("a")
    before = external_data(TokenizerConfig(file=str(path)))
    flip_bit(path)
    assert external_data(TokenizerConfig(file=str(path))) != before
    assert external_data(TokenizerConfig()) is None


def test_loading_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    _adopt(tmp_path, _byte_level())
    flip_bit(tmp_path / "adopted" / "special_tokens.json", 20)
    with pytest.raises(CorruptionError, match=r"special_tokens\.json"):
        load_vocabulary(tmp_path / "adopted")


def test_run_without_a_file_or_text_writes_nothing_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished artifact"):
        run(TokenizerConfig(), {"corpus": tmp_path}, StageContext(tmp_path, tmp_path, "f"))
    assert list(tmp_path.iterdir()) == []
