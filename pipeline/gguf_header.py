"""What the header of a GGUF file says, without reading a tensor.

The format: magic, version, counts, key-value pairs, descriptions of tensors (github.com/ggml-org/ggml docs/gguf.md).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import CorruptionError, UserError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its struct format."""
_TEXT, _ARRAY = 8, 9
_MAX_TEXT_BYTES, _MAX_COUNT, _MAX_DEPTH = 1 << 28, 1 << 24, 4
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFHeader:
    """Keys with their values, and the tensors."""

    keys: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """(type, shape) by name; shapes in the order of NumPy, rows first."""


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header; UserError for a file of another kind or version, CorruptionError for one that is cut or damaged."""
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
            tensors = dict(_tensor(file) for _ in range(num_tensors))
        except (struct.error, UnicodeDecodeError, _DamagedError) as error:
            raise CorruptionError(f"{path} has a damaged header, or is cut: {error}") from None
    return GGUFHeader(keys, tensors)


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


def _tensor(file: BinaryIO) -> tuple[str, tuple[str, tuple[int, ...]]]:
    name = _text(file)
    (num_dims,) = _unpacked(file, "<I")
    if num_dims > 8:
        raise _DamagedError(f"{name} has {num_dims} dimensions")
    shape = _unpacked(file, f"<{num_dims}Q")
    kind, _ = _unpacked(file, "<IQ")
    return name, (_TYPES.get(kind, f"type {kind}"), tuple(reversed(shape)))
