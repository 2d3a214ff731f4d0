"""Disks that are full, and leases that are lost, between the saves of a gang: ranks are threads here."""

import errno
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LeaseLostError
from pipeline.pretrain import saving
from pipeline.training_state import checkpoint_name
from tests.support.hand_state import (
    ThreadRanks,
    checkpointer,
    distinct,
    state_of,
    steps_in,
    succeeded,
    together,
    train,
)

SIZE_BYTES = 4 * sum(tensor.numel() for tensor in distinct().values())


class Disk:
    """Free space, as it is told to the preflight of saves: of so many checkpoints, the published ones taken off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        monkeypatch.setattr(saving, "free_bytes", self.free_bytes)

    def free_bytes(self, directory: Path) -> int:
        return int(1.2 * SIZE_BYTES) * (self.room - len(steps_in(directory)))


def is_full(error: Any, step: int, last: int) -> bool:
    """Whether it is what a full disk ends a training with."""
    return (
        isinstance(error, OSError)
        and error.errno == errno.ENOSPC
        and f"checkpoint {checkpoint_name(step)} does not fit on the disk" in str(error)
        and f"free some space and resume: training goes on after {last} steps" in str(error)
    )


def test_a_full_disk_costs_a_checkpoint_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(monkeypatch, room=1)

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, distinct())
        saver = checkpointer(tmp_path, state, ranks, max_failed_saves=3)
        train(saver, state, range(6))
        saver.wait()
        assert saver.last_saved == 2
        ranks.of_all(None)
        disk.room = 3
        train(saver, state, range(6, 10))
        saver.wait()
        assert saver.last_saved == 10

    succeeded(work)
    assert steps_in(tmp_path) == [10, 8]
    said = capsys.readouterr().out
    for step in (4, 6):
        assert f"warning: checkpoint {checkpoint_name(step)} failed ([Errno 28] 0.0 MB are free" in said


def test_a_disk_that_stays_full_stops_all_ranks_after_so_many_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Disk(monkeypatch, room=1)

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, distinct())
        train(checkpointer(tmp_path, state, ranks, max_failed_saves=3), state, range(20))

    assert all(is_full(error, step=8, last=2) for error in together(work))
    assert "3 checkpoints in a row have failed (pretrain.max_failed_saves)" in capsys.readouterr().out
    assert steps_in(tmp_path) == [2]


def test_a_last_save_that_has_no_room_stops_all_ranks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, room=1)

    def work(ranks: ThreadRanks) -> None:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks, max_failed_saves=9)
        assert saver.restore() == 0
        ranks.of_all(None)
        disk.room = 0
        saver.save(4, is_last=True)

    assert all(is_full(error, step=4, last=0) for error in together(work))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_in_the_middle_of_a_file_costs_that_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = saving.write_file, [1]

    def write_or_fail(path: Path, header: bytes, data: memoryview) -> Any:
        if path.stem == "rank-00001" and left[0]:
            left[0] -= 1
            write(path, header, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, header, data)

    monkeypatch.setattr(saving, "write_file", write_or_fail)

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, distinct())
        saver = checkpointer(tmp_path, state, ranks)
        train(saver, state, range(4))
        saver.wait()

    succeeded(work)
    assert steps_in(tmp_path) == [4]
    assert not list(tmp_path.glob("staging-*"))


def keep_five(directory: Path, ranks: ThreadRanks) -> None:
    """A training of five steps that keeps the checkpoint of each."""
    state = state_of(ranks, distinct())
    saver = checkpointer(directory, state, ranks, keep_checkpoints=5)
    train(saver, state, range(5), every=1)
    saver.wait()


def test_old_checkpoints_are_deleted_before_a_save_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a training that kept more of them before it was resumed, or that has found better ones to be averaged."""
    disk = Disk(monkeypatch, room=9)

    def go_on(ranks: ThreadRanks) -> None:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks, keep_checkpoints=2)
        assert saver.restore() == 5
        saver.pinned = frozenset({1})
        ranks.of_all(None)
        disk.room = 4
        saver.save(6, is_last=True)

    succeeded(lambda ranks: keep_five(tmp_path, ranks))
    assert steps_in(tmp_path) == [5, 4, 3, 2, 1]
    succeeded(go_on)
    assert steps_in(tmp_path) == [6, 5, 1]


def test_old_checkpoints_are_deleted_before_a_resume_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a training that was killed before it deleted them, or that is to keep fewer, for want of space."""
    disk = Disk(monkeypatch, room=9)

    def go_on(ranks: ThreadRanks) -> None:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks, keep_checkpoints=2, num_steps=9)
        assert saver.restore() == 5
        saver.pinned = frozenset({2})
        saver.make_room()

    succeeded(lambda ranks: keep_five(tmp_path, ranks))
    disk.room = 5
    succeeded(go_on)
    assert steps_in(tmp_path) == [5, 4, 2]


@pytest.mark.parametrize(("num_steps", "is_refused"), [(9, True), (8, False)])
def test_too_little_space_is_told_before_training_if_there_is_something_left_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int, is_refused: bool
) -> None:
    disk = Disk(monkeypatch, room=1)

    def work(ranks: ThreadRanks) -> int:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks, num_steps=num_steps)
        done = saver.restore()
        saver.make_room()
        saver.save(8, is_last=True)
        return done

    assert succeeded(work) == [0, 0]
    assert disk.free_bytes(tmp_path) == 0
    for found in together(work):
        if is_refused:
            assert isinstance(found, OSError)
            assert found.errno == errno.ENOSPC
            assert "0.0 MB are free" in str(found)
            assert "MB are wanted for a checkpoint" in str(found)
        else:
            assert found == 8


@pytest.mark.parametrize("lost_at", [0, 1], ids=["before writing", "before publishing"])
def test_a_lost_lease_writes_and_publishes_nothing_and_stops_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_at: int
) -> None:
    asked, written = [0], list[Path]()
    write = saving.write_file
    monkeypatch.setattr(saving, "write_file", lambda path, *rest: (written.append(path), write(path, *rest))[1])

    def fence() -> None:
        asked[0] += 1
        if asked[0] > lost_at:
            raise LeaseLostError("attempt 2 has taken over")

    def work(ranks: ThreadRanks) -> None:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks, fence=fence)
        saver.save(2)
        saver.wait()

    assert [type(error) for error in together(work)] == [LeaseLostError] * 2
    assert len(written) == 2 * lost_at
    assert not list(tmp_path.iterdir())
