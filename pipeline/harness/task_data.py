"""Documents of the tasks in tasks/, from files of this machine.

They lie in a folder that the environment variable DLM_TASK_DATA names, or task_data in the harness's metadata:

    gsm8k/test.jsonl, gsm8k/train.jsonl    {"question", "answer"}; the second for examples in the prompt
    wikitext2/test.txt                     articles one after the other, each begun by a line  = Title =
    choices.jsonl                          {"context", "choices", "answer"}, the answer being the number of a choice
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.json_lines import json_objects

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "DLM_TASK_DATA"
_TITLE = re.compile(r"(?m)^ = [^=\n]+ = \n(?= \n)")


def gsm8k(task_data: str = "", **_settings_of_the_model: Any) -> "dict[str, Dataset]":
    """Word problems: their test set, and examples to show before."""
    folder = _folder(task_data) / "gsm8k"
    kinds = {"question": str, "answer": str}
    return {name: _records(folder / f"{name}.jsonl", kinds) for name in ("train", "test")}


def wikitext2(task_data: str = "", **_settings_of_the_model: Any) -> "dict[str, Dataset]":
    """One document for each article, its words as they stand there."""
    path = _folder(task_data) / "wikitext2" / "test.txt"
    text = _read(path)
    starts = [found.start() for found in _TITLE.finditer(text)]
    if not starts:
        raise UserError(f"{path} has no line such as ' = Title = ', with which an article begins")
    stops = [*starts[1:], len(text)]
    return {"test": _dataset([{"page": text[start:stop]} for start, stop in zip(starts, stops, strict=True)])}


def choices(task_data: str = "", **_settings_of_the_model: Any) -> "dict[str, Dataset]":
    """Questions with several answers to choose from."""
    path = _folder(task_data) / "choices.jsonl"
    found = _records(path, {"context": str, "choices": list, "answer": int})
    for number, (texts, answer) in enumerate(zip(found["choices"], found["answer"], strict=True), 1):
        if len(texts) < 2 or not all(texts):
            raise UserError(
                f"{path}, line {number}: choices are {texts!r}; there must be 2 or more, none of them empty"
            )
        if not 0 <= answer < len(texts):
            raise UserError(f"{path}, line {number}: answer is {answer}; it must be from 0 to {len(texts) - 1}")
    return {"test": found}


def _folder(task_data: str) -> Path:
    folder = task_data or os.environ.get(FOLDER, "")
    if not folder:
        raise UserError(f"the folder with the data of the tasks is unknown; set {FOLDER}, or --metadata task_data=DIR")
    return Path(folder).expanduser()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _missing(path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def _missing(path: Path) -> UserError:
    return UserError(f"there is no file {path}; its folder is {FOLDER}, or --metadata task_data=DIR")


def _records(path: Path, kinds: Mapping[str, type]) -> "Dataset":
    """Lines of JSON, of which these fields are kept."""
    if not path.exists():
        raise _missing(path)
    records = []
    for number, record in json_objects(path, str(path)):
        for name, kind in kinds.items():
            if type(record.get(name)) is not kind:
                raise UserError(f"{path}, line {number}: {name} must be there, as {kind.__name__}")
        records.append({name: record[name] for name in kinds})
    if not records:
        raise UserError(f"{path} has no record")
    return _dataset(records)


def _dataset(records: list[dict[str, Any]]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(records)
