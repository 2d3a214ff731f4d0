"""Ask a model the questions of files, a shard at a time; what is asked of a question depends on its number alone.

Every shard writes one record a question.  ``finish`` puts them in the order of the files and adds them up exactly, so
that neither the number of workers nor the order in which they end changes a bit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifact import load_manifest, write_json
from pipeline.errors import UserError
from pipeline.stage import Shard, StageContext, Stats
from pipeline.tasks.config import TasksConfig
from pipeline.tasks.pieces import cut
from pipeline.tasks.questions import read_task
from pipeline.tasks.tables import Table, table_of
from pipeline.weights import check_tokenizer, load_record

RESULTS_FILE = "results.json"
_RECORDS = "records.jsonl"


def list_shards(config: TasksConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """Pieces of like cost, the costliest first."""
    record = load_record(inputs["weights"])
    check_tokenizer(record, inputs["weights"], inputs["tokenizer"])
    files = {name: read_task(name, config) for name in config.tasks}
    passes = 1 if record.objective == "autoregressive_nll" else config.likelihood.num_masks
    return cut(files, config, passes)


def run_shard(config: TasksConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats | None:
    """One record for each question of a shard, in their order."""
    import torch

    from pipeline.inference.model import open_model
    from pipeline.tasks.likelihoods import ASK

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    name = shard["task"]
    file = read_task(name, config)
    if file.sha256 != shard["sha256"]:
        raise UserError(f"tasks.{name}.file: {config.tasks[name].file} has changed since the run was planned")
    model = open_model(inputs["weights"], inputs["tokenizer"], config.device)
    numbered = [(number, file.questions[number]) for number in range(shard["start"], shard["stop"])]
    records = ASK[config.tasks[name].kind](model, numbered, config.likelihood)
    write_records(context.out / _RECORDS, records)
    return {"questions": len(records)}


def finish(config: TasksConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext) -> Stats:
    """The records of each task in the order of its file, and a table of them."""
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(config.tasks)}
    for directory in shard_dirs:
        records[load_manifest(directory).shard["task"]] += read_records(directory / _RECORDS)
    model = load_record(inputs["weights"])
    tables: dict[str, Table] = {}
    for name, found in records.items():
        found.sort(key=lambda record: record["number"])
        assert [record["number"] for record in found] == list(range(len(found))), f"questions of {name} are missing"
        write_records(context.out / f"{name}.jsonl", found)
        tables[name] = table_of(config.tasks[name], found, model, config.likelihood)
    results = {
        name: {"kind": config.tasks[name].kind, "sha256": read_task(name, config).sha256, **table}
        for name, table in tables.items()
    }
    write_json(context.out / RESULTS_FILE, {"tasks": results})
    return {name: {metric: row["value"] for metric, row in table["metrics"].items()} for name, table in tables.items()}


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict[str, Any]]:
    """What ``write_records`` wrote."""
    # Not splitlines(): that also cuts at U+2028 and the like, which JSON allows inside a string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
