"""The tokenizer of a checkpoint gets a mask token, and nothing else of it changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipeline.artifact import checked_files, load_manifest
from pipeline.config import from_json
from pipeline.data.shards import open_stream
from pipeline.data.vocabulary import Vocabulary, load_vocabulary, take_literally
from pipeline.errors import UserError
from pipeline.tokenization.config import STAGE as TOKENIZATION
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import STAGE, TokenizerConfig
from pipeline.tokenizer.mask import with_mask
from tests.pipeline.conftest import AWKWARD, make_artifact
from tests.support.ar_checkpoints import checkpoint, llama_like, qwen_like

MASK = "[MASK]"
PLAIN = ["the token mask noise model reads é", "data learns text 1 2 3 and writes in the model of noise\n"]
TEXTS = [*PLAIN, *AWKWARD]
QWEN, LLAMA = qwen_like(PLAIN * 20), llama_like(PLAIN * 20)
QWEN_END, LLAMA_END = QWEN.get_vocab_size(), LLAMA.get_vocab_size()
"""Ids of the first token that they do not have."""
QWEN_IDS = {"eos": QWEN_END - 1, "pad": QWEN_END - 2}
MADE = {"qwen": QWEN, "llama": LLAMA}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that takes all text literally."""
    return take_literally(Tokenizer.from_str(tokenizer.to_str()))


def adopted(root: Path, source: Path, **settings: Any) -> tuple[Vocabulary, dict[str, Any]]:
    """What the stage makes of a checkpoint: the vocabulary and the stats."""
    out = make_artifact(STAGE, TokenizerConfig(**settings), {"checkpoint": source}, root / "adopted")
    return load_vocabulary(out), load_manifest(out).stats


def refused(root: Path, source: Path, words: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=words):
        adopted(root, source, **settings)


def end_of(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def expendable(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens that merges make and no merge takes, by another count than that of the code."""
    pairs = merges_of(tokenizer)
    parts = {part for pair in pairs for part in pair}
    vocab = tokenizer.get_vocab()
    return {vocab[a + b]: a + b for a, b in pairs if a + b not in parts}


# Where the mask comes from


@pytest.mark.parametrize(("mask_from", "spare", "wanted"), [
    ("auto", 7, "unused_row"), ("unused_row", 7, "unused_row"), ("unused_row", 1, "unused_row"),
    ("auto", 0, "new_row"), ("new_row", 0, "new_row"),
])  # fmt: skip
@pytest.mark.parametrize("kind", MADE)
def test_mask_is_the_id_after_the_last_token_and_no_row_is_lost(
    tmp_path: Path, kind: str, mask_from: Any, spare: int, wanted: str
) -> None:
    end = end_of(MADE[kind])
    eos = {"qwen": "<|endoftext|>", "llama": "</s>"}[kind]
    source = checkpoint(tmp_path / "import", MADE[kind], end + spare)
    found, stats = adopted(tmp_path, source, mask_from=mask_from, eos_token=eos)
    assert found.special.mask_token_id == end
    assert found.special.vocab_size == max(end + spare, end + 1) == stats["vocab_size"]
    assert (stats["mask_from"], stats["mask_token_id"]) == (wanted, end)
    before = literal(MADE[kind])
    for text in (*TEXTS, f"a {MASK} b", MASK):
        assert ids_of(found.tokenizer, text) == ids_of(before, text)
        assert end not in ids_of(found.tokenizer, text)
    assert found.tokenizer.get_vocab() == {**before.get_vocab(), MASK: end}


def test_special_tokens_are_those_that_the_checkpoint_names(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "import", QWEN, QWEN_END + 5, special_ids=QWEN_IDS)
    special = adopted(tmp_path, source)[0].special
    assert (special.eos_token_id, special.pad_token_id) == (QWEN_IDS["eos"], QWEN_IDS["pad"])


def test_padding_is_the_end_where_the_checkpoint_names_none(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "import", QWEN, QWEN_END, special_ids={"eos": QWEN_END - 1, "pad": -1})
    special = adopted(tmp_path, source)[0].special
    assert special.eos_token_id == special.pad_token_id == QWEN_END - 1


def test_special_tokens_that_are_given_go_before_those_of_the_checkpoint(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "import", QWEN, QWEN_END, special_ids={"eos": QWEN_END - 1, "mask": QWEN_END - 1})
    special = adopted(
        tmp_path, source, mask_token="<m>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )[0].special  # fmt: skip
    assert special.mask_token_id == QWEN_END
    assert special.eos_token_id == special.pad_token_id == QWEN_END - 2


@pytest.mark.parametrize("settings", [{}, {"mask_from": "existing"}, {"mask_token": "<|im_end|>"}])
def test_an_existing_special_token_is_taken_as_it_is(tmp_path: Path, settings: dict[str, Any]) -> None:
    named = {} if "mask_token" in settings else {"mask": QWEN_END - 1}
    source = checkpoint(tmp_path / "import", QWEN, QWEN_END + 5, special_ids={"eos": QWEN_END - 2, **named})
    found, stats = adopted(tmp_path, source, **settings)
    assert (found.special.mask_token_id, stats["mask_from"]) == (QWEN_END - 1, "existing")
    assert found.special.vocab_size == QWEN_END + 5
    assert found.tokenizer.get_vocab() == QWEN.get_vocab()


# A token that is given up


@pytest.mark.parametrize("kind", MADE)
def test_every_token_that_nothing_is_made_of_can_be_given_up(kind: str) -> None:
    tokenizer = MADE[kind]
    before, texts = literal(tokenizer), [*TEXTS, *(f"x {text} y" for text in expendable(tokenizer).values())]
    num_changed = 0
    for token_id in expendable(tokenizer):
        found, source = with_mask(
            Tokenizer.from_str(tokenizer.to_str()), "rare_token", MASK, token_id, end_of(tokenizer), "it"
        )
        assert source == "rare_token"
        assert found.token_to_id(MASK) == token_id
        assert end_of(found) == end_of(tokenizer)
        found = literal(found)
        for text in (*texts, MASK, f"a{MASK}"):
            old, new = ids_of(before, text), ids_of(found, text)
            assert token_id not in new
            assert found.decode(new, skip_special_tokens=False) == before.decode(old, skip_special_tokens=False)
            assert (old == new) == (token_id not in old)
            num_changed += old != new
    assert num_changed > len(expendable(tokenizer)) // 2


_RARE = {kind: next(iter(sorted(expendable(made)))) for kind, made in MADE.items()}
_GIVEN_UP = {
    kind: literal(with_mask(Tokenizer.from_str(made.to_str()), "rare_token", MASK, _RARE[kind], 0, "it")[0])
    for kind, made in MADE.items()
}
_WHOLE = {kind: literal(made) for kind, made in MADE.items()}


@pytest.mark.parametrize("kind", MADE)
@given(drawn=st.lists(st.sampled_from(["the", "token", " ", "ma", MASK, "é", "\n", "1"]) | st.text(), max_size=12))
def test_any_text_without_the_token_has_the_ids_it_had(kind: str, drawn: list[str]) -> None:
    text = "".join(drawn)
    old, new = ids_of(_WHOLE[kind], text), ids_of(_GIVEN_UP[kind], text)
    assert _RARE[kind] not in new
    assert (old == new) == (_RARE[kind] not in old)
    assert _GIVEN_UP[kind].decode(new, skip_special_tokens=False) == _WHOLE[kind].decode(old, skip_special_tokens=False)


def test_a_token_is_given_up_by_the_stage(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "import", LLAMA, LLAMA_END, special_ids={"eos": 2})
    token_id = _RARE["llama"]
    found, stats = adopted(tmp_path, source, mask_from="rare_token", rare_token_id=token_id)
    assert stats == {"vocab_size": LLAMA_END, "mask_from": "rare_token", "mask_token_id": token_id, "rows": LLAMA_END}
    text = f"x {LLAMA.id_to_token(token_id)} y".replace("▁", " ")
    assert token_id in ids_of(_WHOLE["llama"], text)
    assert token_id not in ids_of(found.tokenizer, text)
    assert found.decode(ids_of(found.tokenizer, text)) == text


def test_merges_spelled_as_one_string_are_known(tmp_path: Path) -> None:
    old = json.loads(QWEN.to_str())
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    spelled = Tokenizer.from_str(json.dumps(old))
    found, _ = with_mask(spelled, "rare_token", MASK, _RARE["qwen"], 0, "it")
    assert found.to_str() == with_mask(
        Tokenizer.from_str(QWEN.to_str()), "rare_token", MASK, _RARE["qwen"], 0, "it"
    )[0].to_str()  # fmt: skip


def words_with(model: Any, trainer: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _word_piece() -> Tokenizer:
    return words_with(models.WordPiece(), trainers.WordPieceTrainer(vocab_size=200, show_progress=False))  # pyright: ignore[reportCallIssue]


def _unigram() -> Tokenizer:
    return words_with(models.Unigram(), trainers.UnigramTrainer(vocab_size=80, show_progress=False))


_MERGED = QWEN.token_to_id(next(a for a, _ in merges_of(QWEN) if len(a) > 1))


@pytest.mark.parametrize(
    ("make", "token_id", "words"),
    [
        (lambda: QWEN, QWEN.token_to_id("A"), r"'A' .*, which no merge makes: text that holds it could not be spelled"),
        (lambda: LLAMA, LLAMA.token_to_id("<0x0A>"), r"'<0x0A>' .*, which no merge makes"),
        (lambda: QWEN, _MERGED, rf"rare_token_id is {_MERGED}, .* longer token\(s\) are merged from, such as .*; take"),
        (lambda: QWEN, QWEN_END - 1, r"'<\|im_end\|>' .*, a special token: set tokenizer\.mask_token to it"),
        (lambda: QWEN, QWEN_END, rf"rare_token_id is {QWEN_END}; the tokenizer of .* has no such token"),
        (lambda: QWEN, 2**40, rf"rare_token_id is {2**40}; the tokenizer of .* has no such token"),
        (_unigram, 20, r"given up in a BPE only, and this is Unigram"),
        (_word_piece, 20, r"given up in a BPE only, and this is WordPiece"),
    ],
)
def test_a_token_that_cannot_be_given_up_is_refused_with_the_reason(
    tmp_path: Path, make: Callable[[], Tokenizer], token_id: int, words: str
) -> None:
    eos = next(iter(make().get_added_tokens_decoder()))
    source = checkpoint(tmp_path / "import", make(), end_of(make()), special_ids={"eos": eos})
    refused(tmp_path, source, r"tokenizer\.rare_token_id is .*" + words.removeprefix("rare_token_id is "),
            mask_from="rare_token", rare_token_id=token_id)  # fmt: skip


# Bad input


@pytest.mark.parametrize(
    ("settings", "spare", "words"),
    [
        (
            {"mask_from": "existing"},
            5,
            r"has no token '\[MASK\]'; its special tokens are .*<\|im_end\|>.*mask_from=auto",
        ),
        ({"mask_from": "unused_row"}, 0, rf"up to id {QWEN_END - 1}, .* {QWEN_END} rows: none is unused.*new_row"),
        ({"mask_from": "new_row"}, 2, r"gets a row that is there\. Set tokenizer\.mask_from=unused_row"),
        (
            {"mask_from": "new_row", "mask_token": "<|im_end|>"},
            0,
            r"has the token .* already, .*mask_from=existing, or",
        ),
        ({"mask_token": "in"}, 0, r"mask token 'in' is not marked as special.*tokenizer\.mask_token"),
        ({"mask_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, 0, "mask token must differ from the eos"),
        ({"eos_token": "</s>"}, 0, r"has no eos token '</s>'; .*tokenizer\.eos_token"),
        ({"pad_token": "<pad>"}, 0, r"has no pad token '<pad>'; .*tokenizer\.pad_token"),
        ({"vocab_size": 500}, 0, r"tokenizer\.vocab_size is 500, but the tokenizer of a checkpoint is not trained"),
        ({"max_train_bytes": 5}, 0, r"tokenizer\.max_train_bytes is 5, but .* leave it out"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, settings: dict[str, Any], spare: int, words: str
) -> None:
    source = checkpoint(tmp_path / "import", QWEN, QWEN_END + spare, special_ids={"eos": QWEN_END - 1})
    assert QWEN.token_to_id("in") is not None
    refused(tmp_path, source, words, **settings)


def test_a_checkpoint_without_an_end_says_what_to_set(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "import", LLAMA, LLAMA_END)
    refused(tmp_path, source, r"no eos token '<\|endoftext\|>'; its special tokens are \['</s>', '<s>', '<unk>'\]\. "
            r"Set tokenizer\.eos_token to one of them$")  # fmt: skip
    bare = checkpoint(tmp_path / "bare", _word_piece(), 300)
    refused(tmp_path / "other", bare, r"no pad token '<pad>'; its special tokens are \['<\|endoftext\|>'\]\. Set",
            pad_token="<pad>")  # fmt: skip


def test_a_tokenizer_without_special_tokens_says_where_they_are_marked(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    source = checkpoint(tmp_path / "import", words, 8)
    refused(tmp_path, source, r"no eos token .*; it has no special tokens\. Mark one in its tokenizer\.json "
            r"\(\"added_tokens\", \"special\": true\); of a checkpoint, before its import$")  # fmt: skip


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "import", None, 300)
    refused(tmp_path, source, r"was imported without a tokenizer\. Put the tokenizer\.json of "
            r"its model beside the config\.json that it was imported with, and import it again$")  # fmt: skip


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ({"dequantised_from": "x.gguf"}, r"without a tokenizer\. Import the safetensors that it was made from$"),
        (
            {"export": "f" * 64},
            r"Export the weights that it was made from again, with their tokenizer, and import that$",
        ),
    ],
)
def test_a_tokenizer_is_not_asked_for_where_it_would_not_help(
    tmp_path: Path, details: dict[str, str], words: str
) -> None:
    source = checkpoint(tmp_path / "import", None, 300, details=details)
    refused(tmp_path, source, words)


def test_a_tokenizer_with_holes_is_refused_where_a_new_token_would_fall_into_one(tmp_path: Path) -> None:
    content = json.loads(QWEN.to_str())
    content["model"]["vocab"]["zz"] = QWEN_END + 40
    source = checkpoint(tmp_path / "import", Tokenizer.from_str(json.dumps(content)), QWEN_END + 50)
    refused(tmp_path, source, r"has ids that no token has.*mask_from=rare_token")


def test_a_mask_that_the_model_has_learned_is_not_left_for_another(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "import", QWEN, QWEN_END + 5, mask_token_id=QWEN_END + 3)
    refused(tmp_path, source, rf"the mask id {QWEN_END + 3}, None .* '\[MASK\]', id {QWEN_END}.*tokenizer\.mask_token=")
    found, _ = adopted(tmp_path / "meant", source, mask_token=MASK)
    assert found.special.mask_token_id == QWEN_END
    own = checkpoint(tmp_path / "own", QWEN, QWEN_END + 5, mask_token_id=QWEN_END)
    assert adopted(tmp_path / "same", own)[0].special.mask_token_id == QWEN_END


def test_text_that_would_get_the_id_of_the_mask_is_refused(tmp_path: Path) -> None:
    content = json.loads(QWEN.to_str())
    content["model"]["ignore_merges"] = True
    source = checkpoint(tmp_path / "import", Tokenizer.from_str(json.dumps(content)), QWEN_END)
    refused(tmp_path, source, "text that spells a special token", mask_from="rare_token", mask_token="MASK",
            rare_token_id=_RARE["qwen"])  # fmt: skip


def test_a_vocabulary_has_one_origin(tmp_path: Path, corpus: Path) -> None:
    source = checkpoint(tmp_path / "import", QWEN, QWEN_END)
    given_file = str(source / "tokenizer.json")
    with pytest.raises(UserError, match=r"neither the input corpus .*, nor tokenizer\.file, nor the input checkpoint"):
        make_artifact(STAGE, TokenizerConfig(), {}, tmp_path / "nothing")
    with pytest.raises(UserError, match="has the input checkpoint and corpus; a vocabulary has one origin"):
        make_artifact(STAGE, TokenizerConfig(), {"checkpoint": source, "corpus": corpus}, tmp_path / "two")
    with pytest.raises(UserError, match="has the input checkpoint and file; a vocabulary has one origin"):
        make_artifact(STAGE, TokenizerConfig(file=given_file), {"checkpoint": source}, tmp_path / "file")


@pytest.mark.parametrize("mask_from", ["unused_row", "new_row", "rare_token"])
def test_a_source_of_the_mask_is_for_checkpoints_alone(tmp_path: Path, corpus: Path, mask_from: Any) -> None:
    config = TokenizerConfig(mask_from=mask_from, rare_token_id=5 if mask_from == "rare_token" else None)
    with pytest.raises(UserError, match=rf'tokenizer\.mask_from is "{mask_from}", which is for .* a checkpoint'):
        make_artifact(STAGE, config, {"corpus": corpus}, tmp_path / "t")


def test_without_a_checkpoint_the_special_tokens_are_three(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.mask_token, eos_token and pad_token are .* three different"):
        make_artifact(STAGE, TokenizerConfig(pad_token="<|endoftext|>"), {"corpus": corpus}, tmp_path / "t")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_from": "magic"}, "mask_from"),
        ({"mask_from": "rare_token"}, r'mask_from is "rare_token" and rare_token_id None'),
        ({"rare_token_id": 5}, r'mask_from is "auto" and rare_token_id 5'),
        ({"mask_from": "rare_token", "rare_token_id": -1}, "rare_token_id is -1; ids begin at 0"),
        ({"mask_token": ""}, "mask_token is empty"),
        ({"pad_token": ""}, "pad_token is empty"),
        ({"mask_token": "<m>", "eos_token": "<m>"}, "mask_token is '<m>', which is eos_token or pad_token too"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_json(TokenizerConfig, settings, "tokenizer")


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("mask_from", ["new_row", "rare_token"])
def test_a_corpus_is_tokenized_into_what_the_checkpoint_knows(
    tmp_path: Path, corpus: Path, documents: list[str], kind: str, mask_from: Any
) -> None:
    eos, rare = {"qwen": "<|im_end|>", "llama": "</s>"}[kind], _RARE[kind]
    config = TokenizerConfig(
        mask_from=mask_from, eos_token=eos, rare_token_id=rare if mask_from == "rare_token" else None
    )
    source = checkpoint(tmp_path / "import", MADE[kind], end_of(MADE[kind]))
    tokenizer = make_artifact(STAGE, config, {"checkpoint": source}, tmp_path / "tokenizer")
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    tokens = make_artifact(TOKENIZATION, TokenizationConfig(), inputs, tmp_path / "tokens")
    vocabulary, mask = load_vocabulary(tokenizer), load_vocabulary(tokenizer).special.mask_token_id
    found = []
    for split in ("train", "held_out"):
        stream = open_stream(checked_files(tokens, f"{split}-*.arrow"))
        found += [ids.tolist() for ids in np.split(stream[:], stream.doc_starts[1:-1])]
    assert sorted(map(vocabulary.decode, found)) == sorted(documents)
    unchanged = [ids for ids in found if rare not in ids_of(_WHOLE[kind], vocabulary.decode(ids))]
    assert unchanged
    for ids in unchanged if mask_from == "rare_token" else found:
        assert ids == [*ids_of(_WHOLE[kind], vocabulary.decode(ids)), MADE[kind].token_to_id(eos)]
    assert not any(mask in ids for ids in found)
