import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import gpus, local
from cluster import ray_executor as ray_executor_module
from cluster.executor import Call, Ended, Executor
from cluster.gang import GANG_LOG
from cluster.gpus import DriverGpu
from cluster.local import LocalExecutor
from cluster.nodes import Demand, Node
from tests.support.executors import NUM_CPUS, RAY_LIMIT_S, ray_executor
from tests.support.toy_workflow import is_gone, wait_until

CALLS = "tests.support.calls"


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[Executor]:
    with ray_executor() as executor:
        yield executor


@pytest.fixture
def local_executor() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(NUM_CPUS)
    yield executor
    executor.close()


_ON_RAY = (pytest.mark.ray, pytest.mark.timeout(RAY_LIMIT_S))


@pytest.fixture(params=["local", pytest.param("ray", marks=_ON_RAY)])
def executor(request: pytest.FixtureRequest) -> Executor:
    return _executor(request)


@pytest.fixture(params=["local", pytest.param("ray", marks=(*_ON_RAY, pytest.mark.slow))])
def executor_of_gangs(request: pytest.FixtureRequest) -> Executor:
    return _executor(request)


def _executor(request: pytest.FixtureRequest) -> Executor:
    return request.getfixturevalue("local_executor" if request.param == "local" else "shared_ray")


def call(function: str, out: Path, key: str = "", gang_size: int = 0, cpus: float = 1.0, **payload: object) -> Call:
    out.mkdir(exist_ok=True)
    name = key or function
    return Call(
        name,
        f"{CALLS}:{function}",
        {"out": str(out), **payload},
        out / "log" / name,
        cpus,
        (gang_size,) if gang_size else (),
    )


def collect(executor: Executor, *calls: Call) -> dict[str, Ended]:
    """Start calls and wait until all of them have ended."""
    for item in calls:
        executor.start(item)
    found: dict[str, Ended] = {}

    def all_ended() -> bool:
        found.update({ended.key: ended for ended in executor.wait(0.1)})
        return len(found) == len(calls)

    wait_until(all_ended, f"{len(calls)} calls have ended", 120.0)
    return found


def processes(out: Path) -> list[psutil.Process]:
    """The processes that said that they run, and their children."""
    pids = [int(path.read_text()) for path in out.glob("*.pid")]
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return found + [child for process in found for child in process.children(recursive=True)]


def assert_gone(found: list[psutil.Process]) -> None:
    wait_until(lambda: all(map(is_gone, found)), "the processes are gone", 20.0)


# --- both executors -------------------------------------------------------------------------------------------------


def test_calls_run_with_their_payload_and_their_output_is_kept(executor, tmp_path):
    calls = [call("write_down", tmp_path, key=word, word=word, cpus=0.5) for word in ("a", "b", "c")]
    found = collect(executor, *calls)
    assert found == {item.key: Ended(item.key) for item in calls}
    for item in calls:
        assert "says " + item.key in (item.log_dir / "rank-0.log").read_text()
        assert (tmp_path / f"{item.key}-none.json").exists()


def test_call_that_raises_ends_with_a_failure_and_its_traceback_is_kept(executor, tmp_path):
    item = call("fail", tmp_path, rank="0")
    ended = collect(executor, item)[item.key]
    assert ended.failure
    assert not ended.killed
    text = "".join(path.read_text() for path in item.log_dir.glob("*.log"))
    assert "RuntimeError: no good" in text + ended.failure


def test_call_that_raises_tells_no_secret(executor, tmp_path):
    item = call("fail_over_a_secret", tmp_path, name="DLM_TEST_TOKEN", value="ninety-nine luftballons")
    ended = collect(executor, item)[item.key]
    assert ended.failure
    assert not ended.killed
    texts = {path.name: path.read_text() for path in item.log_dir.glob("*.log")}
    assert "RuntimeError: *** is wrong" in texts["rank-0.log"]
    assert "KeyError: '***'" in texts["rank-0.log"]
    assert "luftballons" not in "".join(texts.values()) + ended.failure


def test_call_that_is_killed_says_so(executor, tmp_path):
    item = call("be_killed", tmp_path, rank="0")
    ended = collect(executor, item)[item.key]
    assert ended.failure
    assert ended.killed


def test_gang_has_ranks_and_one_address(executor_of_gangs, tmp_path):
    item = call("write_down", tmp_path, gang_size=2, cpus=0.5, word="w")
    assert collect(executor_of_gangs, item) == {item.key: Ended(item.key)}
    ranks = [json.loads((tmp_path / f"w-{rank}.json").read_text()) for rank in range(2)]
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("0", "0"), ("1", "1")]
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        assert {rank[name] for rank in ranks} == {"2"}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1
    assert len({rank["pid"] for rank in ranks}) == 2


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, ["1", "1", "0"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["1", "0", "0"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["0", "0", "0"]),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["0", "0", "0"]),
        ({"DS_ACCELERATOR": "cpu"}, ["0", "0", "0"]),
    ],
)
def test_ranks_of_subprocesses_are_told_the_gpus_that_they_take(tmp_path, monkeypatch, environment, ranks):
    two = (DriverGpu("NVIDIA H200", 143771, "570.86", has_mig=False),) * 2
    monkeypatch.setattr(gpus, "_ask_driver", lambda: (two, ""))
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "DLM_GPUS": "8"}.items():
        monkeypatch.setenv(name, value)
    executor = LocalExecutor(NUM_CPUS)
    try:
        gang = call("write_down", tmp_path, "gang", gang_size=3, cpus=0.5, word="w")
        collect(executor, gang, call("write_down", tmp_path, "task", word="t"))
    finally:
        executor.close()
    found = [json.loads((tmp_path / f"w-{rank}.json").read_text())["DLM_GPUS"] for rank in range(3)]
    assert found == ranks
    assert json.loads((tmp_path / "t-none.json").read_text())["DLM_GPUS"] == "0"


def test_call_that_wants_a_gpu_that_is_not_there_waits_and_says_so(executor, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "_ask_driver", lambda: ((), ""))
    item = dataclasses.replace(call("write_down", tmp_path, word="w"), gpus=0.5)
    executor.start(item)
    assert executor.wait(1.0) == []
    found = executor.shortage(item)
    assert found.is_beyond
    assert "0.5 GPUs" in found.reason
    executor.cancel(item.key)
    ended: list[Ended] = []
    wait_until(lambda: ended.extend(executor.wait(0.1)) or ended, "the call has ended")
    assert [one.key for one in ended] == [item.key]
    assert not list(tmp_path.glob("w-*.json"))
    assert collect(executor, call("write_down", tmp_path, "task", word="t"))["task"].failure == ""
    assert json.loads((tmp_path / "t-none.json").read_text())["DLM_GPUS"] == "0"


def test_single_processes_have_a_gpu_to_themselves_or_share_one(tmp_path, monkeypatch):
    two = (DriverGpu("NVIDIA H200", 143771, "570.86", has_mig=False),) * 8
    monkeypatch.setattr(gpus, "_ask_driver", lambda: (two, ""))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    executor = LocalExecutor(NUM_CPUS)
    try:
        calls = {
            name: dataclasses.replace(call("wait_for", tmp_path, name, cpus=0.5, word=name), gpus=share)
            for name, share in (("a", 1.0), ("b", 0.5), ("c", 0.5), ("d", 1.0))
        }
        for item in calls.values():
            executor.start(item)
        wait_until(lambda: len(list(tmp_path.glob("?-none.json"))) == 3, "three run")
        reason = executor.shortage(calls["d"])
        assert (reason.reason, reason.is_beyond) == ("wants 1 GPUs; all 2 are taken", False)
        (tmp_path / "go").touch()
        ended: list[Ended] = []
        wait_until(lambda: ended.extend(executor.wait(0.1)) or len(ended) == 4, "all have ended", 60.0)
    finally:
        executor.close()
    assert sorted(ended, key=lambda one: one.key) == [Ended(name) for name in "abcd"]
    found = {name: json.loads((tmp_path / f"{name}-none.json").read_text()) for name in "abcd"}
    assert [found[name]["CUDA_VISIBLE_DEVICES"] for name in "abc"] == ["5", "7", "7"]
    assert [found[name]["DLM_GPUS"] for name in "abcd"] == ["1", "0.5", "0.5", "1"]
    assert found["d"]["CUDA_VISIBLE_DEVICES"] in ("5", "7")


def test_cancelled_call_ends_with_a_failure(executor, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor_module, "_KILL_AFTER_S", 1.0)
    item = call("sleep", tmp_path)
    executor.start(item)
    wait_until(lambda: list(tmp_path.glob("*.pid")), "the call runs", 60.0)
    executor.cancel(item.key)
    found: list[Ended] = []
    wait_until(lambda: found.extend(executor.wait(0.1)) or found, "the call has ended")
    assert [ended.key for ended in found] == [item.key]
    assert found[0].failure


def test_executor_tells_its_cores(executor):
    assert executor.num_cpus == NUM_CPUS


def test_waiting_for_nothing_returns_nothing(executor):
    assert executor.wait(0.01) == []


# --- subprocesses ---------------------------------------------------------------------------------------------------


def test_local_gang_with_a_failing_rank_is_stopped_as_a_whole(local_executor, tmp_path):
    item = call("fail", tmp_path, gang_size=3, cpus=0.1, rank="1")
    local_executor.start(item)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 3, "all ranks run")
    found = processes(tmp_path)
    ended: list[Ended] = []
    wait_until(lambda: ended.extend(local_executor.wait(0.1)) or ended, "the gang has ended")
    assert ended == [Ended(item.key, "rank 1 ended with exit code 1")]
    assert_gone(found)


def test_local_close_stops_processes_and_their_children(tmp_path):
    executor = LocalExecutor(NUM_CPUS)
    executor.start(call("sleep", tmp_path, gang_size=2, cpus=0.5))
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "both ranks run")
    found = processes(tmp_path)
    assert len(found) == 4
    executor.close()
    assert_gone(found)


def test_local_cancel_kills_what_ignores_the_request_to_end(local_executor, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_KILL_AFTER_S", 0.3)
    item = call("ignore_requests_to_end", tmp_path)
    local_executor.start(item)
    wait_until(lambda: list(tmp_path.glob("*.pid")), "the call runs")
    found = processes(tmp_path)
    local_executor.cancel(item.key)
    assert_gone(found)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_local_calls_that_ignore_the_request_to_end_are_waited_for_together(tmp_path, monkeypatch, how):
    monkeypatch.setattr(local, "_KILL_AFTER_S", 1.0)
    executor = LocalExecutor(NUM_CPUS)
    keys = ("a", "b", "c", "d")
    for key in keys:
        executor.start(call("ignore_requests_to_end", tmp_path / key, key=key))
    wait_until(lambda: len(list(tmp_path.glob("*/*.pid"))) == len(keys), "the calls run")
    found = [process for key in keys for process in processes(tmp_path / key)]
    begun_s = time.monotonic()
    executor.cancel(*keys) if how == "cancel" else executor.close()
    assert time.monotonic() - begun_s < 2.5
    assert_gone(found)
    if how == "cancel":
        assert executor.wait(0.0) == [Ended(key, "cancelled") for key in keys]
        executor.close()


def test_local_calls_beyond_the_cores_wait_their_turn(tmp_path):
    executor = LocalExecutor(1)
    first, second = (call("sleep", tmp_path / key, key=key) for key in ("first", "second"))
    executor.start(first)
    executor.start(second)
    wait_until(lambda: list((tmp_path / "first").glob("*.pid")), "the first runs")
    assert executor.wait(0.0) == []
    assert not second.log_dir.exists()
    executor.cancel("first")
    assert executor.wait(0.0) == [Ended("first", "cancelled")]
    wait_until(lambda: list((tmp_path / "second").glob("*.pid")), "the second runs")
    executor.close()


def test_local_call_that_wants_more_cores_than_there_are_runs_alone(tmp_path):
    executor = LocalExecutor(1)
    item = call("write_down", tmp_path, gang_size=2, cpus=2.0, word="w")
    assert collect(executor, item) == {item.key: Ended(item.key)}
    executor.close()


def test_local_cancelled_before_its_turn_never_runs(tmp_path):
    executor = LocalExecutor(1)
    executor.start(call("sleep", tmp_path / "first", key="first"))
    item = call("write_down", tmp_path / "second", key="second", word="w")
    executor.start(item)
    executor.cancel("second")
    executor.cancel("first")
    assert {ended.key for ended in executor.wait(0.0)} == {"first", "second"}
    executor.close()
    assert not item.log_dir.exists()


def test_local_gang_seen_late_tells_the_rank_that_was_killed_not_the_one_that_complained(local_executor, tmp_path):
    local_executor.start(call("be_killed", tmp_path, gang_size=2, cpus=0.5, rank="1", peers_raise=True))
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "both ranks run")
    assert_gone(processes(tmp_path))
    assert local_executor.wait(0.0) == [Ended("be_killed", "rank 1 ended with signal 9", killed=True)]


def test_local_gang_seen_late_tells_the_rank_that_raised_not_the_one_that_aborted_over_it(local_executor, tmp_path):
    local_executor.start(call("raise_or_abort", tmp_path, gang_size=2, cpus=0.5, rank="1"))
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "both ranks run")
    assert_gone(processes(tmp_path))
    assert local_executor.wait(0.0) == [Ended("raise_or_abort", "rank 1 ended with exit code 1")]


def test_local_call_whose_processes_cannot_be_started_ends_with_the_reason_and_the_next_one_runs(tmp_path):
    executor = LocalExecutor(1)
    (tmp_path / "second" / "log").mkdir(parents=True)
    (tmp_path / "second" / "log" / "second").write_text("a file where a directory must be")
    calls = [call("write_down", tmp_path / key, key=key, word="w") for key in ("first", "second", "third")]
    found = collect(executor, *calls)
    assert (found["first"], found["third"]) == (Ended("first"), Ended("third"))
    assert "File exists" in found["second"].failure
    assert not found["second"].killed
    executor.close()


def test_local_gang_of_which_a_rank_cannot_be_started_is_stopped_as_a_whole(local_executor, tmp_path):
    item = call("sleep", tmp_path, gang_size=2, cpus=0.5)
    (item.log_dir / "rank-1.log").mkdir(parents=True)
    local_executor.start(item)
    (ended,) = local_executor.wait(0.0)
    assert "rank-1.log" in ended.failure
    needle = str(item.log_dir)
    assert not [p for p in psutil.Process().children(recursive=True) if needle in " ".join(p.cmdline())]


# --- Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_gang_whose_controller_is_killed_leaves_no_rank_and_no_placement_group(shared_ray, tmp_path):
    from ray.util import placement_group_table

    item = call("sleep", tmp_path, gang_size=2, cpus=0.5)
    shared_ray.start(item)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "both ranks run", 60.0)
    ranks = processes(tmp_path)
    assert [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    controllers = [p for p in psutil.process_iter() if p.name().startswith("ray::TrainContr")]
    mine = [p for p in controllers if psutil.Process() in p.parents()]
    assert len(mine) == 1
    mine[0].kill()
    found: list[Ended] = []
    wait_until(lambda: found.extend(shared_ray.wait(0.1)) or found, "the call has ended", 60.0)
    assert found[0].failure
    assert_gone(ranks)
    wait_until(
        lambda: all(group["state"] == "REMOVED" for group in placement_group_table().values()), "no group is left", 20.0
    )


def groups(*states: str) -> list[str]:
    """Names of the placement groups in these states."""
    from ray.util import placement_group_table

    return sorted(group["name"] for group in placement_group_table().values() if group["state"] in states)


@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_demands_add_up_hold_nothing_while_they_wait_and_are_met_once_there_is_room(shared_ray):
    demands = [Demand("one"), Demand("another"), Demand("small")]
    try:
        demands[0].ask(NUM_CPUS + 1, 1.0, 0.0)
        demands[1].ask(NUM_CPUS + 1, 1.0, 0.0)
        demands[0].ask(NUM_CPUS + 2, 1.0, 0.0)
        assert groups("PENDING") == ["another", "one"]
        demands[2].ask(NUM_CPUS, 1.0, 0.0)
        wait_until(lambda: demands[2].is_met(NUM_CPUS, 1.0, 0.0), "there is room for it", 20.0)
        assert not demands[2].is_met(NUM_CPUS, 1.0, 1.0)
        assert not demands[0].is_met(NUM_CPUS + 2, 1.0, 0.0)
    finally:
        for demand in demands:
            demand.withdraw()
    assert groups("PENDING", "CREATED", "PREPARED", "RESCHEDULING") == []


@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_gang_that_ends_while_it_waits_leaves_no_demand(shared_ray, tmp_path, monkeypatch, how):
    monkeypatch.setattr(shared_ray, "_is_embedded", False)  # as on a cluster, which may grow
    item = call("sleep", tmp_path, gang_size=NUM_CPUS + 1)
    shared_ray.start(item)
    name = f"dlm demand {item.log_dir}"
    wait_until(lambda: groups("PENDING") == [name], "it asks for room", 60.0)
    if how == "cancelled":
        shared_ray.cancel(item.key)
    else:
        drivers = [p for p in psutil.process_iter() if p.name() == f"ray::{item.key}"]
        next(p for p in drivers if psutil.Process() in p.parents()).kill()
    found: list[Ended] = []
    wait_until(lambda: found.extend(shared_ray.wait(0.1)) or found, "the call has ended", 60.0)
    assert found[0].failure
    wait_until(lambda: groups("PENDING", "CREATED") == [], "it asks no longer", 20.0)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_gang_is_started_again_on_the_cores_of_a_killed_controller_while_another_one_runs(shared_ray, tmp_path):
    gangs = [call("sleep", tmp_path / key, key=key, gang_size=2) for key in ("one", "another")]
    for item in gangs:
        shared_ray.start(item)
    wait_until(lambda: len(list(tmp_path.glob("*/*.pid"))) == NUM_CPUS, "all cores are taken", 90.0)
    controllers = [p for p in psutil.process_iter() if p.name().startswith("ray::TrainContr")]
    next(p for p in controllers if psutil.Process() in p.parents()).kill()
    ended: list[Ended] = []
    wait_until(lambda: ended.extend(shared_ray.wait(0.1)) or ended, "a gang has ended", 60.0)
    (left,) = {item.key for item in gangs} - {ended[0].key}
    again = call("write_down", tmp_path / "again", gang_size=2, word="w")
    assert collect(shared_ray, again) == {again.key: Ended(again.key)}
    assert shared_ray.wait(0.0) == [], "the other one goes on"
    shared_ray.cancel(left)
    wait_until(lambda: [one.key for one in shared_ray.wait(0.1)] == [left], "it has ended", 60.0)


def test_call_whose_log_tells_that_it_holds_its_cores_lacks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor_module, "nodes", lambda: [Node("n", NUM_CPUS, 0.0, 0.0, 0.0)])
    executor = object.__new__(ray_executor_module.RayExecutor)
    one, gang = call("sleep", tmp_path, key="one"), call("sleep", tmp_path, key="gang", gang_size=2)
    for item in (one, gang):
        item.log_dir.mkdir(parents=True)
        assert "free are 0 cores" in executor.shortage(item).reason
    (one.log_dir / "rank-0.log").touch()
    (gang.log_dir / GANG_LOG).write_text("a warning\n")
    assert executor.shortage(one) is None
    assert executor.shortage(gang) is not None
    (gang.log_dir / GANG_LOG).write_text("a warning\nstarting 2 of at most 2 ranks, without GPUs\n")
    assert executor.shortage(gang) is None
