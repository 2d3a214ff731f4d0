"""Tasks through the engine: the same bytes for any workers, executor and order; a killed shard costs itself alone."""

import contextlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.executor import Executor
from cluster.local import LocalExecutor
from pipeline.artifact import FileRecord, load_manifest
from pipeline.errors import UserError
from pipeline.tasks.config import TaskConfig
from tests.support.asked_runs import Asked
from tests.support.executors import RAY_LIMIT_S, Inline, Kept, ray_executor
from tests.support.model_kinds import KINDS
from tests.support.questions import CONFIG, both, every_kind, texts, write
from tests.support.toy_workflow import coordinate
from workflows import runs
from workflows.plan import Plan
from workflows.store import Store, open_store

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def asked(tmp_path: Path, tokenizer_file: Path) -> Asked:
    return Asked(tmp_path, tokenizer_file)


def files_of(store: Store, plan: Plan, make: Callable[[], Executor]) -> list[FileRecord]:
    """Run to the end; the files of what was asked."""
    states = coordinate(store, runs.create_run(store, plan, "local", "r1"), make)
    assert all(state.status in ("committed", "cached") for state in states.values()), [
        state.reason for state in states.values()
    ]
    outputs = [states[step].output for step in ("evaluate", "tasks") if step in states]
    return [file for output in outputs if output is not None for file in load_manifest(output).files]


def copied(tmp_path: Path, asked: Asked, name: str, model: str) -> Store:
    """A store that has what the tasks of a model need."""
    whole = tmp_path / "before"
    if not whole.exists():
        before = asked.plan(None, model, **KINDS[model])
        coordinate(open_store(whole), before, Inline)
    shutil.copytree(whole, tmp_path / name)
    return open_store(tmp_path / name)


@pytest.mark.parametrize("model", list(KINDS))
def test_every_bit_is_the_same_for_any_order(tmp_path: Path, asked: Asked, model: str) -> None:
    config = every_kind(tmp_path, model, num_shards=12)
    plan = asked.plan(config, model, **KINDS[model])
    wanted = files_of(open_store(tmp_path / "one"), plan, Inline)
    assert {file.path for file in wanted} == {"results.json", *(f"{name}.jsonl" for name in config.tasks)}
    assert files_of(open_store(tmp_path / "two"), plan, lambda: Inline(num_cpus=99, newest_first=True)) == wanted


@pytest.mark.parametrize(("workers", "model"), [(1, "blocks"), (2, "masked"), (3, "next")])
def test_every_bit_is_the_same_for_any_number_of_workers(
    tmp_path: Path, asked: Asked, workers: int, model: str
) -> None:
    plan = asked.plan(every_kind(tmp_path, model, num_shards=6), model, **KINDS[model])
    wanted = files_of(copied(tmp_path, asked, "inline", model), plan, Inline)
    assert files_of(copied(tmp_path, asked, "workers", model), plan, lambda: LocalExecutor(workers)) == wanted


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("model", ["masked", "shifted"])
def test_likelihoods_are_the_same_for_any_number_of_workers(
    tmp_path: Path, asked: Asked, workers: int, model: str
) -> None:
    plan = asked.plan(both(tmp_path, num_shards=3), model, **KINDS[model])
    wanted = files_of(copied(tmp_path, asked, "inline", model), plan, Inline)
    assert files_of(copied(tmp_path, asked, "workers", model), plan, lambda: LocalExecutor(workers)) == wanted


@pytest.mark.parametrize("workers", [1, 2])
def test_an_evaluation_is_the_same_for_any_number_of_workers(tmp_path: Path, asked: Asked, workers: int) -> None:
    plan = asked.plan(None, "masked", evaluates=True)
    wanted = files_of(open_store(tmp_path / "inline"), plan, Inline)
    assert "results.json" in {file.path for file in wanted}
    assert files_of(open_store(tmp_path / "workers"), plan, lambda: LocalExecutor(workers)) == wanted


@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
def test_every_bit_is_the_same_on_ray(tmp_path: Path, asked: Asked) -> None:
    plan = asked.plan(every_kind(tmp_path, "masked", num_shards=6), "masked")
    wanted = files_of(copied(tmp_path, asked, "inline", "masked"), plan, Inline)
    store = copied(tmp_path, asked, "ray", "masked")
    with ray_executor() as executor:
        assert files_of(store, plan, lambda: Kept(executor)) == wanted


def test_a_killed_shard_is_asked_again_alone_with_the_same_bytes(
    tmp_path: Path, asked: Asked, no_backoff: None
) -> None:
    plan = asked.plan(both(tmp_path), "a")
    wanted = files_of(open_store(tmp_path / "calm"), plan, Inline)
    store, killed = open_store(tmp_path / "store"), threading.Event()

    class Killing(LocalExecutor):
        """Kills the first worker that asks."""

        def start(self, call) -> None:
            super().start(call)
            if call.key.startswith("tasks-how") and not killed.is_set():
                for child in psutil.Process().children():
                    with contextlib.suppress(psutil.ZombieProcess):  # one that has ended, and is to be waited for
                        if "tasks-how" in " ".join(child.cmdline()) and not killed.is_set():
                            child.kill()
                            killed.set()

    assert files_of(store, plan, lambda: Killing(2)) == wanted
    assert killed.is_set()
    (retry,) = [event for event in store.run("r1").events() if event["kind"] == "shard_retry"]
    assert retry["step"] == "tasks"


def test_shards_that_were_done_are_kept_when_a_run_is_stopped(tmp_path: Path, asked: Asked) -> None:
    plan, store = asked.plan(both(tmp_path), "a"), open_store(tmp_path / "store")
    wanted = files_of(open_store(tmp_path / "calm"), plan, Inline)
    run = runs.create_run(store, plan, "local", "r1")

    def stop_after_two(states) -> None:
        fan_out = states[-1].fan_out
        if fan_out is not None and len(fan_out.committed) >= 2:
            run.cancel_file.touch()

    assert coordinate(store, run, lambda: Inline(num_cpus=1), stop_after_two)["tasks"].status == "stopped"
    done = len(store.artifact("tasks", plan.step("tasks").fingerprint).committed_shards())
    assert done >= 2
    executor = Inline()
    state = coordinate(store, run, lambda: executor)["tasks"]
    assert state.output is not None
    assert load_manifest(state.output).files == wanted
    asked_again = [key for key in executor.started if key.startswith(("tasks-how", "tasks-which"))]
    assert len(asked_again) == len(store.artifact("tasks", plan.step("tasks").fingerprint).committed_shards()) - done


def test_pieces_ask_for_the_gpus_of_their_step_and_nothing_else_does(tmp_path: Path, asked: Asked) -> None:
    config = replace(both(tmp_path), device="auto", gpus=0.25)
    seen: dict[str, float] = {}

    class Noting(Inline):
        def start(self, call) -> None:
            seen[call.key] = call.gpus
            super().start(call)

    files_of(open_store(tmp_path / "store"), asked.plan(config, "a"), Noting)
    pieces = {key for key in seen if key.startswith(("tasks-how", "tasks-which"))}
    assert len(pieces) > 2
    assert {seen[key] for key in pieces} == {0.25}
    assert {seen[key] for key in seen.keys() - pieces} == {0.0}


def test_a_file_of_questions_that_is_none_is_refused_when_planned(tmp_path: Path, asked: Asked) -> None:
    file = write(tmp_path / "q.jsonl", [{"text": "a"}, {"texts": "b"}])
    config = replace(CONFIG, tasks={"q": TaskConfig("text", str(file))})
    with pytest.raises(UserError, match=r"tasks\.q\.file: .*q\.jsonl, line 2 has no \"text\"; it has 'texts'"):
        asked.plan(config, "a")


def test_other_questions_and_not_another_place_make_another_artifact(tmp_path: Path, asked: Asked) -> None:
    def fingerprint(folder: str, seed: int) -> str:
        (tmp_path / folder).mkdir()
        file = write(tmp_path / folder / "q.jsonl", texts(seed=seed))
        return asked.plan(replace(CONFIG, tasks={"q": TaskConfig("text", str(file))}), "a").step("tasks").fingerprint

    here = fingerprint("here", 1)
    assert fingerprint("there", 1) == here
    assert fingerprint("other", 2) != here
