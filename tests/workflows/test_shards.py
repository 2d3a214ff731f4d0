"""Map steps: which shards run, how often, and what comes out."""

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.executor import Ended
from cluster.local import LocalExecutor
from pipeline.artifact import MANIFEST, load_manifest, open_artifact
from tests.support.executors import Inline
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import coordinate, copies_plan, wait_until
from workflows import runs
from workflows.coordinator import _POLL_S
from workflows.lease import acquire_lease
from workflows.plan import Plan
from workflows.shards import ShardRegistry
from workflows.state import StepState
from workflows.store import ArtifactPlace, RunPlace, Store, open_store
from workflows.summary import summarise

ONCE = dict.fromkeys(["copies-list", "copies-000", "copies-001", "copies-002", "copies-finish"], 1)


def text_of(state: StepState) -> str:
    """What a step made, its shards counted."""
    assert state.output is not None, state.failure
    text = (state.output.path / "text.txt").read_text()
    assert open_artifact(state.output.path).stats == {"codes": sum(map(ord, text)) // 2}
    return text


def place_of(store: Store, plan: Plan) -> ArtifactPlace:
    return store.artifact("toy-copies", plan.step("copies").fingerprint)


def events(store: Store, kind: str, run_id: str = "r1") -> list[dict]:
    return [event for event in store.run(run_id).events() if event["kind"] == kind]


def copied(store: Store, log: Path, text: str, run_id: str) -> dict[str, int]:
    """Run the map over a text to its end, check what comes out, and tell what was executed."""
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir()
    states = coordinate(store, runs.create_run(store, copies_plan(log, text), "local", run_id), Inline)
    assert text_of(states["copies"]) == "".join(2 * letter for letter in text)
    return executions(log)


# --- failures -------------------------------------------------------------------------------------------------------


def test_map_with_a_killed_shard_executes_only_that_one_again(store, log, executor, no_backoff):
    plan = copies_plan(log, trouble="kill", where="copies-001")
    states = coordinate(store, runs.create_run(store, plan, "local", "r1"), executor)
    assert text_of(states["copies"]) == "aabbcc"
    assert executions(log) == {**ONCE, "copies-001": 2}
    (retry,) = events(store, "shard_retry")
    assert (retry["shard"], retry["failure"]["error_class"]) == ("001", "infra")
    assert len(events(store, "step_started")) == 2, "the step itself was not started again"
    assert summarise(store, store.run("r1")).steps[1].status == "committed"


def test_map_with_a_shard_that_fails_three_times_names_it_and_keeps_the_others(store, log, executor, no_backoff):
    plan = copies_plan(log, trouble="kill", where="copies-001", times=3)
    run = runs.create_run(store, plan, "local", "r1")
    states = coordinate(store, run, executor)
    assert states["copies"].status == "failed"
    assert states["copies"].failure.message.startswith("shard 001 failed 3 times: ")
    assert states["copies"].failure.error_class == "poison"
    failed = {name: count for name, count in ONCE.items() if name != "copies-finish"}
    assert executions(log) == {**failed, "copies-001": 3}
    assert set(place_of(store, plan).committed_shards()) == {"000", "002"}
    states = coordinate(store, run, executor)
    assert text_of(states["copies"]) == "aabbcc"
    assert executions(log) == {**ONCE, "copies-list": 2, "copies-001": 4}


@pytest.mark.parametrize(
    ("trouble", "error_class"), [("code", "code"), ("memory", "memory"), ("connection", "transient")]
)
def test_map_with_a_shard_that_fails_is_tried_three_times_whatever_the_class(
    store, log, no_backoff, trouble, error_class
):
    twice = copies_plan(log, trouble=trouble, where="copies-00[02]", times=2)
    states = coordinate(store, runs.create_run(store, twice, "local", "r1"), Inline)
    assert text_of(states["copies"]) == "aabbcc"
    assert executions(log) == {**ONCE, "copies-000": 3, "copies-002": 3}
    assert sorted(event["shard"] for event in events(store, "shard_retry")) == ["000", "000", "002", "002"]

    always = copies_plan(log, text="dab", trouble=trouble, where="copies-000", times=99)
    states = coordinate(store, runs.create_run(store, always, "local", "r2"), Inline)
    assert states["copies"].failure.error_class == "poison"
    assert {e["failure"]["error_class"] for e in events(store, "shard_retry", "r2")} == {error_class}
    assert states["copies"].failure.message.startswith("shard 000 failed 3 times: copies-000 ")


@pytest.mark.parametrize(
    ("trouble", "status", "message"),
    [
        ("user", "failed", "shard 001: copies-001 does not like its settings"),
        ("numerics", "failed", "shard 001: copies-001 diverged"),
        ("corruption", "failed", "shard 001: copies-001 read what was not written"),
        ("stop", "stopped", "shard 001: copies-001 had enough"),
    ],
)
def test_map_with_a_final_failure_of_a_shard_ends_at_once(store, log, trouble, status, message):
    plan = copies_plan(log, trouble=trouble, where="copies-001")
    run = runs.create_run(store, plan, "local", "r1")
    states = coordinate(store, run, Inline)
    assert (states["copies"].status, states["copies"].reason) == (status, message)
    if status == "failed":
        assert states["copies"].failure.error_class == {"corruption": "code"}.get(trouble, trouble)
    assert executions(log) == {"copies-list": 1, "copies-000": 1, "copies-001": 1}
    assert text_of(coordinate(store, run, Inline)["copies"]) == "aabbcc"
    assert executions(log) == {**ONCE, "copies-list": 2, "copies-001": 2}


def test_map_waits_with_a_failed_shard_and_not_with_the_others(store, log, monkeypatch):
    monkeypatch.setattr("workflows.retries.BACKOFF_S", 0.3)
    executor = Inline()
    coordinate(store, copies_plan(log, trouble="code", where="copies-000"), lambda: executor)
    order = [key.partition("@")[0] for key in executor.started]
    assert order == ["letters", "copies-list", "copies-000", "copies-001", "copies-002", "copies-000", "copies-finish"]
    assert len(set(executor.started)) == len(executor.started)


def test_map_whose_lease_is_lost_to_another_run_is_no_failure_of_the_shard(store, log, no_backoff):
    plan = copies_plan(log, trouble="slow", where="copies-001")
    run = runs.create_run(store, plan, "local", "r1")
    heirs = []

    def take_over(states) -> None:
        copies = states[1]
        if not heirs and copies.progress.get("done") == 2 and (log / "copies-001").exists():
            copies.lease.release()
            heirs.append(acquire_lease(place_of(store, plan).lease_dir, "heir"))
            wait_until(lambda: (log / "copies-001").read_text().endswith("\n"), "the shard has told its number")
            os.kill(int((log / "copies-001").read_text()), signal.SIGKILL)
        if heirs and copies.status == "waiting":
            heirs[0].release()

    states = coordinate(store, run, lambda: LocalExecutor(4), take_over)
    assert text_of(states["copies"]) == "aabbcc"
    assert [e["shard"] for e in events(store, "shard_retry")] == ["001"]
    assert [e["failure"]["type"] for e in events(store, "step_retry")] == ["LeaseLostError"]


# --- the list of the shards -----------------------------------------------------------------------------------------


def interrupted(store: Store, log: Path, **changes) -> tuple[RunPlace, dict]:
    """A run that failed at its end, the record of shard 001 changed; and that record."""
    plan = copies_plan(log, trouble="user", where="copies-finish")
    run = runs.create_run(store, plan, "local", "r1")
    assert coordinate(store, run, Inline)["copies"].status == "failed"
    assert executions(log) == ONCE
    manifest = place_of(store, plan).committed_shards()["001"].path / MANIFEST
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**value, "shard": {**value["shard"], **changes}}))
    return run, value["shard"]


AFTER_AN_INTERRUPTION = {**ONCE, "copies-list": 2, "copies-finish": 2}


def test_committed_shard_whose_identity_is_not_the_listed_one_is_executed_again(store, log):
    run, shard = interrupted(store, log, identity={"sha256": "of a letter that was there meanwhile"})
    shutil.rmtree(store.root.path / "shards")
    states = coordinate(store, run, Inline)
    assert text_of(states["copies"]) == "aabbcc"
    assert executions(log) == {**AFTER_AN_INTERRUPTION, "copies-001": 2}
    kept = place_of(store, copies_plan(log)).committed_shards()["001"]
    assert load_manifest(kept).shard == shard


def test_committed_shard_that_differs_in_other_values_than_its_identity_is_kept(store, log):
    run, _ = interrupted(store, log, file="elsewhere.txt", changed_ns=1)
    assert text_of(coordinate(store, run, Inline)["copies"]) == "aabbcc"
    assert executions(log) == AFTER_AN_INTERRUPTION


class Damaging(Inline):
    """Replaces what lists the shards has left."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self._content = content

    def wait(self, timeout_s: float) -> list[Ended]:
        listing = [call.log_dir for call in self._calls[:1] if "-list@" in call.key]
        ended = super().wait(timeout_s)
        for work_dir in listing:
            (work_dir / "done.json").write_text(self._content)
        return ended


@pytest.mark.parametrize(
    "content", ["{", "{}", "null", "[1]", '[{"x": 1}]', '[{"name": "../../evil"}]', '[{"name": "a"}, {"name": "a"}]']
)
def test_list_of_shards_that_is_damaged_fails_its_step_alone_and_says_what_to_delete(store, log, content):
    run = runs.create_run(store, copies_plan(log), "local", "r1")
    states = coordinate(store, run, lambda: Damaging(content))
    assert (states["letters"].status, states["copies"].status) == ("committed", "failed")
    assert "done.json" in states["copies"].reason
    assert "Delete" in states["copies"].reason
    assert text_of(coordinate(store, run, Inline)["copies"]) == "aabbcc"


def test_step_that_cannot_begin_fails_alone(store, log):
    plan = copies_plan(log)
    place = place_of(store, plan)
    place.directory.path.mkdir(parents=True)
    place.state.path.write_text("a file where a directory must be")
    states = coordinate(store, plan, Inline)
    assert (states["letters"].status, states["copies"].status) == ("committed", "failed")
    assert str(place.state) in states["copies"].reason


# --- many shards ----------------------------------------------------------------------------------------------------

MANY = "".join(chr(0x100 + i) for i in range(200))


def test_map_of_many_shards_gives_the_executor_few_at_a_time(store, log):
    executor = Inline(num_cpus=2)
    plan = copies_plan(log, MANY)
    states = coordinate(store, plan, lambda: executor)
    assert text_of(states["copies"]) == "".join(2 * letter for letter in MANY)
    assert executor.most_held == 10, "eight fit on two cores twice over, at half a core each, plus two"
    assert set(executions(log).values()) == {1}
    assert states["copies"].progress == {"done": 200, "total": 200}


def test_map_of_many_shards_reads_what_is_committed_once(store, log, monkeypatch):
    calls = []
    real = ArtifactPlace.kept_shards
    monkeypatch.setattr(ArtifactPlace, "kept_shards", lambda *given: calls.append(given) or real(*given))
    coordinate(store, copies_plan(log, MANY[:30]), Inline)
    assert len(calls) == 1


def test_map_comes_out_the_same_for_any_cores_and_any_order(tmp_path):
    makers = {
        "one": lambda: LocalExecutor(1),
        "two": lambda: LocalExecutor(2),
        "oldest": Inline,
        "newest": lambda: Inline(num_cpus=99, newest_first=True),
    }
    found = {}
    for name, make in makers.items():
        log = tmp_path / f"log-{name}"
        log.mkdir()
        states = coordinate(open_store(tmp_path / name), copies_plan(log, "bac"), make)
        assert text_of(states["copies"]) == "bbaacc"
        found[name] = load_manifest(states["copies"].output).files
        if name == "newest":
            started = [(log / f"copies-{number:03d}").stat().st_mtime_ns for number in range(3)]
            assert started == sorted(started, reverse=True)
    assert all(files == found["one"] for files in found.values())


def test_stop_request_starts_no_shard_that_waits_and_the_resumed_run_no_other(store, log):
    run = runs.create_run(store, copies_plan(log, MANY[:40]), "local", "r1")
    executor, started = Inline(), []

    def stop_after_five(states) -> None:
        if states[1].progress.get("done", 0) >= 5 and not started:
            run.cancel_file.touch()
            started.extend(executor.started)

    states = coordinate(store, run, lambda: executor, stop_after_five)
    assert executor.started == started
    assert states["copies"].status == "stopped"
    done = {f"copies-{name}" for name in place_of(store, copies_plan(log, MANY[:40])).committed_shards()}
    assert 5 <= len(done) < 40
    assert set(executions(log)) == {"copies-list", *done}
    assert text_of(coordinate(store, run, Inline)["copies"]) == "".join(2 * letter for letter in MANY[:40])
    found = executions(log)
    assert found.pop("copies-list") == 2
    assert set(found.values()) == {1}


def test_stop_request_while_a_shard_waits_to_be_tried_again_is_heard_at_once(store, log, monkeypatch):
    monkeypatch.setattr("workflows.retries.BACKOFF_S", 3600.0)
    run = runs.create_run(store, copies_plan(log, trouble="code", where="copies-001"), "local", "r1")

    def stop_once_the_others_are_done(states) -> None:
        if states[1].progress.get("done") == 2:
            run.cancel_file.touch()

    states = coordinate(store, run, Inline, stop_once_the_others_are_done)
    assert states["copies"].status == "stopped"
    assert executions(log)["copies-001"] == 1


# --- shards of other artifacts --------------------------------------------------------------------------------------


def test_one_changed_input_executes_only_its_shard(store, log, executor):
    coordinate(store, runs.create_run(store, copies_plan(log), "local", "r1"), executor)
    assert events(store, "shards_adopted") == []
    plan, before = copies_plan(log, "abd"), copies_plan(log)
    states = coordinate(store, runs.create_run(store, plan, "local", "r2"), executor)
    assert text_of(states["copies"]) == "aabbdd"
    assert executions(log) == {**ONCE, "copies-list": 2, "copies-002": 2, "copies-finish": 2}
    (event,) = events(store, "shards_adopted", "r2")
    assert event["adopted"] == 2
    assert "refused" not in event
    assert states["copies"].progress == {"done": 3, "total": 3}
    old, new = (place_of(store, p).committed_shards() for p in (before, plan))
    for name in ("000", "001"):
        assert old[name] != new[name]
        assert (old[name].path / "in" / "copy.txt").samefile(new[name].path / "in" / "copy.txt")
        assert load_manifest(new[name]).fingerprint == plan.step("copies").fingerprint
        assert load_manifest(new[name]).stats == load_manifest(old[name]).stats != {}


def test_shard_taken_over_has_the_name_that_it_has_there(store, log):
    copied(store, log, "abc", "r1")
    assert copied(store, log, "cxab", "r2") == {"copies-list": 1, "copies-001": 1, "copies-finish": 1}
    shards = place_of(store, copies_plan(log, "cxab")).committed_shards()
    assert [load_manifest(shards[name]).shard["name"] for name in sorted(shards)] == ["000", "001", "002", "003"]


LETTERS = st.text("abcd", min_size=1, max_size=5)


@settings(max_examples=12, deadline=None)
@given(first=LETTERS, second=LETTERS)
def test_shards_executed_are_those_whose_letter_is_new(first, second):
    with tempfile.TemporaryDirectory() as directory:
        store, log = open_store(Path(directory) / "store"), Path(directory) / "log"
        copied(store, log, first, "r1")
        found = copied(store, log, second, "r2")
        new = {f"copies-{place:03d}" for place, letter in enumerate(second) if letter not in first}
        rest = set() if first == second else {"copies-list", "copies-finish"}
        assert set(found) == new | rest
        assert set(found.values()) <= {1}


def test_registered_shard_that_is_damaged_is_executed_and_registered_anew(store, log):
    copied(store, log, "abc", "r1")
    shard = place_of(store, copies_plan(log)).committed_shards()["001"]
    (shard.path / "in" / "copy.txt").write_text("xx")
    found = copied(store, log, "abd", "r2")
    assert found == {"copies-list": 1, "copies-001": 1, "copies-002": 1, "copies-finish": 1}
    (event,) = events(store, "shards_adopted", "r2")
    assert (event["adopted"], event["refused"]) == (1, 1)
    assert "shard 001 cannot be taken over" in event["reason"]
    assert "SHA-256 differs" in event["reason"]
    assert copied(store, log, "abe", "r3") == {"copies-list": 1, "copies-002": 1, "copies-finish": 1}


def test_registered_shards_of_a_deleted_artifact_are_executed_and_registered_anew(store, log):
    copied(store, log, "abc", "r1")
    place_of(store, copies_plan(log)).directory.remove()
    assert copied(store, log, "abd", "r2") == ONCE
    assert copied(store, log, "abe", "r3") == {"copies-list": 1, "copies-002": 1, "copies-finish": 1}


def records(store: Store) -> list[Path]:
    return sorted((store.root.path / "shards" / "toy-copies").glob("*.json"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"artifact": "0123456789ab"}',
        '{"artifact": "0123456789ab", "directory": "x"}',
        '{"artifact": "../../../out", "directory": "x"}',
        '{"artifact": "0123456789ab", "directory": "../../../../out"}',
        '{"artifact": "0123456789ab", "directory": 7}',
    ],
)
def test_record_that_leads_nowhere_is_dropped_and_the_shard_executed(store, log, content):
    copied(store, log, "a", "r1")
    (record,) = records(store)
    record.write_text(content)
    assert copied(store, log, "ab", "r2") == {key: 1 for key in ONCE if key != "copies-002"}
    assert json.loads(record.read_text())["artifact"] == place_of(store, copies_plan(log, "ab")).directory.name


def test_record_that_leads_to_another_shard_is_dropped_and_the_shard_executed(store, log):
    copied(store, log, "ab", "r1")
    first, second = records(store)
    first.write_bytes(second.read_bytes())
    found = copied(store, log, "bac", "r2")
    assert len(found) == 4, "list, finish, the new shard and the one that was not found"
    assert copied(store, log, "abd", "r3") == {"copies-list": 1, "copies-002": 1, "copies-finish": 1}


def test_shards_taken_over_are_not_those_of_another_code_version_or_setting(store, log):
    copied(store, log, "abc", "r1")
    states = coordinate(store, copies_plan(log, number=2), Inline)
    assert states["copies"].status == "committed"
    assert executions(log) == dict.fromkeys(ONCE, 2)


def test_records_of_shards_are_no_artifacts(store, log):
    copied(store, log, "abc", "r1")
    assert len(records(store)) == 3
    assert [place.directory.name for place in store.artifacts("toy-copies")] == [
        place_of(store, copies_plan(log)).directory.name
    ]


def test_stop_request_while_shards_are_taken_over_leaves_them_and_waits_in_peace(store, log, monkeypatch):
    copied(store, log, MANY[:20], "r1")
    run = runs.create_run(store, copies_plan(log, MANY[:20] + "z"), "local", "r2")
    timeouts: list[float] = []

    class Busy(Inline):
        """Runs its last shard only after it was waited for many times."""

        def wait(self, timeout_s: float) -> list[Ended]:
            if any("copies-020" in call.key for call in self._calls) and len(timeouts) < 20:
                timeouts.append(timeout_s)
                time.sleep(0.02)
                return []
            return super().wait(timeout_s)

    def stop(states) -> None:
        if states[1].fan_out is not None:
            run.cancel_file.touch()

    monkeypatch.setattr("workflows.driver._COMMIT_FOR_S", 0.0)
    states = coordinate(store, run, Busy, stop)
    assert states["copies"].status == "stopped"
    assert len(timeouts) == 20
    assert set(timeouts[1:]) == {_POLL_S}, "the loop spins"
    assert len(events(store, "shards_adopted", "r2")) == 1
    monkeypatch.undo()
    assert text_of(coordinate(store, run, Inline)["copies"]) == "".join(2 * letter for letter in MANY[:20] + "z")


def test_run_goes_on_while_shards_are_looked_at(store, log, monkeypatch):
    copied(store, log, "abc", "r1")
    seen, looked_at = [], threading.Event()
    real = ShardRegistry.adopt

    def adopt_later(*arguments):
        assert looked_at.wait(20.0), "the loop waits for the shard"
        return real(*arguments)

    def count(states) -> None:
        if states[1].status == "running":
            seen.append(dict(states[1].progress))
            if len(seen) > 5:
                looked_at.set()

    monkeypatch.setattr(ShardRegistry, "adopt", adopt_later)
    states = coordinate(store, copies_plan(log, "abd"), Inline, count)
    assert text_of(states["copies"]) == "aabbdd"
    assert {"done": 1, "total": 3} in seen, "the shard that nobody has is executed meanwhile"
    assert executions(log) == {**ONCE, "copies-list": 2, "copies-002": 2, "copies-finish": 2}


def test_failure_while_shards_are_looked_at_keeps_those_that_were_taken_over(store, log):
    copied(store, log, MANY[:30], "r1")
    text = "a" + MANY[:30]
    plan = copies_plan(log, text, trouble="user", where="copies-000")
    shutil.rmtree(log)
    log.mkdir()
    run = runs.create_run(store, plan, "local", "r2")
    assert coordinate(store, run, Inline)["copies"].status == "failed"
    (event,) = events(store, "shards_adopted", "r2")
    assert event["adopted"] == len(place_of(store, plan).committed_shards())
    assert text_of(coordinate(store, run, Inline)["copies"]) == "".join(2 * letter for letter in text)
    assert executions(log) == {"copies-list": 2, "copies-000": 2, "copies-finish": 1}


def test_record_that_cannot_be_read_stays_and_the_shard_is_executed(store, log):
    """The disk may be at fault, and the shard whole."""
    copied(store, log, "a", "r1")
    (record,) = records(store)
    record.unlink()
    record.mkdir()
    assert copied(store, log, "ab", "r2") == {key: 1 for key in ONCE if key != "copies-002"}
    assert record.is_dir()
    assert "Is a directory" in events(store, "shards_adopted", "r2")[0]["reason"]
