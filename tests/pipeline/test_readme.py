"""The example of the README runs as it stands there."""

import re
import shutil
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


def test_every_file_of_data_is_in_the_table() -> None:
    files = {path.name for path in (Path(pipeline.__file__ or "").parent / "data").glob("[!_]*.py")}
    assert files == set(
        re.findall(r"`(\w+\.py)`", README[README.index("| file of `data/`") : README.index("## To add")])
    )
