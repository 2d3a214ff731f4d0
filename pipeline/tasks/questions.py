"""Files of questions: JSON objects, one a line, all of them looked at before anything is asked."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.artifact import file_sha256
from pipeline.config import parse_json
from pipeline.errors import UserError
from pipeline.sandbox.humaneval import read_problems
from pipeline.tasks.config import Kind, TasksConfig

_MAX_LINE_BYTES = 64_000_000
_SHOWN_CHARS = 80
Question = Mapping[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """The questions of a task, in the order of its file."""

    sha256: str
    """Of the bytes of the file."""
    questions: tuple[Question, ...]


def external_data(config: TasksConfig) -> Any:
    """What identifies the questions of each task: the bytes of its file.

    Raises UserError for a file that is missing, holds nothing, or has a line that is no question.
    """
    return {
        name: {"sha256": read_task(name, config).sha256} for name in sorted(config.tasks) if config.tasks[name].file
    }


def read_task(name: str, config: TasksConfig) -> TaskFile:
    """The questions of a task, up to its limit; UserError as ``external_data``."""
    task, where = config.tasks[name], f"tasks.{name}.file"
    if task.kind == "samples":
        return TaskFile("", ({},) * task.value("num_samples"))
    path = Path(task.file)
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}") from None
    if not path.is_file():
        raise UserError(f"{where}: {path} is no file")
    found = _read(where, task.kind, path, (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
    return TaskFile(found.sha256, found.questions[: task.limit])


@lru_cache(maxsize=32)
def _read(where: str, kind: Kind, path: Path, state: tuple[int, ...]) -> TaskFile:
    """The state of the file is there for the cache."""
    if kind == "code":
        try:
            return TaskFile(file_sha256(path), tuple(asdict(problem) for problem in read_problems(path)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    questions = tuple(_parsed(kind, line, f"{where}: {path}, line {number}") for number, line in _lines(where, path))
    if not questions:
        raise UserError(f"{where}: {path} has no question; give one a line")
    return TaskFile(file_sha256(path), questions)


def _lines(where: str, path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with something in them, numbered from 1."""
    open_file: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise UserError(
                        f"{where}: {path}, line {number} is longer than {_MAX_LINE_BYTES:,} bytes; it is no question"
                    )
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where}: {path} cannot be read: {error}") from None


def _parsed(kind: Kind, line: bytes, where: str) -> Question:
    try:
        value = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON: {error.msg} at character {error.colno}") from None
    except (UserError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_shown(value)}; a question is a JSON object")
    return {name: take(value, name, where) for name, take in _FIELDS[kind].items()}


# Fields


def _text(value: Mapping[str, Any], name: str, where: str, *, may_be_empty: bool = False) -> str:
    if name not in value:
        raise UserError(f'{where} has no "{name}"; it has {", ".join(map(repr, value)) or "nothing"}')
    return _as_text(value[name], f'{where}: "{name}"', may_be_empty)


def _as_text(found: Any, what: str, may_be_empty: bool = False) -> str:
    if not isinstance(found, str):
        raise UserError(f"{what} is {_shown(found)}; it must be a text")
    if not found and not may_be_empty:
        raise UserError(f"{what} is empty; there is nothing to be scored")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} holds half a surrogate pair, which is no text") from None
    return found


def _text_or_nothing(value: Mapping[str, Any], name: str, where: str) -> str:
    return _text(value, name, where, may_be_empty=True)


def _choices(value: Mapping[str, Any], name: str, where: str) -> list[str]:
    found = value.get(name)
    if not isinstance(found, list) or len(found) < 2:
        raise UserError(f'{where}: "{name}" is {_shown(found)}; it must be a list of at least 2 texts')
    return [_as_text(one, f'{where}: "{name}"[{place}]') for place, one in enumerate(found)]


def _place(value: Mapping[str, Any], name: str, where: str) -> int:
    found, choices = value.get(name), _choices(value, "choices", where)
    if type(found) is not int or not 0 <= found < len(choices):
        raise UserError(
            f'{where}: "{name}" is {_shown(found)}; it must be the place of the right choice, 0 to {len(choices) - 1}'
        )
    return found


_FIELDS: Mapping[Kind, Mapping[str, Callable[[Mapping[str, Any], str, str], Any]]] = {
    "multiple_choice": {"context": _text_or_nothing, "choices": _choices, "answer": _place},
    "text": {"text": _text},
    "match": {"prompt": _text_or_nothing, "answer": _text},
    "infill": {"prefix": _text_or_nothing, "middle": _text, "suffix": _text_or_nothing},
}
"""What is read of a line; other fields it may have are left alone."""


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"
