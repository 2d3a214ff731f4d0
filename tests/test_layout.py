"""The shape of the repository: what lies at its top, and how long its files are."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"pipeline", "dlm_core", "workflows", "cluster", "tests", "benchmarks"}
FILES = {"pyproject.toml", "README.md", "Makefile", "LICENSE", "constraints.txt"}
MAX_LINES = 500


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: nobody can tell what belongs to it")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in names.split("\0") if name]


def test_nothing_else_lies_at_the_top(tracked):
    tops = {path.parts[0] for path in tracked}
    assert {top for top in tops if not top.startswith(".")} == PACKAGES | FILES


def test_no_file_of_code_is_longer_than_500_lines_or_called_utils(tracked):
    code = [path for path in tracked if path.suffix in (".py", ".sh") and (ROOT / path).exists()]
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in code}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
    assert [path for path in code if path.stem == "utils"] == []
