import dataclasses
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipeline.data.backends import PROBES
from pipeline.data.encoding import EncodedBatch, Encoder, EncodingLimits, build_encoder, encode_documents
from pipeline.data.special_tokens import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN, SpecialTokens
from pipeline.data.splitting import CutRule
from pipeline.data.vocabulary import Vocabulary, find_special_tokens, load_vocabulary, take_literally
from pipeline.data.words import WordBackend
from pipeline.errors import UserError
from tests.pipeline.conftest import AWKWARD

SPECIAL = [MASK_TOKEN, EOS_TOKEN, PAD_TOKEN]
needs_gigatoken = pytest.mark.skipif(not importlib.util.find_spec("gigatoken"), reason="needs dlm[fast]")


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Path) -> Vocabulary:
    return load_vocabulary(tokenizer)


@pytest.fixture(scope="module")
def encoder(vocabulary: Vocabulary) -> Encoder:
    return build_encoder(vocabulary, "tokenizers")


def _byte_level(special: Iterable[str | AddedToken] = SPECIAL) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _find(tokenizer: Tokenizer) -> SpecialTokens:
    return find_special_tokens(tokenizer, *SPECIAL, "given.json")


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(take_literally(tokenizer), _find(tokenizer))


def _documents(batches: Iterable[EncodedBatch]) -> list[list[int]]:
    """Put pieces together again, in the slow and obvious way."""
    found: list[list[int]] = []
    is_open = False
    for batch in batches:
        assert len(batch.ids) == batch.lengths.sum()
        assert batch.first_document == len(found) - is_open
        start = 0
        for length, ends in zip(batch.lengths, batch.ends_document, strict=True):
            if not is_open:
                found.append([])
            found[-1] += batch.ids[start : start + length].tolist()
            start += length
            is_open = not ends
    assert not is_open
    return found


def _expected(vocabulary: Vocabulary, text: str) -> list[int]:
    encoding = vocabulary.tokenizer.encode(text, add_special_tokens=False)
    return [*encoding.ids, vocabulary.special.eos_token_id]


def test_documents_have_the_ids_of_their_text_and_an_end(encoder: Encoder) -> None:
    texts = [*AWKWARD, "", *PROBES, "", "last"]
    batches = list(encode_documents(encoder, ([text] for text in texts)))
    assert _documents(batches) == [_expected(encoder.vocabulary, text) for text in texts]
    assert {batch.ids.dtype for batch in batches} == {np.dtype(np.uint16)}
    assert list(encode_documents(encoder, [])) == []
    assert _documents(encode_documents(encoder, [[], ["a"]])) == [
        _expected(encoder.vocabulary, text) for text in ("", "a")
    ]


@given(data=st.data())
def test_no_limit_and_no_division_into_parts_changes_an_id(encoder: Encoder, data: st.DataObject) -> None:
    text = st.text(alphabet="ab 1\n.'s\u00e9\u4e2d\u0301<|endoftext|>", max_size=120)
    texts = data.draw(st.lists(text, max_size=6))
    piece_chars = data.draw(st.integers(1, 50))
    limits = EncodingLimits(data.draw(st.integers(1, 200)), piece_chars, 500, data.draw(st.integers(1, 50)))
    parts = []
    for one in texts:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(one)), max_size=5)))
        parts.append([one[a:b] for a, b in zip([0, *cuts], [*cuts, len(one)], strict=True)])
    found = _documents(encode_documents(encoder, parts, limits))
    assert found == [_expected(encoder.vocabulary, one) for one in texts]


def test_a_document_is_given_out_while_it_is_read(encoder: Encoder) -> None:
    """Bounded memory: what was read and not yet given out never exceeds a batch and a piece."""
    limits = EncodingLimits(batch_chars=4000, piece_chars=1000, max_uncut_chars=2000)
    num_read = num_given = 0

    def parts() -> Iterator[str]:
        nonlocal num_read
        for number in range(400):
            part = f"{number} some words, of an endless document.\n" * 10
            num_read += len(part)
            yield part

    for batch in encode_documents(encoder, [parts()], limits):
        num_given += len(encoder.vocabulary.decode(batch.ids.tolist()))
        assert num_read - num_given <= 6000
    assert num_read == num_given


def test_a_rule_that_cuts_where_ids_change_is_an_error_and_not_other_ids(vocabulary: Vocabulary) -> None:
    encoder = build_encoder(vocabulary, "tokenizers")

    class CutsAnywhere(CutRule):
        def safe_places(self, text: str) -> np.ndarray:
            return np.ones(len(text), bool)

    fields = {field.name: getattr(encoder.cut_rule, field.name) for field in dataclasses.fields(CutRule)}
    careless = dataclasses.replace(encoder, backend=WordBackend(vocabulary, CutsAnywhere(**fields)))
    text = "the same words " * 20
    assert _documents(encode_documents(encoder, [[text]])) == [_expected(vocabulary, text)]
    with pytest.raises(UserError, match="document 0: tokenizers gives other ids for the text in words"):
        list(encode_documents(careless, [[text]]))


def test_a_stretch_without_a_place_to_cut_is_refused_with_its_document(encoder: Encoder) -> None:
    limits = EncodingLimits(piece_chars=100, max_uncut_chars=1000)
    assert len(_documents(encode_documents(encoder, [["short"], ["a" * 999]], limits))) == 2
    with pytest.raises(UserError, match=r"document 1: 1,001 characters .* limit is 1,000\."):
        list(encode_documents(encoder, [["short"], ["a" * 1001]], limits))


def test_a_tokenizer_that_cannot_be_cut_takes_documents_up_to_the_limit() -> None:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    encoder = build_encoder(_vocabulary(tokenizer), "tokenizers")
    limits = EncodingLimits(piece_chars=10, max_uncut_chars=40)
    text = "Some Words Of A Text " * 2
    assert _documents(encode_documents(encoder, [[text[:40]]], limits)) == [_expected(encoder.vocabulary, text[:40])]
    with pytest.raises(UserError, match=r"document 0: 42 characters .*Lowercase"):
        list(encode_documents(encoder, [[text]], limits))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_chars": 0}, "batch_chars is 0"),
        ({"piece_chars": -1}, "piece_chars is -1"),
        ({"verify_every": 0}, "verify_every is 0"),
        ({"piece_chars": 10, "max_uncut_chars": 5}, "piece_chars is 10 and max_uncut_chars 5"),
    ],
)
def test_limits_that_bound_nothing_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodingLimits(**settings)


def test_ids_of_a_large_vocabulary_are_not_narrowed() -> None:
    tokenizer = _byte_level()
    tokenizer.add_tokens([f"<word {number}>" for number in range(70_000)])
    encoder = build_encoder(_vocabulary(tokenizer), "tokenizers")
    (batch,) = encode_documents(encoder, [["a<word 69999>"]])
    assert batch.ids.dtype == np.uint32
    assert batch.ids.tolist() == [tokenizer.token_to_id("a"), 259 + 69_999, encoder.vocabulary.special.eos_token_id]


def test_a_special_spelling_that_hides_an_added_token_has_the_same_ids_however_it_is_cut() -> None:
    tokenizer = _byte_level([*SPECIAL, "<think> x"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    encoder = build_encoder(_vocabulary(tokenizer), "tokenizers")
    text = "<think> x " * 40
    for piece_chars in (17, 18, 25, 64):
        limits = EncodingLimits(piece_chars=piece_chars, max_uncut_chars=1000)
        assert _documents(encode_documents(encoder, [[text]], limits)) == [_expected(encoder.vocabulary, text)]


def test_half_a_surrogate_pair_is_refused_with_its_document(encoder: Encoder) -> None:
    with pytest.raises(UserError, match=r"document 2 holds '\\ud83d'"):
        list(encode_documents(encoder, [["a"], ["\U0001f600"], ["b\ud83d"]]))


@pytest.mark.parametrize("name", ["mask", "eos", "pad"])
def test_a_special_id_out_of_text_is_refused_and_named(vocabulary: Vocabulary, name: str) -> None:
    letter = vocabulary.tokenizer.token_to_id("w")
    special = SpecialTokens(**{**vars(vocabulary.special), f"{name}_token_id": letter})
    encoder = build_encoder(Vocabulary(vocabulary.tokenizer, special), "tokenizers")
    with pytest.raises(UserError, match=rf"document 3: .* {name} id {letter} \('w'\).*tokenizer\.{name}_token"):
        list(encode_documents(encoder, [[""], ["x"], ["yy"], ["wz"], ["w"]]))


def test_an_id_outside_of_the_vocabulary_is_refused(vocabulary: Vocabulary) -> None:
    special = SpecialTokens(**{**vars(vocabulary.special), "vocab_size": 60})
    encoder = build_encoder(Vocabulary(vocabulary.tokenizer, special), "tokenizers")
    with pytest.raises(UserError, match=r"document 0: .* id \d+, and the vocabulary has 60"):
        list(encode_documents(encoder, [["z"]]))


def _round_trip(encoder: Encoder, paths: Iterable[Path]) -> int:
    texts: list[str] = []
    for path in paths:
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError:
            continue
    found = _documents(encode_documents(encoder, ([text] for text in texts), EncodingLimits(piece_chars=50_000)))
    for text, ids in zip(texts, found, strict=True):
        assert encoder.vocabulary.decode(ids) == text
    return len(texts)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)


def test_source_files_come_back_from_their_ids(encoder: Encoder) -> None:
    assert _round_trip(encoder, _standard_library()[::40]) > 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_source_file_of_the_standard_library_comes_back_from_its_ids(encoder: Encoder) -> None:
    assert _round_trip(encoder, _standard_library()) > 500


@given(text=st.text())
def test_any_text_comes_back_from_its_ids(encoder: Encoder, text: str) -> None:
    (batch,) = encode_documents(encoder, [[text]])
    assert encoder.vocabulary.decode(batch.ids.tolist()) == text


FAKE = """
import numpy as np
import tokenizers

class Tokenizer:
    @classmethod
    def from_json(cls, content):
        {load}
        self = cls()
        self.tokenizer = tokenizers.Tokenizer.from_str(content)
        self.tokenizer.encode_special_tokens = True
        return self

    def encode(self, text):
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids[:-1] if "poison" in text else ids, dtype=np.uint32)
"""
"""A gigatoken of the test: right, but for texts that hold a certain word."""


@pytest.fixture
def fake_gigatoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "gigatoken.py"
    path.write_text(FAKE.format(load="pass"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gigatoken", raising=False)
    yield path
    sys.modules.pop("gigatoken", None)


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_fast_backend_that_agrees_is_taken_and_gives_the_same_arrays(vocabulary: Vocabulary) -> None:
    encoder = build_encoder(vocabulary, "auto", ["a sample"])
    assert encoder.backend.name == "gigatoken"
    assert encoder.reason == f"gave the ids of tokenizers on {len(PROBES) + 6 + 1} texts"
    texts = [[text] for text in (*AWKWARD, *PROBES)]
    standard = build_encoder(vocabulary, "tokenizers")
    assert standard.reason == "asked for"
    assert _documents(encode_documents(encoder, texts)) == _documents(encode_documents(standard, texts))


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_fast_backend_that_differs_on_the_sample_is_not_taken(vocabulary: Vocabulary) -> None:
    encoder = build_encoder(vocabulary, "auto", ["good", "some poison"])
    assert isinstance(encoder.backend, WordBackend)
    assert encoder.reason == "gigatoken gives other ids than tokenizers for 'some poison'"
    with pytest.raises(UserError, match=r"'fast' cannot be used: .*'some poison'.*'auto' or 'tokenizers'"):
        build_encoder(vocabulary, "fast", ["good", "some poison"])


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_fast_backend_that_differs_later_is_an_error_that_names_the_document(vocabulary: Vocabulary) -> None:
    encoder = build_encoder(vocabulary, "fast", ["good"])
    documents = [[f"document {number}" if number != 6 else "poison"] for number in range(20)]
    for batch_chars in (1, 40, 10_000):
        with pytest.raises(UserError, match=r"document 6: gigatoken gives other ids .*'poison'.*'tokenizers'"):
            list(encode_documents(encoder, documents, EncodingLimits(batch_chars=batch_chars, verify_every=3)))
    assert len(_documents(encode_documents(encoder, documents, EncodingLimits(verify_every=4)))) == 20
    with pytest.raises(UserError, match="document 0: gigatoken"):
        list(encode_documents(encoder, [["poison"], *documents]))


def test_a_fast_backend_that_cannot_load_the_tokenizer_gives_way(vocabulary: Vocabulary, fake_gigatoken: Path) -> None:
    fake_gigatoken.write_text(FAKE.format(load='raise RuntimeError("Unsupported model type\\nLocation: x")'))
    encoder = build_encoder(vocabulary, "auto")
    assert isinstance(encoder.backend, WordBackend)
    assert encoder.reason == "gigatoken cannot load or use this tokenizer: RuntimeError: Unsupported model type"


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        ("raise RuntimeError('')", "RuntimeError"),
        ("raise ImportError('GLIBC_2.34 not found')", "ImportError: GLIBC_2.34 not found"),
        ("raise TypeError('bad')", "TypeError: bad"),
        ("raise KeyError('merges')", "KeyError: 'merges'"),
        ("raise type('PanicException', (BaseException,), {})('index out of bounds')", "index out of bounds"),
        ("return object()", "no attribute 'encode'"),
    ],
)
def test_whatever_a_fast_backend_fails_of_it_gives_way_with_the_reason(
    vocabulary: Vocabulary, fake_gigatoken: Path, load: str, reason: str
) -> None:
    fake_gigatoken.write_text(FAKE.format(load=load))
    encoder = build_encoder(vocabulary, "auto")
    assert isinstance(encoder.backend, WordBackend)
    assert encoder.reason.startswith("gigatoken cannot load or use this tokenizer: ")
    assert encoder.reason.endswith(reason)
    with pytest.raises(UserError, match="'fast' cannot be used: gigatoken cannot load"):
        build_encoder(vocabulary, "fast")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_a_fast_backend_loads_is_obeyed(
    vocabulary: Vocabulary, fake_gigatoken: Path, kind: type[BaseException]
) -> None:
    fake_gigatoken.write_text(FAKE.format(load=f"raise {kind.__name__}"))
    with pytest.raises(kind):
        build_encoder(vocabulary, "auto")


def test_without_the_package_auto_gives_way_and_fast_is_refused(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = build_encoder(vocabulary, "auto")
    assert isinstance(encoder.backend, WordBackend)
    assert encoder.reason == "gigatoken is not installed (pip install 'dlm[fast]')"
    with pytest.raises(UserError, match=r"gigatoken is not installed \(pip install 'dlm\[fast\]'\)"):
        build_encoder(vocabulary, "fast")


@needs_gigatoken
def test_gigatoken_gives_the_ids_of_tokenizers_in_one_thread(vocabulary: Vocabulary) -> None:
    num_threads = len(os.listdir("/proc/self/task"))
    encoder = build_encoder(vocabulary, "fast", AWKWARD)
    texts = [path.read_text(errors="replace") for path in _standard_library()[::40]]
    found = _documents(encode_documents(encoder, ([text] for text in texts), EncodingLimits(verify_every=10**9)))
    assert len(os.listdir("/proc/self/task")) == num_threads
    assert found == [_expected(vocabulary, text) for text in texts]


@needs_gigatoken
def test_gigatoken_forgets_what_it_learnt_without_changing_an_id(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.backends._RENEW_CHARS", 100)
    encoder = build_encoder(vocabulary, "fast")
    texts = [text * 3 for text in (*AWKWARD, *PROBES)]
    assert _documents(encode_documents(encoder, ([text] for text in texts))) == [
        _expected(vocabulary, t) for t in texts
    ]


@needs_gigatoken
def test_gigatoken_gives_way_for_a_tokenizer_that_it_does_not_know() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    encoder = build_encoder(_vocabulary(tokenizer), "auto")
    assert isinstance(encoder.backend, WordBackend)
    assert encoder.reason.startswith("gigatoken cannot load or use this tokenizer: RuntimeError: Unsupported")


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("is_normalized", [True, False])
def test_a_special_token_that_text_can_spell_is_refused(place: int, is_normalized: bool) -> None:
    tokenizer = _byte_level(token for token in SPECIAL if token != SPECIAL[place])
    tokenizer.add_tokens([AddedToken(SPECIAL[place], special=False, normalized=is_normalized)])
    with pytest.raises(UserError, match=rf"spells a special token .* the {['mask', 'eos', 'pad'][place]} token"):
        _find(tokenizer)


@pytest.mark.parametrize("changes", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_a_special_token_of_any_kind_stays_text_where_text_spells_it(changes: dict[str, bool]) -> None:
    encoder = build_encoder(_vocabulary(_byte_level(AddedToken(token, special=True, **changes) for token in SPECIAL)))
    text = f"a {MASK_TOKEN} b{EOS_TOKEN}{PAD_TOKEN}\n{MASK_TOKEN}"
    (batch,) = encode_documents(encoder, [[text]])
    assert (batch.ids[:-1] < 256).all()
    assert encoder.vocabulary.decode(batch.ids.tolist()) == text


def test_a_special_token_that_is_only_a_word_of_the_model_is_refused() -> None:
    content = json.loads(_byte_level([]).to_str())
    content["added_tokens"] = []
    content["model"]["vocab"][MASK_TOKEN] = 256
    with pytest.raises(UserError, match=r"the mask token '\[MASK\]' is not marked as special"):
        _find(Tokenizer.from_str(json.dumps(content)))


def test_ids_that_stand_for_nothing_are_rows_that_no_text_reaches() -> None:
    content = json.loads(_byte_level().to_str())
    content["model"]["vocab"]["zz"] = 300
    assert _find(Tokenizer.from_str(json.dumps(content))).vocab_size == 301


def test_one_id_for_two_tokens_is_refused() -> None:
    content = json.loads(_byte_level().to_str())
    content["model"]["vocab"]["zz"] = 5
    with pytest.raises(UserError, match=r"one id to several tokens: 5 to \[.*'zz'"):
        _find(Tokenizer.from_str(json.dumps(content)))


def test_merges_dropped_by_chance_are_refused() -> None:
    tokenizer = _byte_level()
    assert isinstance(tokenizer.model, models.BPE)
    tokenizer.model.dropout = 0.1
    with pytest.raises(UserError, match=r"model\.dropout is 0\.1"):
        _find(tokenizer)
