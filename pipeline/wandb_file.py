"""How far a Weights & Biases run file (``run-ID.wandb``) got: a process that is killed leaves less than it was given.

The file is a log in LevelDB's format (https://github.com/google/leveldb/blob/main/doc/log_format.md) with a header of
its own and zlib's CRC-32: blocks of 32 KiB, in each of them fragments of records, each fragment with its checksum,
length and place in the record.  A record is a protobuf message of wandb's.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 32768
_FILE_HEADER = b":W&B\xe1\xbe\x00"
"""Name, magic number 0xBEE1 and version 0."""
_FRAGMENT = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def next_step(directory: Path, run_id: str, axis: str) -> int:
    """The first step of which no run file of ``run_id`` below ``directory`` has a row; 0 without a file.

    The process that writes for wandb ends within moments of the training that started it, long before the next one
    has imported what it needs to ask.

    Args:
        axis: key of a row that holds its step.
    """
    found = directory.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    return 1 + max((_last_step(path, axis) for path in found), default=-1)


def _last_step(path: Path, axis: str) -> int:
    """The highest step in a file, -1 without one: read from the end, since a month of rows takes minutes."""
    size_bytes = path.stat().st_size
    num_blocks, tail = -(-size_bytes // _BLOCK_BYTES), 1
    while True:
        first = max(0, num_blocks - tail)
        steps = [step for record in _records(path, first) for step in _steps(record, axis)]
        if steps or first == 0:
            return max(steps, default=-1)
        tail *= 4


def _records(path: Path, first_block: int) -> Iterator[bytes]:
    """Whole records that begin in ``first_block`` or after it, up to the first damaged or torn one.

    Raises ValueError for a file in another format.
    """
    with path.open("rb") as file:
        header = file.read(len(_FILE_HEADER))
        if header != _FILE_HEADER[: len(header)]:
            raise ValueError(f"{path} begins with {header!r}; a run file that can be continued with {_FILE_HEADER!r}")
        file.seek(first_block * _BLOCK_BYTES)
        record: bytes | None = None
        for number, block in enumerate(iter(lambda: file.read(_BLOCK_BYTES), b""), start=first_block):
            place = len(_FILE_HEADER) if number == 0 else 0
            while place + _FRAGMENT.size <= len(block):
                checksum, length, kind = _FRAGMENT.unpack_from(block, place)
                place += _FRAGMENT.size
                body = block[place : place + length]
                place += length
                if len(body) < length or checksum != zlib.crc32(body, zlib.crc32(bytes([kind]))):
                    return
                if kind in (_WHOLE, _FIRST):
                    record = body
                elif record is not None:  # else a record that began before the first block
                    record += body
                if kind in (_WHOLE, _LAST) and record is not None:
                    yield record
                    record = None


def _steps(record: bytes, axis: str) -> Iterator[int]:
    """The step of a record that is a row."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    for item in Record.FromString(record).history.item:
        if axis in (item.key, *item.nested_key):
            yield int(json.loads(item.value_json))
