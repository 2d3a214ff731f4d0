"""Text to rows by our stages, driven by the workflow engine as ``dlm run`` drives a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import load_manifest
from pipeline.config import from_json
from pipeline.corpus.config import CorpusConfig
from pipeline.data.rows import open_rows
from pipeline.data.shards import TokenStream, open_stream
from pipeline.packing.config import PackingConfig
from pipeline.stage import environment
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.coordinator import Coordinator
from workflows.plan import make_plan
from workflows.runs import committed_outputs, create_run, frozen_plan
from workflows.step import Step, Workflow
from workflows.store import open_store


def _workflow(text: str, tokenizer_file: str, seq_len: int, backend: str, shard_bytes: int) -> Workflow:
    values: dict[type, dict[str, Any]] = {
        CorpusConfig: {"source": text, "shard_bytes": shard_bytes},
        TokenizerConfig: {"file": tokenizer_file},
        TokenizationConfig: {"backend": backend},
        PackingConfig: {"seq_len": seq_len},
    }
    corpus, tokenizer, tokenization, packing = (from_json(kind, value) for kind, value in values.items())
    return Workflow(
        name="rows",
        summary="text -> tokens -> rows",
        steps=(
            Step("corpus", "pipeline.corpus", corpus),
            Step("tokenizer", "pipeline.tokenizer", tokenizer, {"corpus": "corpus"}),
            Step("tokenization", "pipeline.tokenization", tokenization, {"corpus": "corpus", "tokenizer": "tokenizer"}),
            Step("packing", "pipeline.packing", packing, {"tokens": "tokenization", "tokenizer": "tokenizer"}),
        ),
    )


def run(
    text: str, tokenizer_file: str, seq_len: str, num_workers: str, backend: str, shard_bytes: str, store: str
) -> None:
    """Run the workflow in an empty store, in subprocesses on so many cores."""
    from cluster.local import LocalExecutor

    workflow = _workflow(text, tokenizer_file, int(seq_len), backend, int(shard_bytes))
    plan, place = make_plan(workflow, environment()), open_store(Path(store))
    Path(store).mkdir()
    coordinator = Coordinator(
        place, create_run(place, plan, "local"), plan, lambda: LocalExecutor(int(num_workers)), lambda states: None
    )
    for state in coordinator.run():
        if state.failure is not None:
            raise SystemExit(f"{state.step.name}: {state.failure.message}\n{state.failure.traceback}")


@dataclass(frozen=True)
class Commit:
    """One committed shard of the tokenization stage."""

    at_s: float
    tokens: int


@dataclass(frozen=True)
class Output:
    """What ``run`` left in a store."""

    train: TokenStream
    held_out: TokenStream
    rows: np.ndarray
    """All tokens of all rows, in their order, without padding."""
    num_rows: int
    commits: list[Commit]
    """In the order of time."""
    backends: dict[str, int]
    """Shards by what encoded them."""


def outputs_of(store: Path) -> dict[str, Path]:
    """The artifacts of the one run in a store, by step."""
    place = open_store(store)
    (run_place,) = place.runs()
    return {name: output.path for name, output in committed_outputs(place, run_place).items()}


def read_output(store: Path) -> Output:
    """Open the artifacts of the one run in a store."""
    place = open_store(store)
    (run_place,) = place.runs()
    outputs = outputs_of(store)
    tokens, packed = outputs["tokenization"], outputs["packing"]
    stats = load_manifest(tokens).stats
    split = {
        name: open_stream([tokens / f"{shard['name']}.arrow" for shard in stats["shards"] if shard["split"] == name])
        for name in ("train", "held_out")
    }
    opened = open_rows(packed)
    shards = [opened.open_shard(number) for number in range(len(opened.shards))]
    artifact = place.artifact("tokenization", frozen_plan(run_place).step("tokenization").fingerprint)
    commits = [
        Commit((artifact.directory / "shards" / f"{name}.json").modified(), load_manifest(path).stats["tokens"])
        for name, path in artifact.committed_shards().items()
    ]
    return Output(
        train=split["train"],
        held_out=split["held_out"],
        rows=np.concatenate([shard.tokens[:] for shard in shards]),
        num_rows=opened.num_rows,
        commits=sorted(commits, key=lambda commit: commit.at_s),
        backends=stats["backends"],
    )
