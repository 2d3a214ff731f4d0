"""Files of questions: JSON objects, one a line, all of them looked at before anything is asked."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.artifact import file_sha256
from pipeline.errors import UserError, is_wrong_path
from pipeline.json_lines import json_objects, shown
from pipeline.sandbox.humaneval import read_problems
from pipeline.tasks.config import Kind, TasksConfig

Question = Mapping[str, Any]
Fields = Mapping[str, Callable[[Mapping[str, Any], str, str], Any]]
"""Name -> what takes the field of that name out of an object; UserError, which tells where it stands."""


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
        if not is_wrong_path(error):
            raise
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
            problems = tuple(asdict(problem) for problem in read_problems(path))
            return TaskFile(file_sha256(path), problems)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    questions = read_questions(path, FIELDS[kind], f"{where}: {path}")  # first, as it tells what is wrong with a path
    return TaskFile(file_sha256(path), questions)


def read_questions(path: Path, fields: Fields, where: str) -> tuple[dict[str, Any], ...]:
    """What is read of every line of a file; UserError, which calls it ``where``, for one that is no such question."""
    questions = tuple(
        {name: take(value, name, f"{where}, line {number}") for name, take in fields.items()}
        for number, value in json_objects(path, where)
    )
    if not questions:
        raise UserError(f"{where} has no question; give one a line")
    return questions


# Fields


def take_text(value: Mapping[str, Any], name: str, where: str, *, may_be_empty: bool = False) -> str:
    """A field that is a text."""
    if name not in value:
        raise UserError(f'{where} has no "{name}"; it has {", ".join(map(repr, value)) or "nothing"}')
    return _as_text(value[name], f'{where}: "{name}"', may_be_empty)


def _as_text(found: Any, what: str, may_be_empty: bool = False) -> str:
    if not isinstance(found, str):
        raise UserError(f"{what} is {shown(found)}; it must be a text")
    if not found and not may_be_empty:
        raise UserError(f"{what} is empty; there is nothing to be scored")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} holds half a surrogate pair, which is no text") from None
    return found


def _text_or_nothing(value: Mapping[str, Any], name: str, where: str) -> str:
    return take_text(value, name, where, may_be_empty=True)


def _choices(value: Mapping[str, Any], name: str, where: str) -> list[str]:
    found = value.get(name)
    if not isinstance(found, list) or len(found) < 2:
        raise UserError(f'{where}: "{name}" is {shown(found)}; it must be a list of at least 2 texts')
    return [_as_text(one, f'{where}: "{name}"[{place}]') for place, one in enumerate(found)]


def _place(value: Mapping[str, Any], name: str, where: str) -> int:
    found, choices = value.get(name), _choices(value, "choices", where)
    if type(found) is not int or not 0 <= found < len(choices):
        raise UserError(
            f'{where}: "{name}" is {shown(found)}; it must be the place of the right choice, 0 to {len(choices) - 1}'
        )
    return found


FIELDS: Mapping[Kind, Fields] = {
    "multiple_choice": {"context": _text_or_nothing, "choices": _choices, "answer": _place},
    "text": {"text": take_text},
    "match": {"prompt": _text_or_nothing, "answer": take_text},
    "infill": {"prefix": _text_or_nothing, "middle": take_text, "suffix": _text_or_nothing},
}
"""What is read of a line; other fields it may have are left alone."""
