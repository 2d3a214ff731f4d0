"""The one reader of JSON lines: what is a line, and what is refused."""

import errno
import gzip
import io
import os
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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f'{{"a": {"1" * 4301}}}', "a number has more than 4,300 digits$"),
        (f'{{"a": {"[" * 100_000}}}', "it is nested too deeply$"),
    ],
    ids=["a long number", "many brackets"],
)
def test_a_line_that_no_parser_takes_is_refused_with_its_number(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(f'{{"a": {"1" * 4300}}}\n{line}\n')
    with pytest.raises(UserError, match=f"^f, line 2 is no JSON that can be read: {words}"):
        list(json_objects(tmp_path / "f.jsonl", "f"))


def test_a_torn_line_is_refused_at_the_character_where_something_is_missing(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"prompt": "x"\r\n')
    with pytest.raises(UserError, match=r"^f, line 1 is no JSON: Expecting ',' delimiter at character 15$"):
        list(json_objects(tmp_path / "f.jsonl", "f"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "No such file or directory"),
        ("folder", "Is a directory"),
        ("file/f", "Not a directory"),
        ("circle", "Too many levels of symbolic links"),
        ("f" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_path_that_leads_to_no_file_is_refused(name: str, suffix: str, words: str, tmp_path: Path) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / f"circle{suffix}").symlink_to(tmp_path / f"circle{suffix}")
    with pytest.raises(UserError, match=f"^f cannot be read: {words}. Name a file of JSON lines$"):
        list(json_objects(tmp_path / f"{name}{suffix}", "f"))


def test_a_file_that_is_no_gzip_is_to_be_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl.gz").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"^f cannot be read: Not a gzipped file.*Fetch it again$"):
        list(json_objects(tmp_path / "f.jsonl.gz", "f"))


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ENOTCONN])
def test_an_error_that_no_other_path_mends_is_not_called_the_users(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(json_lines, "open", lambda path, mode: Failing(), raising=False)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        list(json_objects(tmp_path / "f.jsonl", "f"))
    assert raised.value.errno == number
