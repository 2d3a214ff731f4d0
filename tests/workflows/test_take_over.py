"""Two runs at one artifact, and artifacts that go away: nothing is made twice or filed under a wrong address."""

import dataclasses
import time

import pytest

from cluster.local import LocalExecutor
from pipeline.artifact import read_json
from pipeline.errors import LeaseLostError
from pipeline.storage import FileStorage, Place
from tests.support.executors import Inline
from tests.support.toy_stages.source import config as source_config
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import coordinate, copies_plan, fabricate, toy_plan, toy_workflow, wait_until
from tests.workflows.conftest import Dlm
from workflows import coordinator, driver, runs
from workflows import lease as lease_module
from workflows.lease import Beating, Lease, acquire_lease, find_holder, lease_is_free
from workflows.store import ArtifactPlace, Store


def test_step_that_another_run_commits_between_the_look_and_the_lease_is_not_made_again(store: Store, log, monkeypatch):
    plan = toy_plan(log, ("source",))
    acquire = driver.acquire_lease

    def acquire_late(folder, purpose: str, give_up) -> Lease:
        if "step source" in purpose and not executions(log) and not (folder.parent / "COMMIT.json").exists():
            fabricate(store, plan, "source")
        return acquire(folder, purpose, give_up)

    monkeypatch.setattr(driver, "acquire_lease", acquire_late)
    states = coordinate(store, plan, Inline)
    assert states["source"].status == "cached"
    assert executions(log) == {}


def test_step_made_anew_takes_no_shard_over(store: Store, log):
    plan = copies_plan(log)
    assert coordinate(store, plan, Inline)["copies"].status == "committed"
    salted = dataclasses.replace(plan.step("copies"), salt="again", fingerprint="a" * 64)
    again = dataclasses.replace(plan, steps=[plan.step("letters"), salted])
    assert coordinate(store, again, Inline)["copies"].status == "committed"
    assert {name: count for name, count in executions(log).items() if name[-1].isdigit()} == dict.fromkeys(
        ["copies-000", "copies-001", "copies-002"], 2
    )


def test_accepted_artifact_that_is_gone_is_not_made_by_other_code_under_its_address(
    store: Store, log, dlm: Dlm, monkeypatch
):
    settings = [word for step in toy_workflow().steps for word in ("--set", f"{step.name}.log={log}")]
    assert dlm("run", "toy", "--executor", "local", "--run-id", "r1", *settings).code == 0
    monkeypatch.setattr(source_config, "STAGE", dataclasses.replace(source_config.STAGE, code_version=2))
    assert dlm("resume", "r1", "--accept-drift", "source", "--accept-drift", "aside").code == 0
    plan = runs.frozen_plan(store.run("r1"))
    place = store.artifact("toy-source", plan.step("source").fingerprint)
    place.directory.remove()
    before = executions(log)
    states = coordinate(store, store.run("r1"), Inline)
    assert states["source"].status == "failed"
    assert "--rebuild source" in states["source"].reason
    assert place.committed() is None
    assert executions(log) == before


def beats_again(folder: Place) -> bool:
    """Whether the lease on a folder is heard of again, however late."""
    heartbeat = folder / "000001.heartbeat"
    before = heartbeat.modified()
    wait_until(lambda: heartbeat.modified() > before, f"{heartbeat} is younger", 60.0)
    return True


@pytest.fixture
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lease_module, "_LOOK_S", 0.05)


def test_leases_are_kept_alive_while_an_executor_starts(store: Store, log, fast_beats):
    plan = toy_plan(log, ("source",))
    run = runs.create_run(store, plan, "local", "r1")
    held = (run.lease_dir, store.artifact("toy-source", plan.step("source").fingerprint).lease_dir)
    beaten: list[bool] = []

    def start_slowly() -> Inline:
        beaten.extend(map(beats_again, held))
        return Inline()

    assert coordinate(store, run, start_slowly)["source"].status == "committed"
    assert beaten == [True, True]


def test_leases_are_kept_alive_while_many_shards_are_looked_at(store: Store, log, fast_beats, monkeypatch):
    plan = copies_plan(log)
    run = runs.create_run(store, plan, "local", "r1")
    look, beaten = ArtifactPlace.kept_shards, list[bool]()

    def look_slowly(place: ArtifactPlace, listed):
        beaten.extend(map(beats_again, (run.lease_dir, place.lease_dir)))
        return look(place, listed)

    monkeypatch.setattr(ArtifactPlace, "kept_shards", look_slowly)
    assert coordinate(store, run, Inline)["copies"].status == "committed"
    assert beaten == [True, True]


def test_lease_that_was_lost_meanwhile_is_met_by_the_next_beat(store: Store, fast_beats):
    own = acquire_lease(store.run_place("r1").lease_dir, "run")
    beating = Beating()
    with beating.meanwhile(own, []):
        own.release()
        acquire_lease(own.folder, "another")
        time.sleep(0.3)
    time.sleep(0.15)
    with pytest.raises(LeaseLostError):
        beating.beat(own, [])


def test_release_of_a_lease_that_was_deleted_leaves_nothing_that_would_free_the_next_one(store: Store):
    run = store.run_place("r1")
    old = acquire_lease(run.lease_dir, "old")
    run.directory.remove()
    old.release()
    assert not run.directory.exists()
    new = acquire_lease(run.lease_dir, "new")
    assert new.epoch == old.epoch
    old.release()
    assert not lease_is_free(run.lease_dir)
    new.release()
    assert lease_is_free(run.lease_dir)


def test_lease_that_was_deleted_is_not_the_next_one_of_its_epoch(store: Store):
    folder = store.artifact("toy", "a" * 64).lease_dir
    zombie = acquire_lease(folder, "zombie")
    folder.remove()
    heir = acquire_lease(folder, "heir")
    assert zombie.epoch == heir.epoch
    for use in (zombie.check, zombie.heartbeat):
        with pytest.raises(LeaseLostError, match="epoch 1 was deleted"):
            use()
    heir.heartbeat()


def test_lease_that_was_taken_although_the_storage_did_not_answer_is_given_up(store: Store, monkeypatch):
    folder = store.artifact("toy", "a" * 64).lease_dir
    create = FileStorage.create

    def create_without_answer(storage: FileStorage, key: str, data: bytes) -> bool:
        create(storage, key, data)
        raise ConnectionError("no answer")

    monkeypatch.setattr(FileStorage, "create", create_without_answer)
    with pytest.raises(ConnectionError):
        acquire_lease(folder, "step")
    monkeypatch.undo()
    assert acquire_lease(folder, "step").epoch == 2


@pytest.mark.parametrize("times", [1, 3])
def test_lease_that_goes_away_between_the_listing_and_the_look_is_looked_for_again(store: Store, monkeypatch, times):
    folder = store.artifact("toy", "a" * 64).lease_dir
    acquire_lease(folder, "gc")
    listed, left = folder.names(), [times]
    folder.remove()
    names = FileStorage.names

    def old_names(storage: FileStorage, key: str) -> list[str]:
        left[0] -= 1
        return listed if left[0] >= 0 else names(storage, key)

    monkeypatch.setattr(FileStorage, "names", old_names)
    assert find_holder(folder) is None
    left[0] = times
    monkeypatch.setattr(lease_module, "_VANISHED_S", -1.0)
    with pytest.raises(FileNotFoundError):
        find_holder(folder)


def test_lease_of_one_step_that_is_lost_is_the_matter_of_that_step_alone(store: Store):
    own = acquire_lease(store.run_place("r1").lease_dir, "run")
    first = acquire_lease(store.artifact("toy", "a" * 64).lease_dir, "step a")
    second = acquire_lease(store.artifact("toy", "b" * 64).lease_dir, "step b")
    first.release()
    acquire_lease(first.folder, "another")
    assert Beating().beat(own, [first, second]) == [first]


def test_every_start_of_a_shard_reports_to_a_place_of_its_own(store: Store, log, no_backoff):
    seen: list[str] = []

    class Noting(Inline):
        def start(self, call) -> None:
            seen.append(call.payload["work"])
            super().start(call)

    coordinate(store, copies_plan(log, trouble="code", where="copies-001", times=2), Noting)
    of_shard = [work for work in seen if "copies-001" in work]
    assert len(of_shard) == len(set(of_shard)) == 3


@pytest.mark.parametrize("executor", [Inline, LocalExecutor])
def test_failure_is_written_down_without_the_secrets_of_the_environment(store: Store, log, monkeypatch, executor):
    secret = " ".join(["copies-002", "does", "not", "like"])  # the store has a snapshot of this file too
    monkeypatch.setenv("SOME_SERVICE_TOKEN", secret)
    run = runs.create_run(store, copies_plan(log, trouble="user", where="copies-002"), "local", "r1")
    states = coordinate(store, run, executor)
    assert states["copies"].failure.message == "shard 002: *** its settings"
    texts = {path: path.read_text(errors="replace") for path in store.root.path.rglob("*") if path.is_file()}
    assert [path for path, text in texts.items() if secret in text] == []
    logs = [text for path, text in texts.items() if path.suffix == ".log"]
    assert any("UserError: *** its settings" in text for text in logs) is (executor is LocalExecutor)
    assert read_json(run.directory / "run.json")["executor"] == "local"


@pytest.mark.parametrize(("is_wanted_again", "status"), [(True, "succeeded"), (False, "cancelled")])
def test_request_to_cancel_outlives_starts_that_nobody_asked_for(store: Store, log, is_wanted_again, status):
    plan = toy_plan(log, ("source",))
    run = runs.create_run(store, plan, "local", "r1")
    coordinator.CancelFile(run.cancel_file).request(1.0, is_cancel=True)
    options = coordinator.Options(is_wanted_again=is_wanted_again)
    driven = coordinator.Coordinator(store, run, plan, Inline, lambda states: None, options)
    driven.run()
    assert driven.status == status
    assert executions(log) == ({"source": 1} if is_wanted_again else {})


def test_request_to_stop_of_an_earlier_attempt_is_forgotten_by_any_start(store: Store, log):
    plan = toy_plan(log, ("source",))
    run = runs.create_run(store, plan, "local", "r1")
    coordinator.CancelFile(run.cancel_file).request()
    options = coordinator.Options(is_wanted_again=False)
    assert (
        coordinator.Coordinator(store, run, plan, Inline, lambda states: None, options).run()[0].status == "committed"
    )
