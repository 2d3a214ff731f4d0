"""``dlm data``: look at what a run has tokenized and packed, and verify it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import to_json
from pipeline.data import inspection
from pipeline.data.loader import Loader
from pipeline.data.rows import open_rows
from pipeline.data.vocabulary import Vocabulary, load_vocabulary
from pipeline.errors import UserError
from workflows import runs
from workflows.copies import local_copy
from workflows.plan import Plan, PlannedStep, step_config
from workflows.store import RunPlace, Store

_TRAINING, _PACKING = "pipeline.pretrain", "pipeline.packing"
_BAR_WIDTH = 40
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = _PICTURES | {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), *_REORDERING)}
"""What a text holds must not steer the terminal: control characters as pictures, or by number where there is none."""


@dataclass(frozen=True)
class Prepared:
    """The artifacts of a run that hold its data, and how training draws from them."""

    corpus: Path
    tokens: Path
    rows: Path
    vocabulary: Vocabulary
    mixture: dict[str, float]
    data_seed: int
    num_samples: int | None


def prepared_data(store: Store, run: RunPlace, step_name: str = "") -> Prepared:
    """The data of the training or packing step of that name, or of the only one of a run.

    UserError if there is none or more than one, or if the run has not come to packed rows yet.
    """
    plan = runs.frozen_plan(run)
    chosen = _chosen(plan, run.run_id, step_name)
    is_training = chosen.stage == _TRAINING
    packing = _source(plan, chosen, "rows") if is_training else chosen
    tokenizer, tokenization = _source(plan, packing, "tokenizer"), _source(plan, packing, "tokens")
    corpus = _source(plan, tokenization, "corpus")
    outputs = runs.committed_outputs(store, run)
    for step in (corpus, tokenizer, tokenization, packing):
        if step.name not in outputs:
            raise UserError(f"run {run.run_id} has no finished {step.name} step; see dlm status {run.run_id}")
    training = step_config(chosen) if is_training else None
    return Prepared(
        local_copy(outputs[corpus.name]),
        local_copy(outputs[tokenization.name]),
        local_copy(outputs[packing.name]),
        load_vocabulary(local_copy(outputs[tokenizer.name])),
        dict(training.mixture) if training else {},
        training.data_seed if training else 0,
        training.num_steps * training.global_batch_seqs if training else None,
    )


def _chosen(plan: Plan, run_id: str, name: str) -> PlannedStep:
    """The step whose data are meant; a training before a packing, since it says how rows are drawn."""
    known = [step for stage in (_TRAINING, _PACKING) for step in plan.steps if step.stage == stage]
    if not known:
        raise UserError(f"run {run_id} has no packing step: its workflow neither packs rows nor trains")
    found = [step for step in known if (step.name == name if name else step.stage == known[0].stage)]
    if len(found) == 1:
        return found[0]
    several = f"it has {len(found)} {known[0].stage.partition('.')[2]} steps"
    what = f"{name!r} is no training or packing" if name else several
    raise UserError(f"run {run_id}: {what}; choose one with --step: {', '.join(step.name for step in known)}")


def _source(plan: Plan, step: PlannedStep, name: str) -> PlannedStep:
    if name not in step.inputs:
        raise UserError(f"step {step.name} ({step.stage}) has no input {name!r}: its data cannot be traced")
    return plan.step(step.inputs[name])


def verify(data: Prepared) -> Iterator[str]:
    """One sentence for each thing that was checked; CorruptionError at the first that is wrong."""
    return inspection.verify(data.corpus, data.tokens, data.rows, data.vocabulary)


def show(data: Prepared, sample_ids: list[int]) -> dict[str, Any]:
    """All that ``dlm data show`` prints, as JSON values."""
    rows = open_rows(data.rows)
    loader = Loader(rows, data.data_seed, data.vocabulary.special.pad_token_id, data.mixture)
    return {
        "seq_len": rows.seq_len,
        "vocab_size": rows.vocab_size,
        "padding_share": rows.stats["padding_share"],
        "sources": to_json(inspection.summarise_sources(data.tokens, rows, data.mixture, data.num_samples)),
        "lengths": to_json(inspection.length_histogram(data.tokens)),
        "samples": {i: to_json(inspection.decode_row(loader, data.vocabulary, i)) for i in sample_ids},
    }


def print_shown(console: Console, shown: dict[str, Any]) -> None:
    """Tables and text of what ``show`` found."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("source")
    for column in ("documents", "tokens", "bytes", "rows", "share of rows", "epochs"):
        table.add_column(column, justify="right")
    for source in shown["sources"]:
        counts = [f"{source[key]:,}" for key in ("docs", "tokens", "bytes", "rows")]
        epochs = "" if source["epochs"] is None else f"{source['epochs']:.3f}"
        table.add_row(source["source"], *counts, f"{source['share']:.4f}", epochs)
    console.print(table)
    padding = f"{100 * shown['padding_share']:.2f} % padding"
    console.print(
        f"\nrows of {shown['seq_len']} tokens, {padding}, vocabulary of {shown['vocab_size']}", highlight=False
    )
    lengths = shown["lengths"]
    part = (
        ""
        if lengths["shards_read"] == lengths["shards"]
        else f" in {lengths['shards_read']} of {lengths['shards']} shards"
    )
    console.print(f"\nlength of documents in tokens{part}", highlight=False)
    highest = max(lengths["counts"], default=0)
    for low, count in zip(lengths["edges"], lengths["counts"], strict=False):
        bar = "█" * round(_BAR_WIDTH * count / highest) or ("▏" if count else "")
        console.print(f"{f'{low:,} to {2 * low - 1:,}':>23} {count:>10,} {bar}", highlight=False)
    for sample_id, parts in shown["samples"].items():
        console.print(f"\n[bold]sample {sample_id}[/bold]", highlight=False)
        numbers = itertools.count()
        for row_part in parts:
            what = "padding" if row_part["text"] is None else f"document {next(numbers)}"
            console.print(f"[dim]── {what}, {row_part['tokens']} tokens[/dim]", highlight=False)
            if row_part["text"] is not None:
                console.print(
                    row_part["text"].translate(_VISIBLE), highlight=False, markup=False, emoji=False, soft_wrap=True
                )
