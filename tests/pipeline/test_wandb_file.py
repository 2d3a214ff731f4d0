"""The step that a run file ends with, against a reader of whole files; the files are written here by fragments."""

import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.wandb_file import next_step
from tests.support.wandb_file import all_rows

_BLOCK, _HEADER = 32768, 7


def _record(step: int | None, num_bytes: int) -> bytes:
    """A message with a row, or none, and that much ballast."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    record = Record()
    if step is not None:
        record.history.item.add(nested_key=["train/step"], value_json=str(step))
        record.history.item.add(nested_key=["train/ballast"], value_json='"' + "x" * num_bytes + '"')
    else:
        record.output.line = "x" * num_bytes
    return record.SerializeToString()


def _file(records: list[bytes]) -> bytes:
    """A log of records, cut at the ends of blocks."""
    data = bytearray(b":W&B\xe1\xbe\x00")
    for record in records:
        rest, begun = record, False
        while True:
            left = _BLOCK - len(data) % _BLOCK
            if left < _HEADER:
                data += bytes(left)
                continue
            body, rest = rest[: left - _HEADER], rest[left - _HEADER :]
            kind = {(False, False): 1, (False, True): 2, (True, True): 3, (True, False): 4}[begun, bool(rest)]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + body), len(body), kind) + body
            begun = True
            if not rest:
                break
    return bytes(data)


def _place(root: Path, attempt: int = 0, run_id: str = "abc") -> Path:
    path = root / "wandb" / f"offline-run-2026010{attempt}_000000-{run_id}" / f"run-{run_id}.wandb"
    path.parent.mkdir(parents=True)
    return path


_SIZES = st.sampled_from([0, 50, 3000, 32_700, 32_768, 100_000])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), _SIZES), max_size=12), st.integers(0, 200_000))
@example([(True, 0), (True, 0)], 99)  # within the header of the file
def test_next_step_follows_the_last_row_of_a_file_cut_anywhere(kinds: list[tuple[bool, int]], cut: int) -> None:
    data = _file([_record(step if is_row else None, size) for step, (is_row, size) in enumerate(kinds)])
    with tempfile.TemporaryDirectory() as name:
        _place(Path(name)).write_bytes(data[: max(0, len(data) - cut)])
        expected = 1 + max((row["train/step"] for row in all_rows(Path(name))), default=-1)
        assert next_step(Path(name), "abc", "train/step") == expected


def test_next_step_is_that_of_the_attempt_that_came_furthest(tmp_path: Path) -> None:
    assert next_step(tmp_path, "abc", "train/step") == 0
    for attempt, end in enumerate([4, 9, 7]):
        _place(tmp_path, attempt).write_bytes(_file([_record(step, 0) for step in range(end)]))
    _place(tmp_path, 3, "other").write_bytes(_file([_record(50, 0)]))
    assert next_step(tmp_path, "abc", "train/step") == 9


def test_next_step_stops_at_a_flipped_bit(tmp_path: Path) -> None:
    records = [_record(step, 100) for step in range(10)]
    data = bytearray(_file(records))
    data[len(_file(records[:6])) + 20] ^= 0x10
    _place(tmp_path).write_bytes(data)
    assert next_step(tmp_path, "abc", "train/step") == 6


@pytest.mark.parametrize("content", [b"SQLite format 3\0", b":W&B\xe1\xbe\x01", b"\0" * 100])
def test_next_step_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    _place(tmp_path).write_bytes(content)
    with pytest.raises(ValueError, match="begins with"):
        next_step(tmp_path, "abc", "train/step")
