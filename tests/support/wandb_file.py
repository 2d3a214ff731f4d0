"""A naive reader of the files that Weights & Biases writes: the whole file, from its beginning."""

import json
import struct
from pathlib import Path
from typing import Any

BLOCK_BYTES, _HEADER = 32768, 7


def read_records(path: Path) -> list[Any]:
    """Every whole record of a .wandb file, as messages of wandb's."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data = path.read_bytes()
    assert data[:_HEADER] == b":W&B\xe1\xbe\x00"[: len(data)], "it may be cut within its header"
    records: list[Any] = []
    place, begun = _HEADER, b""
    while place + _HEADER <= len(data):
        if BLOCK_BYTES - place % BLOCK_BYTES < _HEADER:
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        body = data[place + _HEADER : place + _HEADER + length]
        if len(body) < length:
            break
        place += _HEADER + length
        begun += body
        if kind in (1, 4):
            records.append(Record.FromString(begun))
            begun = b""
    return records


def rows(record: Any) -> list[dict[str, Any]]:
    """The row that a record holds, if it is one."""
    values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
    return [values] if values else []


def run_files(directory: Path) -> list[Path]:
    """Run files in the order of their attempts."""
    return sorted(directory.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns)


def all_rows(directory: Path) -> list[dict[str, Any]]:
    """Rows of all attempts in the order in which they were sent."""
    return [row for path in run_files(directory) for record in read_records(path) for row in rows(record)]
