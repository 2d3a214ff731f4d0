"""Text to rows through the engine: the same bytes for any workers and order; a changed file redoes its own shards."""

import os
import signal
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
from workflows.plan import Plan, make_plan
from workflows.step import Step, Workflow
from workflows.store import Store

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
    wanted = files_of(Store(tmp_path / "one"), plan, Inline, "r1")
    assert len(wanted["packing"]) > 12
    found = files_of(Store(tmp_path / "two"), plan, lambda: Inline(num_cpus=99, newest_first=True), "r1")
    assert found == wanted


def test_a_changed_file_redoes_its_own_shards_in_every_stage(tmp_path: Path, tokenizer_file: Path) -> None:
    folder, store = write_sources(tmp_path / "text"), Store(tmp_path / "store")
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
    assert again == files_of(Store(tmp_path / "fresh"), changed, Inline, "r1")


def _num_shards(plan: Plan, store: Store, name: str) -> int:
    from pipeline.artifact import read_json

    return len(read_json(store.artifact(name, plan.step(name).fingerprint).directory / "shards.json"))


def test_a_killed_tokenization_worker_costs_its_shard_alone(tmp_path: Path, tokenizer_file: Path) -> None:
    plan = data_plan(write_sources(tmp_path / "text"), tokenizer_file, shard_bytes=1_000_000)
    wanted = files_of(Store(tmp_path / "calm"), plan, Inline, "r1")
    store = Store(tmp_path / "store")
    killed = threading.Event()

    class Killing(LocalExecutor):
        """Kills the first worker that tokenizes a shard."""

        def start(self, call) -> None:
            super().start(call)
            if call.key.startswith("tokenization-train") and not killed.is_set():
                for child in psutil.Process().children():
                    if any("tokenization-train" in word for word in child.cmdline()):
                        os.kill(child.pid, signal.SIGKILL)
                        killed.set()

    found = files_of(store, plan, lambda: Killing(2), "r1")
    assert killed.is_set()
    assert found == wanted
    (retry,) = [event for event in store.run("r1").events() if event["kind"] == "shard_retry"]
    assert retry["failure"]["error_class"] == "infra"
    assert retry["step"] == "tokenization"
