import json
import os
import re
import shutil
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import CorruptionError, LeaseLostError
from pipeline.storage import FileStorage, Place
from tests.support.executors import NUM_CPUS
from tests.support.toy_workflow import amended, coordinate, copies_plan, fabricate, toy_plan
from tests.workflows.conftest import Dlm
from workflows import gc, runs
from workflows.amendments import Wishes
from workflows.gc import collect, find_garbage
from workflows.lease import STALE_AFTER_S, LeaseHeldError, acquire_lease
from workflows.plan import Plan, artifact_of
from workflows.store import Store


def tree(store: Store) -> dict[str, bytes]:
    """Every file of a store with its bytes."""
    root = store.root.path
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def found(store: Store, **options) -> set[tuple[str, str]]:
    return {(one.what, one.place.key) for one in find_garbage(store, options.pop("older_than_s", 0.0), **options)}


def address(store: Store, plan: Plan, step: str) -> str:
    return artifact_of(plan.step(step), store).directory.key


@pytest.fixture
def used(store: Store) -> Plan:
    """A plan whose artifacts are there, of the run r1."""
    plan = toy_plan()
    runs.create_run(store, plan, "local", "r1")
    fabricate(store, plan)
    return plan


def put(folder: Place, name: str, text: str = "x" * 100) -> None:
    (folder / name).write(text.encode())


# --- what goes, what stays --------------------------------------------------------------------------------------------


def test_gc_of_a_store_whose_runs_need_everything_finds_nothing(store, used):
    assert found(store) == set()


def test_gc_takes_artifacts_that_no_run_refers_to_and_leaves_those_of_others(store, used):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double", "total")
    expected = {("artifact", address(store, other, name)) for name in ("double", "total")}
    assert found(store) == expected
    before = set(tree(store))
    assert {one.place.key for one in collect(store, find_garbage(store, 0.0))} == {key for _, key in expected}
    gone = before - set(tree(store))
    assert gone
    assert all(any(path.startswith(f"{key}/") for _, key in expected) for path in gone)
    assert not artifact_of(other.step("double"), store).directory.exists()
    assert all(artifact_of(step, store).committed() is not None for step in used.steps)


def test_gc_after_a_run_was_deleted_takes_what_it_alone_needed(store, used):
    other = toy_plan(total__number=5)
    runs.create_run(store, other, "local", "r2")
    fabricate(store, other, "total")
    assert found(store) == set()
    shutil.rmtree(store.root.path / "runs" / "r2")
    assert found(store) == {("artifact", address(store, other, "total"))}
    shutil.rmtree(store.root.path / "runs" / "r1")
    assert {what for what, _ in found(store)} == {"artifact", "code"}


def test_gc_keeps_what_the_plan_before_an_amendment_and_the_plan_after_it_need(store, used):
    anew = amended(store, store.run("r1"), Wishes(rebuild=("double",)))
    fabricate(store, anew, "double", "total")
    assert found(store) == set()


def test_gc_dry_run_deletes_nothing_and_says_what_it_would(dlm: Dlm, store, used):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double")
    before = tree(store)
    done = dlm("gc", "--dry-run", "--older-than", "0")
    assert (done.code, tree(store)) == (0, before)
    assert address(store, other, "double") in done.stdout
    assert "1 would be deleted" in done.stdout
    value = json.loads(dlm("gc", "--dry-run", "--older-than", "0", "--json").stdout)
    size = sum(len(data) for path, data in before.items() if path.startswith(address(store, other, "double")))
    assert (value["is_dry_run"], value["freed_bytes"], value["deleted"][0]["bytes"]) == (True, size, size)
    assert dlm("gc", "--older-than", "0").code == 0
    assert len(tree(store)) < len(before)
    assert "0 deleted" in dlm("gc", "--older-than", "0").stdout


def test_gc_leaves_what_is_young_and_what_is_leased(dlm: Dlm, store, used):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double")
    assert json.loads(dlm("gc", "--dry-run", "--json").stdout)["deleted"] == []  # a week by default
    place = artifact_of(other.step("double"), store)
    for path in place.directory.path.rglob("*"):
        os.utime(path, (1, time.time() - 3 * gc.DAY_S))
    assert found(store, older_than_s=4 * gc.DAY_S) == set()
    assert len(found(store, older_than_s=2 * gc.DAY_S)) == 1
    acquire_lease(place.lease_dir, "test")
    assert found(store) == set()


def test_gc_fences_who_held_the_lease_before_at_every_moment_and_leaves_nothing(store, used, monkeypatch):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double")
    place = artifact_of(other.step("double"), store)
    zombie = acquire_lease(place.lease_dir, "zombie")
    zombie.release()  # as far as anybody else knows
    remove, moments = FileStorage.remove, []

    def remove_and_look(storage: FileStorage, key: str) -> None:
        remove(storage, key)
        if key.startswith(place.directory.key):
            moments.append(key)
            for use in (zombie.check, zombie.heartbeat):
                with pytest.raises(LeaseLostError):
                    use()

    monkeypatch.setattr(FileStorage, "remove", remove_and_look)
    collect(store, find_garbage(store, 0.0))
    assert len(moments) > 5
    assert not place.directory.exists()
    with pytest.raises(LeaseLostError, match="was deleted"):
        zombie.heartbeat()
    assert not place.directory.exists()


def test_gc_leaves_the_lease_of_who_begins_anew_when_its_own_is_gone(store, used, monkeypatch):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double")
    place = artifact_of(other.step("double"), store)
    remove, heirs = FileStorage.remove, []

    def remove_and_begin(storage: FileStorage, key: str) -> None:
        remove(storage, key)
        if key.startswith(place.lease_dir.key) and not heirs:
            with suppress(LeaseHeldError):
                heirs.append(acquire_lease(place.lease_dir, "heir"))

    monkeypatch.setattr(FileStorage, "remove", remove_and_begin)
    collect(store, find_garbage(store, 0.0))
    heirs[0].heartbeat()


def test_gc_leaves_what_is_leased_after_it_looked(store, used):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double")
    seen = find_garbage(store, 0.0)
    acquire_lease(artifact_of(other.step("double"), store).lease_dir, "test")
    assert collect(store, seen) == []
    assert artifact_of(other.step("double"), store).committed() is not None


def test_gc_leaves_what_a_run_needs_that_was_created_after_it_looked(store, used):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double")
    seen = find_garbage(store, 0.0)
    assert len(seen) == 1
    runs.create_run(store, other, "local", "r2")
    assert collect(store, seen) == []
    assert artifact_of(other.step("double"), store).committed() is not None


def test_gc_leaves_what_a_run_needs_that_was_created_while_it_deleted(store, used, monkeypatch):
    others = [toy_plan(double__number=number) for number in (5, 6)]
    for other in others:
        fabricate(store, other, "double")
    remove = gc._remove

    def remove_and_create(one) -> bool:
        (needed,) = [plan for plan in others if address(store, plan, "double") != one.place.key]
        runs.create_run(store, needed, "local", "r2")
        return remove(one)

    seen = find_garbage(store, 0.0)
    assert len(seen) == 2
    monkeypatch.setattr(gc, "_remove", remove_and_create)
    assert len(collect(store, seen)) == 1
    assert [artifact_of(plan.step("double"), store).directory.exists() for plan in others].count(True) == 1


def test_gc_of_a_committed_artifact_takes_other_attempts_and_state(store, used):
    place = artifact_of(used.step("double"), store)
    put(place.directory / "attempts" / "000001-aaaaaaaa", "half")
    put(place.state / "step-000100", "weights")
    keys = {("attempt", f"{place.directory.key}/attempts/000001-aaaaaaaa"), ("state", place.state.key)}
    assert found(store) == keys
    assert found(store, keep_state=True) == {one for one in keys if one[0] == "attempt"}
    collect(store, find_garbage(store, 0.0))
    assert found(store) == set()
    assert place.committed() is not None


def test_gc_leaves_all_of_an_artifact_that_a_run_has_not_finished(store):
    plan = toy_plan()
    runs.create_run(store, plan, "local", "r1")
    place = artifact_of(plan.step("double"), store)
    put(place.directory / "attempts" / "000001-aaaaaaaa-shards-1" / "0", "value.txt")
    put(place.state / "step-000100", "weights")
    put(place.directory / "shards", "0.json", json.dumps({"directory": "000001-aaaaaaaa-shards-1/0"}))
    assert found(store) == set()


def test_gc_leaves_a_damaged_artifact_of_a_run_to_its_user(store, used):
    place = artifact_of(used.step("double"), store)
    committed = place.committed()
    assert committed is not None
    (committed.path / "value.txt").unlink()
    assert found(store) == set()


def test_gc_with_a_run_that_cannot_be_read_deletes_nothing(dlm: Dlm, store, used):
    fabricate(store, toy_plan(double__number=5), "double")
    put(store.root / "runs" / "r2", "run.json", '{"plan": 3}')
    with pytest.raises(CorruptionError, match="plan of run r2 cannot be read"):
        find_garbage(store, 0.0)
    put(store.root / "runs" / "r2", "run.json", "{half")
    before = tree(store)
    assert dlm("gc", "--older-than", "0").code == 3
    assert tree(store) == before


def test_gc_takes_code_sweeps_and_staging_that_belong_to_nothing(store, used):
    put(store.root / "code", f"{'0' * 64}.zip")
    put(store.root / "sweeps", "s.json", json.dumps({"runs": ["s-1"]}))
    put(store.root / "sweeps", "t.json", json.dumps({"runs": ["r1"]}))
    for name in (".run.json.0a1b2c3d.tmp", ".clock-0a1b2c3d", ".reserve-0", ".mine"):
        put(store.root / "runs" / "r1", name)
    assert found(store) == {
        ("code", f"code/{'0' * 64}.zip"),
        ("sweep", "sweeps/s.json"),
        ("staging", "runs/r1/.run.json.0a1b2c3d.tmp"),
        ("staging", "runs/r1/.clock-0a1b2c3d"),
        ("staging", "runs/r1/.reserve-0"),
    }
    assert found(store, older_than_s=60.0) == set()
    assert len(collect(store, find_garbage(store, 0.0))) == 5
    assert find_garbage(store, 0.0) == []


def test_gc_where_there_is_no_store_is_refused(dlm: Dlm, tmp_path: Path):
    done = dlm("gc", "--store", str(tmp_path / "nowhere"), "--dry-run")
    assert (done.code, "no store" in done.stderr) == (2, True)
    assert not (tmp_path / "nowhere").exists()


# --- shards ---------------------------------------------------------------------------------------------------------


def local():
    from cluster.local import LocalExecutor

    return LocalExecutor(NUM_CPUS)


@pytest.fixture
def sharing(store: Store, log: Path) -> tuple[Plan, Plan]:
    """Two runs of a map; the second took shards over from the first."""
    plans = copies_plan(log, "abc"), copies_plan(log, "abcd")
    for number, plan in enumerate(plans, 1):
        states = coordinate(store, runs.create_run(store, plan, "local", f"r{number}"), local)
        assert states["copies"].status == "committed"
    return plans


def test_gc_keeps_shards_that_are_offered_and_takes_those_that_were_taken_over(store, sharing):
    first, second = (artifact_of(plan.step("copies"), store) for plan in sharing)
    before = {name: (first.directory / "attempts" / name).names() for name in (first.directory / "attempts").names()}
    assert len((store.root / "shards" / "toy-copies").names()) == 4
    collect(store, find_garbage(store, 0.0))
    assert {name: (first.directory / "attempts" / name).names() for name in before} == before
    left = (second.directory / "attempts").names()
    assert not [name for name in left if name.endswith("-adopted")]
    (own,) = [name for name in left if "-shards-" in name]
    assert (second.directory / "attempts" / own).names() == ["003"]
    assert (second.directory / "shards").names() == ["003.json"]
    assert find_garbage(store, 0.0) == []
    assert len((store.root / "shards" / "toy-copies").names()) == 4


def test_gc_of_the_artifact_that_shards_came_from_spares_who_took_them_over(store, sharing, log):
    first, second = sharing
    shutil.rmtree(store.root.path / "runs" / "r1")
    garbage = find_garbage(store, 0.0)
    assert ("artifact", address(store, first, "copies")) in {(one.what, one.place.key) for one in garbage}
    assert len([one for one in garbage if one.what == "record" and one.place.key.startswith("shards/")]) == 3
    collect(store, garbage)
    place = artifact_of(second.step("copies"), store)
    committed = place.committed()
    assert committed is not None
    assert len((store.root / "shards" / "toy-copies").names()) == 1
    assert find_garbage(store, 0.0) == []
    third = copies_plan(log, "abcde")
    assert coordinate(store, runs.create_run(store, third, "local", "r3"), local)["copies"].status == "committed"


def test_gc_counts_a_file_once_and_only_if_no_link_of_it_stays(dlm: Dlm, store, used):
    plans = [toy_plan(double__number=number) for number in (5, 6)]
    for plan in plans:
        fabricate(store, plan, "double")
    first, second = (artifact_of(plan.step("double"), store).directory for plan in plans)

    def freed() -> dict[str, int]:
        return {one.place.key: one.freed_bytes for one in find_garbage(store, 0.0)}

    before = freed()
    (first.path / "big").write_bytes(bytes(10_000))
    os.link(first.path / "big", first.path / "twice")
    assert sum(freed().values()) == sum(before.values()) + 10_000
    os.link(first.path / "big", store.root.path / "elsewhere")
    assert freed() == before
    os.rename(store.root.path / "elsewhere", second.path / "big")
    last = max(before, key=list(before).index)
    assert freed() == before | {last: before[last] + 10_000}
    value = json.loads(dlm("gc", "--dry-run", "--older-than", "0", "--json").stdout)
    assert value["freed_bytes"] == sum(row["bytes"] for row in value["deleted"]) == sum(freed().values())
    deleted = collect(store, find_garbage(store, 0.0))
    assert {one.place.key: one.freed_bytes for one in deleted} == before | {last: before[last] + 10_000}


def test_gc_that_has_to_leave_something_counts_no_bytes_that_it_shares(store, used):
    plans = [toy_plan(double__number=number) for number in (5, 6)]
    for plan in plans:
        fabricate(store, plan, "double")
    first, second = (artifact_of(plan.step("double"), store) for plan in plans)
    (first.directory.path / "big").write_bytes(bytes(10_000))
    os.link(first.directory.path / "big", second.directory.path / "big")
    garbage = find_garbage(store, 0.0)
    lease = acquire_lease((first if first.directory.key == garbage[0].place.key else second).lease_dir, "somebody")
    (deleted,) = collect(store, garbage)
    lease.release()
    assert deleted.freed_bytes == garbage[1].freed_bytes - 10_000


def test_gc_counts_what_lies_in_something_else_that_goes_once(store, used):
    other = toy_plan(double__number=5)
    fabricate(store, other, "double")
    folder = artifact_of(other.step("double"), store).directory
    put(folder, ".half.0123abcd.tmp")
    put(folder / "attempts" / "000001", ".part.0123abcd.tmp")
    found = find_garbage(store, 0.0)
    sizes = sorted((one.what, one.freed_bytes) for one in found)
    whole = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    assert sizes == [("artifact", whole), ("staging", 0), ("staging", 0)]
    assert sorted((one.what, one.freed_bytes) for one in collect(store, found)) == sizes
    assert not list(folder.path.rglob("*.tmp"))


# --- unlock ---------------------------------------------------------------------------------------------------------


def make_stale(folder: Place) -> None:
    """As if its holder had been silent, on another machine."""
    for name in folder.names():
        path = (folder / name).path
        if name.endswith(".json"):
            path.write_text(path.read_text().replace(f'"host": "{os.uname().nodename}"', '"host": "elsewhere"'))
        old = time.time() - STALE_AFTER_S - 5
        os.utime(path, (old, old))


def test_unlock_refuses_a_fresh_lease_and_says_who_and_how_long(dlm: Dlm, store):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    acquire_lease(run.lease_dir, "run r1")
    done = dlm("unlock", "r1")
    assert done.code == 5
    assert f"epoch 1, process {os.getpid()} on {os.uname().nodename} (run r1), heard of 0 s ago" in done.stdout
    ((when, left),) = re.findall(r"may be alive.*Try again at (\d\d:\d\d:\d\d), in (\d+) s", done.stderr)
    assert int(left) in (119, 120)
    due = datetime.now() + timedelta(seconds=120)
    assert when in {f"{due - timedelta(seconds=ago):%H:%M:%S}" for ago in range(10)}
    assert "Only where you have seen that its process is gone" in done.stderr
    assert "--force 1" in done.stderr
    assert "000001.released" not in run.lease_dir.names()
    wrong = dlm("unlock", "r1", "--force", "2")
    assert (wrong.code, "epoch 1" in wrong.stderr) == (2, True)
    assert "000001.released" not in run.lease_dir.names()
    assert dlm("unlock", "r1", "--force", "1").code == 0
    assert "000001.released" in run.lease_dir.names()
    assert acquire_lease(run.lease_dir, "next").epoch == 2


def test_unlock_releases_a_stale_lease_of_a_run_and_of_an_artifact(dlm: Dlm, store):
    plan = toy_plan()
    run = runs.create_run(store, plan, "local", "r1")
    artifact = artifact_of(plan.step("double"), store)
    for folder, name in ((run.lease_dir, "r1"), (artifact.lease_dir, artifact.address)):
        acquire_lease(folder, "work")
        make_stale(folder)
        done = dlm("unlock", name)
        assert (done.code, "elsewhere" in done.stdout, "released" in done.stdout) == (0, True, True)
        assert "000001.released" in folder.names()
        assert "nothing to release" in dlm("unlock", name).stdout


def test_unlock_releases_the_lease_of_a_dead_process(dlm: Dlm, store):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    assert "nobody ever held" in dlm("unlock", "r1").stdout
    acquire_lease(run.lease_dir, "run r1")
    record = run.lease_dir.path / "000001.json"
    value = json.loads(record.read_text())
    record.write_text(json.dumps(value | {"started_at": 1.0}))  # an earlier process with this number
    done = dlm("unlock", "r1")
    assert (done.code, "it is dead" in done.stdout) == (0, True)
    assert "000001.released" in run.lease_dir.names()


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("r9", "no run 'r9'"),
        ("../r1", "no address"),
        ("toy-double/xyz", "no address"),
        (f"toy/{'0' * 12}", "no artifact"),
    ],
)
def test_unlock_refuses_what_is_not_there(dlm: Dlm, store, what, word):
    done = dlm("unlock", what)
    assert (done.code, word in done.stderr) == (2, True)
    assert not store.root.path.exists()
