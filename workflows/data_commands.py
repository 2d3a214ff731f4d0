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
from workflows.plan import step_config
from workflows.store import RunPlace, Store

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


def prepared_data(store: Store, run: RunPlace) -> Prepared:
    """The data of a run; UserError if it has not come to packed rows yet."""
    plan = runs.frozen_plan(run)
    outputs = runs.committed_outputs(store, run)
    by_stage = {step.stage: step for step in plan.steps}
    places: dict[str, Path] = {}
    for stage in ("pipeline.corpus", "pipeline.tokenizer", "pipeline.tokenization", "pipeline.packing"):
        step = by_stage.get(stage)
        if step is None or step.name not in outputs:
            raise UserError(
                f"run {run.run_id} has no finished {stage.partition('.')[2]} step; see dlm status {run.run_id}"
            )
        places[stage.partition(".")[2]] = outputs[step.name]
    training = step_config(by_stage["pipeline.pretrain"]) if "pipeline.pretrain" in by_stage else None
    return Prepared(
        places["corpus"],
        places["tokenization"],
        places["packing"],
        load_vocabulary(places["tokenizer"]),
        dict(training.mixture) if training else {},
        training.data_seed if training else 0,
        training.num_steps * training.global_batch_seqs if training else None,
    )


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
