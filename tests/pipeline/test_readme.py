"""The README's example runs as it stands there, and the files and tests that it names exist."""

import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.data.rows import open_rows
from tests.support.tiny_run import Artifacts

README = (Path(pipeline.__file__ or "").parent / "README.md").read_text(encoding="utf-8")


def test_rows_are_read_from_python_as_the_readme_says(
    made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for name in ("rows", "tokenizer"):
        shutil.copytree(getattr(made, name), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    batch = names["batch"]
    assert batch.x0.shape == batch.doc_ids.shape == (8, open_rows("rows").seq_len)  # type: ignore[attr-defined]
    assert batch.x0.dtype == np.int64  # type: ignore[attr-defined]
    assert "(8, 32)" in capsys.readouterr().out


def _section(begin: str, end: str) -> str:
    return README[README.index(begin) : README.index(end)]


def test_every_file_of_data_is_in_the_table() -> None:
    files = {path.name for path in (Path(pipeline.__file__ or "").parent / "data").glob("[!_]*.py")}
    assert files == set(re.findall(r"`(\w+\.py)`", _section("| file of `data/`", "## Code under test")))


def test_every_file_of_sandbox_is_in_the_table() -> None:
    files = {path.name for path in (Path(pipeline.__file__ or "").parent / "sandbox").glob("[!_]*.py")}
    assert files == set(re.findall(r"`(\w+\.py)`", _section("| file of `sandbox/`", "## What bad input gets")))


def _tests_cited(rows: list[str]) -> None:
    """Each row of a table names a file of tests, or several, and tests that stand in them."""
    tests: dict[str, str] = defaultdict(str)
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        tests[path.name] += path.read_text(encoding="utf-8")
    for row in rows:
        cited = [part.partition("`:")[::2] for part in re.split(r"(?<=\W)`(?=test_\w+\.py)", row)[1:]]
        assert cited, row
        for file, names in cited:
            found = re.findall(r"`(test_\w+)`", names)
            assert found, row
            for name in found:
                assert f"def {name}(" in tests[file], (file, name)


def test_every_test_of_bad_input_exists() -> None:
    rows = _section("## What bad input gets", "## To add a stage").splitlines()[4:-1]
    _tests_cited(rows)
    assert len(rows) == 20


def test_every_test_of_what_goes_wrong_in_training_exists() -> None:
    text = (Path(pipeline.__file__ or "").parent / "pretrain" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)$", text[text.index("## What goes wrong") :], flags=re.MULTILINE)
    _tests_cited([row for _, row in rows])
    assert [int(number) for number, _ in rows] == [*range(1, 10), 13, 14, 15, 16, 22, 23, *range(25, 56)]
