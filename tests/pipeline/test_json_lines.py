"""The one reader of JSON lines: what is a line, and what is refused."""

import gzip
from pathlib import Path

import pytest

from pipeline import json_lines
from pipeline.errors import UserError
from pipeline.json_lines import json_objects

TEXT = '\n{"a": "one\u2028two"}\r\n \n{"a": "\u0085"}'


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz"])
def test_a_line_ends_where_json_lines_end_and_blank_ones_are_counted(name: str, tmp_path: Path) -> None:
    data = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(json_objects(tmp_path / name, "f")) == [(2, {"a": "one\u2028two"}), (4, {"a": "\u0085"})]


def test_a_line_that_does_not_end_is_refused_before_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_MAX_LINE_BYTES", 9)
    (tmp_path / "f.jsonl").write_bytes(b'{"a": 12}\n{"a": 12} ')
    with pytest.raises(UserError, match="f, line 1 is longer than 9 bytes; cut the file"):
        list(json_objects(tmp_path / "f.jsonl", "f"))
