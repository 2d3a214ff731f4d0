"""The pictures in the README: ``python -m workflows.report.picture OUT.svg [--loss PRETRAIN EVALUATION]``.

Kinds and arrows are read from the declarations of the stages; a test compares them with the quickstart recipe.
"""

import argparse
from pathlib import Path

from pipeline.convert.config import STAGE as CONVERT
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.evaluate.config import STAGE as EVALUATE
from pipeline.generate.config import STAGE as GENERATE
from pipeline.packing.config import STAGE as PACKING
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.tokenization.config import STAGE as TOKENIZATION
from pipeline.tokenizer.config import STAGE as TOKENIZER
from workflows.report import svg
from workflows.report.config import STAGE as REPORT
from workflows.report.data import collect
from workflows.report.loss import loss_chart

STAGES = (CORPUS, TOKENIZER, TOKENIZATION, PACKING, PRETRAIN, CONVERT, EVALUATE, GENERATE, REPORT)
_MADE_BY = {
    "tokens": "tokenization",
    "rows": "packing",
    "weights": "convert",
    "evaluation": "evaluate",
    "samples": "generate",
}
"""Stage behind an input, where it is called otherwise."""

_WHAT_IT_DOES = {
    "corpus": "text in, documents out",
    "tokenizer": "trains or adopts a BPE",
    "tokenization": "documents to token shards",
    "packing": "token shards to rows",
    "pretrain": "masked diffusion, resumable",
    "convert": "checkpoint to safetensors",
    "evaluate": "held-out bound, xz beside it",
    "generate": "text out of masks",
    "report": "all of it on one page",
}
_KINDS = {"task": "one process", "map": "one process per shard", "gang": "all ranks together"}

_LAYOUT = svg.Layout(node_width=214, node_height=66, gap_x=34, gap_y=20, layers_per_row=4)
_MARGIN = 26.0
_PALETTE = {
    "ink": "#1c2330", "muted": "#566072", "line": "#d5dbe4", "card": "#ffffff", "accent": "#2f6bd8", "level": "#b4540a",
    "lane": "#b3bcc9", "task": "#44546e", "map": "#0b7a75", "gang": "#8a3ab9",
}  # fmt: skip
_BACKGROUND = "#f4f6f9"


def picture_edges() -> set[svg.Edge]:
    """Which stage reads what which other stage made, of the stages in the picture."""
    shown = {stage.name for stage in STAGES}
    edges = {
        (_MADE_BY.get(name, name), stage.name) for stage in STAGES for name in (*stage.inputs, *stage.optional_inputs)
    }
    return {(source, user) for source, user in edges if source in shown}


def draw_picture() -> str:
    """The graph of the stages on a card of its own, as a whole SVG file."""
    nodes = [svg.Node(stage.name, _WHAT_IT_DOES[stage.name], stage.kind) for stage in STAGES]
    graph = svg.layered_graph(nodes, picture_edges(), _LAYOUT)
    legend = _legend(graph.height + _LAYOUT.gap_y)
    drawing = svg.Drawing(graph.body + legend, graph.width, graph.height + 2 * _LAYOUT.gap_y)
    return _card(drawing, "From text to an evaluated diffusion language model")


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
        f"<style>{svg.stylesheet(_PALETTE)}</style>"
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="14" fill="{_BACKGROUND}" '
        f'stroke="{_PALETTE["line"]}"/>'
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
    """Write the picture of the pipeline, or of a training's loss, to the path on the command line."""
    parser = argparse.ArgumentParser(prog="python -m workflows.report.picture", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument("--loss", type=Path, nargs=2, metavar=("PRETRAIN", "EVALUATION"), help="committed artifacts")
    arguments = parser.parse_args()
    drawn = draw_loss(*arguments.loss) if arguments.loss else draw_picture()
    arguments.out.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
