import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.data.shards as shards
from pipeline.data.shards import TokenStream, open_stream, token_type
from pipeline.errors import CorruptionError
from tests.pipeline.conftest import cut_end, python
from tests.support.packed import write_shard

VOCAB_SIZE = 500

DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=9), max_size=8)


def _stream(root: Path, groups: list[list[list[int]]]) -> TokenStream:
    paths = []
    for number, group in enumerate(groups):
        paths.append(root / f"{number}.arrow")
        write_shard(paths[-1], group, VOCAB_SIZE)
    return open_stream(paths)


def _write_table(path: Path, arrays: dict[str, Any], vocab_size: Any) -> Path:
    batch = pa.RecordBatch.from_pydict(arrays)
    metadata = {} if vocab_size is None else {"vocab_size": str(vocab_size)}
    with pa.ipc.new_file(str(path), batch.schema.with_metadata(metadata)) as writer:
        writer.write_batch(batch.replace_schema_metadata(metadata))
    return path


@given(groups=st.lists(DOCUMENTS, min_size=1, max_size=4), start=st.integers(0, 90), length=st.integers(0, 90))
def test_read_across_shards_equals_naive_concatenation(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[list[int]]], start: int, length: int
) -> None:
    stream = _stream(tmp_path_factory.mktemp("shards"), groups)
    documents = [document for group in groups for document in group]
    flat = [token for document in documents for token in document]
    for first in (0, start, *stream.piece_starts.tolist()):
        found = stream[first : first + length]
        assert found.dtype == np.uint16
        assert found.tolist() == flat[first : first + length]
    assert stream.num_tokens == len(flat)
    assert stream.doc_starts.tolist() == [0, *np.cumsum([len(d) for d in documents], dtype=int).tolist()]


def test_write_in_many_batches_gives_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[i % VOCAB_SIZE] * (i % 5) for i in range(60)]
    whole = _stream(tmp_path, [documents])
    monkeypatch.setattr(shards, "BATCH_TOKENS", 7)
    path = tmp_path / "batches.arrow"
    assert write_shard(path, iter(documents), VOCAB_SIZE) == (60, 120)
    parts = open_stream([path])
    assert len(parts.pieces) > len(whole.pieces)
    assert parts[:1000].tolist() == whole[:1000].tolist()
    assert parts.doc_starts.tolist() == whole.doc_starts.tolist()


def test_write_without_documents_gives_an_empty_stream(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "empty.arrow", [], VOCAB_SIZE) == (0, 0)
    stream = open_stream([tmp_path / "empty.arrow"])
    assert (stream.num_tokens, stream.doc_starts.tolist(), stream.vocab_size) == (0, [0], VOCAB_SIZE)
    assert stream[0:10].tolist() == []


def test_read_at_and_past_the_end_is_short(tmp_path: Path) -> None:
    stream = _stream(tmp_path, [[[1, 2, 3]], [], [[4]]])
    assert stream[2:12].tolist() == [3, 4]
    assert stream[4:14].tolist() == []
    assert stream[99:109].tolist() == []


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32"), (200_000, "uint32")]
)
def test_ids_take_the_narrowest_type_that_holds_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    path = tmp_path / "a.arrow"
    write_shard(path, [[0, vocab_size - 1]], vocab_size)
    stream = open_stream([path])
    assert str(token_type(vocab_size)) == dtype
    assert stream.pieces[0].dtype == np.dtype(dtype)
    assert stream[0:2].tolist() == [0, vocab_size - 1]


def test_open_maps_the_values_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "big.arrow"
    write_shard(path, [list(range(VOCAB_SIZE))] * 2000, VOCAB_SIZE)
    allocated_before = pa.total_allocated_bytes()
    stream = open_stream([path])
    (piece,) = stream.pieces
    assert pa.total_allocated_bytes() - allocated_before < piece.nbytes / 10
    assert not piece.flags.owndata
    assert not piece.flags.writeable
    address = piece.__array_interface__["data"][0]
    assert any(low <= address < high for low, high in _mapped_ranges(path)), "not in the mapped file"


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in lines]  # type: ignore[misc]


def test_open_with_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_shard(path, [[1, 2], [VOCAB_SIZE, 3]], VOCAB_SIZE)
    with pytest.raises(CorruptionError, match=f"token id {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE}"):
        open_stream([path])


@pytest.mark.parametrize("token", [-1, 1 << 16])
def test_write_of_an_id_that_does_not_fit_raises_instead_of_wrapping(tmp_path: Path, token: int) -> None:
    with pytest.raises(OverflowError):
        write_shard(tmp_path / "a.arrow", [[token]], VOCAB_SIZE)


def test_open_with_different_vocabularies_names_both(tmp_path: Path) -> None:
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    for path, vocab_size in zip(paths, (300, 301), strict=True):
        write_shard(path, [[1]], vocab_size)
    with pytest.raises(CorruptionError, match=r"\[300, 301\]"):
        open_stream(paths)


def test_open_of_no_shards_is_refused() -> None:
    with pytest.raises(CorruptionError, match="no token shard"):
        open_stream([])


@pytest.mark.parametrize(
    ("arrays", "vocab_size"),
    [
        ({"tokens": pa.array([1, 2], pa.uint16())}, 10),
        ({"tokens": pa.array([[1, 2]], pa.list_(pa.int64()))}, 10),
        ({"tokens": pa.array([[1, 2]], pa.list_(pa.uint32()))}, 10),
        ({"tokens": pa.array(["text"])}, 10),
        ({"other": pa.array([[1, 2]], pa.list_(pa.uint16()))}, 10),
        ({"tokens": pa.array([[1, None]], pa.list_(pa.uint16()))}, 10),
        ({"tokens": pa.array([[1], None], pa.list_(pa.uint16()))}, 10),
        ({"tokens": pa.array([[1, 2]], pa.list_(pa.uint16()))}, None),
        ({"tokens": pa.array([[1, 2]], pa.list_(pa.uint16()))}, "many"),
    ],
)
def test_open_of_another_schema_is_corruption(tmp_path: Path, arrays: dict[str, Any], vocab_size: Any) -> None:
    path = _write_table(tmp_path / "a.arrow", arrays, vocab_size)
    with pytest.raises(CorruptionError, match=r"a\.arrow"):
        open_stream([path])


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"ARROW1\0\0" * 9, b"junk" * 100])
def test_open_of_junk_is_corruption(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(content)
    with pytest.raises(CorruptionError, match=r"a\.arrow"):
        open_stream([path])


def test_open_of_a_shard_cut_anywhere_is_corruption(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_shard(path, [[1, 2], [3]], VOCAB_SIZE)
    while path.stat().st_size > 0:
        cut_end(path, min(13, path.stat().st_size))
        with pytest.raises(CorruptionError):
            open_stream([path])


_FLIP_EVERYWHERE = """
import json, sys
from pathlib import Path
from pipeline.data.shards import open_stream
from pipeline.errors import CorruptionError
path = Path(sys.argv[1])
good, path = path.read_bytes(), path.with_name("flipped.arrow")
refused = 0
for offset in range(len(good)):
    for bit in (0, 6, 7):
        data = bytearray(good)
        data[offset] ^= 1 << bit
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            stream = open_stream([path])
            tokens = stream[:1000]
            assert len(tokens) == stream.num_tokens < 1000, (offset, bit)
            assert stream.doc_starts[0] == 0 and stream.doc_starts[-1] == stream.num_tokens, (offset, bit)
            assert (stream.doc_starts[1:] >= stream.doc_starts[:-1]).all(), (offset, bit)
        except CorruptionError:
            refused += 1
print(json.dumps(refused))
"""


def test_open_with_any_bit_flipped_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_shard(path, [[1, 2, 3], [], [4, 5, 6, 7]], VOCAB_SIZE)
    process = python("-c", _FLIP_EVERYWHERE, str(path))
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) > 50


@pytest.mark.parametrize("offsets", [[0, 10**6], [0, -5], [5, 2], [-1, 2]])
def test_open_with_corrupt_offsets_is_corruption(tmp_path: Path, offsets: list[int]) -> None:
    path = tmp_path / "a.arrow"
    good = np.array([0, 3], dtype=np.int32).tobytes()
    write_shard(path, [[21, 22, 23]], VOCAB_SIZE)
    data = path.read_bytes()
    at = data.rindex(np.array([21, 22, 23], dtype=np.uint16).tobytes())
    place = data.rindex(good, 0, at)
    path.write_bytes(data[:place] + np.array(offsets, dtype=np.int32).tobytes() + data[place + len(good) :])
    with pytest.raises(CorruptionError, match="not a valid token shard"):
        open_stream([path])
