from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from pipeline.data import words
from pipeline.data.special_tokens import SpecialTokens
from pipeline.data.splitting import CutRule, find_cut_rule
from pipeline.data.vocabulary import Vocabulary, take_literally
from pipeline.data.words import WordBackend, encode_whole
from pipeline.errors import UserError
from tests.pipeline.test_splitting import ALPHABET, MIXED, WORDS

HIDDEN = "<think> x"
"""A special token; its spelling is text, and hides the added token in it."""
REPEATED = 12
"""Times that texts are given, so that their words come again."""


def _trained(name: str) -> Vocabulary:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, normalizer = WORDS[name]
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [MIXED], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(["<think>", AddedToken("e\u0301!", normalized=False)])
    tokenizer.add_special_tokens([HIDDEN])
    return Vocabulary(take_literally(tokenizer), SpecialTokens(0, 1, 2, tokenizer.get_vocab_size()))


@pytest.fixture(scope="module", params=WORDS)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return _trained(request.param)


def _backend(vocabulary: Vocabulary) -> WordBackend:
    return WordBackend(vocabulary, find_cut_rule(vocabulary.tokenizer))


def _encode(backend: WordBackend, texts: list[str]) -> list[list[int]]:
    flat, lengths = backend.encode(texts)
    assert (flat.dtype, lengths.dtype) == (np.uint32, np.int64)
    ends = np.cumsum(lengths)
    assert ends[-1] == len(flat)
    return [flat[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


def _whole(vocabulary: Vocabulary, texts: Iterable[str]) -> list[list[int]]:
    """The oracle: the tokenizer, for each text at once."""
    return [vocabulary.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_words_have_together_the_ids_of_the_whole(vocabulary: Vocabulary) -> None:
    backend = _backend(vocabulary)
    lines = MIXED.splitlines(keepends=True)
    texts = ["", MIXED, "", *lines, "\u0301" + MIXED, f"a {HIDDEN} {HIDDEN}<think> e\u0301! \u00e9!", ""]
    for _ in range(2):
        assert _encode(backend, REPEATED * texts) == REPEATED * _whole(vocabulary, texts)
    assert backend._ids_of_word
    assert _encode(backend, ["", ""]) == [[], []]
    assert np.array_equal(encode_whole(vocabulary, MIXED), _whole(vocabulary, [MIXED])[0])


def test_any_texts_have_the_ids_of_the_whole(vocabulary: Vocabulary) -> None:
    backend = _backend(vocabulary)

    @given(texts=st.lists(st.text(alphabet=f"{ALPHABET}<think>!", max_size=40) | st.text(max_size=12), min_size=1))
    def agree(texts: list[str]) -> None:
        assert _encode(backend, REPEATED * texts) == REPEATED * _whole(vocabulary, texts)

    agree()


@pytest.mark.parametrize("name", sorted(WORDS))
def test_the_safe_places_of_a_text_are_those_judged_one_by_one(name: str) -> None:
    rule = find_cut_rule(_trained(name).tokenizer)
    text = MIXED
    if rule.normalizer:
        assert not rule.safe_places(MIXED).any()
        text = rule.normalizer.normalize_str(MIXED)
    found = set(np.flatnonzero(rule.safe_places(text)).tolist())
    single = {place for place in range(len(text)) if rule.is_safe(text, place)}
    assert len(found) > len(text) // 10
    # Of a text that the normalizer leaves as it is, more is known than of its surroundings alone.
    assert single <= found if rule.normalizer else single == found


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def counted(vocabulary: Vocabulary, text: str) -> np.ndarray:
        asked.append(text)
        return encode_whole(vocabulary, text)

    monkeypatch.setattr(words, "encode_whole", counted)
    return asked


def test_the_tokenizer_is_asked_once_for_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = _trained("gpt2")
    asked = _count_calls(monkeypatch)
    backend = _backend(vocabulary)
    texts = REPEATED * ["one two one two", "two, one", " one one one"]
    assert _encode(backend, texts) == _whole(vocabulary, texts)
    assert sorted(asked) == sorted({"one", " two", " one", "two", ","})
    assert _encode(backend, [*texts, " three"]) == _whole(vocabulary, [*texts, " three"])
    assert asked[5:] == [" three"]


def test_texts_of_many_new_words_are_taken_at_once_and_teach_their_frequent_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vocabulary = _trained("gpt2")
    asked = _count_calls(monkeypatch)
    backend = _backend(vocabulary)
    texts = ["one two", "", "three two two four"]
    assert _encode(backend, texts) == _whole(vocabulary, texts)
    assert asked == [" two", *texts]
    again = 3 * texts
    assert _encode(backend, again) == _whole(vocabulary, again)
    assert sorted(asked[4:]) == sorted(["one", "three", " four", *again])
    assert _encode(backend, again) == _whole(vocabulary, again)
    assert len(asked) == 4 + 3 + len(again)


@pytest.mark.parametrize("limit", ["_MAX_WORDS", "_MAX_CHARS"])
def test_what_is_remembered_is_bounded_and_changes_no_id(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(words, limit, 8)
    vocabulary = _trained("gpt2")
    backend = _backend(vocabulary)
    for number in range(20):
        texts = REPEATED * [f"word {number}, and {number + 1} more"]
        assert _encode(backend, texts) == _whole(vocabulary, texts)
        assert len(backend._ids_of_word) <= 8 + 7
        assert len("".join(backend._ids_of_word)) <= 8 + 40
        assert backend._num_chars == len("".join(backend._ids_of_word))


def test_one_text_that_a_normalizer_changes_leaves_the_others_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = _trained("qwen2")
    asked = _count_calls(monkeypatch)
    texts = REPEATED * ["one two", "e\u0301 x", "\u00e9 y"]
    assert _encode(_backend(vocabulary), texts) == _whole(vocabulary, texts)
    assert sorted(asked) == sorted(["one", " two", "e\u0301 x", "\u00e9", " y"])


def test_a_tokenizer_without_safe_places_takes_each_text_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = _trained("gpt2")
    asked = _count_calls(monkeypatch)
    texts = ["one two one two one", "", "three"]
    assert _encode(WordBackend(vocabulary, CutRule(obstacle="of the test")), texts) == _whole(vocabulary, texts)
    assert asked == texts


def test_a_regex_that_gives_up_is_a_user_error_with_the_text() -> None:
    vocabulary = _trained("gpt2")
    vocabulary.tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:a+a+)+b|[\s\S]"), "isolated")
    with pytest.raises(UserError, match=r"fails on the text 'aaaa.*of 40 characters: .*retry-limit"):
        _backend(vocabulary).encode(["a" * 40])


def test_a_tokenizer_that_cuts_or_pads_texts_does_neither() -> None:
    vocabulary = _trained("gpt2")
    vocabulary.tokenizer.enable_truncation(3)
    vocabulary.tokenizer.enable_padding(length=100)
    take_literally(vocabulary.tokenizer)
    assert len(encode_whole(vocabulary, MIXED)) > 100
    assert len(encode_whole(vocabulary, "one")) < 100
    assert _encode(_backend(vocabulary), REPEATED * [MIXED]) == _whole(vocabulary, REPEATED * [MIXED])
