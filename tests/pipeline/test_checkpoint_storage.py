"""Checkpoints on a storage that shows files late, or can't read them any more."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import training_state
from pipeline.artifact import MANIFEST
from pipeline.pretrain.checkpoint import load_checkpoint_manifest, publish
from pipeline.training_state import checkpoint_name, file_name, list_checkpoints
from tests.support.hand_checkpoints import all_find, published, write_staging


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are not there are waited for, but not for seconds."""
    monkeypatch.setattr(training_state, "_PATIENCE_S", (0.001,) * 4)


@pytest.mark.parametrize("name", [file_name(0), file_name(1), MANIFEST])
def test_a_file_that_the_storage_can_never_read_makes_all_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    older, newer = published(tmp_path, 10), published(tmp_path, 20)
    unreadable(monkeypatch, newer / name)
    warnings: list[str] = []
    assert [(path, manifest.step) for path, manifest in all_find(tmp_path, 2, warnings)] == [(older, 10)] * 2
    (aside,) = tmp_path.glob("corrupt-step-00000020-*")
    assert {path.name for path in aside.iterdir()} == {file_name(0), file_name(1), MANIFEST}
    assert len(warnings) == 1
    assert f"{newer / name} still cannot be read" in warnings[0]
    assert "Input/output error" in warnings[0]


def test_a_file_that_can_be_read_again_after_a_while_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = published(tmp_path, 20)
    unreadable(monkeypatch, final / file_name(1), times=4)
    assert [path for path, _ in all_find(tmp_path, 2, [])] == [final] * 2


def test_another_error_of_the_storage_sets_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = published(tmp_path, 20)
    unreadable(monkeypatch, final / file_name(1), errno.EACCES)
    assert [type(error) for error in all_find(tmp_path, 2, [])] == [PermissionError] * 2
    assert list_checkpoints(tmp_path) == [final]


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, number: int = errno.EIO, times: int = 10**9) -> None:
    """Let the storage fail to read one file so many times."""
    left = [times]

    def reading(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def read_or_fail(given: Path) -> Any:
            if given == path and left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(given))
            return read(given)

        return read_or_fail

    for name in ("file_sha256", "read_json"):
        monkeypatch.setattr(training_state, name, reading(getattr(training_state, name)))


@pytest.mark.parametrize("name", [file_name(0), file_name(1), MANIFEST])
def test_a_checkpoint_of_which_the_first_rank_does_not_see_a_file_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    final = published(tmp_path, 7)
    come_late(monkeypatch, final / name, tmp_path / "late")
    assert [path for path, _ in all_find(tmp_path, 2, [])] == [final] * 2


def test_a_file_that_the_first_rank_does_not_see_yet_is_waited_for_before_publication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, manifest = write_staging(tmp_path, 3)
    come_late(monkeypatch, staging / file_name(1), tmp_path / "late")
    publish(staging, manifest)
    assert load_checkpoint_manifest(tmp_path / checkpoint_name(3)).step == 3


def come_late(monkeypatch: pytest.MonkeyPatch, path: Path, meanwhile: Path) -> None:
    """Show a file only after the last but one wait for it."""
    path.rename(meanwhile)
    waits = [0]

    def sleep(wait_s: float) -> None:
        waits[0] += 1
        if waits[0] == 4:
            meanwhile.rename(path)

    own = SimpleNamespace(sleep=sleep)  # time.sleep itself is called by the threads of the test as well
    monkeypatch.setattr(training_state, "time", own)
