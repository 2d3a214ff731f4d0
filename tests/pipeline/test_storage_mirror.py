"""Checkpoints in an object store: published by a record, found by another machine, whole or not at all.

Ranks are threads, each on a machine (a directory) of its own; what they hold is made by hand.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorruptionError, LeaseLostError, UserError
from pipeline.mirror import Mirror
from pipeline.pretrain.saving import Checkpointer
from pipeline.storage import Place, open_storage
from tests.support.hand_state import (
    HandState,
    ThreadRanks,
    assembled,
    assert_equal,
    checkpointer,
    distinct,
    saved,
    state_of,
    succeeded,
    together,
)
from tests.support.mortal import Death, Life, Mortal, in_memory

KEEP = 2


@pytest.fixture(params=["memory", "s3", "gs"])
def place(request: pytest.FixtureRequest) -> Place:
    """An empty folder of an object store."""
    if request.param == "memory":
        return Place(in_memory(), "state")
    return Place(open_storage(request.getfixturevalue(f"{request.param}_url")), "state")


@pytest.fixture
def memory() -> Place:
    return Place(in_memory(), "state")


def saver_of(place: Place, machine: Path, ranks: ThreadRanks, state: HandState, **more: Any) -> Checkpointer:
    """Of a rank on a machine of its own."""
    directory = machine / str(ranks.rank)
    directory.mkdir(parents=True, exist_ok=True)
    saver = checkpointer(directory, state, ranks, keep_checkpoints=KEEP, **more)
    mirror = Mirror(place, directory, is_first_here=True, fence=saver.context.fence)
    saver.context = replace(saver.context, mirror=mirror)
    return Checkpointer(saver.config, saver.context, state, ranks, saver.belonging)


def save(place: Place, machine: Path, *steps: int) -> None:
    """Train and save as two ranks on two machines: after step N every number is that of distinct(N)."""

    def work(ranks: ThreadRanks) -> None:
        saver_of(place, machine, ranks, state_of(ranks, distinct())).restore()
        for step in steps:
            save_one(saver_of(place, machine, ranks, state_of(ranks, distinct(step))), step)

    succeeded(work)


def save_one(saver: Checkpointer, step: int) -> None:
    if saver.ranks.rank == 0:
        log = saver.context.state / "metrics.jsonl"
        log.write_text("".join(f'{{"step": {n}}}\n' for n in range(step)))
        saver.beside = [log]
    saver.save(step)
    saver.wait()


def restored(place: Place, machine: Path, workers: int = 2) -> int:
    """The step that ranks on other machines go on with, all their numbers checked."""
    states: list[HandState] = [None] * workers  # type: ignore[list-item]

    def work(ranks: ThreadRanks) -> int:
        states[ranks.rank] = state_of(ranks, {key: tensor * 0 - 1 for key, tensor in distinct().items()})
        return saver_of(place, machine, ranks, states[ranks.rank]).restore()

    (step,) = set(succeeded(work, workers))
    if step:
        assert_equal(assembled(states), distinct(step))
        assert len((machine / "0" / "metrics.jsonl").read_text().splitlines()) == step
    return step


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_other_machines_and_another_number_of_them_go_on_from_the_newest(
    place: Place, tmp_path: Path, workers: int
) -> None:
    save(place, tmp_path / "first", 4, 8)
    assert restored(place, tmp_path / "second", workers) == 8
    assert restored(place, tmp_path / "first") == 8


def test_where_nothing_was_published_training_begins(place: Place, tmp_path: Path) -> None:
    stray = tmp_path / "first" / "0" / "step-00000004"
    stray.mkdir(parents=True)
    (stray / "manifest.json").write_text("{}")
    assert restored(place, tmp_path / "first") == 0
    assert not stray.exists(), "what was not published does not exist"


def test_old_checkpoints_and_what_dead_attempts_uploaded_go_and_pinned_ones_stay(memory: Place, tmp_path: Path) -> None:
    (memory / "step-00000002-dead" / "rank-00000.safetensors").write(b"half")
    save(memory, tmp_path / "a", 2, 4, 6)

    def work(ranks: ThreadRanks) -> None:
        saver = saver_of(memory, tmp_path / "a", ranks, state_of(ranks, distinct(8)))
        saver.restore()
        saver.pinned = frozenset({4})
        for step in (8, 10):
            saver.save(step)
            saver.wait()

    succeeded(work)
    records = [name for name in memory.names() if name.endswith(".json")]
    assert records == [f"step-{step:08d}.json" for step in (4, 8, 10)]
    folders = [name for name in memory.names() if not name.endswith(".json")]
    assert [name[:13] for name in folders] == ["step-00000004", "step-00000008", "step-00000010"]
    assert "step-00000002-dead" not in folders


def test_files_that_are_here_already_are_not_fetched_again(
    memory: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(memory, tmp_path / "a", 4)
    fetched: list[str] = []
    download = type(memory.storage).download
    monkeypatch.setattr(
        type(memory.storage), "download", lambda self, key, to: (fetched.append(key), download(self, key, to))
    )
    assert restored(memory, tmp_path / "a") == 4
    names = sorted(Path(key).name for key in fetched)
    assert names == ["manifest.json", "metrics.jsonl", "rank-00000.safetensors", "rank-00001.safetensors"], (
        "each of two machines lacks the file of the other; that of rank 0 wrote the manifest"
    )


def damaged(place: Place, name: str, step: int) -> None:
    """Flip a bit of a published file."""
    folder = next(f for f in place.names() if f.startswith(f"step-{step:08d}-"))
    data = bytearray((place / folder / name).read_bytes())
    data[-1] ^= 0x10
    (place / folder / name).write(bytes(data))


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    memory: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    save(memory, tmp_path / "a", 4, 8)
    damaged(memory, name, 8)
    machine = tmp_path / "b"
    states: list[HandState] = [None, None]  # type: ignore[list-item]

    def work(ranks: ThreadRanks) -> int:
        states[ranks.rank] = state_of(ranks, distinct(1))
        return saver_of(memory, machine, ranks, states[ranks.rank]).restore()

    assert succeeded(work) == [4, 4]
    assert_equal(assembled(states), distinct(4))
    assert f"{name} is damaged" in capsys.readouterr().out
    assert [n for n in memory.names() if n.startswith("corrupt-step-00000008-")]
    save(memory, machine, 8)
    assert restored(memory, tmp_path / "c") == 8


def test_all_damaged_is_an_error_and_no_silent_start(memory: Place, tmp_path: Path) -> None:
    save(memory, tmp_path / "a", 4)
    damaged(memory, "rank-00001.safetensors", 4)
    for _ in range(2):
        found = together(lambda ranks: saver_of(memory, tmp_path / "b", ranks, state_of(ranks, distinct())).restore())
        assert [type(error) for error in found] == [CorruptionError] * 2
        assert all("all checkpoints in" in str(error) for error in found)


def test_a_record_that_is_cut_counts_as_damaged_and_no_folder_is_deleted(memory: Place, tmp_path: Path) -> None:
    save(memory, tmp_path / "a", 4, 8)
    (memory / "step-00000008.json").write(b'{"folder": ')
    folders = [name for name in memory.names() if not name.endswith(".json")]
    assert restored(memory, tmp_path / "b") == 4
    save(memory, tmp_path / "b", 10)
    assert set(folders) <= set(memory.names())


def test_another_training_is_refused_and_nothing_set_aside(memory: Place, tmp_path: Path) -> None:
    save(memory, tmp_path / "a", 4)
    other = {"config": {"lr": 0.2, "data_seed": 0}}
    found = together(
        lambda ranks: saver_of(memory, tmp_path / "b", ranks, state_of(ranks, distinct()), identity=other).restore()
    )
    assert [type(error) for error in found] == [UserError] * 2
    assert "config.lr 0.1 -> 0.2" in str(found[0])
    assert "step-00000004.json" in memory.names()


def test_the_same_step_of_two_attempts_counts_once_and_whole(memory: Place, tmp_path: Path) -> None:
    save(memory, tmp_path / "a", 4)
    first = (memory / "step-00000004.json").read_bytes()

    def again(ranks: ThreadRanks) -> None:
        save_one(saver_of(memory, tmp_path / "zombie", ranks, state_of(ranks, distinct(4))), 4)

    succeeded(again)
    assert (memory / "step-00000004.json").read_bytes() == first
    assert len(memory.names()) == 2
    (folder,) = [name for name in memory.names() if not name.endswith(".json")]
    (memory / folder / "rank-00001.safetensors").remove()
    succeeded(again)
    assert restored(memory, tmp_path / "b") == 4


def test_uploads_that_fail_cost_a_checkpoint_and_then_too_many_end_the_training(memory: Place, tmp_path: Path) -> None:
    class Full(Mortal):
        def upload(self, source: Path, key: str) -> None:
            if "rank-00001" in key:
                raise ConnectionError("the store is away")
            super().upload(source, key)

    away = Place(Full(memory.storage, Life()), "state")

    def work(ranks: ThreadRanks) -> list[int]:
        own = away if ranks.rank == 1 else memory
        saver = saver_of(own, tmp_path / "a", ranks, state_of(ranks, distinct(4)), max_failed_saves=2)
        saver.save(4)
        saver.wait()
        assert saver.last_saved == -1
        assert not list((tmp_path / "a" / str(ranks.rank)).glob("staging-*"))
        saver.save(8)
        saver.wait()
        return []

    assert [str(error) for error in together(work)] == ["the store is away"] * 2
    assert [name for name in memory.names() if name.endswith(".json")] == []
    save(memory, tmp_path / "b", 2)
    assert [name[:13] for name in memory.names()] == ["step-00000002"] * 2, "what was uploaded in vain is gone"


def test_one_who_has_lost_the_lease_deletes_nothing(memory: Place, tmp_path: Path) -> None:
    save(memory, tmp_path / "a", 4, 8)
    (memory / "step-00000010-of-the-successor" / "rank-00000.safetensors").write(b"half")
    before = memory.names()

    def lost() -> None:
        raise LeaseLostError("another attempt has taken over")

    zombie = Mirror(memory, tmp_path / "a" / "0", is_first_here=True, fence=lost)
    with pytest.raises(LeaseLostError):
        zombie.remove(["step-00000004"])
    with pytest.raises(LeaseLostError):
        zombie.clear()
    assert memory.names() == before


def test_what_comes_after_the_look_at_the_lease_is_not_deleted(memory: Place, tmp_path: Path) -> None:
    (memory / "step-00000002-of-a-dead-one" / "rank-00000.safetensors").write(b"half")

    def taken_over_afterwards() -> None:
        (memory / "step-00000010-of-the-successor" / "rank-00000.safetensors").write(b"half")

    Mirror(memory, tmp_path, is_first_here=True, fence=taken_over_afterwards).clear()
    assert memory.names() == ["step-00000010-of-the-successor"]


def test_the_artifact_is_made_of_the_files_of_all_machines(memory: Place, tmp_path: Path) -> None:
    save(memory, tmp_path / "a", 4, 8)

    def work(ranks: ThreadRanks) -> None:
        saver = saver_of(memory, tmp_path / "a", ranks, state_of(ranks, distinct(8)))
        saver.gather({4, 8}, lambda: None)

    succeeded(work)
    for step in (4, 8):
        assert_equal(saved(tmp_path / "a" / "0", step), distinct(step))


def one_rank(place: Place, machine: Path, life: Life, *steps: int) -> None:
    """A training of one rank that restores, saves, and deletes what is old; it may die at a write."""

    def act(ranks: ThreadRanks) -> None:
        mortal = Place(Mortal(place.storage, life), place.key)
        saver_of(mortal, machine, ranks, state_of(ranks, distinct())).restore()
        for step in steps:
            save_one(saver_of(mortal, machine, ranks, state_of(ranks, distinct(step))), step)

    succeeded(act, workers=1)


def writes_of_two_saves(tmp_path: Path) -> list[str]:
    life = Life()
    place = Place(in_memory(), "state")
    save(place, tmp_path / "before", 2, 4)
    one_rank(place, tmp_path / "counted", life, 6, 8)
    return life.writes


def all_deaths(check: Callable[[int, Any], None], num_writes: int) -> None:
    for number in range(num_writes):
        for when in ("before", "after"):
            check(number, when)


def test_a_crash_at_any_write_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # deaths in the thread that writes
    writes = writes_of_two_saves(tmp_path)
    kinds = {word.split()[0] for word in writes}
    assert kinds == {"upload", "create", "remove"}
    found: set[int] = set()

    def die(number: int, when: Any) -> None:
        shutil.rmtree(tmp_path / "dying", ignore_errors=True)
        place = Place(in_memory(), "state")
        save(place, tmp_path / "dying", 2, 4)
        life = Life(number, when)
        with pytest.raises((Death, RuntimeError)):
            one_rank(place, tmp_path / "dying" / "machine", life, 6, 8)
        assert life.is_over
        machine = tmp_path / "dying" / "next"
        step = restored(place, machine)
        is_committed = [w for w in life.writes[: number + (when == "after")] if w.startswith("create")]
        assert step == 4 + 2 * len(is_committed)
        found.add(step)
        save(place, machine, 10, 12)
        records = [name for name in place.names() if name.endswith(".json")]
        assert records == ["step-00000010.json", "step-00000012.json"]
        assert len(place.names()) == 4, "nothing is left of what died"
        assert restored(place, tmp_path / "dying" / "last") == 12

    all_deaths(die, len(writes))
    assert found == {4, 6, 8}
