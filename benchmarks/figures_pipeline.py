"""The pictures in the README: ``python -m benchmarks.figures_pipeline [--loss PRETRAIN EVALUATION]``.

Kinds and arrows are those of a recipe's steps.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from workflows.graph import wanted_steps
from workflows.recipes.quickstart import quickstart
from workflows.recipes.smollm2 import smollm2_to_diffusion
from workflows.report import svg
from workflows.report.data import collect
from workflows.report.loss import loss_chart
from workflows.step import Workflow, load_stage

OUT = Path(svg.__file__).parent
PICTURES = {"pipeline.svg": (quickstart, 4), "pipeline_adaptation.svg": (smollm2_to_diffusion, 5)}
"""Recipe and number of layers a row, by file."""
LOSS = "quickstart_loss.svg"

_WHAT_IT_DOES = {
    "import_checkpoint": "a next-token model, proved",
    "corpus": "text in, documents out",
    "tokenizer": "trains or adopts a BPE",
    "tokenization": "documents to token shards",
    "packing": "token shards to rows",
    "ar_init": "a row for the mask",
    "pretrain": "masked diffusion, resumable",
    "convert": "checkpoint to safetensors",
    "evaluate": "held-out bound, xz beside it",
    "generate": "text out of masks",
    "report": "all of it on one page",
}
_KINDS = {"task": "one process", "map": "one process per shard", "gang": "all ranks together"}

_LAYOUT = svg.Layout(node_width=214, node_height=66, gap_x=34, gap_y=20)
_MARGIN = 26.0
PALETTE = {
    "ink": "#1c2330", "muted": "#566072", "line": "#d5dbe4", "card": "#ffffff", "accent": "#2f6bd8", "level": "#b4540a",
    "lane": "#b3bcc9", "task": "#44546e", "map": "#0b7a75", "gang": "#8a3ab9",
}  # fmt: skip
BACKGROUND = "#f4f6f9"


def draw_picture(workflow: Workflow, layers_per_row: int) -> str:
    """The graph of the steps that a recipe has unasked, on a card of its own, as a whole SVG file."""
    steps = wanted_steps(workflow)
    nodes = [
        svg.Node(step.name, _WHAT_IT_DOES[load_stage(step.stage).name], load_stage(step.stage).kind) for step in steps
    ]
    edges = {(source, step.name) for step in steps for source in step.inputs.values()}
    graph = svg.layered_graph(nodes, edges, replace(_LAYOUT, layers_per_row=layers_per_row))
    legend = _legend(graph.height + _LAYOUT.gap_y)
    drawing = svg.Drawing(graph.body + legend, graph.width, graph.height + 2 * _LAYOUT.gap_y)
    return _card(drawing, workflow.summary)


def draw_loss(pretrain: Path, evaluation: Path) -> str:
    """The training loss of two committed artifacts on a card of its own, as a whole SVG file."""
    data = collect("", {"pretrain": pretrain, "evaluation": evaluation})
    chart = loss_chart(data.metrics.lines, data.results["unigram_entropy"])
    assert chart is not None, "no step had a finite loss"
    return _card(chart.drawing, "Training loss by step")


def _card(drawing: svg.Drawing, title: str) -> str:
    """A drawing with its own background, readable on a white and on a black page."""
    width, height = drawing.width + 2 * _MARGIN, drawing.height + 2 * _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img"><title>{title}</title>'
        f"<style>{svg.stylesheet(PALETTE)}</style>"
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="14" fill="{BACKGROUND}" '
        f'stroke="{PALETTE["line"]}"/>'
        f'<g transform="translate({_MARGIN:g} {_MARGIN:g})">{drawing.body}</g></svg>\n'
    )


def _legend(top: float) -> str:
    """What the kinds mean, in a line below the graph."""
    parts: list[str] = []
    for number, (kind, meaning) in enumerate(_KINDS.items()):
        x = number * (_LAYOUT.node_width + _LAYOUT.gap_x)
        parts.append(svg.kind_label(x, top, kind))
        parts.append(svg.text(x + 52, top + 13, meaning, "sub"))
    return "".join(parts)


def main() -> None:
    """Write the pictures of the recipes, or that of a training's loss."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures_pipeline", description=main.__doc__)
    parser.add_argument("--loss", type=Path, nargs=2, metavar=("PRETRAIN", "EVALUATION"), help="committed artifacts")
    arguments = parser.parse_args()
    if arguments.loss:
        (OUT / LOSS).write_text(draw_loss(*arguments.loss), encoding="utf-8")
        return
    for file, (recipe, layers_per_row) in PICTURES.items():
        (OUT / file).write_text(draw_picture(recipe(), layers_per_row), encoding="utf-8")


if __name__ == "__main__":
    main()
