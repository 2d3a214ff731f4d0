"""Checkpoints of a gang, written while it trains: ranks are threads here, and what they hold is made by hand."""

import errno
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CorruptionError, UserError
from pipeline.pretrain import checkpoint as checkpoint_module
from pipeline.pretrain import saving
from pipeline.pretrain.checkpoint import load_checkpoint_manifest
from pipeline.pretrain.saving import Checkpointer
from pipeline.tracking import MetricsLog
from pipeline.training_state import StateFiles, checkpoint_name, list_checkpoints, read_manifest
from tests.support.hand_state import (
    CUTS,
    SHAPES,
    HandState,
    ThreadRanks,
    assembled,
    assert_equal,
    checkpointer,
    distinct,
    saved,
    state_of,
    steps_in,
    succeeded,
    together,
    train,
)


class Slow:
    """A storage that writes nothing until it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: tuple[str, ...] = ("rank-00000", "rank-00001")) -> None:
        self.may_write = threading.Event()
        write = saving.write_file

        def wait_and_write(path: Path, *rest: Any) -> Any:
            if path.stem in ranks:
                assert self.may_write.wait(20)
            return write(path, *rest)

        monkeypatch.setattr(saving, "write_file", wait_and_write)


def failing(monkeypatch: pytest.MonkeyPatch, problem: OSError, rank: int = 1, times: int = 10**9) -> None:
    """Let the next writes of one rank fail in the middle of the file."""
    write, left = saving.write_file, [times]

    def write_or_fail(path: Path, header: bytes, data: memoryview) -> Any:
        if path.stem == f"rank-{rank:05d}" and left[0]:
            left[0] -= 1
            write(path, header, data[: len(data) // 2])
            raise problem
        return write(path, header, data)

    monkeypatch.setattr(saving, "write_file", write_or_fail)


_SLOW_WRITE_S = 0.5


def finish(saver: Checkpointer) -> dict[str, float]:
    """Poll as training does until a checkpoint is published."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        if figures := saver.poll():
            return figures
        time.sleep(0.001)
    raise AssertionError("nothing was published")


@pytest.mark.parametrize("cut", CUTS)
def test_the_numbers_are_those_of_the_step_boundary_although_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    slow, full = Slow(monkeypatch), distinct()

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, full, cut)
        saver = checkpointer(tmp_path, state, ranks)
        saver.save(4)
        saver.release_state()
        state.change(by=1.0)
        assert saver.poll() == {}
        assert saver.last_saved == -1
        assert not list_checkpoints(tmp_path)
        time.sleep(_SLOW_WRITE_S)
        slow.may_write.set()
        figures = finish(saver)
        assert saver.last_saved == 4
        assert list(figures) == ["checkpoint_s"], "a wait that the meter tells too"
        assert 0 < saver.stall.spent_s < _SLOW_WRITE_S <= figures["checkpoint_s"]

    succeeded(work)
    assert_equal(saved(tmp_path, 4), full)


def test_training_does_not_wait_for_a_slow_disk_until_it_saves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, ("rank-00001",))
    released_s = [0.0]

    def work(ranks: ThreadRanks) -> list[Any]:
        state = state_of(ranks, distinct())
        saver = checkpointer(tmp_path, state, ranks)
        figures = train(saver, state, range(3))
        assert saver.last_saved == -1
        if ranks.rank == 0:
            released_s[0] = time.monotonic() + 0.3
            threading.Timer(0.3, slow.may_write.set).start()
        begun_s = time.monotonic()
        saver.save(4)
        assert saver.last_saved == 2, "the second save did not wait for the first"
        assert time.monotonic() >= released_s[0] - 0.01
        waited_s = time.monotonic() - begun_s
        assert figures == [{}] * 3
        (figure,) = [found for found in (saver.poll(),) if found]
        assert figure["checkpoint_s"] >= waited_s - 0.01
        assert saver.stall.spent_s >= waited_s - 0.01 >= 0.2
        saver.wait()
        return [saver.last_saved]

    assert succeeded(work) == [[4], [4]]
    assert_equal(saved(tmp_path, 2), {key: tensor + 2.0 for key, tensor in distinct().items()})


def test_the_last_save_is_published_when_it_returns(tmp_path: Path) -> None:
    def work(ranks: ThreadRanks) -> None:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks)
        saver.save(3)
        saver.save(5, is_last=True)
        assert saver.last_saved == 5
        saver.save(5, is_last=True)
        assert saver.poll(), "the figures of a save that was waited for are still to be told"
        assert saver.poll() == {}

    succeeded(work)
    assert steps_in(tmp_path) == [5, 3]
    assert not list(tmp_path.glob("staging-*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_that_fails_on_one_rank_costs_all_of_them_that_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    failing(monkeypatch, OSError(errno.EIO, "Input/output error"), rank, times=2)

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, distinct())
        saver = checkpointer(tmp_path, state, ranks, max_failed_saves=3)
        train(saver, state, range(5))
        assert saver.last_saved == -1
        saver.wait()
        ranks.of_all(None)
        assert not list(tmp_path.glob("staging-*"))
        train(saver, state, range(5, 8))
        saver.wait()
        assert saver.last_saved == 8

    succeeded(work)
    assert steps_in(tmp_path) == [8, 6]
    said = capsys.readouterr().out
    assert "warning: checkpoint step-00000002 failed ([Errno 5] Input/output error); training goes on" in said
    assert "warning: checkpoint step-00000004 failed" in said


def test_saves_that_fail_again_and_again_stop_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, OSError(errno.EIO, "Input/output error"))

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, distinct())
        train(checkpointer(tmp_path, state, ranks, max_failed_saves=2), state, range(9))

    for error in together(work):
        assert isinstance(error, OSError)
        assert error.errno == errno.EIO
    assert "2 checkpoints in a row have failed (pretrain.max_failed_saves)" in capsys.readouterr().out
    assert not list(tmp_path.glob("staging-*"))


def test_a_last_save_that_fails_raises_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OSError(errno.EACCES, "Permission denied", "/store/x"))
    for error in together(
        lambda ranks: checkpointer(tmp_path, state_of(ranks, distinct()), ranks).save(5, is_last=True)
    ):
        assert isinstance(error, PermissionError)
        assert "/store/x" in str(error)
    assert not list(tmp_path.iterdir())


def test_metrics_are_on_the_disk_before_a_checkpoint_that_knows_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    publish = saving.publish
    monkeypatch.setattr(saving, "publish", lambda *given: (order.append("publish"), publish(*given)))
    monkeypatch.setattr(MetricsLog, "sync", lambda log: order.append("sync"))

    def work(ranks: ThreadRanks) -> None:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks)
        if ranks.rank == 0:
            saver.log = MetricsLog(tmp_path / "metrics.jsonl", 0)
        saver.save(2, is_last=True)
        if saver.log is not None:
            saver.log.close()

    succeeded(work)
    assert order[:2] == ["sync", "publish"]


@pytest.mark.parametrize("before", CUTS)
@pytest.mark.parametrize("after", CUTS)
def test_restore_gives_other_ranks_the_same_numbers_counts_and_extras(tmp_path: Path, before: str, after: str) -> None:
    full = distinct()

    def save(ranks: ThreadRanks) -> None:
        state = state_of(ranks, full, before)
        saver = checkpointer(tmp_path, state, ranks)
        assert saver.restore() == 0
        state.optimizer_steps, state.skipped_steps = 5, 2
        saver.extras["guard"] = {"window": [1.5, 2.0]}
        saver.save(7)
        saver.extras["guard"]["window"].append(3.0)
        saver.wait()

    def load(ranks: ThreadRanks) -> HandState:
        state = state_of(ranks, {key: torch.zeros_like(tensor) for key, tensor in full.items()}, after)
        saver = checkpointer(tmp_path, state, ranks, zero_stage=3)
        assert saver.restore() == saver.last_saved == 7
        assert (state.went_on, state.optimizer_steps, state.skipped_steps) == (7, 5, 2)
        assert saver.extras == {"guard": {"window": [1.5, 2.0]}}
        return state

    succeeded(save, workers=3)
    assert_equal(assembled(succeeded(load, workers=2)), full)


def save_one(directory: Path, step: int = 2, **more: Any) -> None:
    """A checkpoint of two ranks."""
    succeeded(lambda ranks: checkpointer(directory, state_of(ranks, distinct()), ranks, **more).save(step, True))


def test_another_identity_is_refused_field_by_field_before_any_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_one(tmp_path)
    monkeypatch.setattr(checkpoint_module, "verify_bytes", lambda *given: pytest.fail("files were read"))
    other = {"config": {"lr": 0.2, "data_seed": 0, "ema": 0.9}}

    def restore(ranks: ThreadRanks) -> None:
        checkpointer(tmp_path, state_of(ranks, distinct()), ranks, identity=other).restore()

    for error in together(restore):
        assert isinstance(error, UserError)
        assert "config.ema None -> 0.9, config.lr 0.1 -> 0.2." in str(error)
        assert "data_seed" not in str(error)
        assert "pretrain.accept_changed_identity=true" in str(error)
    assert steps_in(tmp_path) == [2]


def test_an_accepted_change_is_recorded_in_every_checkpoint_from_then_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_one(tmp_path)
    for lr, old, step in ((0.2, 0.1, 2), (0.3, 0.2, 3)):

        def go_on(ranks: ThreadRanks, lr: float = lr, step: int = step) -> None:
            other, state = {"config": {"lr": lr, "data_seed": 0}}, state_of(ranks, distinct(9))
            saver = checkpointer(tmp_path, state, ranks, identity=other, accept_changed_identity=True)
            assert saver.restore() == step
            saver.save(step + 1, is_last=True)

        succeeded(go_on)
        assert f'"config.lr": [{old}, {lr}]' in capsys.readouterr().out
    lineage = read_manifest(tmp_path / checkpoint_name(4)).lineage
    assert [(entry["step"], entry["changed"]) for entry in lineage] == [
        (2, {"config.lr": [0.1, 0.2]}),
        (3, {"config.lr": [0.2, 0.3]}),
    ]
    assert_equal(saved(tmp_path, 4), distinct())


def test_a_model_of_another_shape_is_refused_even_if_changes_are_accepted(tmp_path: Path) -> None:
    save_one(tmp_path)
    shapes = {**SHAPES, "embed.weight": [8, 5]}
    other = {"config": {"lr": 0.1, "data_seed": 0, "vocab": 8}}

    def restore(ranks: ThreadRanks) -> None:
        state = HandState(distinct(0, shapes=shapes), CUTS["1"], ranks.rank, 2, shapes)
        more: dict[str, Any] = {"identity": other, "shapes": shapes, "accept_changed_identity": True}
        checkpointer(tmp_path, state, ranks, **more).restore()

    for error in together(restore):
        assert isinstance(error, UserError)
        assert "config.vocab None -> 8" in str(error)
        assert "embed.weight [7, 5] -> [8, 5]" in str(error)


def test_an_optimizer_that_keeps_other_tensors_is_refused_by_name_on_all_ranks(tmp_path: Path) -> None:
    save_one(tmp_path)

    def restore(ranks: ThreadRanks) -> None:
        checkpointer(tmp_path, state_of(ranks, distinct(kept=("master", "momentum"))), ranks).restore()

    for error in together(restore):
        assert isinstance(error, UserError)
        assert "has no 'momentum' of" in str(error)


def test_a_rank_that_holds_what_another_holds_too_is_refused_before_training(tmp_path: Path) -> None:
    def work(ranks: ThreadRanks) -> None:
        state = HandState(distinct(), CUTS["1"], 0, 2, SHAPES)
        checkpointer(tmp_path, state, ranks)

    assert [type(error) for error in together(work)] == [CorruptionError] * 2


def test_retention_keeps_the_newest_and_the_pinned_and_forgives_what_it_cannot_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rmtree = shutil.rmtree

    def refuse(path: Any, *rest: Any, **more: Any) -> None:
        if Path(path).name == checkpoint_name(3) and Path(path).exists():
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        rmtree(path, *rest, **more)

    monkeypatch.setattr(shutil, "rmtree", refuse)

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, distinct())
        saver = checkpointer(tmp_path, state, ranks, keep_checkpoints=2)
        saver.pinned = frozenset({2})
        train(saver, state, range(6), every=1)
        saver.wait()

    succeeded(work)
    assert steps_in(tmp_path) == [6, 5, 3, 2]
    assert not (tmp_path / checkpoint_name(3) / "manifest.json").exists(), "half of a checkpoint looks complete"
    assert f"old checkpoint {tmp_path / checkpoint_name(3)} could not be deleted" in capsys.readouterr().out
    for step in (6, 5, 2):
        load_checkpoint_manifest(tmp_path / checkpoint_name(step))


class Saves:
    """How often a training may save, and how often it has."""

    def __init__(self) -> None:
        self._may, self._did, self._open = threading.Semaphore(0), threading.Semaphore(0), 0
        self.is_over = False

    def allow(self, number: int) -> None:
        self._open += number
        self._may.release(number)

    def wait(self) -> None:
        """Until it has saved as often as it may."""
        while self._open:
            assert self._did.acquire(timeout=20), "nothing is saved"
            self._open -= 1

    def end(self) -> None:
        self.is_over = True
        self._may.release()

    def run(self, save: Callable[[], None], ranks: ThreadRanks) -> None:
        while True:
            if ranks.rank == 0:
                self._may.acquire()
            if ranks.any(self.is_over):
                return
            save()
            if ranks.rank == 0:
                self._did.release()


@pytest.fixture
def saves(tmp_path: Path) -> Iterator[Saves]:
    """A training that keeps two checkpoints, and saves when it may."""
    saves = Saves()

    def work(ranks: ThreadRanks) -> None:
        state, steps = state_of(ranks, distinct()), itertools.count(3)
        saver = checkpointer(tmp_path, state, ranks, keep_checkpoints=2)
        saves.run(lambda: saver.save(next(steps), is_last=True), ranks)

    save_one(tmp_path, 1)
    save_one(tmp_path, 2)
    thread = threading.Thread(target=succeeded, args=(work,))
    thread.start()
    yield saves
    saves.end()
    thread.join()


def test_the_newest_checkpoint_can_be_opened_beside_a_save_and_read_once_it_is_deleted(
    tmp_path: Path, saves: Saves
) -> None:
    seen: set[int] = set()
    for _ in range(20):
        saves.allow(1)  # while it is opened; with two, the newest of a moment ago may be gone
        newest = list_checkpoints(tmp_path)[0]
        manifest = load_checkpoint_manifest(newest)
        files = StateFiles(newest, manifest)
        saves.allow(2)
        saves.wait()
        assert not newest.exists()
        for key, tensor in distinct().items():
            assert torch.equal(torch.from_numpy(files.whole(*key)).flatten(), tensor)
        seen.add(manifest.step)
    assert len(seen) == 20


def test_the_state_is_released_only_when_it_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_copy, take = threading.Event(), saving.Snapshot.take
    monkeypatch.setattr(saving.Snapshot, "take", lambda self: may_copy.wait() and take(self))
    full = distinct()

    def work(ranks: ThreadRanks) -> None:
        state = state_of(ranks, full)
        saver = checkpointer(tmp_path, state, ranks)
        saver.release_state()  # nothing is under way
        saver.save(4)
        if ranks.rank == 0:
            threading.Timer(0.2, may_copy.set).start()
        saver.release_state()
        assert may_copy.is_set()
        state.change(by=1.0)
        assert saver.stall.spent_s >= 0.1
        assert finish(saver)["checkpoint_s"] >= 0.1

    succeeded(work)
    assert_equal(saved(tmp_path, 4), full)


def test_a_copy_that_fails_releases_the_state_and_costs_its_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any) -> None:
        raise MemoryError("no room for a copy")

    def work(ranks: ThreadRanks) -> None:
        saver = checkpointer(tmp_path, state_of(ranks, distinct()), ranks)
        with monkeypatch.context() as patched:
            patched.setattr(saving.Snapshot, "take", fail)
            saver.save(2)
            saver.release_state()
            saver.wait()
        assert saver.last_saved == -1
        saver.save(4, is_last=True)
        assert saver.last_saved == 4

    succeeded(work, workers=1)
    assert "checkpoint step-00000002 failed (no room for a copy)" in capsys.readouterr().out
