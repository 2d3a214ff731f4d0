import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.artifact import read_json
from pipeline.errors import CorruptionError, UserError
from pipeline.storage import FileStorage, Place
from tests.support import races
from tests.support.races import finished_attempt, is_fenced, place_at
from tests.support.toy_workflow import wait_until
from workflows.lease import (
    STALE_AFTER_S,
    Lease,
    LeaseHeldError,
    Owner,
    _started_at,
    acquire_lease,
    lease_is_free,
)
from workflows.store import ArtifactPlace, EventLog, RunPlace, Store, open_store

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def place(store: Store) -> ArtifactPlace:
    return store.artifact("toy", "f" * 64)


def silence(lease: Lease, for_s: float) -> None:
    """As if the last heartbeat had been so long ago."""
    past = lease._heartbeat.modified() - for_s
    os.utime(lease._heartbeat.path, (past, past))


def move_owner(lease: Lease, **changes: Any) -> None:
    """As if another process had taken the lease."""
    path = lease.folder.path / f"{lease.epoch:06d}.json"
    path.write_text(json.dumps({**read_json(path), **changes}))


def run_together(*calls: tuple[Callable[..., None], tuple[Any, ...]]) -> list[tuple[int, Any]]:
    """Run functions in processes of their own, with a barrier and a queue for answers; what they answered."""
    barrier, answers = SPAWN.Barrier(len(calls)), SPAWN.SimpleQueue()
    processes = [SPAWN.Process(target=function, args=(*args, barrier, answers)) for function, args in calls]
    for process in processes:
        process.start()
    found: list[tuple[int, Any]] = []
    while any(process.is_alive() for process in processes) or not answers.empty():
        while not answers.empty():
            found.append(answers.get())
        for process in processes:
            process.join(0.02)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return found


# --- leases ---------------------------------------------------------------------------------------------------------


def test_lease_race_has_exactly_one_winner_an_epoch(tmp_path: Path):
    found = run_together(*[(races.race_for_lease, (tmp_path / "lease",))] * 5)
    assert sorted(found) == [(number, number + 1) for number in range(races.NUM_ROUNDS)]


def test_lease_that_is_fresh_is_refused_naming_its_holder(place: ArtifactPlace):
    acquire_lease(place.lease_dir, "training of run r1")
    assert not lease_is_free(place.lease_dir)
    with pytest.raises(LeaseHeldError, match=rf"process {os.getpid()}.*training of run r1"):
        acquire_lease(place.lease_dir, "another")


def test_lease_refused_leaves_the_holder_undisturbed(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "first")
    with pytest.raises(LeaseHeldError):
        acquire_lease(place.lease_dir, "second")
    lease.heartbeat()
    assert len(place.lease_dir.names()) == 2


def test_lease_that_was_released_is_taken_over(place: ArtifactPlace):
    acquire_lease(place.lease_dir, "first").release()
    assert lease_is_free(place.lease_dir)
    assert acquire_lease(place.lease_dir, "second").epoch == 2


def test_lease_of_a_dead_process_is_taken_over_at_once(place: ArtifactPlace):
    process = SPAWN.Process(target=races.hold_and_vanish, args=(place.lease_dir,))
    process.start()
    process.join()
    assert acquire_lease(place.lease_dir, "second").epoch == 2


def test_lease_of_a_dead_process_that_nobody_waited_for_is_taken_over(place: ArtifactPlace):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    observed = psutil.Process(process.pid)
    owner = dataclasses.replace(Owner.this_process(), pid=process.pid, started_at=_started_at(process.pid))
    wait_until(lambda: observed.status() == psutil.STATUS_ZOMBIE, "the process has ended")
    assert owner.is_dead()
    process.wait()
    assert owner.is_dead()


def test_lease_of_a_process_whose_number_was_reused_is_taken_over(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "first")
    move_owner(lease, started_at=Owner.this_process().started_at - 1000.0)
    assert acquire_lease(place.lease_dir, "second").epoch == 2


def test_lease_of_another_host_is_judged_by_its_heartbeat_alone(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "first")
    move_owner(lease, host="elsewhere", pid=2**22 + 1)
    silence(lease, STALE_AFTER_S - 20.0)
    with pytest.raises(LeaseHeldError, match="elsewhere"):
        acquire_lease(place.lease_dir, "second")
    silence(lease, 40.0)
    assert acquire_lease(place.lease_dir, "second").epoch == 2


def test_lease_with_an_old_heartbeat_is_taken_over_from_a_live_process(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "first")
    silence(lease, STALE_AFTER_S + 1.0)
    assert lease_is_free(place.lease_dir)
    assert acquire_lease(place.lease_dir, "second").epoch == 2


def test_lease_heartbeat_keeps_it(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "first")
    silence(lease, STALE_AFTER_S + 1.0)
    lease.heartbeat()
    assert not lease_is_free(place.lease_dir)


def test_lease_without_a_first_heartbeat_is_still_held(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "first")
    lease._heartbeat.remove()
    assert not lease_is_free(place.lease_dir)


def test_lease_on_nothing_is_free(tmp_path: Path):
    assert lease_is_free(place_at(tmp_path / "nothing"))


def test_zombie_with_an_older_epoch_can_do_nothing_more(place: ArtifactPlace):
    zombie = acquire_lease(place.lease_dir, "zombie")
    attempt = finished_attempt(place, zombie, "old")
    silence(zombie, STALE_AFTER_S + 1.0)
    heir = acquire_lease(place.lease_dir, "heir")
    assert is_fenced(zombie.check)
    assert is_fenced(zombie.heartbeat)
    assert is_fenced(lambda: place.commit(attempt, zombie, "r1"))
    assert is_fenced(lambda: place.commit_shard("0", attempt, zombie))
    assert place.committed() is None
    assert place.committed_shards() == {}
    zombie.release()
    assert not lease_is_free(place.lease_dir), "the release of an old epoch must not free the new one"
    heir.heartbeat()
    assert place.commit(finished_attempt(place, heir, "new"), heir, "r2").name.startswith("000002")


# --- commits --------------------------------------------------------------------------------------------------------


def test_commit_race_has_one_winner_and_readers_never_see_a_part(tmp_path: Path):
    writers = [(races.race_to_commit, (tmp_path, name)) for name in ("a", "b")]
    found = run_together(*writers, (races.read_all_the_time, (tmp_path,)))
    seen: dict[int, set[str]] = defaultdict(set)
    for number, committed in found:
        seen[number].add(committed)
    assert len(found) == 3 * races.NUM_PLACES
    assert [len(seen[number]) for number in range(races.NUM_PLACES)] == [1] * races.NUM_PLACES


def test_commit_of_an_unfinished_attempt_is_refused(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "test")
    attempt = place.new_attempt(lease)
    attempt.path.mkdir(parents=True)
    (attempt.path / "value.txt").write_text("1")
    with pytest.raises(UserError, match="not a finished artifact"):
        place.commit(attempt, lease, "r1")
    finished = finished_attempt(place, lease, "text")
    (finished.path / "value.txt").write_text("cut")
    with pytest.raises(CorruptionError, match=r"value\.txt has 3 bytes"):
        place.commit(finished, lease, "r1")
    assert place.committed() is None


def test_commit_of_a_shard_counts_once(place: ArtifactPlace):
    lease = acquire_lease(place.lease_dir, "test")
    first, second = finished_attempt(place, lease, "1"), finished_attempt(place, lease, "2")
    assert place.commit_shard("0", first, lease) == first
    assert place.commit_shard("0", second, lease) == first
    assert place.committed_shards() == {"0": first}


def taken_over(
    place: ArtifactPlace, stalled: Lease, monkeypatch: pytest.MonkeyPatch, then: Callable[[Lease], object]
) -> list[Lease]:
    """Another coordinator takes over between the next commit's look at its lease and its link, and does something."""
    heirs: list[Lease] = []

    create = FileStorage.create

    def wake_up_too_late(storage: FileStorage, key: str, data: bytes) -> bool:
        monkeypatch.setattr(FileStorage, "create", create)
        silence(stalled, STALE_AFTER_S + 1.0)
        heirs.append(acquire_lease(place.lease_dir, "heir"))
        then(heirs[0])
        return create(storage, key, data)

    monkeypatch.setattr(FileStorage, "create", wake_up_too_late)
    return heirs


def test_commit_of_a_shard_by_a_coordinator_that_stalled_gives_way_to_the_newest(
    place: ArtifactPlace, monkeypatch: pytest.MonkeyPatch
):
    stalled = acquire_lease(place.lease_dir, "stalled")
    old = finished_attempt(place, stalled, "old", {"name": "0", "identity": "old"})
    heirs = taken_over(place, stalled, monkeypatch, lambda heir: None)
    place.commit_shard("0", old, stalled)
    (heir,) = heirs
    shard = {"name": "0", "identity": "new"}
    new, same = (finished_attempt(place, heir, "new", shard) for _ in range(2))
    assert place.commit_shard("0", new, heir) == new
    assert place.commit_shard("0", same, heir) == new
    assert place.committed_shards() == {"0": new}


def test_commit_of_a_shard_that_finds_another_of_a_newer_coordinator_is_refused(
    place: ArtifactPlace, monkeypatch: pytest.MonkeyPatch
):
    stalled = acquire_lease(place.lease_dir, "stalled")
    old = finished_attempt(place, stalled, "old", {"name": "0", "identity": "old"})
    newer: list[Place] = []

    def commit_newer(heir: Lease) -> None:
        newer.append(finished_attempt(place, heir, "new", {"name": "0", "identity": "new"}))
        place.commit_shard("0", newer[0], heir)

    taken_over(place, stalled, monkeypatch, commit_newer)
    assert is_fenced(lambda: place.commit_shard("0", old, stalled))
    assert place.committed_shards() == {"0": newer[0]}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"directory": 7}', '{"directory": "../../out"}', "null"])
def test_record_of_a_shard_that_is_damaged_is_dropped(place: ArtifactPlace, content: str):
    lease = acquire_lease(place.lease_dir, "test")
    shard = finished_attempt(place, lease, "1")
    place.commit_shard("0", shard, lease)
    (place.directory.path / "shards" / "0.json").write_text(content)
    assert place.committed_shards() == {}
    assert place.commit_shard("0", shard, lease) == shard


@pytest.mark.parametrize("damage", ["missing file", "short file", "no manifest", "bad manifest", "bad commit"])
def test_committed_but_damaged_artifact_is_reported_with_what_to_delete(place: ArtifactPlace, damage: str):
    lease = acquire_lease(place.lease_dir, "test")
    committed = place.commit(finished_attempt(place, lease, "text"), lease, "r1")
    if damage == "missing file":
        (committed.path / "value.txt").unlink()
    elif damage == "short file":
        (committed.path / "value.txt").write_text("t")
    elif damage == "no manifest":
        (committed.path / "manifest.json").unlink()
    elif damage == "bad manifest":
        (committed.path / "manifest.json").write_text('{"schema_version": 1, "stage"')
    else:
        (place.directory.path / "COMMIT.json").write_bytes(b"\0" * 80)
    with pytest.raises(CorruptionError) as error:
        place.committed()
    assert f"delete {place.directory.path}" in str(error.value)


# --- crashes --------------------------------------------------------------------------------------------------------

_CALLS = ("link", "replace", "rename", "fsync", "unlink", "mkdir", "open", "utime")


class Crash(BaseException):
    """The process is gone; no handler of Exception sees it."""


@contextmanager
def crash_at(monkeypatch: pytest.MonkeyPatch, call: int, after: bool) -> Iterator[list[str]]:
    """Die at the ``call``-th call that changes the file system, before or after it is done; yields the calls made.

    A dead process cleans nothing up: every later call fails as well.
    """
    made: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return original(*args, **kwargs)
            made.append(name)
            if len(made) < call:
                return original(*args, **kwargs)
            if len(made) == call and after:
                original(*args, **kwargs)
            raise Crash(f"call {len(made)}, {name}")

        return function

    with monkeypatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, wrapped(name))
        yield made


def survive_every_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Any, check: Any) -> list[str]:
    """Run ``work(root)`` with a crash at each of its calls, then ``check(root, whole)`` as another process sees it."""
    with crash_at(monkeypatch, 10**6, False) as made:
        work(tmp_path / "whole")
    check(tmp_path / "whole", True)
    for call in range(1, len(made) + 1):
        for after in (False, True):
            root = tmp_path / f"{call}-{after}"
            with crash_at(monkeypatch, call, after), pytest.raises(Crash):
                work(root)
            check(root, False)
    return made


def test_commit_with_a_crash_at_every_call_is_whole_or_absent_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    outcomes: list[bool] = []

    def work(root: Path) -> None:
        place = ArtifactPlace(place_at(root))
        lease = acquire_lease(place.lease_dir, "test")
        place.commit(finished_attempt(place, lease, "text"), lease, "r1")
        lease.release()

    def check(root: Path, whole: bool) -> None:
        place = ArtifactPlace(place_at(root))
        committed = place.committed()
        assert committed is not None or not whole
        outcomes.append(committed is not None)
        with monkeypatch.context() as patch:
            patch.setattr(Owner, "is_dead", lambda owner: True)
            work(root)
        again = place.committed()
        assert again is not None
        assert (again.path / "value.txt").read_text() == "text"
        assert committed in (None, again), "what was committed stays"

    made = survive_every_crash(monkeypatch, tmp_path, work, check)
    assert made.count("link") == 2
    assert {True, False} == set(outcomes)


def test_shard_commit_with_a_crash_at_every_call_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outcomes: list[bool] = []

    def work(root: Path) -> None:
        place = ArtifactPlace(place_at(root))
        lease = acquire_lease(place.lease_dir, "test")
        place.commit_shard("7", finished_attempt(place, lease, "text"), lease)

    def check(root: Path, whole: bool) -> None:
        shards = ArtifactPlace(place_at(root)).committed_shards()
        assert set(shards) <= {"7"}
        assert shards or not whole
        outcomes.append(bool(shards))
        for directory in shards.values():
            assert (directory.path / "value.txt").read_text() == "text"

    survive_every_crash(monkeypatch, tmp_path, work, check)
    assert {True, False} == set(outcomes)


def test_run_creation_with_a_crash_at_every_call_leaves_a_whole_plan_or_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = {"steps": list(range(500))}
    outcomes: list[bool] = []

    def work(root: Path) -> None:
        run = open_store(root).create_run("r1", plan)
        EventLog(run, 1).write("run_started")

    def check(root: Path, whole: bool) -> None:
        runs = open_store(root).runs()
        assert [run.plan() for run in runs] in ([], [plan])
        assert all(event["kind"] == "run_started" for run in runs for event in run.events())
        assert runs or not whole
        outcomes.append(bool(runs))
        if not runs:
            work(root)
            assert open_store(root).run("r1").plan() == plan

    survive_every_crash(monkeypatch, tmp_path, work, check)
    assert {True, False} == set(outcomes)


# --- runs -----------------------------------------------------------------------------------------------------------

BAD_IDS = ["", ".", "..", "../x", "a/b", "/tmp/x", "a\0b", "-rf", ".hidden", "a b", "é", "a\n", "x" * 129]


@pytest.mark.parametrize("run_id", BAD_IDS)
def test_run_id_that_is_no_plain_name_is_refused_and_nothing_written(store: Store, run_id: str):
    with pytest.raises(UserError, match="run id"):
        store.create_run(run_id, {})
    with pytest.raises(UserError, match="run id"):
        store.run(run_id)
    assert not store.root.path.exists()


@pytest.mark.parametrize("run_id", ["r", "7", "quick-start_2.1", "x" * 128])
def test_run_id_that_is_a_plain_name_is_taken(store: Store, run_id: str):
    store.create_run(run_id, {"a": 1})
    assert store.run(run_id).plan() == {"a": 1}


def test_run_created_twice_is_refused_and_the_first_plan_stays(store: Store):
    store.create_run("r1", {"a": 1})
    with pytest.raises(UserError, match="dlm resume r1"):
        store.create_run("r1", {"a": 2})
    assert store.run("r1").plan() == {"a": 1}


def test_run_that_does_not_exist_is_refused_naming_those_that_do(store: Store):
    with pytest.raises(UserError, match="none in this store"):
        store.run("r1")
    store.create_run("r2", {})
    with pytest.raises(UserError, match=r"'r1'.*r2"):
        store.run("r1")


def test_runs_are_listed_newest_first(store: Store):
    for age_s, run_id in enumerate(["c", "a", "b"]):
        path = store.create_run(run_id, {}).directory.path / "run.json"
        os.utime(path, (1e9 - age_s, 1e9 - age_s))
    assert [run.run_id for run in store.runs()] == ["c", "a", "b"]


def test_events_tell_no_secret_and_keep_what_is_no_text(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "12345678")
    run = store.run_place("r1")
    events = EventLog(run, 1)
    events.note("step_warning", "a", message="after its end: 12345678 is wrong", epoch=12345678)
    events.write("step_retry", "a", failure={"message": "12345678", "ranks": ["12345678", 3]}, backoff_s=0.5)
    noted, written = run.events()
    assert (noted["message"], noted["epoch"]) == ("after its end: *** is wrong", 12345678)
    assert (written["failure"], written["backoff_s"]) == ({"message": "***", "ranks": ["***", 3]}, 0.5)


def test_events_of_two_attempts_come_in_order(store: Store):
    run = store.create_run("r1", {})
    first, second = EventLog(run, 1), EventLog(run, 2)
    second.write("c")
    first.write("a")
    first.write("b", step="s", figure=1)
    assert [event["kind"] for event in run.events()] == ["a", "b", "c"]


def test_events_of_a_second_coordinator_of_the_same_attempt_are_refused(store: Store):
    run: RunPlace = store.create_run("r1", {})
    EventLog(run, 1).write("a")
    assert is_fenced(lambda: EventLog(run, 1).write("a"))


def test_events_about_steps_that_were_there_are_one_file_and_told_one_by_one_before_what_follows(store: Store):
    run = store.create_run("r1", {})
    log = EventLog(run, 1)
    log.cached("a", "aaaa")
    log.cached("b", "bbbb")
    log.write("step_started", "c")
    log.cached("d", "dddd")
    log.flush()
    log.flush()
    told = [(event["kind"], event["step"], event.get("artifact")) for event in run.events()]
    assert told == [
        ("step_cached", "a", "aaaa"),
        ("step_cached", "b", "bbbb"),
        ("step_started", "c", None),
        ("step_cached", "d", "dddd"),
    ]
    assert len((run.directory / "events").names()) == 3
