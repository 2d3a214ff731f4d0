"""Ask a model the questions of files, a shard at a time; what is asked of a question depends on its number alone.

Every shard writes one record a question.  ``finish`` puts them in the order of the files and adds them up exactly, so
that neither the number of workers nor the order in which they end changes a bit.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifact import load_manifest, write_json
from pipeline.config import to_json
from pipeline.errors import UserError
from pipeline.inference.model import open_model, read_about
from pipeline.sandbox.isolation import choose_isolation
from pipeline.stage import Shard, StageContext, Stats
from pipeline.tasks.config import TaskConfig, TasksConfig, check_scorer, not_exact
from pipeline.tasks.fit import check_fit
from pipeline.tasks.pieces import cut
from pipeline.tasks.questions import Question, read_task
from pipeline.tasks.tables import Table, table_of
from pipeline.tracking import WandbRun
from pipeline.weights import check_tokenizer, load_record

RESULTS_FILE = "results.json"
_RECORDS = "records.jsonl"


def list_shards(config: TasksConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """Pieces of like cost, the costliest first; UserError for what cannot be asked of this model, or here."""
    if config.runs_programs:
        choose_isolation(allow_unsandboxed=config.allow_unsandboxed)
    record, vocabulary = read_about(inputs["weights"], inputs["tokenizer"])
    files = {name: read_task(name, config) for name in config.tasks}
    check_fit(config, files, record, vocabulary.special)
    _check_scorer(config, inputs)
    passes = 1 if record.objective == "autoregressive_nll" else config.likelihood.num_masks
    return cut(files, config, passes)


def _check_scorer(config: TasksConfig, inputs: Mapping[str, Path]) -> None:
    check_scorer(config, dict.fromkeys(inputs), "tasks")
    if "scorer" not in inputs:
        return
    record = load_record(inputs["scorer"])
    if record.objective != "autoregressive_nll":
        raise UserError(not_exact("tasks", record.objective))
    check_tokenizer(record, inputs["scorer"], inputs.get("scorer_tokenizer", inputs["tokenizer"]))


def run_shard(config: TasksConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats | None:
    """One record for each question of a shard, in their order."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    name = shard["task"]
    file = read_task(name, config)
    if file.sha256 != shard["sha256"]:
        raise UserError(f"tasks.{name}.file: {config.tasks[name].file} has changed since the run was planned")
    numbered = [(number, file.questions[number]) for number in range(shard["start"], shard["stop"])]
    records, isolation = _ask(config, config.tasks[name], inputs, numbered)
    write_records(context.out / _RECORDS, records)
    return {"questions": len(records), **({"isolation": isolation} if isolation else {})}


def _ask(
    config: TasksConfig, task: TaskConfig, inputs: Mapping[str, Path], numbered: Sequence[tuple[int, Question]]
) -> tuple[list[dict[str, Any]], str]:
    """A record of each question, and how programs were kept apart, if any were run."""
    from pipeline.tasks import generations, likelihoods

    isolation = choose_isolation(allow_unsandboxed=config.allow_unsandboxed) if task.kind == "code" else None
    model = open_model(inputs["weights"], inputs["tokenizer"], config.device)
    match task.kind:
        case "multiple_choice":
            return likelihoods.choose(model, numbered, config.likelihood), ""
        case "text":
            return likelihoods.roll(model, numbered, config.likelihood), ""
        case "match":
            return generations.match(model, numbered, task), ""
        case "infill":
            return generations.infill(model, numbered, task), ""
        case "code":
            assert isolation is not None
            return generations.code(model, numbered, task, isolation), isolation.words
        case "samples":
            records = generations.samples(model, numbered, task)
            if "scorer" in inputs:
                tokenizer = inputs.get("scorer_tokenizer", inputs["tokenizer"])
                scorer = open_model(inputs["scorer"], tokenizer, config.device)
                is_same = load_manifest(tokenizer).fingerprint == load_manifest(inputs["tokenizer"]).fingerprint
                generations.add_scores(records, scorer, is_same, config.likelihood.batch_rows)
            return records, ""


def finish(config: TasksConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext) -> Stats:
    """The records of each task in the order of its file, and a table of them."""
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(config.tasks)}
    isolations: dict[str, set[str]] = {name: set() for name in records}
    for directory in shard_dirs:
        manifest = load_manifest(directory)
        name = manifest.shard["task"]
        records[name] += read_records(directory / _RECORDS)
        isolations[name] |= {words for words in [manifest.stats.get("isolation")] if words}
    model = load_record(inputs["weights"])
    tables: dict[str, Table] = {}
    for name, found in records.items():
        found.sort(key=lambda record: record["number"])
        assert [record["number"] for record in found] == list(range(len(found))), f"questions of {name} are missing"
        write_records(context.out / f"{name}.jsonl", found)
        tables[name] = table_of(config.tasks[name], found, model, config.likelihood)
        tables[name]["settings"] |= {"isolation": sorted(words)} if (words := isolations[name]) else {}
        if config.tasks[name].kind == "samples" and "scorer" in inputs:
            tables[name]["settings"]["scorer"] = load_manifest(inputs["scorer"]).fingerprint
    results = {
        name: {"kind": config.tasks[name].kind, "sha256": read_task(name, config).sha256, **table}
        for name, table in tables.items()
    }
    write_json(context.out / RESULTS_FILE, {"tasks": results})
    if config.track:
        _track(config, context, tables)
    return {name: {metric: row["value"] for metric, row in table["metrics"].items()} for name, table in tables.items()}


def _track(config: TasksConfig, context: StageContext, tables: Mapping[str, Table]) -> None:
    """Figures with their errors and intervals, as values of a Weights & Biases run of their own."""
    group = context.labels.get("run_id", "alone")
    run = WandbRun(context.state / "wandb", context.fingerprint[:12], group, to_json(config), _warn)
    run.summarise(
        {
            f"tasks/{name}/{metric}{suffix}": value
            for name, table in tables.items()
            for metric, row in table["metrics"].items()
            for suffix, value in (
                ("", row["value"]),
                ("_doc_se", row["doc_se"]),
                ("_mc_se", row["mc_se"]),
                *zip(("_low", "_high"), row["interval"] or (), strict=False),
            )
            if value is not None
        }
        | {
            f"tasks/{name}/isolation": "; ".join(words)
            for name, table in tables.items()
            if (words := table["settings"].get("isolation"))
        }
    )
    run.finish()


def _warn(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr, flush=True)  # noqa: T201


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict[str, Any]]:
    """What ``write_records`` wrote."""
    # Not splitlines(): that also cuts at U+2028 and the like, which JSON allows inside a string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
