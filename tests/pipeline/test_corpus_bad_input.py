import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from tests.pipeline.conftest import AWKWARD, cut_end, flip_bit, python, write_jsonl
from tests.support.corpus_runs import TEXTS, Made, jsonl, make_corpus


def _parquet(path: Path, texts: Any) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": pa.array(texts)}), path)
    return path


def _arrow(path: Path, text: pa.Array) -> Path:
    table = pa.table({"text": text})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


# Nothing left


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_corpus_without_text_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="holds no document with text"):
        make_corpus(tmp_path, tmp_path / name)


def test_a_corpus_of_which_everything_is_left_out_says_why(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, ""])
    with pytest.raises(UserError, match=r"no document with text \(left out: (1 empty, 40|40 too short, 1)"):
        make_corpus(tmp_path, source, filters={"min_chars": 1000})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_file_without_records_is_no_document(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", TEXTS)
    path = folder / name
    if name == "a.parquet":
        _parquet(path, pa.array([], pa.string()))
    elif name == "a.arrow":
        _arrow(path, pa.array([], pa.string()))
    else:
        path.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    made = make_corpus(tmp_path, folder)
    assert sorted(made.texts()) == sorted(TEXTS)
    assert (made.source["files"], made.source["records"]) == (2, 40)


@pytest.mark.parametrize(("fraction", "empty"), [(1e-12, "evaluation"), (1 - 1e-12, "training")])
def test_a_split_that_leaves_nothing_says_for_what(tmp_path: Path, fraction: float, empty: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(UserError, match=rf"nothing is left for {empty} .* 40 documents .*held_out_fraction"):
        make_corpus(tmp_path, source, held_out_fraction=fraction)


def test_blank_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    made = make_corpus(tmp_path, write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "", " ", "\n\t\u2003"]))
    assert sorted(made.texts()) == sorted(TEXTS)
    assert made.source["dropped"] == {"empty": 3}


# Bytes that are no text


def test_undecodable_bytes_under_strict_name_file_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"first\nsecond\nthird \xff here\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 3: byte 0xff .*corpus\.undecodable"):
        make_corpus(tmp_path, tmp_path / "bad.txt")
    (tmp_path / "bad.jsonl").write_bytes(jsonl(TEXTS) + b'{"text": "\xfe"}\n')
    for shard_bytes in (64_000_000, 100):
        with pytest.raises(UserError, match=r"bad\.jsonl, line 41: byte 0xfe"):
            make_corpus(tmp_path, tmp_path / "bad.jsonl", shard_bytes=shard_bytes)


def test_undecodable_bytes_after_a_byte_order_mark_name_the_right_byte(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfab\xfdcdefgh")
    with pytest.raises(UserError, match=r"line 1: byte 0xfd"):
        make_corpus(tmp_path, tmp_path / "bad.txt")


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    """A folder in which three documents of two files are not UTF-8."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text)
    (folder / "bad1.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 one")
    (folder / "bad2.jsonl").write_bytes(b'{"text": "caf\xe9 two"}\n{"text": "caf\xe9 three"}\n{"text": "fine"}\n')
    return folder


def test_undecodable_bytes_under_replace_are_counted_by_file(tmp_path: Path, bad_files: Path) -> None:
    made = make_corpus(tmp_path, bad_files, undecodable="replace")
    replaced = ["caf\ufffd one", "caf\ufffd three", "caf\ufffd two", "fine"]
    assert sorted(made.texts()) == sorted([*TEXTS, *replaced])
    assert made.source["replaced_by_file"] == {"bad1.txt": 1, "bad2.jsonl": 2}
    assert (made.source["skipped_by_file"], made.rejects()) == ({}, [])


@pytest.mark.parametrize("shard_bytes", [64_000_000, 30])
def test_undecodable_bytes_under_skip_are_listed_and_counted(tmp_path: Path, bad_files: Path, shard_bytes: int) -> None:
    made = make_corpus(tmp_path, bad_files, undecodable="skip", max_bad_ratio=0.0, shard_bytes=shard_bytes)
    assert sorted(made.texts()) == sorted([*TEXTS, "fine"])
    assert made.source["skipped_by_file"] == {"bad1.txt": 1, "bad2.jsonl": 2}
    assert (made.source["dropped"], made.source["broken"]) == ({"undecodable": 3}, 0)
    assert made.source["replaced_by_file"] == {}
    reason = "byte 0xe9 is not UTF-8"
    places = [("bad1.txt", 1), ("bad2.jsonl", 1), ("bad2.jsonl", 2)]
    assert made.rejects() == [{"file": file, "line": line, "reason": reason} for file, line in places]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_undecodable_text_in_columns_follows_the_policy(tmp_path: Path, suffix: str) -> None:
    bad = pa.array([b"caf\xe9", *[text.encode() for text in TEXTS]], pa.binary()).view(pa.string())
    path = tmp_path / f"a.{suffix}"
    if suffix == "arrow":
        _arrow(path, bad)
    else:
        pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(UserError, match=rf"a\.{suffix}, line 1: byte 0xe9"):
        make_corpus(tmp_path, path)
    made = make_corpus(tmp_path, path, undecodable="skip")
    assert sorted(made.texts()) == sorted(TEXTS)
    assert made.source["skipped_by_file"] == {path.name: 1}


def test_a_byte_order_mark_is_taken_off_the_front_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst \xef\xbb\xbf inside")
    source = write_jsonl(tmp_path / "b.jsonl", TEXTS)
    assert "first \ufeff inside" in make_corpus(tmp_path, [str(tmp_path / "a.txt"), str(source)]).texts()


def test_nul_mixed_line_ends_and_odd_characters_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [*TEXTS, *AWKWARD])
    texts = [f"{text}\r\nof a\rfile\x00\x0c\x85\u2028end" for text in AWKWARD if not text.startswith("\ufeff")]
    for number, text in enumerate(texts):
        (folder / f"{number}.md").write_bytes(text.encode())
    assert sorted(make_corpus(tmp_path, folder).texts()) == sorted([*TEXTS, *AWKWARD, *texts])


def test_a_lone_surrogate_is_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS) + b'{"text": "half \\ud83d of a pair"}\n')
    made = make_corpus(tmp_path, tmp_path / "a.jsonl")
    assert sorted(made.texts()) == sorted(TEXTS)
    assert made.source["dropped"] == {"lone surrogate": 1}


# Records that are none

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


@pytest.mark.parametrize("shard_bytes", [64_000_000, 1000])
def test_broken_lines_are_set_aside_with_file_line_and_reason(tmp_path: Path, shard_bytes: int) -> None:
    good = jsonl(TEXTS).decode().splitlines()
    lines = [*good[:2], *BROKEN_LINES, *good[2:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = make_corpus(tmp_path, tmp_path / "a.jsonl", max_bad_ratio=0.2, shard_bytes=shard_bytes)
    assert sorted(made.texts()) == sorted(TEXTS)
    assert (made.source["records"], made.source["broken"]) == (50, 10)
    rejects = made.rejects()
    assert [(reject["file"], reject["line"]) for reject in rejects] == [("a.jsonl", 3 + i) for i in range(10)]
    for reject, reason in zip(rejects, BROKEN_LINES.values(), strict=True):
        assert reason in reject["reason"]


@pytest.mark.parametrize("broken", list(BROKEN_LINES), ids=range(len(BROKEN_LINES)))
def test_broken_lines_above_the_ratio_fail_and_name_the_first(tmp_path: Path, broken: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:8]) + f"{broken}\nnothing\n".encode())
    with pytest.raises(UserError, match=r"2 of 10 records are broken.*max_bad_ratio 0\.1 .*a\.jsonl, line 9"):
        make_corpus(tmp_path, tmp_path / "a.jsonl", max_bad_ratio=0.1)
    assert make_corpus(tmp_path, tmp_path / "a.jsonl", max_bad_ratio=0.2).source["broken"] == 2


def test_the_ratio_is_that_of_a_source_over_all_its_shards(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"junk\n" * 4 + jsonl(TEXTS[:36]))
    write_jsonl(tmp_path / "b.jsonl", TEXTS[36:])
    source = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")}
    made = make_corpus(tmp_path, source, max_bad_ratio=0.1, shard_bytes=99)
    assert {name: counts["broken"] for name, counts in made.stats["sources"].items()} == {"a": 4, "b": 0}
    with pytest.raises(UserError, match=r"corpus\.source\.a: 4 of 40 records are broken"):
        make_corpus(tmp_path, source, max_bad_ratio=0.099, shard_bytes=99)


@pytest.mark.parametrize("shard_bytes", [64_000_000, 70_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_above_the_limit_is_set_aside(tmp_path: Path, name: str, shard_bytes: int) -> None:
    limit = len(jsonl(TEXTS[:1])) + 10
    longest = "x" * (limit - len(jsonl([""])) + 1)
    assert len(jsonl([longest])) == limit + 1  # the end of the line is not counted
    data = jsonl([*TEXTS[:2], "y" * 3_000_000, longest, longest + "x", *TEXTS[2:], "z" * 5000])
    if name == "a.jsonl":
        data = data.rstrip()
    pack = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstandard.compress}[name]
    (tmp_path / name).write_bytes(pack(data))
    made = make_corpus(
        tmp_path, tmp_path / name, max_line_bytes=limit, max_bad_ratio=0.1, shard_bytes=shard_bytes,
        max_decompression_ratio=1e6,
    )  # fmt: skip
    assert sorted(made.texts()) == sorted([*TEXTS, longest])
    assert (made.source["records"], made.source["broken"]) == (44, 3)
    assert [reject["line"] for reject in made.rejects()] == [3, 5, 44]
    assert {reject["reason"] for reject in made.rejects()} == {f"longer than corpus.max_line_bytes {limit}"}


@settings(deadline=None, max_examples=40)
@given(data=st.binary(max_size=300), shard_bytes=st.sampled_from([64_000_000, 700, 300]))
def test_any_bytes_as_lines_of_json_give_documents_and_rejects(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, shard_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "a.jsonl").write_bytes(jsonl(TEXTS) + data)
    made = make_corpus(root, root / "a.jsonl", undecodable="skip", max_bad_ratio=1.0, shard_bytes=shard_bytes)
    assert set(TEXTS) <= set(made.texts())
    documents = made.stats["train_docs"] + made.stats["held_out_docs"]
    counts = made.source
    assert documents == len(made.texts())
    assert documents + counts["broken"] + sum(counts["dropped"].values()) == counts["records"]
    assert len(made.rejects()) == counts["broken"] + counts["dropped"].get("undecodable", 0)


@settings(deadline=None)
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(["a.txt", "a.md", "a.jsonl.gz", "a.jsonl.zst", "a.arrow", "a.parquet"]),
)
def test_any_bytes_as_another_kind_give_documents_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / name).write_bytes(data)
    write_jsonl(root / "b.jsonl", TEXTS)
    found = _made_or_error(root, [str(root / name), str(root / "b.jsonl")])
    assert name in str(found) if isinstance(found, UserError) else set(TEXTS) <= set(found.texts())


def _made_or_error(root: Path, source: list[str]) -> Made | UserError:
    try:
        return make_corpus(root, source, undecodable="replace")
    except UserError as error:
        return error


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_values_of_a_wrong_type_in_columns_are_set_aside(tmp_path: Path, suffix: str) -> None:
    def write(name: str, values: list[Any]) -> Path:
        path = tmp_path / f"{name}.{suffix}"
        return _parquet(path, values) if suffix == "parquet" else _arrow(path, pa.array(values))

    made = make_corpus(tmp_path, write("a", [*TEXTS, None]), max_bad_ratio=0.1)
    assert sorted(made.texts()) == sorted(TEXTS)
    assert made.rejects() == [{"file": f"a.{suffix}", "line": 41, "reason": "'text' holds NoneType"}]
    with pytest.raises(UserError, match="40 of 40 records are broken"):
        make_corpus(tmp_path, write("b", list(range(40))))


def test_a_missing_field_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "title": "y"}\n')
    with pytest.raises(UserError, match=r"no field 'text'; set corpus\.text_field to one of: body, title"):
        make_corpus(tmp_path, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"no field 'body'; set corpus\.text_field to one of: id, text"):
        make_corpus(tmp_path, _parquet(tmp_path / "a.parquet", TEXTS), text_field="body")
    with pytest.raises(UserError, match=r"no field 'body'; set corpus\.text_field to one of: text"):
        make_corpus(tmp_path, _arrow(tmp_path / "a.arrow", pa.array(TEXTS)), text_field="body")


def test_a_missing_field_names_the_setting_of_the_source_that_has_one(tmp_path: Path) -> None:
    for path in (write_jsonl(tmp_path / "a.jsonl", TEXTS), _parquet(tmp_path / "a.parquet", TEXTS)):
        with pytest.raises(UserError, match=r"no field 'body'; set corpus\.source\.own\.text_field to one of: "):
            make_corpus(tmp_path, {"own": {"paths": str(path), "text_field": "body"}})


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": 1, "body": t}) + "\n" for t in TEXTS))
    assert sorted(make_corpus(tmp_path, tmp_path / "a.jsonl", text_field="body").texts()) == sorted(TEXTS)


# Damaged files


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.02])
def test_a_cut_archive_is_refused_and_named(tmp_path: Path, name: str, keep: float) -> None:
    data = jsonl(TEXTS * 50)
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
    (tmp_path / name).write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(UserError, match=rf"{re.escape(name)} cannot be read"):
        make_corpus(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_of_another_kind_than_its_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(jsonl(TEXTS))
    for shard_bytes in (64_000_000, 100):
        with pytest.raises(UserError, match=rf"{re.escape(name)} (cannot be read|is not a Parquet file)"):
            make_corpus(tmp_path, tmp_path / name, shard_bytes=shard_bytes)


def _refused_at(tmp_path: Path, path: Path, offsets: range) -> Iterator[int]:
    packed = path.read_bytes()
    for offset in offsets:
        path.write_bytes(packed)
        flip_bit(path, offset)
        with pytest.raises(UserError):
            make_corpus(tmp_path, path)
        yield offset


def test_a_damaged_gz_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl([*TEXTS, "".join(map(chr, range(33, 3000)))])))
    assert len(list(_refused_at(tmp_path, path, range(20, path.stat().st_size - 8, 97)))) > 20


def test_a_damaged_parquet_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i} {i * i * 7919}" for i in range(3000)]})
    pq.write_table(table, path, compression="gzip", write_page_checksum=True)
    assert len(list(_refused_at(tmp_path, path, range(200, path.stat().st_size // 2, 2503)))) > 3


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_arrow_offsets_out_of_bounds_are_refused_and_not_followed(tmp_path: Path, kind: pa.DataType) -> None:
    path = _arrow(tmp_path / "a.arrow", pa.array(TEXTS, kind))
    width = 4 if kind == pa.string() else 8
    offsets = b"".join(sum(map(len, TEXTS[:i])).to_bytes(width, "little") for i in range(41))
    at = path.read_bytes().index(offsets)
    for place in (1, 20, 40):
        flip = at + width * place + width - 1
        _arrow(path, pa.array(TEXTS, kind))
        flip_bit(path, flip)
        with pytest.raises(UserError, match=r"a\.arrow cannot be read"):
            make_corpus(tmp_path, path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_cut_file_of_columns_is_refused(tmp_path: Path, name: str) -> None:
    path = _parquet(tmp_path / name, TEXTS) if name == "a.parquet" else _arrow(tmp_path / name, pa.array(TEXTS))
    cut_end(path, 20)
    with pytest.raises(UserError, match=rf"{re.escape(name)} (cannot be read|is not a Parquet file)"):
        make_corpus(tmp_path, path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_decompression_bomb_is_refused_with_its_ratio(tmp_path: Path, name: str) -> None:
    bomb = jsonl(TEXTS) + b'{"text": "' + bytes(100_000_000)
    (tmp_path / name).write_bytes(gzip.compress(bomb) if name.endswith("gz") else zstandard.compress(bomb))
    with pytest.raises(UserError, match=rf"{re.escape(name)} decompresses to more than \d+ times .*max_decompression"):
        make_corpus(tmp_path, tmp_path / name)
    values = ["x" * 3_000_000, *TEXTS]
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(UserError, match=r"a\.parquet decompresses to more than \d+ times .*max_decompression"):
        make_corpus(tmp_path, tmp_path / "a.parquet")
    assert len(make_corpus(tmp_path, tmp_path / "a.parquet", max_decompression_ratio=1e5).texts()) == 41
    short = gzip.compress(jsonl(["x" * 500_000, *TEXTS]))
    (tmp_path / "short.jsonl.gz").write_bytes(short)
    assert len(make_corpus(tmp_path, tmp_path / "short.jsonl.gz").texts()) == 41


# Giant documents

_MEASURED = """
import resource, sys
from pathlib import Path
from tests.support.corpus_runs import make_corpus
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
root = Path(sys.argv[1])
made = make_corpus(root, str(root / "in"), txt_document_chars=int(sys.argv[2]), held_out_fraction=0.5)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""


def _peak_mb(root: Path, txt_document_chars: int) -> float:
    """Memory that making a corpus took above what the imports did."""
    process = python("-c", _MEASURED, str(root), str(txt_document_chars))
    assert process.returncode == 0, process.stderr
    return float(process.stdout)


@pytest.mark.parametrize("txt_document_chars", [0, 4096])
def test_a_giant_text_passes_in_bounded_memory_and_unchanged(tmp_path: Path, txt_document_chars: int) -> None:
    line = "né pas, a line of a text without an end that is longer than memory\n".encode()
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "giant.txt").open("wb") as handle:
        for _ in range(180):
            handle.write(line * 15_000)
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.md").write_text(text)
    size_mb = (folder / "giant.txt").stat().st_size / 1e6
    assert size_mb > 180
    assert _peak_mb(tmp_path, txt_document_chars) < 160
    (out,) = tmp_path.glob("made-*/corpus")
    made = Made(out)
    counts = made.stats
    assert counts["train_docs"] + counts["held_out_docs"] == 41
    assert counts["train_bytes"] + counts["held_out_bytes"] > size_mb * 1e6
    _compare_giant(made, line, 180 * 15_000)


def _compare_giant(made: Made, line: bytes, num_lines: int) -> None:
    from pipeline.data.documents import read_documents, text_files

    for split in ("train", "held_out"):
        for name in text_files(made.out, split)["text"]:
            for parts in read_documents(made.out, name):
                first = next(iter(parts))
                if not first.encode().startswith(line):
                    continue
                size, rest = len(first.encode()), first.encode()
                for part in parts:
                    rest = rest[len(rest) // len(line) * len(line) :] + part.encode()
                    size += len(part.encode())
                    assert rest.startswith(line[: len(rest)])
                    assert rest.count(line) == len(rest) // len(line)
                assert size == num_lines * len(line)
                return
    raise AssertionError("the giant document is gone")


@pytest.mark.parametrize("policy", ["strict", "replace", "skip"])
def test_a_giant_text_that_is_not_utf8_follows_the_policy(tmp_path: Path, policy: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    data = ("é" * 499 + "\n").encode() * 17_000
    (folder / "giant.md").write_bytes(data + b"a bad \xf0\x9f byte\n" + b"tail")
    write_jsonl(folder / "a.jsonl", TEXTS)
    if policy == "strict":
        with pytest.raises(UserError, match=r"giant\.md, line 17001: byte 0xf0 is not UTF-8"):
            make_corpus(tmp_path, folder)
        return
    made = make_corpus(tmp_path, folder, undecodable=policy)
    (giant,) = [text for text in made.texts() if text not in TEXTS] or [""]
    if policy == "replace":
        assert giant == (data + b"a bad \xf0\x9f byte\ntail").decode(errors="replace")
        assert made.source["replaced_by_file"] == {"giant.md": 1}
    else:
        assert giant == ""
        assert made.rejects() == [{"file": "giant.md", "line": 17001, "reason": "byte 0xf0 is not UTF-8"}]


def test_a_giant_blank_text_is_empty_and_a_giant_line_of_json_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "blank.txt").write_bytes(b" \n\t" * 3_000_000)
    giant = "é word " * 1_500_000
    write_jsonl(folder / "a.jsonl", [*TEXTS, giant])
    made = make_corpus(tmp_path, folder)
    assert sorted(made.texts()) == sorted([*TEXTS, giant])
    assert made.source["dropped"] == {"empty": 1}
