import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import artifact
from pipeline.artifact import MANIFEST, Manifest, record_files, write_json
from pipeline.data import documents
from pipeline.data.documents import (
    SCHEMA,
    DocumentWriter,
    duplicates_file,
    read_documents,
    read_rows,
    text_files,
    text_hashes,
)
from pipeline.errors import CorruptionError, classify
from tests.pipeline.conftest import cut_end, flip_bit

NAME = "train-text-00000.arrow"


def _commit(out: Path) -> Path:
    write_json(out / MANIFEST, Manifest("corpus", "f" * 64, 1, {}, {}, record_files(out)))
    return out


def _write(out: Path, texts: list[str], left_out: list[int] | None = None, name: str = NAME) -> Path:
    out.mkdir(exist_ok=True)
    writer = DocumentWriter(out / name)
    for text in texts:
        writer.write(text.encode())
    writer.close()
    if left_out is not None:
        np.save(out / duplicates_file(name), np.array(left_out, np.int64))
    return _commit(out)


def _read(out: Path, name: str = NAME) -> list[str]:
    return ["".join(parts) for parts in read_documents(out, name)]


@settings(deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=80), max_size=12),
    left_out=st.sets(st.integers(0, 11)),
    part_bytes=st.sampled_from([4, 7, 64]),
)
def test_documents_come_back_without_those_left_out(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], left_out: set[int], part_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART_BYTES", part_bytes)
        patch.setattr(documents, "_BATCH_BYTES", 20)
        out = _write(tmp_path_factory.mktemp("d"), texts, sorted(left_out & set(range(len(texts)))))
    kept = [text for number, text in enumerate(texts) if number not in left_out]
    assert _read(out) == kept
    rows = list(read_rows(out, NAME))
    assert "".join(text for row in rows for text in row.texts) == "".join(kept)
    assert sum(starts for row in rows for starts in row.starts_document) == len(kept)
    assert all(len(text.encode()) < part_bytes + 4 for row in rows for text in row.texts)


def test_a_giant_document_is_several_rows_of_a_megabyte(tmp_path: Path) -> None:
    giant = "aé€𝄞" * 700_000
    out = _write(tmp_path, ["before", giant, "after"])
    rows = [(t, s) for row in read_rows(out, NAME) for t, s in zip(row.texts, row.starts_document, strict=True)]
    assert [text for text, starts in rows if starts][0::2] == ["before", "after"]
    assert len(rows) == 2 + -(-len(giant.encode()) // documents.PART_BYTES)
    assert max(len(text.encode()) for text, _ in rows) <= documents.PART_BYTES + 3
    assert _read(out) == ["before", giant, "after"]


def test_parts_that_were_not_read_do_not_run_into_the_next_document(tmp_path: Path) -> None:
    out = _write(tmp_path, ["x" * 3_000_000, "second", "y" * 3_000_000, "fourth"])
    assert [next(iter(parts))[:6] for parts in read_documents(out, NAME)] == ["x" * 6, "second", "y" * 6, "fourth"]


def test_a_stream_gives_the_same_file_as_its_text(tmp_path: Path) -> None:
    text = "né " * 900_000
    _write(tmp_path / "a", [text, ""])
    (tmp_path / "b").mkdir()
    writer = DocumentWriter(tmp_path / "b" / NAME)
    writer.write_stream(io.BytesIO(text.encode()))
    writer.write_stream(io.BytesIO(b""))
    writer.close()
    assert (tmp_path / "b" / NAME).read_bytes() == (tmp_path / "a" / NAME).read_bytes()


def test_files_of_a_split_are_listed_by_source_in_order(tmp_path: Path) -> None:
    names = [f"{split}-{rest}.arrow" for split in ("train", "held_out") for rest in ("b-00001", "b-00000", "a_c-00000")]
    for name in names:
        _write(tmp_path, ["x"], [], name)
    assert text_files(tmp_path, "train") == {
        "a_c": ["train-a_c-00000.arrow"], "b": ["train-b-00000.arrow", "train-b-00001.arrow"]
    }  # fmt: skip
    assert list(text_files(tmp_path, "held_out")) == ["a_c", "b"]
    assert text_files(tmp_path, "other") == {}


def test_hashes_are_those_of_the_text_and_of_what_is_left_out(tmp_path: Path) -> None:
    out = _write(tmp_path, ["a", "b"])
    alone = text_hashes(out)
    assert list(alone) == [NAME]
    _write(tmp_path, ["a", "b"], [1])
    second = text_hashes(out)
    _write(tmp_path, ["a", "b"], [0])
    first = text_hashes(out)
    assert alone[NAME][0] == first[NAME][0] == second[NAME][0]
    assert len({alone[NAME][1], first[NAME][1], second[NAME][1]}) == 3
    assert alone[NAME][1] == ""


@pytest.mark.parametrize("name", [NAME, duplicates_file(NAME)])
@pytest.mark.parametrize("harm", [flip_bit, cut_end, Path.unlink])
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, name: str, harm: Callable[[Path], Any]) -> None:
    out = _write(tmp_path, ["a", "b"], [1])
    harm(out / name)
    with pytest.raises(CorruptionError, match=name):
        _read(out)


def _table(text: Any, starts: Any, schema: pa.Schema = SCHEMA) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        batch = pa.record_batch([pa.array(text, schema.field(0).type), pa.array(starts, pa.bool_())], schema=schema)
        with pa.ipc.new_file(str(path), schema) as writer:
            writer.write_batch(batch)

    return write


def _bad_offset(path: Path) -> None:
    writer = DocumentWriter(path)
    for _ in range(30):
        writer.write(b"0123456789")
    writer.close()
    data = bytearray(path.read_bytes())
    at = data.index(b"".join((10 * i).to_bytes(8, "little") for i in range(31)))
    data[at + 8 * 9 + 6] = 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_table(["a"], [False]), "begins in the middle of a document"),
        (_table(["a", None], [True, True]), "holds nulls"),
        (_table(["a", "b"], [True, None]), "holds nulls"),
        (_table(["a"], [True], pa.schema([("body", pa.string()), ("x", pa.bool_())])), "its columns are body"),
        (lambda path: path.write_bytes(b"junk" * 20), "is not a valid file of documents"),
        (_bad_offset, "is not a valid file of documents"),
    ],
    ids=["middle", "null text", "null start", "columns", "junk", "offset"],
)
def test_a_committed_file_that_holds_no_documents_is_refused(
    tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path / NAME)
    with pytest.raises(CorruptionError, match=message):
        _read(_commit(tmp_path))


@pytest.mark.parametrize("numbers", [np.array([0.5]), np.array([[1]]), np.array([object()])])
def test_a_list_of_left_out_documents_of_another_type_is_refused(tmp_path: Path, numbers: np.ndarray) -> None:
    _write(tmp_path, ["a", "b"])
    np.save(tmp_path / duplicates_file(NAME), numbers, allow_pickle=True)
    with pytest.raises(CorruptionError, match=r"left-out|not a list of numbers"):
        _read(_commit(tmp_path))


@pytest.mark.parametrize(("module", "function"), [(np, "load"), (pa, "memory_map")])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    out = _write(tmp_path, ["a", "b"], [1])
    monkeypatch.setattr(module, function, fail)
    with pytest.raises(OSError, match="Input/output error") as raised:
        _read(out)
    assert classify(raised.value) == "transient"


def test_a_reader_reads_the_manifest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _write(tmp_path, ["a", "b"], [1])
    read: list[Path] = []
    read_json = artifact.read_json

    def counted(path: Path) -> Any:
        read.append(path)
        return read_json(path)

    monkeypatch.setattr(artifact, "read_json", counted)
    assert _read(out) == ["a"]
    assert read == [out / MANIFEST]
