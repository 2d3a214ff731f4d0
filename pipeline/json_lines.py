"""Files of JSON objects, one a line, that somebody wrote: every line of them is one, or the file is refused."""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config import parse_json
from pipeline.errors import UserError, is_wrong_path

_MAX_LINE_BYTES = 64_000_000
_SHOWN_CHARS = 80


def json_objects(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, plain or .gz, with the numbers of their lines from 1; blank lines are passed over.

    Raises UserError, which calls the file ``where``, if it cannot be read, and for the first line that is no object.
    """
    for number, line in _lines(path, where):
        yield number, _object(line, f"{where}, line {number}")


def shown(value: Any) -> str:
    """A value as JSON in a message, cut where it is long."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"


def _lines(path: Path, where: str) -> Iterator[tuple[int, bytes]]:
    """Not by str.splitlines, which also cuts at U+2028 and the like, which JSON allows inside a text."""
    open_file: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, "rb") as file:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise UserError(f"{where}, line {number} is longer than {_MAX_LINE_BYTES:,} bytes; cut the file")
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        place = f" after line {number}" if number else ""
        raise UserError(f"{where} cannot be read{place}: {error}. Fetch it again") from None
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise UserError(f"{where} cannot be read: {error.strerror}. Name a file of JSON lines") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = parse_json(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise UserError(f"{where} is no JSON that can be read: it is nested too deeply") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except ValueError:  # what json says of it is advice for programmers
        raise UserError(
            f"{where} is no JSON that can be read: a number has more than {sys.get_int_max_str_digits():,} digits"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is {shown(value)}; a JSON object is wanted")
    return value
