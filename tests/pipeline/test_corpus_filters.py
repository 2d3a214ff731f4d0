import base64
import hashlib
import os
import random
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import gather, text
from pipeline.corpus.filters import Filters, compressibility, control_characters, filters_identity, repeated_lines
from pipeline.corpus.identity import external_data
from pipeline.corpus.ledger import OTHERS, tally
from pipeline.corpus.run import run_shard
from pipeline.corpus.split import INDEX, SplitHash
from pipeline.corpus.text import cut_at_blank_lines
from pipeline.errors import UserError
from pipeline.stage import StageContext
from tests.pipeline.conftest import write_jsonl
from tests.support.corpus_runs import TEXTS, corpus_config, make_corpus, planned

BUILT_IN = "pipeline.corpus.filters:"


def test_length_limits_count_characters_and_are_inclusive(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "é" * 9, "é" * 10, "é" * 50, "é" * 51])
    made = make_corpus(tmp_path, source, filters={"min_chars": 10, "max_chars": 50})
    assert sorted(made.texts()) == sorted([*TEXTS, "é" * 10, "é" * 50])
    assert made.source["dropped"] == {"too short": 1, "too long": 1}


def test_a_source_with_filters_of_its_own_does_not_have_those_of_the_corpus(tmp_path: Path) -> None:
    a = str(write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "short"]))
    b = str(write_jsonl(tmp_path / "b.jsonl", ["brief", "this one is longer"]))
    source = {"a": a, "b": {"paths": b, "filters": {"max_chars": 10}}}
    made = make_corpus(tmp_path, source, filters={"min_chars": 10})
    assert sorted(made.texts()) == sorted([*TEXTS, "brief"])
    counts = made.stats["sources"]
    assert {name: found["dropped"] for name, found in counts.items()} == {"a": {"too short": 1}, "b": {"too long": 1}}


# Duplicates


@pytest.fixture
def twice(tmp_path: Path) -> dict[str, Any]:
    """Two sources, each with copies inside and of the other."""
    return {
        "a": str(write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:20], TEXTS[3], "only in a"])),
        "b": str(write_jsonl(tmp_path / "b.jsonl", [TEXTS[3], *TEXTS[10:], TEXTS[30], TEXTS[30]])),
    }


@pytest.mark.parametrize("shard_bytes", [64_000_000, 300])
def test_the_first_of_identical_documents_stays(tmp_path: Path, twice: dict[str, Any], shard_bytes: int) -> None:
    made = make_corpus(tmp_path, twice, shard_bytes=shard_bytes)
    wanted = [*TEXTS[:20], "only in a", *TEXTS[20:]]
    train = set(made.texts("train"))
    assert made.texts("train") == [text for text in wanted if text in train]
    assert made.texts("held_out") == [text for text in wanted if text not in train]
    counts = made.stats["sources"]
    assert {name: (c["docs"], c["dropped"]) for name, c in counts.items()} == {
        "a": (21, {"duplicate": 1}), "b": (20, {"duplicate": 13})
    }  # fmt: skip
    for split in ("train", "held_out"):
        assert made.stats[f"{split}_docs"] == len(made.texts(split))
        assert made.stats[f"{split}_bytes"] == sum(len(text.encode()) for text in made.texts(split))
    assert sum(c["bytes"] for c in counts.values()) == made.stats["train_bytes"] + made.stats["held_out_bytes"]


def test_duplicates_stay_where_they_are_wanted(tmp_path: Path, twice: dict[str, Any]) -> None:
    made = make_corpus(tmp_path, twice, filters={"drop_duplicates": False})
    assert len(made.texts()) == 22 + 33
    assert not any(name.endswith(".npy") for name in made.files())
    keeping = {**twice, "b": {"paths": twice["b"], "filters": {"drop_duplicates": False}}}
    counts = make_corpus(tmp_path, keeping).stats["sources"]
    assert {name: c["docs"] for name, c in counts.items()} == {"a": 21, "b": 33}
    keeping = {**twice, "a": {"paths": twice["a"], "filters": {"drop_duplicates": False}}}
    counts = make_corpus(tmp_path, keeping).stats["sources"]
    assert {name: c["docs"] for name, c in counts.items()} == {"a": 22, "b": 20}


def test_a_file_of_duplicates_alone_is_left_with_no_document(tmp_path: Path) -> None:
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", TEXTS) for name in "ab")
    made = make_corpus(tmp_path, [str(a), str(b)], shard_bytes=a.stat().st_size)
    assert sorted(made.texts()) == sorted(TEXTS)
    assert {"train-text-00001.arrow", "train-text-00001.duplicates.npy"} <= set(made.files())


def test_a_source_of_duplicates_alone_is_refused_and_says_why(tmp_path: Path) -> None:
    a, b = (str(write_jsonl(tmp_path / f"{name}.jsonl", [*TEXTS, ""])) for name in "ab")
    with pytest.raises(
        UserError, match=r"corpus\.source\.b has no document .*\(of 41 records: .*40 duplicate.*\)\. Add"
    ):
        make_corpus(tmp_path, {"a": a, "b": b})
    made = make_corpus(tmp_path, {"a": a, "b": {"paths": b, "filters": {"drop_duplicates": False}}})
    assert made.stats["sources"]["b"]["docs"] == 40


@settings(deadline=None)
@given(
    hashes=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12), max_size=5),
    at_once=st.sampled_from([1, 4, 1 << 24]),
)
def test_duplicates_are_those_that_a_set_finds(hashes: list[list[tuple[int, int]]], at_once: int) -> None:
    indices = [np.array([(low, high, 1) for low, high in one], INDEX) for one in hashes]
    seen: set[tuple[int, int]] = set()
    wanted: list[list[int]] = []
    for one in hashes:
        wanted.append([])
        for number, found in enumerate(one):
            if found in seen:
                wanted[-1].append(number)
            seen.add(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "_HASHES_AT_ONCE", at_once)
        loads = [lambda index=index: index for index in indices]
        assert [one.tolist() for one in gather.find_duplicates(loads)] == wanted


def test_many_shards_are_gathered_with_few_open_files(tmp_path: Path) -> None:
    index = np.zeros(1, INDEX)
    shards = []
    for number in range(100):
        directory = tmp_path / str(number)
        directory.mkdir()
        index["hash_low"] = number % 7
        np.save(directory / "train.index.npy", index)
        (directory / "train.arrow").touch()
        shards.append(gather.ShardOutput(directory, "text", number, {}))
    counts = {"text": dict.fromkeys(("docs", "bytes", "train_docs"), 0) | {"dropped": Counter[str]()}}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        gather.gather_split(shards, "train", corpus_config("a"), tmp_path, counts)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (counts["text"]["docs"], counts["text"]["dropped"]) == (7, {"duplicate": 93})


@settings(deadline=None)
@given(
    names=st.lists(st.integers(0, 300).map(str), max_size=600),
    cut=st.integers(0, 600),
)
def test_a_table_lists_the_first_hundred_names_in_whatever_order_and_shards_they_come(
    names: list[str], cut: int
) -> None:
    whole, parts = Counter[str](), Counter[str]()
    for name in names:
        tally(whole, name)
    for part in (names[cut:], names[:cut]):
        own = Counter[str]()
        for name in part:
            tally(own, name)
        for name, number in own.items():
            tally(parts, name, number)
    listed = sorted(set(names))[:100]
    wanted = {name: names.count(name) for name in listed}
    others = len(names) - sum(wanted.values())
    assert whole == parts == wanted | ({OTHERS: others} if others else {})


def test_a_reason_for_each_document_does_not_fill_the_stats(tmp_path: Path, module: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *(f"own {i}" for i in range(150))])
    made = make_corpus(tmp_path, source, filters={"quality": ["own_hooks_of_a_test:own_reason"]})
    dropped = made.source["dropped"]
    assert (len(dropped), dropped["(others)"], sum(dropped.values())) == (101, 50, 150)


# Quality hooks


def test_compressibility_finds_noise_and_repetition_and_leaves_text() -> None:
    rng = random.Random(0)
    common = [chr(0x4E00 + int(rng.expovariate(1 / 800))) for _ in range(5000)]
    assert compressibility("abc " * 1000) == "too repetitive"
    for size in (900, 9000):
        data = rng.randbytes(size)
        assert compressibility(base64.b64encode(data).decode()) == "too random"
        assert compressibility(base64.b85encode(data).decode()) == "too random"
        assert compressibility("".join(common[:size])) is None
        assert compressibility("".join(rng.choices("абвгдежзийклмнопрст ", k=size))) is None
        assert compressibility(Path(__file__).read_text()[-size:]) is None
    assert compressibility(base64.b85encode(rng.randbytes(810)).decode()) is None


def test_repeated_lines_are_found_among_eight_lines_or_more() -> None:
    assert repeated_lines("menu\n\n" * 8) == "repeated lines"
    assert repeated_lines("menu\n" * 7) is None
    assert repeated_lines("\n".join([*"abcd", "x", "x", "x", "x"])) is None
    assert repeated_lines("\n".join([*"abc", "x", "x", "x", "x", "x", "x", "x"])) == "repeated lines"
    assert repeated_lines("\n" * 100) is None


def test_control_characters_are_found_above_one_percent() -> None:
    assert control_characters("a" * 99 + "\x00") is None
    assert control_characters("a" * 98 + "\x00\ufffd") == "control characters"
    assert control_characters("\t\n\r\x0c\x85") is None
    assert control_characters("\x1b[0m") == "control characters"


def test_built_in_hooks_drop_and_count_in_the_order_given(tmp_path: Path) -> None:
    bad = ["menu\n" * 500, "\x00" * 100, "a\nb\n" * 100]
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *bad])
    hooks = [BUILT_IN + name for name in ("control_characters", "compressibility", "repeated_lines")]
    made = make_corpus(tmp_path, source, filters={"quality": hooks})
    assert sorted(made.texts()) == sorted(TEXTS)
    assert made.source["dropped"] == {"too repetitive": 1, "control characters": 1, "repeated lines": 1}
    assert len(make_corpus(tmp_path, source).texts()) == 43


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user with hooks."""
    path = tmp_path / "own_hooks_of_a_test.py"
    path.write_text(
        "def odd(text):\n"
        "    return 'odd' if len(text.split()[1]) == 1 else None\n"
        "def one_part(text):\n"
        "    return 'whole' if len(text) > 2_000_000 else 'part' if len(text) > 1_000_000 else None\n"
        "def truth(text):\n    return True\n"
        "def empty(text):\n    return ''\n"
        "def crash(text):\n    return 1 / 0\n"
        "def own_reason(text):\n    return text if text.startswith('own') else None\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("own_hooks_of_a_test", None)


def test_a_hook_of_the_user_is_asked_and_its_file_is_identity(tmp_path: Path, module: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    settings = {"filters": {"quality": ["own_hooks_of_a_test:odd"]}}
    made = make_corpus(tmp_path, source, **settings)
    assert sorted(made.texts()) == sorted(TEXTS[10:])
    assert made.source["dropped"] == {"odd": 10}
    config = corpus_config(str(source), **settings)
    before = external_data(config)
    module.write_text(module.read_text() + "# changed\n")
    assert external_data(config) != before


@pytest.mark.parametrize("place", ["corpus", "source"])
def test_a_hook_that_changes_after_the_plan_is_refused(tmp_path: Path, module: Path, place: str) -> None:
    path, filters = str(write_jsonl(tmp_path / "a.jsonl", TEXTS)), {"quality": ["own_hooks_of_a_test:odd"]}
    in_source = {"a": {"paths": path, "filters": filters}}
    source, settings = (path, {"filters": filters}) if place == "corpus" else (in_source, {})
    (shard,) = planned(source, **settings)
    context = StageContext(tmp_path, tmp_path, "f")
    run_shard(corpus_config(source, **settings), {}, shard, context)
    module.write_text(module.read_text() + "# changed\n")
    with pytest.raises(UserError, match=r"a hook of corpus\.(source\.a\.)?filters\.quality has changed since the run"):
        run_shard(corpus_config(source, **settings), {}, shard, context)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("no_such_module_anywhere:f", "cannot be imported: No module named"),
        ("own_hooks_of_a_test:absent", "cannot be imported: module .* has no attribute 'absent'"),
        ("own_hooks_of_a_test:number", "is a int, a function is needed"),
        ("own_hooks_of_a_test:truth", "gave True; it must give the reason as text, or None"),
        ("own_hooks_of_a_test:empty", "gave ''; it must give the reason"),
        ("own_hooks_of_a_test:crash", r"failed: ZeroDivisionError\('division by zero'\)"),
        ("sys:intern", "is in no file"),
        ("zlib_of_a_test:crc32", "cannot be imported: ZeroDivisionError: division by zero"),
        ("syntax_of_a_test:f", "cannot be imported: SyntaxError: invalid syntax"),
        ("..own_hooks_of_a_test:odd", "cannot be imported: TypeError"),
    ],
)
def test_a_hook_that_is_none_is_named(tmp_path: Path, module: Path, hook: str, message: str) -> None:
    (tmp_path / "zlib_of_a_test.py").write_text("1 / 0\n")
    (tmp_path / "syntax_of_a_test.py").write_text("def x(:\n")
    source = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    with pytest.raises(UserError, match=f"'{hook}'.*{message}"):
        make_corpus(tmp_path, source, filters={"quality": [hook]})
    with pytest.raises(
        UserError, match=r"^(corpus\.source\.a\.filters\.quality|the hook .* gave|.* of corpus\.source\.a\.)"
    ):
        make_corpus(tmp_path, {"a": {"paths": source, "filters": {"quality": [hook]}}})


def test_a_hook_that_is_named_elsewhere_than_it_is_defined_is_both_files(tmp_path: Path, module: Path) -> None:
    outer = tmp_path / "outer_hooks_of_a_test.py"
    outer.write_text("from own_hooks_of_a_test import odd\n")
    found = []
    for path in (None, outer, module):
        if path:
            path.write_text(path.read_text() + "# changed\n")
        found.append(filters_identity(Filters(quality=("outer_hooks_of_a_test:odd",))))
    sys.modules.pop("outer_hooks_of_a_test")
    assert found[0] != found[1] != found[2] != found[0]


def test_hooks_see_the_beginning_of_a_giant_document(tmp_path: Path, module: Path) -> None:
    (tmp_path / "giant.md").write_text("a giant\n" * 1_200_000)
    source = [str(tmp_path / "giant.md"), str(write_jsonl(tmp_path / "a.jsonl", TEXTS))]
    made = make_corpus(tmp_path, source, filters={"quality": ["own_hooks_of_a_test:one_part"]})
    assert made.source["dropped"] == {"part": 1}
    made = make_corpus(tmp_path, source, filters={"max_chars": 9_599_999})
    assert made.source["dropped"] == {"too long": 1}
    assert make_corpus(tmp_path, source, filters={"max_chars": 9_600_000}).source["dropped"] == {}


# The split, and the pieces of a text


def _is_held_out(document: str, fraction: float, split_seed: int) -> bool:
    hashed = SplitHash(split_seed)
    for part in (document[:3], document[3:]):
        hashed.update(part.encode())
    return hashed.is_held_out(fraction)


@settings(deadline=None)
@given(document=st.text(st.characters(codec="utf-8")), split_seed=st.integers(0, 99))
def test_the_split_is_a_keyed_hash_of_the_text(document: str, split_seed: int) -> None:
    digest = hashlib.blake2b(document.encode(), digest_size=8, key=str(split_seed).encode()).digest()
    share = int.from_bytes(digest, "little") / 2**64
    assert _is_held_out(document, share + 1e-9, split_seed)
    assert not _is_held_out(document, share - 1e-9, split_seed)


def test_split_fraction_and_seed_are_respected() -> None:
    texts = [str(i) for i in range(20_000)]
    share = sum(_is_held_out(text, 0.1, 0) for text in texts) / len(texts)
    tolerance = 0.01  # five standard errors of a share of 0.1 among 20,000
    assert abs(share - 0.1) < tolerance
    assert {t for t in texts if _is_held_out(t, 0.05, 0)} < {t for t in texts if _is_held_out(t, 0.1, 0)}
    both = sum(_is_held_out(text, 0.1, 0) and _is_held_out(text, 0.1, 1) for text in texts) / len(texts)
    assert both < 0.02


def test_split_puts_identical_documents_on_the_same_side(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 3)
    made = make_corpus(tmp_path, source, filters={"drop_duplicates": False})
    train, held_out = made.texts("train"), made.texts("held_out")
    assert len(train) + len(held_out) == 3 * len(TEXTS)
    assert not set(train) & set(held_out)


def _cut_naively(whole: str, document_chars: int) -> list[str]:
    """Character by character: a piece ends behind a blank line that begins at its length or later."""
    pieces, start, place = [], 0, document_chars
    while place < len(whole):
        ends = [end for end in ("\n\n", "\n\r\n") if whole.startswith(end, place)]
        if ends and place >= start + document_chars:
            pieces.append(whole[start : place + len(ends[0])])
            start = place + len(ends[0])
            place = start + document_chars
        else:
            place += 1
    return [*pieces, whole[start:]] if whole[start:] else pieces


@settings(deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="ab \n\n\n\r\u2028", max_size=40), max_size=8),
    document_chars=st.integers(1, 50),
    giant=st.sampled_from([1, 3, 10, 1000]),
)
def test_cutting_a_stream_gives_the_pieces_of_the_whole(chunks: list[str], document_chars: int, giant: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", giant)
        pieces = ["".join(piece) for piece in cut_at_blank_lines(chunks, document_chars)]
    assert pieces == _cut_naively("".join(chunks), document_chars)


def test_cutting_a_text_file_gives_documents_of_about_the_length_asked_for(tmp_path: Path) -> None:
    whole = "\n\n".join(TEXTS)
    (tmp_path / "a.txt").write_text(whole)
    made = make_corpus(tmp_path, tmp_path / "a.txt", txt_document_chars=100)
    documents = made.texts()
    assert sum(map(len, documents)) == len(whole)
    assert max(map(len, documents)) < 200
    assert made.stats["train_docs"] + made.stats["held_out_docs"] == len(documents) > 5
