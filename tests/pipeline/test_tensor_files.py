"""Files of tensors: what the safetensors library reads and writes, rounding as torch's, damage that is never read."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import tensor_files
from pipeline.errors import CorruptionError, UserError
from pipeline.tensor_files import TensorFiles, TensorInfo, TensorWriter, narrowed, read_header

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SPECIAL = [0.0, -0.0, 1.0, 1e-45, -1e-40, 1e-38, 65504.0, 65519.9, 3.3895e38, 3.4028235e38, np.inf, -np.inf, np.nan]

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
tensors = arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
kept = st.dictionaries(names, st.tuples(tensors, st.sampled_from(sorted(DTYPES))), max_size=5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "any.safetensors"


def as_torch(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values.copy()).to(DTYPES[dtype])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is equal for nan too, and tells 0.0 from -0.0."""
    tensor = tensor.float()
    return torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor).view(torch.int32)


def stored_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.flatten().view(torch.int16 if tensor.itemsize == 2 else torch.int32)
    return flat.numpy().tobytes()


def is_in_range(values: np.ndarray, dtype: str) -> bool:
    return dtype != "F16" or not (np.isfinite(values) & (np.abs(values) >= 65520)).any()


@given(kept)
@settings(deadline=None)
def test_any_tensors_of_the_library_are_read(place: Path, given: dict[str, tuple[np.ndarray, str]]):
    wanted = {name: as_torch(*value) for name, value in given.items()}
    save_file(wanted, place)
    files = TensorFiles([place])
    assert set(files.names) == set(wanted)
    for name, tensor in wanted.items():
        assert files.info(name).shape == files.shapes[name] == tuple(tensor.shape)
        assert files.info(name).dtype == given[name][1]
        assert torch.equal(bits(torch.from_numpy(files.read(name))), bits(tensor))
        assert files.read_raw(name) == stored_bytes(tensor)
        if tensor.ndim and len(tensor):
            rows = files.read_rows(name, len(tensor) // 2, len(tensor))
            assert torch.equal(bits(torch.from_numpy(rows)), bits(tensor[len(tensor) // 2 :]))


@given(kept, st.dictionaries(names, names, max_size=2), st.integers(1, 3))
@settings(deadline=None)
def test_any_tensors_that_are_written_are_read_by_the_library(
    place: Path, given: dict[str, tuple[np.ndarray, str]], metadata: dict[str, str], pieces: int
):
    given = {name: value for name, value in given.items() if is_in_range(*value)}
    with TensorWriter(place, {name: (dtype, values.shape) for name, (values, dtype) in given.items()}, metadata) as out:
        for name, (values, _) in given.items():
            for part in np.array_split(values, pieces) if values.ndim else [values]:
                if part.size or not values.size:
                    out.append(name, part)
                if not values.size:
                    break
    found = load_file(place)
    assert found.keys() == given.keys()
    for name, (values, dtype) in given.items():
        assert found[name].dtype == DTYPES[dtype]
        assert torch.equal(bits(found[name]), bits(as_torch(values, dtype)))
    with safe_open(str(place), framework="np") as file:
        assert (file.metadata() or {}) == metadata


# Rounding


def test_every_bfloat16_and_every_half_is_the_same_after_it_was_a_float(place: Path):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    save_file({"b": torch.from_numpy(patterns.copy()).view(torch.bfloat16)}, place)
    assert np.array_equal(narrowed(TensorFiles([place]).read("b"), "BF16"), patterns)
    numbers = patterns[~np.isnan(patterns.view(np.float16))]
    save_file({"h": torch.from_numpy(numbers.copy()).view(torch.float16)}, place)
    assert np.array_equal(narrowed(TensorFiles([place]).read("h"), "F16").view(np.uint16), numbers)


def neighbours() -> np.ndarray:
    """Float32 values on, just above, just below and half way between 16-bit ones, of all exponents, both signs."""
    upper = np.arange(0, 1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000], np.uint32)
    return np.concatenate([(upper | lower).reshape(-1).view(np.float32), np.array(SPECIAL, np.float32)])


def test_rounding_is_that_of_torch_for_numbers_of_every_kind():
    values = neighbours()
    found = torch.from_numpy(narrowed(values, "BF16")).view(torch.bfloat16)
    assert torch.equal(bits(found), bits(as_torch(values, "BF16")))
    inside = values[~(np.isfinite(values) & (np.abs(values) >= 65520))]
    found = torch.from_numpy(narrowed(inside, "F16"))
    assert torch.equal(bits(found), bits(as_torch(inside, "F16")))


def test_a_number_that_a_half_cannot_hold_is_refused_by_the_name_of_its_tensor(tmp_path: Path):
    with (
        pytest.raises(UserError, match=r"gate has values up to 65520, beyond 65504.*bfloat16 or float32"),
        TensorWriter(tmp_path / "x", {"gate": ("F16", (2,))}, {}) as out,
    ):
        out.append("gate", np.array([np.inf, 65520.0], np.float32)[1:])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_larger_than_a_block_are_whole(place: Path, monkeypatch: pytest.MonkeyPatch, dtype: str):
    monkeypatch.setattr(tensor_files, "BLOCK_ELEMENTS", 7)
    values = np.arange(60, dtype=np.float32).reshape(5, 12)
    with TensorWriter(place, {"a": (dtype, (3, 12)), "b": (dtype, (5, 12))}, {}) as out:
        out.append("a", values[:1].T.copy().T)
        out.append("a", values[1:3].reshape(-1))
        out.append("b", values)
    files = TensorFiles([place])
    assert np.array_equal(files.read("b"), values)
    assert np.array_equal(files.read_rows("b", 1, 4), values[1:4])
    part = np.empty(20, np.float32)
    files.read_elements("a", 10, part)
    assert np.array_equal(part, values.reshape(-1)[10:30])


# Damage

SOUND = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.arange(5.0).bfloat16(), "c": torch.tensor(2.0)}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.safetensors"
    save_file(SOUND, path, metadata={"format": "pt"})
    return path


def test_a_file_cut_at_any_byte_is_refused_by_its_name(sound: Path):
    data = sound.read_bytes()
    for length in range(len(data)):
        sound.write_bytes(data[:length])
        with pytest.raises(CorruptionError, match=str(sound)):
            read_header(sound)
    sound.write_bytes(data + b"x")
    with pytest.raises(CorruptionError, match="goes on for 1 bytes after its last tensor"):
        read_header(sound)


def is_refused(path: Path, wanted: dict[str, tuple[TensorInfo, bytes]]) -> bool:
    """Whether a file is; what is read of one that is not must be what was wanted."""
    try:
        files = TensorFiles([path])
        found = {name: (files.info(name), files.read_raw(name)) for name in wanted if name in files.names}
    except CorruptionError:
        return True
    except UserError as error:
        told = str(error)
        assert "cannot be used" in told  # F32 became I32 or U32
        return False
    assert found == {name: wanted[name] for name in found}
    return False


def test_a_header_with_any_byte_changed_never_gives_other_values_under_a_right_name(sound: Path):
    data = sound.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    wanted = {name: (info, TensorFiles([sound]).read_raw(name)) for name, info in read_header(sound).items()}
    signs = set(b'0123456789[]{},:" .-eEFIUB\\')
    refused = 0
    with sound.open("r+b", buffering=0) as file:
        for place, byte in ((p, b) for p in range(end) for b in signs | {data[p] ^ 1 << bit for bit in range(8)}):
            os.pwrite(file.fileno(), bytes([byte]), place)
            refused += is_refused(sound, wanted)
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert refused > 20 * end


def written(path: Path, header: Any, num_bytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def entry(start: int, stop: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 16)}, "b lies in bytes 4 to 16, the tensor before it ends at 8"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, "b lies in bytes 12 to 16, the tensor before it ends at 8"),
        ({"a": entry(0, 20)}, "is cut: a ends at byte 20 of its data, of which there are 16"),
        ({"a": entry(0, 16, shape=[5])}, r"a of F32 \[5\] has 16 bytes, not 20"),
        ({"a": entry(0, 16, shape=[4.0])}, r"a is described by .*\[4\.0\]"),
        ({"a": entry(0, 16, shape=[-4, -1])}, "a is described by"),
        ({"a": entry(0, 16, shape=[True, 4])}, "a is described by"),
        ({"a": {**entry(0, 16), "more": 1}}, "a is described by"),
        ({"a": entry(16, 0, "I8", [4])}, "a lies in bytes 16 to 0"),
        ({"a": [0, 16]}, r"a is described by \[0, 16\]"),
        ({"a": entry(0, 16), "__metadata__": {"format": 1}}, "no texts by name"),
        ([], "no table of tensors"),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": 1}', "'a' is in it twice"),
        (b"[" * 100_000, "damaged header"),
        (b'{"a": \xff}', "damaged header"),
    ],
)
def test_a_header_that_is_not_right_in_itself_is_refused(tmp_path: Path, header: Any, words: str):
    with pytest.raises(CorruptionError, match=words):
        read_header(written(tmp_path / "x", header, 16))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([10**3999] * 500, "a is described by"),
        ([1] * 9, "a is described by"),
        ([2**63], "a is described by"),
        ([1] * 7 + [4], None),
    ],
)
def test_sizes_that_no_tensor_has_are_refused_before_they_are_multiplied(tmp_path: Path, shape: Any, words: str | None):
    path = written(tmp_path / "x", {"a": entry(0, 16, shape=shape)}, 16)
    if words is None:
        assert read_header(path)["a"].numel == 4
        return
    started = time.monotonic()
    with pytest.raises(CorruptionError, match=words):
        read_header(path)
    assert time.monotonic() - started < 5  # the product of the first takes half a minute


def test_a_dtype_that_is_no_plain_number_is_refused_by_the_name_of_its_tensor(tmp_path: Path):
    path = written(tmp_path / "x", {"a": entry(0, 8), "q.weight": entry(8, 16, "F8_E4M3", [8])}, 16)
    with pytest.raises(UserError, match=r"x holds 1 tensor\(s\).* q\.weight, which is F8_E4M3; F32, F16, BF16 can"):
        read_header(path)


def test_a_dtype_that_is_no_plain_number_is_refused_when_it_is_asked_for(tmp_path: Path):
    mask, numbers = torch.ones(2, 3, dtype=torch.bool), torch.arange(3)
    save_file({"a": torch.ones(2), "mask": mask, "numbers": numbers}, tmp_path / "x")
    files = TensorFiles([tmp_path / "x"])
    assert {name: files.info(name).dtype for name in files.names} == {"a": "F32", "mask": "BOOL", "numbers": "I64"}
    assert files.shapes["mask"] == (2, 3)
    assert files.read("a").tolist() == [1.0, 1.0]
    files.check_usable(["a"])
    refused: list[Callable[[], Any]] = [
        lambda: files.check_usable(["a", "mask"]),
        lambda: files.read("mask"),
        lambda: files.read_rows("mask", 0, 1),
        lambda: files.read_elements("mask", 0, np.empty(6, np.float32)),
        lambda: files.read_stored("mask", 0, 6),
        lambda: files.read_raw("mask"),
    ]
    for asked in refused:
        with pytest.raises(UserError, match=r"x holds 1 tensor\(s\).* mask, which is BOOL; F32, F16, BF16 can"):
            asked()


def test_a_tensor_that_two_files_have_is_refused(sound: Path, tmp_path: Path):
    save_file({"c": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CorruptionError, match=f"c is in two files, {sound} and {tmp_path / 'other'}"):
        TensorFiles([sound, tmp_path / "other"])


def test_a_file_that_is_cut_while_it_is_read_is_refused(sound: Path):
    files = TensorFiles([sound])
    sound.write_bytes(sound.read_bytes()[:-30])
    with pytest.raises(CorruptionError, match=f"{sound} was cut while"):
        [files.read(name) for name in files.names]


def test_a_file_that_is_deleted_meanwhile_is_read_to_its_end(sound: Path):
    files = TensorFiles([sound])
    wanted = {name: files.read_raw(name) for name in files.names}
    sound.unlink()
    assert {name: files.read_raw(name) for name in files.names} == wanted


def test_files_are_closed_when_nobody_reads_them_any_more(sound: Path):
    before = len(os.listdir("/proc/self/fd"))
    files = TensorFiles([sound])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del files
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_replaced_while_it_is_opened_is_read_as_what_it_was(tmp_path: Path, monkeypatch):
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    save_file({"b": torch.full((4,), 3.0), "a": torch.full((8,), 2.0)}, other)
    real = os.open

    def replace_after(name: Any, *given: Any) -> int:
        opened = real(name, *given)
        if other.exists():
            other.replace(path)
        return opened

    monkeypatch.setattr(tensor_files.os, "open", replace_after)
    files = TensorFiles([path])
    assert not other.exists()
    assert {name: files.read(name).tolist() for name in files.names} == {"a": [0.0] * 4, "b": [1.0] * 4}


@pytest.fixture
def many(tmp_path: Path) -> Iterator[list[Path]]:
    """40 files; limits that a test sets are taken back."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(40)]
    for number, path in enumerate(paths):
        save_file({str(number): torch.full((2,), float(number))}, path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield paths
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _leave_room(num_files: int) -> int:
    """A limit below which so many numbers are free: those of open files need not follow each other."""
    taken = set(map(int, os.listdir("/proc/self/fd")))
    limit = [number for number in range(2000) if number not in taken][num_files]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return limit


@pytest.mark.parametrize("room", [20, 21])
def test_more_files_than_may_be_open_at_first_are_read(many: list[Path], room: int, monkeypatch):
    limit = _leave_room(room)
    monkeypatch.setattr(tensor_files, "_MORE_FILES", 15)
    files = TensorFiles(many)
    assert [files.read(name)[1] for name in files.names] == [*range(40)]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limit + 30  # no more than it takes


def test_a_limit_without_an_end_is_raised_too(many: list[Path], monkeypatch):
    limit = _leave_room(20)
    hard, endless = resource.getrlimit(resource.RLIMIT_NOFILE)[1], resource.RLIM_INFINITY
    get, put = resource.getrlimit, resource.setrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (get(kind)[0], endless))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: put(kind, (limits[0], hard)))
    files = TensorFiles(many)
    assert len(files.names) == 40
    assert get(resource.RLIMIT_NOFILE)[0] == limit + tensor_files._MORE_FILES


@pytest.mark.parametrize("refusal", [ValueError("not allowed to raise maximum limit"), None])
def test_a_limit_that_cannot_be_raised_is_told_with_what_to_do(many: list[Path], refusal, monkeypatch):
    limit = _leave_room(20)
    if refusal is None:
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    monkeypatch.setattr(resource, "setrlimit", Mock(side_effect=refusal))
    with pytest.raises(UserError, match=rf"cannot be opened: .* as many files open as it may, {limit}\. .*ulimit -Hn"):
        TensorFiles(many)


# Writing


def write_parts(path: Path, declared: Any, parts: list[tuple[str, np.ndarray]]) -> None:
    with TensorWriter(path, declared, {}) as out:
        for name, values in parts:
            out.append(name, values)


def test_what_is_not_given_as_the_header_says_is_an_error_and_leaves_no_file(tmp_path: Path):
    declared = {"a": ("F32", (2, 3)), "b": ("F32", (1,))}
    row = np.zeros((1, 3), np.float32)
    wrong = [
        ([("a", row)], "2 tensor.* were not given whole, first a"),
        ([("b", np.zeros(1, np.float32))], "b was given; next is"),
        ([("a", np.zeros((3, 2), np.float32))], r"a is \(2, 3\), its rows \(3, 2\)"),
        ([("a", np.zeros((3, 3), np.float32))], "a has 6 elements, and was given more"),
        ([("a", row.astype(np.float64))], "a was given as float64"),
    ]
    for given_parts, words in wrong:
        with pytest.raises(AssertionError, match=words):
            write_parts(tmp_path / "x", declared, given_parts)
        assert list(tmp_path.iterdir()) == []


def test_tensors_of_two_sizes_of_numbers_are_all_aligned(tmp_path: Path):
    with TensorWriter(tmp_path / "x", {"h": ("BF16", (3,)), "f": ("F32", (2,))}, {}) as out:
        out.append("h", np.ones(3, np.float32))
        out.append("f", np.ones(2, np.float32))
    header = read_header(tmp_path / "x")
    assert header["f"].start % 4 == 0
    assert (tmp_path / "x").read_bytes()[:8][0] % 8 == 0


def test_neither_torch_nor_a_map_of_memory_is_needed(sound: Path):
    code = (
        "import sys; from pathlib import Path; from pipeline.tensor_files import TensorFiles; "
        f"files = TensorFiles([Path({str(sound)!r})]); values = [files.read(name) for name in files.names]; "
        f"assert {str(sound)!r} not in open('/proc/self/maps').read(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout.strip() == "False"
