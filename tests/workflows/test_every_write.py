"""A whole run whose process dies before or after any one of its writes to the store, and is then resumed.

A task, a map with shards of its own, a map that takes shards over from another artifact, and a gang of one rank.
"""

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from pipeline.artifact import load_manifest, read_json
from pipeline.errors import UserError
from pipeline.object_storage import ObjectStorage
from pipeline.stage import environment
from pipeline.storage import FileStorage, Place, Storage, open_storage
from tests.support.executors import Inline
from tests.support.mortal import Death, Life, Mortal, in_memory, writing_files
from tests.support.toy_stages.letters.config import LettersConfig
from tests.support.toy_stages.total import run as total
from tests.support.toy_stages.trouble import ToyConfig, executions
from tests.support.toy_workflow import STAGES, copies_plan, toy_workflow
from workflows import copies, lease, runs, shards, usage, worker
from workflows import store as store_module
from workflows.coordinator import Coordinator
from workflows.plan import Plan, make_plan
from workflows.step import Step, Workflow
from workflows.store import ArtifactPlace, open_attempt, open_writable_store

Tree = dict[str, dict[str, str]]
"""Committed artifact -> path -> SHA-256."""


def whole_plan(log: Path) -> Plan:
    """All kinds of stages.  The copies of "a" and "b" are in the store already."""
    toy = toy_workflow(log, total__workers=1)
    more = (
        Step("letters", f"{STAGES}.letters", LettersConfig(text="abc")),
        Step("copies", f"{STAGES}.copies", ToyConfig(log=str(log)), {"letters": "letters"}),
    )
    return make_plan(Workflow("toy", "small", (*toy.steps, *more)), environment())


class Machine:
    """Processes that work on one store, one after the other, each with its own idea of when it dies."""

    def __init__(self, inner: Storage | ObjectStorage, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.inner, self._root, self._patch = inner, root, patch
        self.log, self._lives = root / "log", itertools.count(1)
        self.log.mkdir(parents=True)

    def live(self, life: Life, plan: Plan) -> None:
        """Create the run, or resume it, to its end or the death of the process."""
        number = next(self._lives)
        storage = Mortal(self.inner, life)
        for module in (store_module, worker):
            self._patch.setattr(module, "open_storage", lambda url: storage)
        self._patch.setattr(lease, "_started_at", lambda pid: float(number))
        self._patch.setenv("DLM_CACHE", str(self._root / f"cache-{number}"))
        with writing_files(life):
            store = open_writable_store(self.inner.url)
            try:
                run = store.run(plan.workflow)
            except UserError:
                run = runs.create_run(store, plan, "local", plan.workflow)
                run.cancel_file.touch()  # what an earlier attempt was asked: the next one takes it away
            states = Coordinator(store, run, runs.frozen_plan(run), Inline, lambda states: None).run()
        assert {state.status for state in states} <= {"committed", "cached"}, [state.failure for state in states]

    def close(self) -> None:
        for lock in total._held:
            lock.close()
        total._held.clear()
        self.inner.remove("")  # a listing in memory looks at all there is
        shutil.rmtree(self._root, ignore_errors=True)

    def artifacts(self) -> Iterator[ArtifactPlace]:
        folder = Place(self.inner, "artifacts")  # type: ignore[arg-type]
        for stage in folder.names():
            yield from (ArtifactPlace(folder / stage / name) for name in (folder / stage).names())

    def tree(self) -> Tree:
        """What is visible as committed, every byte of it hashed; whatever is visible must be whole."""
        found: Tree = {}
        for place in self.artifacts():
            for name in (place.directory / "shards").names():
                checked(place.attempt(read_json(place.directory / "shards" / name)["directory"]))
            if (committed := place.committed()) is not None:
                found[place.address] = checked(committed)
        return found

    def check_runs(self) -> None:
        """Every record of runs is complete."""
        for key in Place(self.inner, "runs").sizes():  # type: ignore[arg-type]
            if key.endswith(".json"):
                read_json(Place(self.inner, f"runs/{key}"))  # type: ignore[arg-type]


def checked(directory: Place) -> dict[str, str]:
    """Path -> SHA-256 of an artifact or shard, which must be what its manifest says."""
    manifest = open_attempt(directory)
    for record in manifest.files:
        assert hashlib.sha256((directory / record.path).read_bytes()).hexdigest() == record.sha256
    return {record.path: record.sha256 for record in load_manifest(directory).files}


def finished(plan: Plan, machine: Machine) -> set[str]:
    """Pieces that are committed, so that nothing executes them again."""
    counts = executions(machine.log)
    found: set[str] = set()
    for step in plan.steps:
        (place,) = [p for p in machine.artifacts() if step.fingerprint.startswith(p.directory.name)] or [None]
        if place is None:
            continue
        if place.committed() is not None:
            found |= {piece for piece in counts if piece == step.name or piece.startswith(f"{step.name}-")}
        found |= {f"{step.name}-{name.removesuffix('.json')}" for name in (place.directory / "shards").names()}
    return found & set(counts)


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes follow each other in one order: no clock and no second thread decides about any.  No power is cut."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(usage, "_SHORTEST_S", 1e6)
    monkeypatch.setattr(usage, "_cpu_s", lambda: 0.0)
    monkeypatch.setattr(worker, "_LOG_EVERY_S", 1e6)
    monkeypatch.setattr(copies, "_THREADS", 1)
    monkeypatch.setattr(shards, "_ADOPTERS", 1)


@pytest.fixture(params=["files", "memory", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    """What the store lies in."""
    if request.param == "s3":
        request.getfixturevalue("s3_url")
    return request.param


def machine_of(kind: str, root: Path, patch: pytest.MonkeyPatch) -> Machine:
    """With a store that has the first two copies already."""
    inner = {
        "files": lambda: FileStorage(root / "store"),
        "memory": in_memory,
        "s3": lambda: open_storage(f"s3://bucket/{root.name}/store"),
    }[kind]()
    machine = Machine(inner, root, patch)
    machine.live(Life(), copies_plan(machine.log, "ab"))
    return machine


def undisturbed(kind: str, root: Path, patch: pytest.MonkeyPatch) -> tuple[list[str], Tree]:
    """The writes of a run, after each of which everything visible was whole, and the tree at its end."""
    machine, life = machine_of(kind, root, patch), Life()
    if kind != "s3":
        life.on_write = lambda: (machine.tree(), machine.check_runs())
    machine.live(life, whole_plan(machine.log))
    tree = machine.tree()
    machine.close()
    return life.writes, tree


def die_and_resume(
    kind: str, root: Path, patch: pytest.MonkeyPatch, number: int, when: Literal["before", "after"], wanted: Tree
) -> None:
    """One death, whatever is visible then, and the resumed run."""
    machine, life = machine_of(kind, root, patch), Life(number, when)
    plan = whole_plan(machine.log)
    with pytest.raises(Death):
        machine.live(life, plan)
    visible = machine.tree()
    assert visible.items() <= wanted.items()
    machine.check_runs()
    kept, before = finished(plan, machine), executions(machine.log)
    machine.live(Life(), plan)
    assert machine.tree() == wanted
    after = executions(machine.log)
    assert {piece: after[piece] for piece in kept} == {piece: before[piece] for piece in kept}
    assert all(after[piece] - before.get(piece, 0) <= 1 for piece in after)
    assert (after["copies-000"], after["copies-001"]) == (1, 1), "they were to be taken over"
    machine.close()


def sweep(kind: str, tmp_path: Path, patch: pytest.MonkeyPatch, every: int) -> None:
    """Die at every so manieth write, counted so that in time each is hit before and after it."""
    writes, wanted = undisturbed(kind, tmp_path / f"{tmp_path.name}-calm", patch)
    assert len(wanted) == 8
    deaths = [(number, when) for number in range(len(writes)) for when in ("before", "after")]
    for number, when in deaths[::every]:
        print(f"dies {when} {writes[number]}")  # noqa: T201
        die_and_resume(kind, tmp_path / f"{tmp_path.name}-{number}-{when}", patch, number, when, wanted)


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("calm", "no_backoff")
@pytest.mark.parametrize("kind", ["files", "memory"])
def test_a_run_that_dies_at_a_write_is_resumed_to_the_same_tree(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(kind, tmp_path, monkeypatch, 13)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("calm", "no_backoff")
def test_a_run_that_dies_before_or_after_any_write_is_resumed_to_the_same_tree(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(kind, tmp_path, monkeypatch, 1 if kind != "s3" else 5)


@pytest.mark.usefixtures("calm", "no_backoff")
def test_the_writes_are_those_of_all_kinds(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, _ = undisturbed(kind, tmp_path / tmp_path.name, monkeypatch)
    text = "\n".join(writes)
    assert {word.split()[0] for word in writes} >= {"create", "write", "touch", "remove"}
    assert ("file manifest.json" if kind == "files" else "upload artifacts/toy-total/") in text
    assert kind == "files" or "copy artifacts/toy-copies/" in text
    for name in ("run.json", "COMMIT.json", "done.json", "lease/000001.json", "released", "events/001-", "shards/toy-"):
        assert name in text, name
