"""Documents of the tasks in tasks/, from files of this machine.

They lie in a folder that the environment variable DLM_TASK_DATA names, or task_data in the harness's metadata:

    gsm8k/test.jsonl, gsm8k/train.jsonl    {"question", "answer"}; the second for examples in the prompt
    wikitext2/test.txt                     articles one after the other, each begun by a line " = Title = " and one " "
    choices.jsonl                          {"context", "choices", "answer"}, the answer being the number of a choice
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, is_wrong_path
from pipeline.json_lines import shown
from pipeline.tasks.questions import FIELDS, Fields, read_questions, take_text

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "DLM_TASK_DATA"
_TITLE = r"(?m)^ = [^=\n]+ = \n"


def gsm8k(task_data: str = "", **_settings_of_the_model: Any) -> "dict[str, Dataset]":
    """Word problems: their test set, and examples to show before."""
    folder = _folder(task_data) / "gsm8k"
    fields = {"question": take_text, "answer": take_text}
    return {name: _records(folder / f"{name}.jsonl", fields) for name in ("train", "test")}


def wikitext2(task_data: str = "", **_settings_of_the_model: Any) -> "dict[str, Dataset]":
    """One document for each article, its words as they stand there."""
    path = _folder(task_data) / "wikitext2" / "test.txt"
    text = _read(path)
    starts = [found.start() for found in re.finditer(rf"{_TITLE}(?= \n)", text)]
    if not starts:
        raise UserError(
            f"{path} has no article: one begins with a line ' = Title = ' that a line of one blank follows; "
            f"{_lacking(text)}"
        )
    stops = [*starts[1:], len(text)]
    return {"test": _dataset([{"page": text[start:stop]} for start, stop in zip(starts, stops, strict=True)])}


def choices(task_data: str = "", **_settings_of_the_model: Any) -> "dict[str, Dataset]":
    """Questions with several answers to choose from."""
    return {"test": _records(_folder(task_data) / "choices.jsonl", FIELDS["multiple_choice"])}


def _lacking(text: str) -> str:
    """What keeps a text from having an article."""
    title = re.search(_TITLE, text)
    if title is None:
        return "no line is such a title"
    number, following = text.count("\n", 0, title.end()), text[title.end() :].partition("\n")[0]
    return f"line {number} is such a title, and the next is {shown(following)}"


def _folder(task_data: str) -> Path:
    folder = task_data or os.environ.get(FOLDER, "")
    if not folder:
        raise UserError(f"the folder with the data of the tasks is unknown; set {FOLDER}, or --metadata task_data=DIR")
    return Path(folder).expanduser()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """UserError, with where its folder comes from, if a path leads to no file."""
    try:
        yield
    except OSError as error:
        if not is_wrong_path(error):
            raise
        folder = f"its folder is {FOLDER}, or --metadata task_data=DIR"
        raise UserError(f"{path} cannot be read: {error.strerror}; {folder}") from None


def _read(path: Path) -> str:
    try:
        with _named(path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def _records(path: Path, fields: Fields) -> "Dataset":
    """Lines of JSON, of which these fields are kept."""
    with _named(path):
        path.stat()
    return _dataset(read_questions(path, fields, str(path)))


def _dataset(records: Iterable[dict[str, Any]]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(list(records))
