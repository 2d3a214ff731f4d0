"""What the header of a GGUF file says, without reading a tensor.

The format: magic, version, counts, key-value pairs, descriptions of tensors (github.com/ggml-org/ggml docs/gguf.md).
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import CorruptionError, UserError

INSTEAD = "Import the safetensors that it was made from"
"""What helps where something is not read from a GGUF file."""
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its struct format."""
_TEXT, _ARRAY = 8, 9
_MAX_TEXT_BYTES, _MAX_COUNT, _MAX_DEPTH = 1 << 28, 1 << 24, 4
_ALIGNMENT, _ALIGNED_TO = "general.alignment", 32
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
}  # fmt: skip
"""Name of a tensor's type, the elements of a block of it, and the bytes that they take."""


@dataclass(frozen=True)
class GGUFHeader:
    """Keys with their values, and the tensors."""

    keys: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """(type, shape) by name; shapes in the order of NumPy, rows first."""


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header; UserError for a file of another kind or version.

    CorruptionError for a header that is cut or damaged, and for a file that ends before its tensors do.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise UserError(f"{path} is no GGUF file: it does not begin with GGUF")
        try:
            (version,) = _unpacked(file, "<I")
            if version not in _VERSIONS:
                raise UserError(f"{path} is of version {version} of GGUF; versions 2 and 3 are read here")
            num_tensors, num_keys = _unpacked(file, "<QQ")
            _check_count(max(num_tensors, num_keys))
            keys = {_text(file): _value(file, *_unpacked(file, "<I")) for _ in range(num_keys)}
            found = [_tensor(file) for _ in range(num_tensors)]
            size = max(0, path.stat().st_size - _begin(file.tell(), keys))
        except (struct.error, UnicodeDecodeError, _DamagedError) as error:
            raise CorruptionError(f"{path} has a damaged header, or is cut: {error}") from None
    name, end = max(((name, end) for name, _, end in found), key=lambda pair: pair[1], default=("", 0))
    if end > size:
        raise CorruptionError(f"{path} is cut: {name} ends at byte {end} of its data, of which there are {size}")
    return GGUFHeader(keys, {name: described for name, described, _ in found})


def _begin(header_bytes: int, keys: dict[str, Any]) -> int:
    """Where the data begin: after the header, filled up."""
    alignment = keys.get(_ALIGNMENT, _ALIGNED_TO)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamagedError(f"{_ALIGNMENT} is {alignment!r}")
    return -(-header_bytes // alignment) * alignment


class _DamagedError(Exception):
    """A number in the header that cannot be meant."""


def _check_count(count: int) -> None:
    if count > _MAX_COUNT:
        raise _DamagedError(f"it promises {count} entries")


def _unpacked(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    (size,) = _unpacked(file, "<Q")
    if size > _MAX_TEXT_BYTES:
        raise _DamagedError(f"a text of {size} bytes")
    data = file.read(size)
    if len(data) < size:
        raise _DamagedError("it ends within a text")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _ARRAY and depth < _MAX_DEPTH:
        inner, count = _unpacked(file, "<IQ")
        _check_count(count)
        if inner in _NUMBERS:
            return list(_unpacked(file, f"<{count}{_NUMBERS[inner]}"))
        return [_value(file, inner, depth + 1) for _ in range(count)]
    if kind not in _NUMBERS:
        raise _DamagedError(f"a value of the unknown type {kind}")
    return _unpacked(file, f"<{_NUMBERS[kind]}")[0]


def _tensor(file: BinaryIO) -> tuple[str, tuple[str, tuple[int, ...]], int]:
    """Its name, (type, shape), and where in the data it ends; where it begins if the type is unknown."""
    name = _text(file)
    (num_dims,) = _unpacked(file, "<I")
    if num_dims > 8:
        raise _DamagedError(f"{name} has {num_dims} dimensions")
    shape = _unpacked(file, f"<{num_dims}Q")
    kind, offset = _unpacked(file, "<IQ")
    known, block, num_bytes = TYPES.get(kind, (f"type {kind}", 1, 0))
    return name, (known, tuple(reversed(shape))), offset + math.prod(shape) * num_bytes // block
