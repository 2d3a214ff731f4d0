import gzip
import json
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.config import STDLIB, CorpusConfig, external_data, find_files
from pipeline.corpus.read import cut_at_blank_lines
from pipeline.corpus.run import is_held_out, run
from pipeline.errors import UserError
from pipeline.stage import StageContext
from tests.pipeline.conftest import flip_bit, write_jsonl

TEXTS = [f"document {i}\nwith a second line" for i in range(40)]

Runner = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def read(tmp_path: Path) -> Runner:
    """Run the stage function on sources; gives its stats and the directory it wrote."""

    def go(*source: object, **settings: Any) -> tuple[dict[str, Any], Path]:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        settings = {"held_out_fraction": 0.3, "txt_document_chars": 0, **settings}
        config = CorpusConfig(source=tuple(map(str, source)), **settings)
        return run(config, {}, StageContext(out, tmp_path / "state", "f")), out

    return go


def _texts(out: Path, split: str) -> list[str]:
    found: list[str] = []
    for path in sorted(out.glob(f"{split}-*.arrow")):
        with pa.memory_map(str(path)) as source:
            found += pa.ipc.open_file(source).read_all().column("text").to_pylist()
    return found


def _all_texts(out: Path) -> list[str]:
    return sorted(_texts(out, "train") + _texts(out, "held_out"))


def _rejects(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def _source(stats: dict[str, Any]) -> dict[str, Any]:
    (source,) = stats["sources"].values()
    return source


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def _write_parquet(path: Path, texts: Any, kind: pa.DataType | None = None) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind)}), path)
    return path


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.jsonl", _jsonl),
        ("a.jsonl.gz", lambda texts: gzip.compress(_jsonl(texts))),
        ("a.jsonl.gz", lambda texts: gzip.compress(_jsonl(texts[:9])) + gzip.compress(_jsonl(texts[9:]))),
        ("a.jsonl.zst", lambda texts: zstandard.compress(_jsonl(texts))),
        ("a.jsonl.zst", lambda texts: zstandard.compress(_jsonl(texts[:9])) + zstandard.compress(_jsonl(texts[9:]))),
        ("a.jsonl", lambda texts: b"\n \n".join(_jsonl(texts).splitlines())),
        ("a.jsonl", lambda texts: b"\xef\xbb\xbf" + _jsonl(texts).replace(b"\n", b"\r\n")),
    ],
    ids=["plain", "gz", "gz of two members", "zst", "zst of two frames", "blank lines between", "BOM and CRLF"],
)
def test_lines_of_json_give_their_documents(
    read: Runner, tmp_path: Path, name: str, encode: Callable[[list[str]], bytes]
) -> None:
    (tmp_path / name).write_bytes(encode(TEXTS))
    stats, out = read(tmp_path / name)
    assert _all_texts(out) == sorted(TEXTS)
    assert stats["train_docs"] + stats["held_out_docs"] == len(TEXTS) == _source(stats)["records"]
    assert stats["train_bytes"] == sum(len(text.encode()) for text in _texts(out, "train"))
    assert (_source(stats)["broken"], _rejects(out)) == (0, [])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_gives_its_documents(read: Runner, tmp_path: Path, kind: pa.DataType) -> None:
    _, out = read(_write_parquet(tmp_path / "a.parquet", TEXTS, kind))
    assert _all_texts(out) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_text_files_in_folders_are_one_document_each(read: Runner, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "texts"
    for number, text in enumerate(TEXTS):
        path = folder / f"part{number % 3}" / f"{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "image.png").write_bytes(b"\x89PNG")
    for source in (folder, f"{folder}/**/*{suffix}", f"{folder}/part?/[0-9]*{suffix}"):
        _, out = read(source)
        assert _all_texts(out) == sorted(TEXTS)


def test_several_sources_are_counted_apart(read: Runner, tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", TEXTS[:15])
    b = write_jsonl(tmp_path / "b.jsonl", [*TEXTS[15:], " "])
    stats, out = read(a, b)
    assert _all_texts(out) == sorted(TEXTS)
    assert {name: source["records"] for name, source in stats["sources"].items()} == {str(a): 15, str(b): 26}
    assert stats["sources"][str(b)]["dropped"] == {"empty": 1}


def test_a_file_whose_name_looks_like_a_glob_is_read(read: Runner, tmp_path: Path) -> None:
    _, out = read(write_jsonl(tmp_path / "a[1]*.jsonl", TEXTS))
    assert _all_texts(out) == sorted(TEXTS)


def test_a_text_file_with_jsonl_inside_its_name_is_text(read: Runner, tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl.txt").write_text("\n\n".join(TEXTS))
    _, out = read(tmp_path / "notes.jsonl.txt", txt_document_chars=1)
    assert len(_all_texts(out)) == len(TEXTS)


def test_a_file_name_that_is_not_unicode_is_read(read: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (Path(str(folder)) / b"caf\xe9.jsonl".decode("utf-8", "surrogateescape")).write_bytes(_jsonl(TEXTS))
    _, out = read(folder)
    assert _all_texts(out) == sorted(TEXTS)


def test_stdlib_is_the_sources_of_python_without_installed_packages() -> None:
    found = find_files(STDLIB)
    names = [file.name for file in found]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert all(file.path.suffix == ".py" and file.path.is_file() for file in found)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.txt", "there is no file or folder"),
        ("absent/folder", "there is no file or folder"),
        ("empty", "holds no file of a known kind"),
        ("empty/*.txt", "holds no file of a known kind"),
        ("data.csv", r"data\.csv is of no known kind"),
        ("*.csv", r"data\.csv is of no known kind"),
    ],
)
def test_a_source_without_usable_files_is_named(read: Runner, tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"corpus\.source.*" + message):
        read(tmp_path / source)


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_corpus_without_text_is_refused(read: Runner, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="holds no document with text"):
        read(tmp_path / name)


@pytest.mark.parametrize(("fraction", "empty"), [(1e-12, "evaluation"), (1 - 1e-12, "training")])
def test_a_split_that_leaves_nothing_says_for_what(read: Runner, tmp_path: Path, fraction: float, empty: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(UserError, match=rf"nothing is left for {empty} .* 40 documents .*held_out_fraction"):
        read(source, held_out_fraction=fraction)


def test_undecodable_bytes_under_strict_name_file_line_and_byte(read: Runner, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"first\nsecond\nthird \xff here\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 3: byte 0xff .*corpus\.undecodable"):
        read(tmp_path / "bad.txt")
    (tmp_path / "bad.jsonl").write_bytes(_jsonl(TEXTS) + b'{"text": "\xfe"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 41: byte 0xfe"):
        read(tmp_path / "bad.jsonl")


def test_undecodable_bytes_after_a_byte_order_mark_name_the_right_byte(read: Runner, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfab\xfdcdefgh")
    with pytest.raises(UserError, match=r"line 1: byte 0xfd"):
        read(tmp_path / "bad.txt")


def _folder_with_bad_files(root: Path) -> Path:
    folder = root / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text)
    (folder / "bad1.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 one")
    (folder / "bad2.jsonl").write_bytes(b'{"text": "caf\xe9 two"}\n{"text": "caf\xe9 three"}\n{"text": "fine"}\n')
    return folder


def test_undecodable_bytes_under_replace_are_counted_by_file(read: Runner, tmp_path: Path) -> None:
    stats, out = read(_folder_with_bad_files(tmp_path), undecodable="replace")
    replaced = ["caf\ufffd one", "caf\ufffd three", "caf\ufffd two", "fine"]
    assert _all_texts(out) == sorted([*TEXTS, *replaced])
    assert _source(stats)["replaced_by_file"] == {"bad1.txt": 1, "bad2.jsonl": 2}
    assert _source(stats)["skipped_by_file"] == {}


def test_undecodable_bytes_under_skip_are_counted_by_file(read: Runner, tmp_path: Path) -> None:
    stats, out = read(_folder_with_bad_files(tmp_path), undecodable="skip")
    assert _all_texts(out) == sorted([*TEXTS, "fine"])
    assert _source(stats)["skipped_by_file"] == {"bad1.txt": 1, "bad2.jsonl": 2}
    assert _source(stats)["dropped"] == {"undecodable": 3}
    assert _source(stats)["replaced_by_file"] == {}


def test_undecodable_parquet_text_follows_the_policy(read: Runner, tmp_path: Path) -> None:
    bad = pa.array([b"caf\xe9", *[text.encode() for text in TEXTS]], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, line 1: byte 0xe9"):
        read(tmp_path / "a.parquet")
    stats, out = read(tmp_path / "a.parquet", undecodable="skip")
    assert _all_texts(out) == sorted(TEXTS)
    assert _source(stats)["skipped_by_file"] == {"a.parquet": 1}


def test_a_byte_order_mark_is_taken_off_the_front_only(read: Runner, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst \xef\xbb\xbf inside")
    source = write_jsonl(tmp_path / "b.jsonl", TEXTS)
    _, out = read(tmp_path / "a.txt", source)
    assert "first \ufeff inside" in _all_texts(out)


BROKEN_LINES = {
    '{"text": "unfinished': "not JSON",
    "not json": "not JSON",
    "[" * 100_000: "not JSON",
    '{"text": "a", "n": ' + "1" * 5000 + "}": "not JSON",
    '["text"]': "a JSON object is needed, found list",
    "null": "a JSON object is needed, found NoneType",
    '{"body": "x"}': "no field 'text'",
    '{"text": 5}': "field 'text' holds int",
    '{"text": null}': "field 'text' holds NoneType",
    '{"text": ["a"]}': "field 'text' holds list",
}


def test_broken_lines_are_set_aside_with_file_line_and_reason(read: Runner, tmp_path: Path) -> None:
    good = _jsonl(TEXTS).decode().splitlines()
    lines = [*good[:2], *BROKEN_LINES, *good[2:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    stats, out = read(tmp_path / "a.jsonl", max_bad_ratio=0.2)
    assert _all_texts(out) == sorted(TEXTS)
    assert (_source(stats)["records"], _source(stats)["broken"]) == (50, 10)
    rejects = _rejects(out)
    assert [(reject["file"], reject["line"]) for reject in rejects] == [("a.jsonl", 3 + i) for i in range(10)]
    for reject, reason in zip(rejects, BROKEN_LINES.values(), strict=True):
        assert reason in reject["reason"]


@pytest.mark.parametrize("broken", list(BROKEN_LINES), ids=range(len(BROKEN_LINES)))
def test_broken_lines_above_the_ratio_fail_and_name_the_first(read: Runner, tmp_path: Path, broken: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(TEXTS[:8]) + f"{broken}\nnothing\n".encode())
    with pytest.raises(UserError, match=r"2 of 10 records are broken.*max_bad_ratio 0\.1 .*a\.jsonl, line 9"):
        read(tmp_path / "a.jsonl", max_bad_ratio=0.1)
    stats, _ = read(tmp_path / "a.jsonl", max_bad_ratio=0.2)
    assert _source(stats)["broken"] == 2


@given(data=st.binary(max_size=300))
def test_any_bytes_as_lines_of_json_give_documents_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "a.jsonl").write_bytes(_jsonl(TEXTS) + data)
    (root / "out").mkdir()
    config = CorpusConfig(source=(str(root / "a.jsonl"),), undecodable="skip", max_bad_ratio=1.0, held_out_fraction=0.3)
    stats = run(config, {}, StageContext(root / "out", root, "f"))
    assert set(TEXTS) <= set(_all_texts(root / "out"))
    source = _source(stats)
    documents = stats["train_docs"] + stats["held_out_docs"]
    assert documents + source["broken"] + sum(source["dropped"].values()) == source["records"]


def test_values_of_a_wrong_type_in_parquet_are_set_aside(read: Runner, tmp_path: Path) -> None:
    source = _write_parquet(tmp_path / "a.parquet", [*TEXTS, None])
    _, out = read(source, max_bad_ratio=0.1)
    assert _all_texts(out) == sorted(TEXTS)
    assert _rejects(out) == [{"file": "a.parquet", "line": 41, "reason": "'text' holds NoneType"}]
    with pytest.raises(UserError, match="40 of 40 records are broken"):
        read(_write_parquet(tmp_path / "b.parquet", list(range(40))))


def test_a_missing_field_names_those_there_are(read: Runner, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "title": "y"}\n')
    with pytest.raises(UserError, match=r"no field 'text'; set corpus\.text_field to one of: body, title"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"no field 'body'; set corpus\.text_field to one of: id, text"):
        read(_write_parquet(tmp_path / "a.parquet", TEXTS), text_field="body")


def test_another_field_can_hold_the_text(read: Runner, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": 1, "body": t}) + "\n" for t in TEXTS))
    _, out = read(tmp_path / "a.jsonl", text_field="body")
    assert _all_texts(out) == sorted(TEXTS)


def test_blank_documents_are_dropped_and_counted(read: Runner, tmp_path: Path) -> None:
    stats, out = read(write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "", " ", "\n\t\u2003"]))
    assert _all_texts(out) == sorted(TEXTS)
    assert _source(stats)["dropped"] == {"empty": 3}


def test_a_lone_surrogate_is_dropped_and_counted(read: Runner, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(TEXTS) + b'{"text": "half \\ud83d of a pair"}\n')
    stats, out = read(tmp_path / "a.jsonl")
    assert _all_texts(out) == sorted(TEXTS)
    assert _source(stats)["dropped"] == {"lone surrogate": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.02])
def test_a_cut_archive_is_refused_and_named(read: Runner, tmp_path: Path, name: str, keep: float) -> None:
    data = _jsonl(TEXTS * 50)
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
    (tmp_path / name).write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(UserError, match=rf"{re.escape(name)} cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_of_another_kind_than_its_name_is_refused(read: Runner, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(_jsonl(TEXTS))
    with pytest.raises(UserError, match=rf"{re.escape(name)} (cannot be read|is not a Parquet file)"):
        read(tmp_path / name)


def test_a_damaged_gz_is_refused_wherever_the_damage_is(read: Runner, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(_jsonl([*TEXTS, "".join(map(chr, range(33, 3000)))]))
    for offset in range(20, len(packed) - 8, 97):
        path.write_bytes(packed)
        flip_bit(path, offset)
        with pytest.raises(UserError):
            read(path)


def test_a_damaged_parquet_page_is_refused_or_set_aside(read: Runner, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i} {i * i * 7919}" for i in range(3000)]})
    pq.write_table(table, path, compression="gzip", write_page_checksum=True)
    packed = path.read_bytes()
    for offset in range(200, len(packed) // 2, 2503):
        path.write_bytes(packed)
        flip_bit(path, offset)
        with pytest.raises(UserError):
            read(path)


def test_split_does_not_depend_on_the_order_of_the_inputs(read: Runner, tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20]), write_jsonl(tmp_path / "b.jsonl", TEXTS[20:])
    c = write_jsonl(tmp_path / "c.jsonl", TEXTS[::-1])
    splits = []
    for source in ((a, b), (b, a), (c,)):
        _, out = read(*source)
        splits.append((sorted(_texts(out, "train")), sorted(_texts(out, "held_out"))))
    assert splits[0] == splits[1] == splits[2]
    assert all(splits[0])


def test_split_puts_identical_documents_on_the_same_side(read: Runner, tmp_path: Path) -> None:
    _, out = read(write_jsonl(tmp_path / "a.jsonl", TEXTS * 3))
    train, held_out = _texts(out, "train"), _texts(out, "held_out")
    assert len(train) + len(held_out) == 3 * len(TEXTS)
    assert not set(train) & set(held_out)


def test_split_fraction_and_seed_are_respected() -> None:
    texts = [str(i) for i in range(20_000)]
    share = sum(is_held_out(text, 0.1, 0) for text in texts) / len(texts)
    tolerance = 0.01  # five standard errors of a share of 0.1 among 20,000
    assert abs(share - 0.1) < tolerance
    assert {t for t in texts if is_held_out(t, 0.05, 0)} < {t for t in texts if is_held_out(t, 0.1, 0)}
    both = sum(is_held_out(text, 0.1, 0) and is_held_out(text, 0.1, 1) for text in texts) / len(texts)
    assert both < 0.02


@given(
    text=st.text(alphabet="ab \n\r\t\u2028", max_size=200) | st.text(max_size=100),
    document_chars=st.integers(1, 50),
)
def test_cutting_loses_no_character_and_cuts_only_at_blank_lines(text: str, document_chars: int) -> None:
    pieces = list(cut_at_blank_lines(text, document_chars))
    assert "".join(pieces) == text
    assert all(pieces)
    for piece in pieces[:-1]:
        assert piece.endswith("\n\n")
        assert len(piece) >= document_chars


def test_cutting_a_text_file_gives_documents_of_about_the_length_asked_for(read: Runner, tmp_path: Path) -> None:
    text = "\n\n".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    stats, out = read(tmp_path / "a.txt", txt_document_chars=100)
    documents = _all_texts(out)
    assert sum(map(len, documents)) == len(text)
    assert max(map(len, documents)) < 200
    assert stats["train_docs"] + stats["held_out_docs"] == len(documents) > 5


def test_shards_are_closed_at_their_size(read: Runner, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    _, out = read(source)
    order = _texts(out, "train")
    assert len(list(out.glob("train-*.arrow"))) == 1
    _, out = read(source, shard_bytes=100)
    assert len(list(out.glob("train-*.arrow"))) > 5
    assert _texts(out, "train") == order


def test_identity_of_the_input_follows_bytes_and_names_but_not_the_place(tmp_path: Path) -> None:
    found = []
    for folder, name, texts in (("a", "x", TEXTS), ("b", "x", TEXTS), ("c", "y", TEXTS), ("d", "x", TEXTS[1:])):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / f"{name}.jsonl", texts)
        found.append(external_data(CorpusConfig(source=(str(tmp_path / folder),))))
    assert found[0] == found[1]
    assert found[2] != found[0] != found[3] != found[2]


def test_hub_without_the_package_says_what_to_install(read: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:some/set needs the package datasets: pip install"):
        read("hf:some/set")


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach the Hub"), FileNotFoundError("no such set"), ValueError("no such subset")]
)
def test_hub_that_cannot_be_reached_is_named(read: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"cannot open 'some/set:part': {error}"):
        read("hf:some/set:part")


def test_hub_rows_are_read_with_name_subset_split_and_revision(read: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> list[dict[str, Any]]:
        asked.append((names, settings))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    _, out = read("hf:some/set:part", hub_split="test", hub_revision="abc")
    assert _all_texts(out) == sorted(TEXTS)
    assert asked == [(("some/set", "part"), {"split": "test", "revision": "abc", "streaming": True})]
