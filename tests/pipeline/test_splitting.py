import time
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipeline.data.splitting import CutRule, cut_document, find_cut_rule
from pipeline.errors import UserError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN_2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
GPT_4 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _splits(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


WORDS: dict[str, tuple[pre_tokenizers.PreTokenizer, normalizers.Normalizer | None]] = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "gpt2_prefix_space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "gpt4": (_splits(GPT_4), None),
    "gpt4o": (_splits(GPT_4O), None),
    "llama3": (_splits(LLAMA_3), None),
    "llama3_nfkc": (_splits(LLAMA_3), normalizers.Sequence([normalizers.NFKC()])),
    "qwen2": (_splits(QWEN_2), normalizers.NFC()),
    "qwen2_nfd": (_splits(QWEN_2), normalizers.NFD()),
    "deepseek": (_splits(*DEEPSEEK), None),
    "digits": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        None,
    ),
    "digit_runs": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        None,
    ),
}

MIXED = (
    "def f(self, x):\n    if x  >  1:\n\t\treturn x[1:-1]   # don't, we'LL, I'd, 'tis\n\n\n\nclass A:\r\n\r\n  pass\n"
    "The quick brown fox jumped; 1234567 times, 3.14159 or 1,000,000.  Two  spaces.   Three.\n \n  \n   x\n"
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002\u4e2d\u6587\uff0c\u6587\u672c\u3001123\u4e2a\u3002\n"
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab\ne\u0301a\u0300\u0316 \u212b \ufb01 \u00bd \u2167 =\u0338 <\u0338 \n"
    "\u0301alone \n\u0301 \u3000\u3099 \u304b\u3099\n\U0001f469\u200d\U0001f52c\U0001f1fa\U0001f1f3!!??...---===\n"
    "\u0967\u0968\u0969 \u0e44\u0e17\u0e22 \u05e2\u05d1\u05e8\u05d9\u05ea\n'\u017f \u0130\u0149 \u1e9e\u00df \ufb06 "
    "'s'S's \u0661\u0662 a1b2c3 x\u00b2 \xa0\xa0a \x85b\u2028c\x00\x07 \ufeff\n   "
)
ALPHABET = (
    "ab sS'tl1\u0662\n\r\t .,/\u3002\u4e2d\u0301e\u00e9\u1112\u1161\u017f\ufb06\u00df\u0149\u3000\U0001f469=\u0338"
)


def _tokenizer(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, normalizer = WORDS[name]
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The oracle: what the tokenizer itself does with a text."""
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.pre_tokenizer
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture(scope="module", params=WORDS)
def ruled(request: pytest.FixtureRequest) -> tuple[Tokenizer, CutRule]:
    tokenizer = _tokenizer(request.param)
    return tokenizer, find_cut_rule(tokenizer)


def test_every_safe_place_keeps_the_words_of_the_whole(ruled: tuple[Tokenizer, CutRule]) -> None:
    tokenizer, rule = ruled
    whole = _words(tokenizer, MIXED)
    safe = [place for place in range(len(MIXED)) if rule.is_safe(MIXED, place)]
    for place in safe:
        assert _words(tokenizer, MIXED[:place]) + _words(tokenizer, MIXED[place:]) == whole, MIXED[
            place - 9 : place + 9
        ]
    assert len(safe) > len(MIXED) // 12


def test_any_text_keeps_its_words_at_every_safe_place(ruled: tuple[Tokenizer, CutRule]) -> None:
    tokenizer, rule = ruled

    near = st.text(alphabet=ALPHABET, max_size=24) | st.text(max_size=12)

    @given(before=near, text=near, after=near)
    def keeps(before: str, text: str, after: str) -> None:
        whole = _words(tokenizer, before + text + after)
        for place in range(len(text) + 1):
            if rule.is_safe(text, place):
                left, right = before + text[:place], text[place:] + after
                assert _words(tokenizer, left) + _words(tokenizer, right) == whole

    keeps()


def test_every_pair_of_characters_is_judged_as_the_tokenizer_splits(ruled: tuple[Tokenizer, CutRule]) -> None:
    tokenizer, rule = ruled
    for x in ALPHABET:
        for y in ALPHABET:
            for before, after in ((" ", " "), ("\n", "a"), ("a", "1"), ("1'", "\n"), (" .", "ll")):
                left, right = before + x, y + after
                if rule.is_safe(left + right, len(left)):
                    assert _words(tokenizer, left) + _words(tokenizer, right) == _words(tokenizer, left + right)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_no_unicode_form_changes_anything_across_an_inert_character(form: str) -> None:
    from pipeline.data.splitting import _INERT

    everything = [chr(code) for code in range(0x32000) if not 0xD800 <= code < 0xE000]
    alone = [unicodedata.normalize(form, character) for character in everything]
    for inert in _INERT:
        assert unicodedata.normalize(form, inert.join(everything)) == inert.join(alone)


def test_ids_of_the_pieces_are_those_of_the_whole_for_every_cut() -> None:
    text = MIXED * 60
    assert len(text) > 20_000
    for name in ("gpt2", "llama3", "qwen2"):
        tokenizer = _tokenizer(name)
        trainer = trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator([MIXED], trainer)
        rule = find_cut_rule(tokenizer)
        whole = tokenizer.encode(text).ids
        cuts = sorted({rule.last_cut(text, 0, place) or 0 for place in range(len(text))})
        # Between two neighbouring cuts is a piece; if every piece joins its neighbours, any choice of cuts does.
        ids = [tokenizer.encode(text[a:b]).ids for a, b in pairwise([*cuts, len(text)])]
        assert [one for piece in ids for one in piece] == whole
        for cut in cuts[:: len(cuts) // 12]:
            assert tokenizer.encode(text[:cut]).ids + tokenizer.encode(text[cut:]).ids == whole


def _byte_level(**changes: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (Tokenizer(models.BPE()), "no pre-tokenizer"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Metaspace()), "Metaspace"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous")), "Split"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"(?<=a)b|."), "isolated")), r"\(\?<=a\)b"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"^a|."), "isolated")), r"\^a"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"\w\b|."), "isolated")), r"\\b"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"(a)\1|."), "isolated")), r"\\1"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"a*"), "isolated")), "without a character"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"ax{2}?b|[\s\S]"), "isolated")), r"\{2\}\?b"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"ax{3,0}b|[\s\S]"), "isolated")), r"\{3,0\}b"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"(?i:\u00df)|."), "isolated")), r"u00df|\u00df"),
        (_byte_level(normalizer=normalizers.Lowercase()), "Lowercase"),
        (_byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])), "Strip"),
        (
            _byte_level(
                pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(), pre_tokenizers.Digits(True)])
            ),
            "ByteLevel makes",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read_cuts_nowhere_and_says_why(tokenizer: Tokenizer, why: str) -> None:
    rule = find_cut_rule(tokenizer)
    assert not any(rule.is_safe(MIXED, place) for place in range(len(MIXED)))
    with pytest.raises(UserError, match=rf"document 7: 21 characters .* limit is 20\b.*({why})"):
        list(cut_document(["a b c d e f g h i j k"], rule, 10, 20, "document 7"))


@pytest.mark.parametrize(
    "quantifier", ["{2}", "{2,}", "{2,3}", "{2,3}?", "{0,2}", "?", "??", "*?", "+?", "{2}?", "{3,0}"]
)
def test_the_reach_of_a_quantifier_is_that_of_the_engine(quantifier: str) -> None:
    tokenizer = _byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(rf"ax{quantifier}b|[\s\S]"), "isolated"))
    rule = find_cut_rule(tokenizer)
    for text in ("abab", "axbaxb", "axxbxab", "axxxbaxxab"):
        whole = _words(tokenizer, text)
        for place in range(len(text)):
            if rule.is_safe(text, place):
                assert _words(tokenizer, text[:place]) + _words(tokenizer, text[place:]) == whole


def test_thousands_of_characters_in_added_tokens_are_learnt_in_no_time() -> None:
    tokenizer = _byte_level()
    letters = "".join(chr(0x4E00 + number) for number in range(6000))
    tokenizer.add_tokens([letters[place : place + 3] for place in range(0, len(letters), 3)])
    rule = find_cut_rule(tokenizer)
    start = time.process_time()
    safe = rule.safe_places(letters + ". " + letters)
    assert time.process_time() - start < 5.0
    assert set(np.flatnonzero(safe)) == {len(letters), len(letters) + 1}


def test_words_without_any_sure_end_are_never_parted() -> None:
    tokenizer = _byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False))
    rule = find_cut_rule(tokenizer)
    assert not any(rule.is_safe(MIXED, place) for place in range(len(MIXED)))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"a?+a|b", "ac"),
        (r"\s{2,}|\S", " a"),
        (r"a(?!x)|\s+", "ax"),
        (r"ab|c", "ac"),
        (r"a|b", "cb"),
        (r"a(?=x)|b", "ac"),
    ],
)
def test_a_character_that_no_match_is_sure_to_hold_is_no_place_for_a_cut(pattern: str, text: str) -> None:
    tokenizer = _byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(pattern), "isolated"))
    assert not find_cut_rule(tokenizer).is_safe(text, 1)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern + r"|[\s\S]"), "isolated")
    assert find_cut_rule(tokenizer).is_safe("--", 1)


def test_a_character_that_matches_two_letters_of_another_case_is_not_cut_off() -> None:
    tokenizer = _byte_level(pre_tokenizer=pre_tokenizers.Split(Regex(r"(?i:ss)x|[\s\S]"), "isolated"))
    assert _words(tokenizer, "\u00dfx") == ["\u00dfx"]
    rule = find_cut_rule(tokenizer)
    assert not rule.is_safe("\u00dfx", 1)
    assert rule.is_safe("ax", 1)


def test_a_letter_that_the_next_mark_turns_into_another_is_not_judged_as_it_stands() -> None:
    tokenizer = _byte_level(
        normalizer=normalizers.NFC(), pre_tokenizer=pre_tokenizers.Split(Regex(r"a[^a-z]|[\s\S]"), "isolated")
    )
    assert _words(tokenizer, "ae\u0301") == ["a\u00e9"]
    rule = find_cut_rule(tokenizer)
    assert not rule.is_safe("ae\u0301", 1)
    assert rule.is_safe("aee", 1)


def test_an_added_token_found_before_the_text_is_normalized_is_not_cut() -> None:
    tokenizer = _byte_level(normalizer=normalizers.NFC())
    assert find_cut_rule(tokenizer).is_safe(" e\u0301, c", 3)
    tokenizer.add_tokens([AddedToken("\u0301, c", normalized=False)])
    assert not find_cut_rule(tokenizer).is_safe(" e\u0301, c", 3)


def test_an_added_token_found_in_text_is_not_cut() -> None:
    tokenizer = _byte_level()
    rule = find_cut_rule(tokenizer)
    assert rule.is_safe("a b, c", 4)
    tokenizer.add_tokens(["b, c"])
    assert not find_cut_rule(tokenizer).is_safe("a b, c", 4)
    assert find_cut_rule(tokenizer).is_safe("a b; c", 4)
    tokenizer.add_tokens([AddedToken("word", single_word=True)])
    assert "'word'" in find_cut_rule(tokenizer).obstacle


@pytest.mark.parametrize("is_normalized", [False, True])
def test_a_special_token_that_is_text_is_not_cut_where_it_hides_another(is_normalized: bool) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=is_normalized)])
    tokenizer.encode_special_tokens = True
    text = "e\u0301 <think> e\u0301; " * 3
    composed = unicodedata.normalize("NFC", text)
    without = find_cut_rule(tokenizer)
    tokenizer.add_special_tokens([AddedToken("<think> e\u0301", normalized=is_normalized)])
    rule = find_cut_rule(tokenizer)
    for one in (text, composed):
        whole = tokenizer.encode(one).ids
        safe = [place for place in range(len(one)) if rule.is_safe(one, place)]
        assert safe
        for place in safe:
            assert tokenizer.encode(one[:place]).ids + tokenizer.encode(one[place:]).ids == whole
    hiding = composed if is_normalized else text
    assert tokenizer.token_to_id("<think>") not in tokenizer.encode(hiding).ids
    place = hiding.index("> ") + 1
    assert without.is_safe(hiding, place)
    assert not rule.is_safe(hiding, place)


def test_a_special_token_is_not_cut_where_only_its_normalized_spelling_stands() -> None:
    tokenizer = _byte_level(normalizer=normalizers.NFC())
    tokenizer.add_tokens(["<t>"])
    tokenizer.encode_special_tokens = True
    text = " b\u00c5 <t>"
    assert find_cut_rule(tokenizer).is_safe(text, 3)
    tokenizer.add_special_tokens([AddedToken("\u212b <t>", normalized=True)])
    assert tokenizer.token_to_id("<t>") not in tokenizer.encode(text).ids
    assert tokenizer.token_to_id("<t>") in tokenizer.encode(text[3:]).ids
    assert not find_cut_rule(tokenizer).is_safe(text, 3)


def test_a_mark_that_an_added_token_parts_from_its_letter_is_not_judged_as_composed() -> None:
    tokenizer = _byte_level(normalizer=normalizers.NFC())
    text = " a\u0301|"
    assert find_cut_rule(tokenizer).is_safe(text + "| ", 3)
    tokenizer.add_tokens([AddedToken(" a", normalized=False)])
    assert _words(tokenizer, "\u0301||") == _words(_byte_level(), "\u0301||")
    assert len(_words(tokenizer, "\u0301||")) == 1
    assert not find_cut_rule(tokenizer).is_safe(text + "| ", 3)
    assert find_cut_rule(tokenizer).is_safe(" b" + text[1:] + "| ", 4)


def _in_parts(text: str, sizes: Iterable[int]) -> list[str]:
    parts, start = [], 0
    for size in sizes:
        parts.append(text[start : start + size])
        start += size
    return [*parts, text[start:]]


@given(
    text=st.text(alphabet="ab 1\n.\u3002", max_size=200),
    sizes=st.lists(st.integers(0, 30), max_size=12),
    piece_chars=st.integers(1, 40),
)
def test_pieces_are_the_document_and_do_not_exceed_what_was_asked(
    text: str, sizes: list[int], piece_chars: int
) -> None:
    rule = find_cut_rule(_byte_level())
    found = list(cut_document(_in_parts(text, sizes), rule, piece_chars, 1000, "document 0"))
    pieces = [piece for piece, _ in found]
    assert "".join(pieces) == text
    assert [is_last for _, is_last in found] == [False] * (len(found) - 1) + [True]
    start = 0
    for piece in pieces[:-1]:
        assert rule.is_safe(text, start + len(piece))
        assert len(piece) <= piece_chars or rule.last_cut(text, start, start + piece_chars) is None
        start += len(piece)


def test_a_word_longer_than_a_piece_stays_whole_up_to_the_limit() -> None:
    rule = find_cut_rule(_byte_level())
    text = "one two " + "a" * 95 + " three"
    pieces = [piece for piece, _ in cut_document(_in_parts(text, [7] * 15), rule, 10, 100, "document 0")]
    assert " " + "a" * 95 in pieces
    with pytest.raises(UserError, match=r"document 3: 9\d characters or more .* limit is 90\."):
        list(cut_document(_in_parts(text, [7] * 15), rule, 10, 90, "document 3"))
    assert [piece for piece, _ in cut_document(["a" * 15, " " + "b" * 10], rule, 10, 20, "document 0")] == [
        "a" * 15,
        " " + "b" * 10,
    ]
    with pytest.raises(UserError, match="there is no such place"):
        list(cut_document([text], rule, 10, 90, "document 3"))
