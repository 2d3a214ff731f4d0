"""The figure of the attention masks: who may attend to whom, as the predicates say."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.figures_parts import AMBER, BLUE, CARD, INK, LINE, MUTED, TEAL, WIDTH, card, number
from dlm_core import masks
from workflows.report.svg import text

SEQ_LEN, BLOCK_SIZE = 12, 3
DOC_LENGTHS = (7, 5)
ANNEAL_RATIO = 0.3
_HEIGHT = 614.0
_CELL = 11.5
_LEFT, _TOP, _LOWER_LEFT, _LOWER_TOP = 34.0, 64.0, 56.0, 280.0
_LOWER_PITCH = 310.0
_LEGEND_LEFT = 676.0

_PACKED = f"packed: {DOC_LENGTHS[0]} and {DOC_LENGTHS[1]} tokens"
_JOINED = "both(block_diffusion, on_both_halves(same_document))"

PARTS = {"M_BD": BLUE, "M_OBC": TEAL, "M_BC": AMBER}
"""Parts of the block-diffusion mask, named as in BD3-LM (arXiv 2503.09573) section 3.4."""
_MEANING = {
    "M_BD": ("a noisy query sees", "its own noisy block"),
    "M_OBC": ("a noisy query sees", "earlier clean blocks"),
    "M_BC": ("a clean query sees its own", "and earlier clean blocks"),
}
_DRAWN = "#8db1ef"
"""What the annealing adds to the causal mask."""


@dataclass(frozen=True)
class Matrix:
    """A tabulated mask, its allowed entries sorted by colour."""

    name: str
    comment: str
    entries: dict[str, Tensor]
    """For every colour the entries [q, k] that have it."""
    cuts: tuple[int, ...] = ()
    """Places where a document ends in a packed row, a block in others."""

    @property
    def length(self) -> int:
        """Queries, and keys."""
        return len(next(iter(self.entries.values())))


def draw_masks() -> str:
    """The masks of dlm_core.masks, as a whole SVG file."""
    parts: list[str] = []
    upper = upper_matrices()
    pitch = (WIDTH - 2 * _LEFT - SEQ_LEN * _CELL) / (len(upper) - 1)
    parts += [_matrix(matrix, _LEFT + i * pitch, _TOP) for i, matrix in enumerate(upper)]
    parts.append(_axis_names(_LEFT, _TOP, SEQ_LEN, below=15, beside=8))
    for i, matrix in enumerate(block_matrices()):
        left = _LOWER_LEFT + i * _LOWER_PITCH
        parts += [_matrix(matrix, left, _LOWER_TOP), _halves(left, _LOWER_TOP)]
    parts.append(_axis_names(_LOWER_LEFT, _LOWER_TOP, 2 * SEQ_LEN, below=32, beside=26))
    description = (
        "Allowed queries and keys of causal, annealed, full, packed, block-causal and block-diffusion attention"
    )
    return card("Attention masks", description, _HEIGHT, "".join(parts) + _legend())


def upper_matrices() -> list[Matrix]:
    """The masks over one row of tokens."""
    causal, annealed = _table(masks.causal()), _table(masks.annealed(ANNEAL_RATIO, noise_seed=0, step=0))
    blocks = tuple(range(BLOCK_SIZE, SEQ_LEN, BLOCK_SIZE))
    packed = _table(masks.same_document(_doc_ids()))
    drawn = annealed & ~causal
    return [
        Matrix("causal", "autoregressive", {BLUE: causal}),
        Matrix("annealed", f"causal or drawn, ratio {ANNEAL_RATIO:g}", {BLUE: annealed & causal, _DRAWN: drawn}),
        Matrix("full", "masked diffusion", {BLUE: _table(masks.full())}),
        Matrix("same_document", _PACKED, {BLUE: packed}, DOC_LENGTHS[:1]),
        Matrix("block_causal", f"blocks of {BLOCK_SIZE}", {BLUE: _table(masks.block_causal(BLOCK_SIZE))}, blocks),
    ]


def block_matrices() -> list[Matrix]:
    """The masks over [xt ; x0], in their parts."""
    diffusion = masks.block_diffusion(SEQ_LEN, BLOCK_SIZE)
    packed = masks.both(diffusion, masks.on_both_halves(masks.same_document(_doc_ids()), SEQ_LEN))
    ends = range(BLOCK_SIZE, 2 * SEQ_LEN, BLOCK_SIZE)
    doc_ends = (DOC_LENGTHS[0], SEQ_LEN + DOC_LENGTHS[0])
    return [
        Matrix("block_diffusion", f"blocks of {BLOCK_SIZE}", _in_parts(diffusion), tuple(ends)),
        Matrix(_JOINED, f"blocks of {BLOCK_SIZE}, {_PACKED}", _in_parts(packed), doc_ends),
    ]


def _doc_ids() -> Tensor:
    return torch.arange(len(DOC_LENGTHS)).repeat_interleave(torch.tensor(DOC_LENGTHS))[None]


def _table(predicate: masks.Predicate, length: int = SEQ_LEN) -> Tensor:
    return masks.dense_mask(predicate, 1, length)[0]


def _in_parts(predicate: masks.Predicate) -> dict[str, Tensor]:
    """The entries of each part: which half the query lies in, and which the key."""
    allowed = _table(predicate, 2 * SEQ_LEN)
    is_clean = torch.arange(2 * SEQ_LEN) >= SEQ_LEN
    q_clean, k_clean = is_clean[:, None], is_clean[None, :]
    parts = {"M_BD": ~q_clean & ~k_clean, "M_OBC": ~q_clean & k_clean, "M_BC": q_clean & k_clean}
    return {PARTS[name]: allowed & part for name, part in parts.items()}


def _matrix(matrix: Matrix, left: float, top: float) -> str:
    side = matrix.length * _CELL
    parts = [
        text(left, top - 22, matrix.name, "name"),
        text(left, top - 7, matrix.comment, "tick"),
        f'<rect x="{left:g}" y="{top:g}" width="{side:g}" height="{side:g}" fill="{CARD}"/>',
    ]
    for colour, allowed in matrix.entries.items():
        parts.append(f'<path d="{_cells(allowed.tolist(), left, top)}" fill="{colour}"/>')
    inner = range(1, matrix.length)
    parts.append(f'<path d="{_grid(inner, left, top, side)}" stroke="{LINE}" stroke-width=".7"/>')
    parts.append(f'<path d="{_grid(matrix.cuts, left, top, side)}" stroke="{MUTED}" stroke-dasharray="2 2"/>')
    parts.append(f'<rect x="{left:g}" y="{top:g}" width="{side:g}" height="{side:g}" fill="none" stroke="{MUTED}"/>')
    return "".join(parts)


def _cells(allowed: list[list[bool]], left: float, top: float) -> str:
    """Path data of the allowed cells, one rectangle for each run of neighbours in a row."""
    parts = []
    for q, row in enumerate(allowed):
        starts = [k for k, hit in enumerate(row) if hit and (k == 0 or not row[k - 1])]
        ends = [k + 1 for k, hit in enumerate(row) if hit and (k + 1 == len(row) or not row[k + 1])]
        for start, end in zip(starts, ends, strict=True):
            width = number((end - start) * _CELL)
            parts.append(f"M{number(left + start * _CELL)} {number(top + q * _CELL)}h{width}v{number(_CELL)}h-{width}z")
    return "".join(parts)


def _grid(places: Sequence[int], left: float, top: float, side: float) -> str:
    across = [f"M{left:g} {number(top + place * _CELL)}h{side:g}" for place in places]
    return "".join(across + [f"M{number(left + place * _CELL)} {top:g}v{side:g}" for place in places])


def _halves(left: float, top: float) -> str:
    """Names of the halves at both axes, and the line between them."""
    half = SEQ_LEN * _CELL
    parts = [
        f'<path d="M{left:g} {top + half:g}h{2 * half:g}M{left + half:g} {top:g}v{2 * half:g}" '
        f'stroke="{INK}" stroke-width="1.6"/>'
    ]
    for i, name in enumerate(("xt", "x0")):
        middle = (i + 0.5) * half
        parts.append(text(left + middle, top + 2 * half + 15, name, "item", "middle"))
        parts.append(text(left - 6, top + middle + 4, name, "item", "end"))
    return "".join(parts)


def _axis_names(left: float, top: float, length: int, *, below: float, beside: float) -> str:
    side = length * _CELL
    return text(left + side / 2, top + side + below, "keys →", "tick", "middle") + (
        f'<text class="tick" text-anchor="middle" '
        f'transform="translate({number(left - beside)} {number(top + side / 2)}) rotate(-90)">← queries</text>'
    )


def _legend() -> str:
    left, top = _LEGEND_LEFT, _LOWER_TOP + 12
    parts = []
    for i, (name, colour) in enumerate(PARTS.items()):
        y = top + 62 * i
        parts.append(f'<rect x="{left:g}" y="{y:g}" width="14" height="14" rx="2" fill="{colour}"/>')
        parts.append(text(left + 24, y + 12, name, "name"))
        parts += [text(left + 24, y + 28 + 15 * j, line, "tick") for j, line in enumerate(_MEANING[name])]
    notes = (
        "no clean query sees a noisy key",
        "xt: noisy half, x0: clean half",
        "dashed: document ends where",
        "packed, elsewhere block ends",
    )
    parts += [text(left, top + 206 + 17 * i, line, "tick") for i, line in enumerate(notes)]
    return "".join(parts)
