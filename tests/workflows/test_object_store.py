"""Runs, races and a training whose store is an object store behind a real API server."""

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.executor import Executor
from cluster.local import LocalExecutor
from pipeline.artifact import open_artifact, read_json
from tests.support import object_training, races
from tests.support.executors import NUM_CPUS
from tests.support.resuming import differences
from tests.support.tiny_run import Artifacts, metrics, tiny
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, PIECES, coordinate, copies_plan, toy_plan
from tests.workflows.test_store import run_together
from workflows import runs
from workflows.cancel import CancelFile
from workflows.copies import local_copy
from workflows.lease import Lease
from workflows.state import StepState
from workflows.store import RunExistsError, Store, open_writable_store
from workflows.summary import summarise

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=["s3", "gs"])
def bucket_url(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind of object store."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this machine keeps copies."""
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def s3_store(s3_url: str, cache: Path) -> Store:
    """An empty store on S3."""
    return open_writable_store(s3_url)


def local() -> Executor:
    return LocalExecutor(NUM_CPUS)


# --- races ----------------------------------------------------------------------------------------------------------


def test_of_several_who_create_a_file_one_is_told_so_and_all_read_its_bytes(bucket_url: str) -> None:
    found = run_together(*[(races.race_to_create, (bucket_url, name)) for name in "abcd"])
    for number in range(races.NUM_ROUNDS):
        of_round = [answer for at, answer in found if at == number]
        (winner,) = [name for name, is_first, _ in of_round if is_first]
        assert {content for *_, content in of_round} == {winner * 100}


def test_lease_race_has_exactly_one_winner_an_epoch(bucket_url: str) -> None:
    found = run_together(*[(races.race_for_lease, (f"{bucket_url}/lease",))] * 4)
    assert sorted(found) == [(number, number + 1) for number in range(races.NUM_ROUNDS)]


def test_commit_race_has_one_winner_and_readers_never_see_a_part(bucket_url: str) -> None:
    writers = [(races.race_to_commit, (bucket_url, name)) for name in ("a", "b")]
    found = run_together(*writers, (races.read_all_the_time, (bucket_url,)))
    seen: dict[int, set[str]] = defaultdict(set)
    for number, committed in found:
        seen[number].add(committed)
    assert len(found) == 3 * races.NUM_PLACES
    assert [len(seen[number]) for number in range(races.NUM_PLACES)] == [1] * races.NUM_PLACES


# --- runs -----------------------------------------------------------------------------------------------------------


def value_of(state: StepState) -> int:
    assert state.output is not None
    return open_artifact(local_copy(state.output)).stats["value"]


def test_a_run_ends_with_its_artifacts_logs_and_usage_in_the_store_and_is_cached_then(
    s3_store: Store, log: Path
) -> None:
    plan = toy_plan(log)
    states = coordinate(s3_store, plan, local)
    assert {state.status for state in states.values()} == {"committed"}, [s.failure for s in states.values()]
    assert executions(log) == ONCE
    (run,) = s3_store.runs()
    sizes = (run.directory / "work" / "001").sizes()
    for piece, ranks in (("source", 1), ("double-1", 1), ("total", 2)):
        (turn,) = (run.directory / "work" / "001" / piece).names()
        for rank in range(ranks):
            assert f"{piece}/{turn}/rank-{rank}.log" in sizes
            assert read_json(run.directory / "work" / "001" / piece / turn / f"usage-{rank}.json")["cpu_s"] > 0
    assert summarise(s3_store, run).status == "succeeded"
    again = coordinate(s3_store, plan, local)
    assert {state.status for state in again.values()} == {"cached"}
    assert executions(log) == ONCE
    assert value_of(again["total"]) == value_of(states["total"])


@pytest.mark.slow
def test_a_run_that_was_cancelled_is_resumed_to_its_end_on_another_machine(
    s3_store: Store, log: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = toy_plan(log, double__trouble="slow", double__where="double-1")
    run = runs.create_run(s3_store, plan, "local", "r1")
    asked: list[bool] = []

    def cancel_once_it_is_slow(states: list[StepState]) -> None:
        if not asked and (log / "double-1").exists():
            asked.append(True)
            CancelFile(run.cancel_file).request()

    states = coordinate(s3_store, run, local, cancel_once_it_is_slow)
    assert states["double"].status == "stopped"
    assert states["total"].status == "stopped"
    assert summarise(s3_store, run).status == "stopped"
    monkeypatch.setenv("DLM_CACHE", str(cache.with_name("other")))
    states = coordinate(s3_store, run, local)
    assert {state.status for state in states.values()} <= {"committed", "cached"}
    found = executions(log)
    assert found.keys() == PIECES
    assert (found["source"], found["double-1"], found["total-0"]) == (1, 2, 1)


def test_shards_of_another_artifact_are_copied_within_the_store(s3_store: Store, log: Path) -> None:
    coordinate(s3_store, copies_plan(log, "ab"), local)
    states = coordinate(s3_store, copies_plan(log, "abc"), local)
    found = executions(log)
    assert (found["copies-000"], found["copies-001"], found["copies-002"]) == (1, 1, 1)
    assert states["copies"].output is not None
    assert (local_copy(states["copies"].output) / "text.txt").read_text() == "aabbcc"


def test_a_run_that_is_created_twice_with_the_same_plan_was_there_the_second_time(s3_store: Store) -> None:
    s3_store.create_run("r1", {"plan": 1})
    with pytest.raises(RunExistsError, match="there is a run 'r1' already"):
        s3_store.create_run("r1", {"plan": 1})


def test_a_node_that_fails_and_is_gone_costs_a_retry(s3_store: Store, log: Path, no_backoff: None) -> None:
    states = coordinate(s3_store, toy_plan(log, total__trouble="kill", total__where="total-1"), local)
    assert states["total"].status == "committed", states["total"].failure
    assert executions(log)["total-1"] == 2


# --- a training -----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_training_killed_goes_on_from_the_store_on_other_machines_to_the_same_end(
    s3_url: str,
    s3_environment: Mapping[str, str],
    made: Artifacts,
    tmp_path: Path,
    cache: Path,
    request: pytest.FixtureRequest,
    workers: int,
) -> None:
    straight = request.getfixturevalue({1: "alone", 2: "pair"}[workers])
    config, store = tiny(workers=workers), object_training.store_with_inputs(s3_url, made)
    environment, go = dict(s3_environment), object_training.start
    piece = object_training.piece_of(store, config, made, tmp_path / "log-1")
    gang = go(piece, tmp_path / "first", environment, "pause_at_step", step=10)
    gang.wait_for(lambda: gang.log().count("paused in step 10") == workers, "pause")
    gang.kill()
    state = store.root / object_training.STATE
    assert [name for name in state.names() if name.endswith(".json")][-1] == "step-00000008.json"
    shutil.rmtree(tmp_path / "first")
    Lease(store.root / "lease", piece.lease_epoch, piece.lease_token).release()
    next_piece = object_training.piece_of(store, config, made, tmp_path / "log-2")
    gang = go(next_piece, tmp_path / "second", environment)
    assert gang.wait() == [0] * workers, gang.log()
    assert "continuing from checkpoint step-00000008: 8 of 20 steps are done" in gang.log(0)
    artifact = local_copy(store.root / object_training.OUT)
    found = Path(shutil.copytree(artifact, tmp_path / "found"))
    assert len(metrics(found)) == config.num_steps
    assert differences(config, found, straight) == []
    assert open_artifact(found).stats["missing_metrics"] == 0
    assert (store.root / next_piece.work / "usage-0.json").exists()
