"""Where ``dlm convert`` writes: nothing is there before all of it is proved, and what others put there stays."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.export import run as export_run
from pipeline.stage import nobody_else
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE
from tests.pipeline.conftest import flip_bit
from tests.support.exports import LLAMA, NEXT_TOKEN, Pair, weights_of
from tests.workflows.conftest import Dlm
from workflows import conversion

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked_proofs")]
NO_TOKENIZER, QUICK_EXPORT = ("--set", "export.without_tokenizer=true"), ("--set", "export.proof=tensors")


def test_a_destination_that_is_taken_is_refused_and_an_empty_one_is_used(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    weights = weights_of(Pair("llama", LLAMA, NEXT_TOKEN), tokenizer_artifact, tmp_path / "weights")
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("here")
    command = ("convert", str(weights), str(target), "--to", "llama", "--tokenizer", str(tokenizer_artifact))
    refused = dlm(*command, *QUICK_EXPORT)
    assert refused.code == 2
    assert f"{target} is there already; choose a new or an empty directory" in refused.stderr
    assert [path.name for path in target.iterdir()] == ["mine"]
    (target / "mine").unlink()
    assert dlm(*command, *QUICK_EXPORT).code == 0
    assert (target / "config.json").is_file()
    again = dlm("convert", str(weights), str(tmp_path / "dlm"), "--to", "dlm")
    assert again.code == 2
    assert "has interchange weights already" in again.stderr
    file = dlm("convert", str(weights / WEIGHTS_FILE), str(tmp_path / "x"), "--to", "llama")
    assert file.code == 2
    assert "its model is not known without the config.json beside it" in file.stderr


def test_a_destination_that_another_call_fills_meanwhile_is_left_to_it(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(Pair("llama", LLAMA, NEXT_TOKEN), tokenizer_artifact, tmp_path / "weights")
    target = tmp_path / "out"

    @contextlib.contextmanager
    def after_another(out: Path, state: Path) -> Iterator[None]:
        target.mkdir()
        (target / "theirs").write_text("here")
        with nobody_else(out, state):
            yield

    monkeypatch.setattr(conversion, "nobody_else", after_another)
    monkeypatch.setattr(conversion, "run_here", lambda *_: pytest.fail("made all the same"))
    refused = dlm("convert", str(weights), str(target), "--to", "llama", *NO_TOKENIZER, *QUICK_EXPORT)
    assert refused.code == 2
    assert f"{target} is there already" in refused.stderr
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert not list(tmp_path.glob(".*"))


def test_a_refused_conversion_leaves_no_directories_above_its_destination(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    weights = weights_of(Pair("llama", LLAMA, NEXT_TOKEN), tokenizer_artifact, tmp_path / "weights")
    flip_bit(weights / WEIGHTS_FILE)
    (tmp_path / "own").mkdir()
    target = tmp_path / "own" / "new" / "newer" / "out"
    refused = dlm("convert", str(weights), str(target), "--to", "llama", *NO_TOKENIZER, *QUICK_EXPORT)
    assert refused.code == 3
    assert not any((tmp_path / "own").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_a_conversion_that_ends_early_leaves_nothing(
    error: BaseException, dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(Pair("llama", LLAMA, NEXT_TOKEN), tokenizer_artifact, tmp_path / "weights")
    write = export_run.write_theirs

    def break_off(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        raise error

    monkeypatch.setattr(export_run, "write_theirs", break_off)
    command = ("convert", str(weights), str(tmp_path / "out"), "--to", "llama", *NO_TOKENIZER)
    if error is RuntimeError:
        with pytest.raises(RuntimeError):
            dlm(*command)
    else:
        assert dlm(*command).code == (75 if error is KeyboardInterrupt else 3)
    assert {path.name for path in tmp_path.iterdir()} - {"store"} == {"weights"}


def test_what_a_killed_conversion_left_is_removed_by_the_next_but_not_what_a_living_one_makes(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    weights = weights_of(Pair("llama", LLAMA, NEXT_TOKEN), tokenizer_artifact, tmp_path / "weights")
    command = ("convert", str(weights), str(tmp_path / "out"), "--to", "llama", *NO_TOKENIZER, *QUICK_EXPORT)
    work = tmp_path / ".out.converting"
    (work / "export").mkdir(parents=True)
    (work / "export" / "model.safetensors").write_text("half")
    with nobody_else(tmp_path / "out", work):
        refused = dlm(*command)
        assert refused.code == 2
        assert f"{tmp_path / 'out'} is being made by process {os.getpid()}" in refused.stderr
        assert (work / "export" / "model.safetensors").read_text() == "half"
    done = dlm(*command)
    assert done.code == 0, done.stderr
    assert TensorFiles([tmp_path / "out" / "model.safetensors"]).names
    assert not work.exists()
