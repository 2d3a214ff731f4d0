"""Problems in the format of HumanEval (arXiv 2107.03374): JSON lines, plain or gzip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.inference.stops import before_stops
from pipeline.json_lines import json_objects

STOP_WORDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends, as in the paper: what follows is no longer the body of the function."""


@dataclass(frozen=True)
class Problem:
    """A function to be completed, and what checks it."""

    task_id: str
    prompt: str
    """The text up to where the model goes on."""
    entry_point: str
    """Name of the function."""
    canonical_solution: str
    """A completion that passes."""
    test: str
    """Source that defines ``check(candidate)``."""


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file, in its order; UserError with line and field where it has another format."""
    problems: list[Problem] = []
    first_lines: dict[str, int] = {}
    for number, record in json_objects(path, str(path)):
        problem = _problem(record, f"{path}, line {number}")
        if problem.task_id in first_lines:
            raise UserError(
                f'{path}, line {number}: task_id "{problem.task_id}" is already that of line '
                f"{first_lines[problem.task_id]}; each problem needs one of its own"
            )
        first_lines[problem.task_id] = number
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} holds no problem; it must have one JSON object a line")
    return problems


def cut_completion(completion: str, stop_words: Sequence[str] = STOP_WORDS) -> str:
    """A completion up to the first of the stop words."""
    return before_stops(completion, stop_words)


def program_of(problem: Problem, completion: str) -> str:
    """The program that comes to its end if and only if a completion passes the checks."""
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n"


def _problem(record: Mapping[str, Any], where: str) -> Problem:
    names = [field.name for field in fields(Problem)]
    for name in names:
        if name not in record:
            raise UserError(f"{where}: no field {name}; wanted are {', '.join(names)}")
        if not isinstance(record[name], str):
            raise UserError(f"{where}: {name} is {type(record[name]).__name__}; a text is wanted")
    if not record["entry_point"].isidentifier():
        raise UserError(f'{where}: entry_point is "{record["entry_point"]}"; the name of a function is wanted')
    return Problem(**{name: record[name] for name in names})
