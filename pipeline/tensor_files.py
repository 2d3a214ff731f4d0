"""safetensors files, read and written one tensor or a part of one at a time, in NumPy alone.

Neither torch, whose import takes more memory than a conversion may, nor a memory map, whose pages count as memory.
Values are float32 here, whatever the file keeps: F32, F16, or BF16, whose bits are the upper half of a float32.
The format: 8 bytes with the length of a JSON header, the header, the data (huggingface.co/docs/safetensors).
"""

import contextlib
import errno
import json
import math
import os
import resource
import weakref
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from pipeline.errors import CorruptionError, UserError

_STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_MAX_DIMENSIONS, _TOO_LARGE = 8, 1 << 63
"""Of what a header tells; larger numbers take long to multiply."""
_MORE_FILES = 64
"""By how many the limit of open files is raised at a time, where it is reached."""
BLOCK_ELEMENTS = 1 << 20
"""What is converted or copied at a time: 4 MB of float32."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file, and the bytes of the file's data that it lies in."""

    dtype: str
    """"F32", "F16" or "BF16"; another one is known by its name, and never read."""
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, in the order of its header.

    Raises CorruptionError naming file and tensor if the file is cut or its header is not right in itself, UserError for
    a dtype that is no plain floating-point number.
    """
    opened = _open(path)
    try:
        entries = _read_header(path, opened)[1]
    finally:
        os.close(opened)
    _check_usable(path, entries)
    return entries


def _check_usable(path: Path, entries: Mapping[str, TensorInfo]) -> None:
    """UserError unless tensors of a file are plain floating-point numbers."""
    foreign = [name for name, info in entries.items() if info.dtype not in _STORED]
    if foreign:
        raise UserError(
            f"{path} holds {len(foreign)} tensor(s) that cannot be used, such as {foreign[0]}, which is "
            f"{entries[foreign[0]].dtype}; {', '.join(_STORED)} can. If the weights are quantised, take those that "
            "they were made from"
        )


def _read_header(path: Path, opened: int) -> tuple[int, dict[str, TensorInfo]]:
    """Where the data begin in the open file, and the tensors; ``path`` may be another file by now."""
    size = os.fstat(opened).st_size
    with os.fdopen(opened, "rb", closefd=False) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptionError(
                f"{path} is cut, or no safetensors file: it has {size} bytes, and its first 8 promise a header of "
                f"{length}"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path} has a damaged header, or is no safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise CorruptionError(f"{path} has a damaged header: it is no table of tensors")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptionError(f"{path} has a damaged header: its {_METADATA} are no texts by name")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_places(path, entries, size - 8 - length)
    return 8 + length, entries


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is in it twice")
        found[name] = value
    return found


def _entry(path: Path, name: str, value: Any) -> TensorInfo:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop], **rest} if not rest:
            numbers = cast("list[Any]", [*shape, start, stop])
            if len(shape) <= _MAX_DIMENSIONS and all(type(n) is int and 0 <= n < _TOO_LARGE for n in numbers):
                info = TensorInfo(dtype, tuple(cast("list[int]", shape)), start, stop)
                stored = _STORED.get(dtype)
                if stored is None or stop - start == info.numel * stored.itemsize:
                    return info
                raise CorruptionError(
                    f"{path} has a damaged header: {name} of {dtype} {list(shape)} has {stop - start} bytes, not "
                    f"{info.numel * stored.itemsize}"
                )
    raise CorruptionError(f"{path} has a damaged header: {name} is described by {str(value)[:200]}")


def _check_places(path: Path, entries: Mapping[str, TensorInfo], size: int) -> None:
    """CorruptionError unless the tensors follow each other and fill the data."""
    end = 0
    for name, info in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end or info.stop < info.start:
            raise CorruptionError(
                f"{path} has a damaged header: {name} lies in bytes {info.start} to {info.stop}, the tensor before it "
                f"ends at {end}"
            )
        end = info.stop
        if end > size:
            raise CorruptionError(f"{path} is cut: {name} ends at byte {end} of its data, of which there are {size}")
    if end != size:
        raise CorruptionError(f"{path} is damaged: it goes on for {size - end} bytes after its last tensor")


class TensorFiles:
    """The tensors of one or several files.  What is read has been looked for in the headers of all of them.

    Files stay open as long as this lives, so that one that is deleted meanwhile can be read to its end.  Raises
    CorruptionError as ``read_header``, and for a tensor that two of the files have.  A tensor that is no plain
    floating-point number is known; the UserError comes when it is asked for.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, tuple[Path, int, TensorInfo]] = {}
        self._opened: dict[Path, int] = {}
        for path in paths:
            self._opened[path] = opened = _open(path)
            weakref.finalize(self, os.close, opened)
            begin, entries = _read_header(path, opened)
            for name, info in entries.items():
                if name in self._places:
                    raise CorruptionError(f"{name} is in two files, {self._places[name][0]} and {path}")
                self._places[name] = path, begin, info
        self.shapes = {name: info.shape for name, (_, _, info) in self._places.items()}
        """Shape of every tensor."""

    @property
    def names(self) -> KeysView[str]:
        """All tensors, file after file."""
        return self._places.keys()

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor; its bytes are those in its file."""
        return self._places[name][2]

    def path(self, name: str) -> Path:
        """File that a tensor lies in."""
        return self._places[name][0]

    def check_usable(self, names: Iterable[str]) -> None:
        """UserError naming a file and one of its tensors, unless all these are plain floating-point numbers."""
        by_file: dict[Path, dict[str, TensorInfo]] = {}
        for name in names:
            by_file.setdefault(self.path(name), {})[name] = self.info(name)
        for path, entries in by_file.items():
            _check_usable(path, entries)

    def read(self, name: str) -> np.ndarray:
        """A whole tensor as float32, in its shape."""
        info = self.info(name)
        values = np.empty(info.numel, np.float32)
        self.read_elements(name, 0, values)
        return values.reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of the first dimension as float32."""
        (num_rows, *rest) = self.info(name).shape
        assert 0 <= start <= stop <= num_rows, f"{name} has {num_rows} rows; asked for {start} to {stop}"
        width = math.prod(rest)
        values = np.empty((stop - start) * width, np.float32)
        self.read_elements(name, start * width, values)
        return values.reshape(stop - start, *rest)

    def read_elements(self, name: str, start: int, target: np.ndarray) -> None:
        """Fill a flat float32 array with consecutive elements of the flattened tensor, from ``start`` on."""
        self.check_usable([name])
        info = self.info(name)
        if info.dtype == "F32":
            self._read_stored(name, start, target)
            return
        for first, part in _blocks(target):
            part[...] = _widened(self.read_stored(name, start + first, part.size), info.dtype)

    def read_stored(self, name: str, start: int, numel: int) -> np.ndarray:
        """Consecutive elements of the flattened tensor as they lie there; the bits of a BF16 as uint16."""
        self.check_usable([name])
        values = np.empty(numel, _STORED[self.info(name).dtype])
        self._read_stored(name, start, values)
        return values

    def read_raw(self, name: str) -> bytes:
        """The bytes of a tensor as they lie there."""
        return self.read_stored(name, 0, self.info(name).numel).tobytes()

    def _read_stored(self, name: str, start: int, target: np.ndarray) -> None:
        path, begin, info = self._places[name]
        assert target.dtype == _STORED[info.dtype], f"{name} is {info.dtype}, its place is {target.dtype}"
        assert target.ndim == 1, f"the place of {name} has {target.ndim} dimensions"
        assert 0 <= start <= info.numel - target.size, f"{name} has {info.numel} elements; asked from {start} on"
        left, place = target.view(np.uint8).data, begin + info.start + start * target.itemsize
        while left.nbytes:
            num_bytes = os.preadv(self._opened[path], [left], place)
            if not num_bytes:
                raise CorruptionError(f"{path} was cut while {name} was read from it")
            left, place = left[num_bytes:], place + num_bytes


def _open(path: Path) -> int:
    """A file for reading, also where more are open than this process may have at first."""
    while True:
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        _allow_more_files(path)


def _allow_more_files(path: Path) -> None:
    """Let this process open some files more; UserError where it may not.

    It may from then on: files that others open meanwhile could not be counted under the old limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + _MORE_FILES if hard == resource.RLIM_INFINITY else min(soft + _MORE_FILES, hard)
    with contextlib.suppress(ValueError, OSError):  # a kernel may have a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= soft:
        raise UserError(
            f"{path} cannot be opened: this process has as many files open as it may, {soft}. Raise the limit of open "
            "files (ulimit -Hn), or put the tensors into fewer files"
        )


def shape_problems(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps tensors of some names and shapes from being those that are wanted; empty if they are."""
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} is unknown" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} has shape {tuple(found[name])}, the model wants {tuple(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if tuple(found[name]) != tuple(wanted[name])
        ),
    ]


def _blocks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of a flat array, each with the place of its first element."""
    for first in range(0, values.size, BLOCK_ELEMENTS):
        yield first, values[first : first + BLOCK_ELEMENTS]


def _widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values of what lies in a file, exactly."""
    if dtype == "BF16":
        return np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    return stored.astype(np.float32)


def narrowed(values: np.ndarray, dtype: str, name: str = "the tensor") -> np.ndarray:
    """Float32 values as they are stored, rounded to the nearest, ties to even; a flat array.

    What was a number of that dtype before is the same again, bit for bit.  UserError for values beyond the range of
    F16, which would become infinite.
    """
    values = np.ascontiguousarray(values, np.float32).reshape(-1)
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if np.isinf(halves).sum() != np.isinf(values).sum():
            raise UserError(f"{name} has values up to {np.abs(values).max():g}, beyond 65504: F16 cannot hold them. "
                            "Choose bfloat16 or float32")  # fmt: skip
        return halves
    bits = values.view(np.uint32)
    upper = bits >> 16
    rounded = (bits + (0x7FFF + (upper & 1))) >> 16
    is_nan = np.isnan(values)
    if is_nan.any():  # rounding could make them infinite; cut off, they stay nan if a bit of the fraction is left
        rounded = np.where(is_nan, np.where(upper & 0x7F, upper, upper | 0x40), rounded)
    return rounded.astype(np.uint16)


class TensorWriter:
    """Writes a file whose tensors are given one after the other, each in as many parts as one likes.

    A context manager: the file is on the disk when it is left, and gone if it is left with an exception.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
    ) -> None:
        """Of each tensor (dtype, shape), in the order in which they will be given."""
        self._path, self._order, self._written = path, list(tensors), 0
        place = 0
        self._infos: dict[str, TensorInfo] = {}
        for name in sorted(tensors, key=lambda name: -_STORED[tensors[name][0]].itemsize):  # so that all are aligned
            dtype, shape = tensors[name]
            end = place + math.prod(shape) * _STORED[dtype].itemsize
            self._infos[name] = TensorInfo(dtype, tuple(shape), place, end)
            place = end
        entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
        for name, info in self._infos.items():
            entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.stop]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._file.write(self._header)
        return self

    def append(self, name: str, values: np.ndarray) -> None:
        """Write the next elements of the next tensor: float32 rows, or a flat part of it.

        Raises UserError as ``narrowed``.
        """
        assert name in self._order[:1], f"{name} was given; next is {self._order[:1] or 'nothing'}"
        info = self._infos[name]
        assert values.dtype == np.float32, f"{name} was given as {values.dtype}"
        tail = values.shape[1:]
        assert tail == info.shape[len(info.shape) - len(tail) :], f"{name} is {info.shape}, its rows {values.shape}"
        assert self._written + values.size <= info.numel, f"{name} has {info.numel} elements, and was given more"
        flat = np.ascontiguousarray(values).reshape(-1)
        itemsize = _STORED[info.dtype].itemsize
        self._file.seek(len(self._header) + info.start + self._written * itemsize)
        for _, part in _blocks(flat):
            self._file.write(narrowed(part, info.dtype, name).data)
        self._written += values.size
        if self._written == info.numel:
            self._order.pop(0)
            self._written = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._order, f"{len(self._order)} tensor(s) were not given whole, first {self._order[0]}"
                self._file.flush()
                os.fsync(self._file.fileno())
        except BaseException:
            self._path.unlink()
            raise
        finally:
            self._file.close()
        if kind is not None:
            self._path.unlink()
