import errno
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.config import STDLIB, CorpusConfig, Source
from pipeline.corpus.files import _matches, list_source
from pipeline.corpus.identity import external_data
from pipeline.errors import UserError
from tests.pipeline.conftest import write_jsonl
from tests.support.corpus_runs import TEXTS, corpus_config, jsonl, make_corpus, planned


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.jsonl", jsonl),
        ("a.jsonl.gz", lambda texts: gzip.compress(jsonl(texts))),
        ("a.jsonl.gz", lambda texts: gzip.compress(jsonl(texts[:9])) + gzip.compress(jsonl(texts[9:]))),
        ("a.jsonl.zst", lambda texts: zstandard.compress(jsonl(texts))),
        ("a.jsonl.zst", lambda texts: zstandard.compress(jsonl(texts[:9])) + zstandard.compress(jsonl(texts[9:]))),
        ("a.jsonl", lambda texts: b"\n \n".join(jsonl(texts).splitlines())),
        ("a.jsonl", lambda texts: b"\xef\xbb\xbf" + jsonl(texts).replace(b"\n", b"\r\n")),
    ],
    ids=["plain", "gz", "gz of two members", "zst", "zst of two frames", "blank lines between", "BOM and CRLF"],
)
def test_lines_of_json_give_their_documents(tmp_path: Path, name: str, encode: Callable[[list[str]], bytes]) -> None:
    (tmp_path / name).write_bytes(encode(TEXTS))
    made = make_corpus(tmp_path, tmp_path / name)
    assert sorted(made.texts()) == sorted(TEXTS)
    stats = made.stats
    assert stats["train_docs"] + stats["held_out_docs"] == len(TEXTS) == made.source["records"]
    assert stats["train_bytes"] == sum(len(text.encode()) for text in made.texts("train"))
    assert stats["held_out_bytes"] == sum(len(text.encode()) for text in made.texts("held_out"))
    assert (made.source["files"], made.source["broken"], made.rejects()) == (1, 0, [])


PARQUET_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", [*PARQUET_TYPES[:2], PARQUET_TYPES[3], pa.binary()], ids=str)
def test_parquet_gives_its_documents(tmp_path: Path, kind: pa.DataType) -> None:
    values = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": pa.array(values, kind)}), tmp_path / "a.parquet")
    assert sorted(make_corpus(tmp_path, tmp_path / "a.parquet").texts()) == sorted(TEXTS)


@pytest.mark.parametrize("kind", PARQUET_TYPES, ids=str)
@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_give_their_documents(tmp_path: Path, kind: pa.DataType, write: Any) -> None:
    table = pa.table({"id": range(len(TEXTS)), "text": pa.array(TEXTS, kind)})
    with write(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    assert sorted(make_corpus(tmp_path, tmp_path / "a.arrow").texts()) == sorted(TEXTS)


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=3)
    made = make_corpus(tmp_path, tmp_path / "saved")
    assert sorted(made.texts()) == sorted(TEXTS)
    assert made.source["files"] == 3


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_text_files_in_folders_are_one_document_each(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "texts"
    for number, text in enumerate(TEXTS):
        path = folder / f"part{number % 3}" / f"{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "image.png").write_bytes(b"\x89PNG")
    for source in (folder, f"{folder}/**/*{suffix}", f"{folder}/part?/[0-9]*{suffix}"):
        assert sorted(make_corpus(tmp_path, source).texts()) == sorted(TEXTS)


def test_named_sources_are_named_in_files_and_counted_apart(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", TEXTS[:15])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in [*TEXTS[15:], " "]))
    source = {"second": {"paths": str(tmp_path / "b.jsonl"), "text_field": "body"}, "first": str(a)}
    made = make_corpus(tmp_path, source)
    assert sorted(made.texts()) == sorted(TEXTS)
    assert sorted(name for name in made.files() if name.endswith(".arrow")) == [
        f"{split}-{name}-00000.arrow" for split in ("held_out", "train") for name in ("first", "second")
    ]
    counts = made.stats["sources"]
    assert list(counts) == ["first", "second"]
    assert {name: (c["records"], c["docs"], c["dropped"]) for name, c in counts.items()} == {
        "first": (15, 15, {}), "second": (26, 25, {"empty": 1})
    }  # fmt: skip
    assert sum(c["bytes"] for c in counts.values()) == sum(len(text.encode()) for text in TEXTS)


def test_a_list_of_paths_is_one_source_in_the_order_of_the_names(tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20]), write_jsonl(tmp_path / "b.jsonl", TEXTS[20:])
    made = [make_corpus(tmp_path, [str(x), str(y)]) for x, y in ((a, b), (b, a))]
    assert made[0].files() == made[1].files()
    train = made[0].texts("train")
    assert train == [text for text in TEXTS if text in train]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    made = make_corpus(tmp_path, write_jsonl(tmp_path / "a[1]*.jsonl", TEXTS))
    assert sorted(made.texts()) == sorted(TEXTS)


def test_a_text_file_with_jsonl_inside_its_name_is_text(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl.txt").write_text("\n\n".join(TEXTS))
    assert len(make_corpus(tmp_path, tmp_path / "notes.jsonl.txt", txt_document_chars=1).texts()) == len(TEXTS)


def test_a_file_name_that_is_not_unicode_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (Path(str(folder)) / b"caf\xe9.jsonl".decode("utf-8", "surrogateescape")).write_bytes(jsonl(TEXTS))
    assert sorted(make_corpus(tmp_path, folder).texts()) == sorted(TEXTS)


def test_stdlib_is_the_sources_of_python_without_installed_packages() -> None:
    found = list_source("text", Source((STDLIB,)))
    names = [file.name for file in found]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert all(file.url.endswith(".py") and Path(file.url).is_file() for file in found)
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
def test_a_source_without_usable_files_is_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"corpus\.source.*" + message):
        make_corpus(tmp_path, tmp_path / source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": {"min_chars": 9}}, "filters do nothing, since every source has its own"),
        ({"text_field": "body"}, "text_field does nothing, since every source has its own"),
        ({"hub_split": "test"}, "hub_split does nothing, since no source is a dataset"),
        ({"hub_revision": "abc"}, "hub_revision does nothing, since no source is a dataset"),
        ({"split_seed": -1}, r"split_seed is -1; it must lie in \[0, 2\*\*63\)"),
        ({"split_seed": 2**63}, "split_seed is 9223372036854775808"),
    ],
)
def test_a_setting_that_no_source_heeds_is_refused(settings: dict[str, Any], message: str) -> None:
    own = {"a": {"paths": "a", "text_field": "t", "filters": {"max_chars": 5}}}
    with pytest.raises(UserError, match=rf"^corpus: {message}"):
        corpus_config(own, **settings)
    if "split_seed" not in settings:
        corpus_config({**own, "b": "hf:some/set"}, **settings)
        corpus_config(own, **{name: getattr(CorpusConfig(), name) for name in settings})


# Links, and the same file twice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one file, beside one that is none of its business."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "secret.jsonl", ["secret"])
    return tmp_path / "in"


def test_a_link_out_of_a_folder_is_refused(folder: Path) -> None:
    (folder / "b.jsonl").symlink_to(folder.parent / "secret.jsonl")
    for source in (folder, folder / "*.jsonl"):
        with pytest.raises(UserError, match=r"the link .*b\.jsonl leads to .*secret\.jsonl, outside"):
            planned(source)
    (folder / "b.jsonl").unlink()
    (folder / "deep" / "up").symlink_to(folder.parent)
    with pytest.raises(UserError, match=r"the link .*up leads to .*, outside"):
        planned(folder)


def test_a_loop_of_links_is_refused(folder: Path) -> None:
    (folder / "deep" / "again").symlink_to(folder)
    with pytest.raises(UserError, match=r"the link .*again leads to .*twice or for ever"):
        planned(folder)
    (folder / "deep" / "again").unlink()
    (folder / "x.jsonl").symlink_to(folder / "y.jsonl")
    (folder / "y.jsonl").symlink_to(folder / "x.jsonl")
    with pytest.raises(UserError, match=r"the link .*\.jsonl leads nowhere"):
        planned(folder)


def test_a_file_reached_twice_is_refused(folder: Path) -> None:
    a = str(folder / "a.jsonl")
    for paths in ([a, a], [a, str(folder)], [str(folder), f"{folder}/*.jsonl"]):
        with pytest.raises(UserError, match=r"a\.jsonl is reached twice"):
            planned(paths)
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl is reached twice, as .*a\.jsonl and as .*b\.jsonl"):
        planned(folder)
    assert len(planned(folder / "b.jsonl")) == 1
    assert len(planned({"one": a, "two": a})) == 2


def test_two_files_of_one_name_in_a_source_are_refused(folder: Path) -> None:
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    with pytest.raises(UserError, match=r"would both be called a\.jsonl\. Give the two places names"):
        planned([str(folder), str(other)])
    assert len(planned({"in": str(folder), "other": str(other)})) == 2


def test_hidden_files_of_a_folder_are_read_only_where_they_are_named(folder: Path) -> None:
    hidden = write_jsonl(folder / ".draft.jsonl", ["draft"])
    (folder / ".cache").mkdir()
    write_jsonl(folder / ".cache" / "b.jsonl", ["cached"])
    assert [file.name for file in list_source("text", Source((str(folder),)))] == ["a.jsonl"]
    assert [file.name for file in list_source("text", Source((str(hidden),)))] == [".draft.jsonl"]


# Folders that cannot be read


@pytest.mark.parametrize("pattern", ["", "*/*/*.jsonl", "**/*.jsonl", "d*p/**/*.jsonl", "*/deeper/a*"])
def test_a_folder_that_cannot_be_read_is_named(folder: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = folder / "deep" / "deeper"
    closed.mkdir()
    write_jsonl(closed / "a2.jsonl", TEXTS)
    planned(folder / pattern)
    _close(closed, monkeypatch)
    with pytest.raises(UserError, match=rf"corpus\.source: the folder {closed} cannot be read: Permission denied"):
        planned(folder / pattern)
    assert len(planned(folder / "*.jsonl")) == 1


def _close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deny a folder to whoever runs the tests, be it root."""

    def read(real: Callable[[Any], Any], path: Any) -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(read, getattr(os, name)))


def test_a_closed_folder_of_the_standard_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _close(Path(json.__file__).parent, monkeypatch)
    with pytest.raises(UserError, match=r"the folder .*json cannot be read"):
        list_source("text", Source((STDLIB,)))


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.sampled_from(["**", "*", "a", "b", "?", "[ab]*", "*.txt", "c.txt"]), min_size=1, max_size=4))
def test_a_pattern_finds_what_pathlib_finds(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    root = tmp_path_factory.getbasetemp() / "globbed"
    for name in ("a/b/c.txt", "a/c.txt", "b/a/b/d.txt", ".hidden/c.txt", "c.txt", "a/.x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    assert _files(_matches(root, parts)) == _files(root.glob("/".join(parts)))


def _files(paths: Iterable[Path]) -> set[Path]:
    return {path for path in paths if path.is_file()}


# Identity


def test_identity_of_a_source_follows_bytes_and_names_but_not_the_place(tmp_path: Path) -> None:
    found = []
    for folder, name, texts in (("a", "x", TEXTS), ("b", "x", TEXTS), ("c", "y", TEXTS), ("d", "x", TEXTS[1:])):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / f"{name}.jsonl", texts)
        found.append(external_data(corpus_config(str(tmp_path / folder))))
    assert found[0] == found[1]
    assert found[2] != found[0] != found[3] != found[2]


def test_identity_of_a_source_follows_how_it_is_read_and_its_name(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    found = [
        external_data(CorpusConfig(source=source))
        for source in (
            {"a": Source((path,))},
            {"b": Source((path,))},
            {"a": Source((path,), "body")},
            {"a": Source((path,)), "b": Source((path,))},
            {"a": Source(("hf:x",))},
        )
    ]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])
    filtered = corpus_config({"a": {"paths": path, "filters": {"min_chars": 2}}})
    assert external_data(filtered) != found[0]
