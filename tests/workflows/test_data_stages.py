"""Text to rows through the engine: the same bytes for any workers and order; a changed file redoes its own shards."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.executor import Executor
from cluster.local import LocalExecutor
from pipeline.artifact import FileRecord, load_manifest
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.packing.config import PackingConfig
from pipeline.stage import environment
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.executors import Inline
from tests.support.tiny_run import write_text
from tests.support.toy_workflow import coordinate
from workflows import runs
from workflows.plan import Plan, check_drift, make_plan
from workflows.step import Step, Workflow
from workflows.store import Store, open_store

MAPS = ("corpus", "tokenization", "packing")


def data_plan(folder: Path, tokenizer: Path, policy: str = "concatenate", shard_bytes: int = 8_000) -> Plan:
    """corpus -> tokenizer -> tokenization -> packing of two sources."""
    sources = {name: Source((str(folder / name),)) for name in ("books", "code")}
    # Files above shard_bytes are cut into ranges: every file has shards of its own.
    corpus = CorpusConfig(source=sources, held_out_fraction=0.1, shard_bytes=shard_bytes)
    tokens = {"tokens": "tokenization", "tokenizer": "tokenizer"}
    steps = (
        Step("corpus", "pipeline.corpus", corpus),
        Step("tokenizer", "pipeline.tokenizer", TokenizerConfig(file=str(tokenizer)), {"corpus": "corpus"}),
        Step(
            "tokenization",
            "pipeline.tokenization",
            TokenizationConfig(backend="tokenizers"),
            {"corpus": "corpus", "tokenizer": "tokenizer"},
        ),
        Step("packing", "pipeline.packing", PackingConfig(seq_len=64, policy=policy), tokens),  # type: ignore[arg-type]
    )
    return make_plan(Workflow("data", "text to rows", steps), environment())


def write_sources(folder: Path) -> Path:
    """Two sources of three files, some 20 kB each."""
    for source in ("books", "code"):
        (folder / source).mkdir(parents=True)
        for number in range(3):
            write_text(folder / source / f"{number}.jsonl", seed=ord(source[0]) * 10 + number, num_docs=45)
    return folder


def files_of(store: Store, plan: Plan, make: Callable[[], Executor], run_id: str) -> dict[str, list[FileRecord]]:
    """Run to the end; the files of every step's artifact."""
    states = coordinate(store, runs.create_run(store, plan, "local", run_id), make)
    assert all(state.status in ("committed", "cached") for state in states.values()), [
        s.reason for s in states.values()
    ]
    return {name: load_manifest(state.output).files for name, state in states.items() if state.output}


@pytest.mark.parametrize("policy", ["concatenate", "best_fit"])
def test_every_file_is_the_same_for_any_number_of_workers_and_any_order(
    tmp_path: Path, tokenizer_file: Path, policy: str
) -> None:
    plan = data_plan(write_sources(tmp_path / "text"), tokenizer_file, policy)
    wanted = files_of(open_store(tmp_path / "one"), plan, Inline, "r1")
    assert len(wanted["packing"]) > 12
    found = files_of(open_store(tmp_path / "two"), plan, lambda: Inline(num_cpus=99, newest_first=True), "r1")
    assert found == wanted


def test_a_changed_file_redoes_its_own_shards_in_every_stage(tmp_path: Path, tokenizer_file: Path) -> None:
    folder, store = write_sources(tmp_path / "text"), open_store(tmp_path / "store")
    plan = data_plan(folder, tokenizer_file)
    files_of(store, plan, Inline, "r1")
    shards = {name: _num_shards(plan, store, name) for name in MAPS}
    write_text(folder / "code" / "1.jsonl", seed=77, num_docs=45)
    changed = data_plan(folder, tokenizer_file)
    again = files_of(store, changed, Inline, "r2")
    for name in MAPS:
        (event,) = [e for e in store.run("r2").events() if e["kind"] == "shards_adopted" and e["step"] == name]
        num_shards = _num_shards(changed, store, name)
        assert 0.7 * shards[name] < event["adopted"] < num_shards, name
    assert again == files_of(open_store(tmp_path / "fresh"), changed, Inline, "r1")


def _num_shards(plan: Plan, store: Store, name: str) -> int:
    return len(store.artifact(name, plan.step(name).fingerprint).committed_shards())


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Callable[[], Plan]]:
    """A file, and how to plan a corpus of its folder."""
    file = tmp_path / "text" / "a.jsonl"
    write_sentences(file, "before")
    config = CorpusConfig(source={"text": Source((str(file.parent),))}, held_out_fraction=0.2)
    workflow = Workflow("corpus", "text alone", (Step("corpus", "pipeline.corpus", config),))
    return file, lambda: make_plan(workflow, environment())


def write_sentences(file: Path, word: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"text": f"{word} number {i}"}) + "\n" for i in range(60)))


def test_shards_listed_of_changed_files_are_never_filed_under_the_planned_fingerprint(
    tmp_path: Path, corpus: tuple[Path, Callable[[], Plan]]
) -> None:
    file, plan = corpus
    store = open_store(tmp_path / "store")
    run = runs.create_run(store, plan(), "local", "r1")
    write_sentences(file, "LATER!")
    planned = runs.frozen_plan(run)
    states = coordinate(store, run, Inline)
    assert "have changed since the run was planned" in states["corpus"].reason
    assert _num_shards(planned, store, "corpus") == 0, "shards of a refused list were run"
    write_sentences(file, "before")
    output = coordinate(store, run, Inline)["corpus"].output
    assert output is not None
    assert load_manifest(output).fingerprint == planned.step("corpus").fingerprint
    text = (output.path / "train-text-00000.arrow").read_bytes()
    assert b"before" in text
    assert b"LATER!" not in text


@pytest.mark.parametrize("other", ["touched", "moved"])
def test_a_corpus_interrupted_after_its_list_is_built_from_the_same_bytes(
    tmp_path: Path, corpus: tuple[Path, Callable[[], Plan]], other: str
) -> None:
    file, plan = corpus
    store = open_store(tmp_path / "store")
    run = runs.create_run(store, plan(), "local", "r1")

    def stop_once_listed(states) -> None:
        if states[0].fan_out is not None:
            run.cancel_file.touch()

    assert coordinate(store, run, Inline, stop_once_listed)["corpus"].status == "stopped"
    if other == "touched":
        os.utime(file, (1, 1))
        assert check_drift(runs.frozen_plan(run)) == {}
        states = coordinate(store, run, Inline)
    else:
        moved = file.parent.rename(tmp_path / "moved")
        config = CorpusConfig(source={"text": Source((str(moved),))}, held_out_fraction=0.2)
        workflow = Workflow("corpus", "text alone", (Step("corpus", "pipeline.corpus", config),))
        again = make_plan(workflow, environment())
        assert again.step("corpus").fingerprint == runs.frozen_plan(run).step("corpus").fingerprint
        states = coordinate(store, runs.create_run(store, again, "local", "r2"), Inline)
    assert states["corpus"].status == "committed", states["corpus"].reason


def test_a_killed_tokenization_worker_costs_its_shard_alone(tmp_path: Path, tokenizer_file: Path) -> None:
    plan = data_plan(write_sources(tmp_path / "text"), tokenizer_file, shard_bytes=1_000_000)
    wanted = files_of(open_store(tmp_path / "calm"), plan, Inline, "r1")
    store = open_store(tmp_path / "store")
    killed = threading.Event()

    class Killing(LocalExecutor):
        """Kills the first worker that tokenizes a shard."""

        def start(self, call) -> None:
            super().start(call)
            if call.key.startswith("tokenization-train") and not killed.is_set():
                # Of several that run by now, one alone.
                started = (c for c in psutil.Process().children() if "tokenization-train" in " ".join(c.cmdline()))
                child = next(started, None)
                if child is not None:
                    child.kill()
                    killed.set()

    found = files_of(store, plan, lambda: Killing(2), "r1")
    assert killed.is_set()
    assert found == wanted
    (retry,) = [event for event in store.run("r1").events() if event["kind"] == "shard_retry"]
    assert retry["failure"]["error_class"] == "infra"
    assert retry["step"] == "tokenization"
