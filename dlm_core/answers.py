"""The bound of an answer given its context, for rows of any lengths: LLaDA's conditional likelihood, in balance.

    -log p(answer | context) <= (1 / n) sum_k E_S (n / k) sum_{i in S} -log p(x_i | the row without S)

over the subsets S of k of the answer's n tokens (arXiv 2502.09992, eq. 6 and algorithm 3).  Which subsets are masked is
drawn in answer_masks.py.  To a model of blocks the bound is the sum of those of an answer's parts, one in each block it
touches, given the clean blocks before (BD3-LM, arXiv 2503.09573); the parts of a row are masked in the same copies,
since none sees the masks of another.

What lives here: rows of any lengths through a denoiser, and their estimates.  What must not: models, tokenizers, tasks.

Shapes: B rows, P parts of answers, b rows of a batch, L the greatest length among them, M masked tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.answer_masks import AnswerMasks, bound_of_losses, draw_masks
from dlm_core.cross_entropy import check_losses

CrossEntropy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(xt [b, L], rows [b], select [M], targets [M]) -> -log p [M] of the targets at the flat positions of xt.

``rows`` are the numbers of the rows that xt are copies of; what stands behind their lengths is padding, to which no
token may attend.
"""

_MAX_CELLS = 1 << 22
"""Of masks that are held at once."""


@dataclass(frozen=True)
class Answers:
    """Rows of a context, an answer and what may follow it, end to end; all on the host.

    Raises ValueError for no row, columns that don't fit, an answer outside its row, or one that holds the mask token.
    """

    tokens: Int[Tensor, " tokens"]
    lengths: Int[Tensor, " B"]
    """Tokens of the rows."""
    starts: Int[Tensor, " B"]
    """Of the answers in their rows."""
    sizes: Int[Tensor, " B"]
    """Tokens of the answers."""
    mask_ids: Int[Tensor, " B"]
    """Address the masks.  Choices of one question share one: the same masks add nothing to their difference."""
    mask_token_id: int
    noise_seed: int = 0
    block_size: int = 0
    """Of a model of blocks, which begin with the row; 0: an answer is all of one part."""

    def __post_init__(self) -> None:
        num_rows = len(self.lengths)
        if self.block_size < 0:
            raise ValueError(f"block_size is {self.block_size}; it must be at least 1, or 0 for answers of one part")
        if num_rows == 0:
            raise ValueError("there is no row; nothing is to be scored")
        for name in ("starts", "sizes", "mask_ids"):
            if len(getattr(self, name)) != num_rows:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {num_rows} rows; wanted one each")
        if int(self.lengths.sum()) != len(self.tokens):
            raise ValueError(f"the lengths add up to {int(self.lengths.sum())} for {len(self.tokens)} tokens")
        is_outside = (self.starts < 0) | (self.sizes < 0) | (self.starts + self.sizes > self.lengths)
        if is_outside.any():
            row = int(is_outside.nonzero()[0])
            raise ValueError(
                f"the answer of row {row} has {int(self.sizes[row])} tokens from {int(self.starts[row])} on, but the "
                f"row has {int(self.lengths[row])}"
            )
        which = torch.repeat_interleave(self.sizes)
        place = torch.arange(len(which)) - (self.sizes.cumsum(0) - self.sizes)[which]
        if (self.tokens[(self.offsets + self.starts)[which] + place] == self.mask_token_id).any():
            raise ValueError(f"an answer holds the mask token {self.mask_token_id}; its likelihood is 0")

    @property
    def offsets(self) -> Int[Tensor, " B"]:
        """Where the rows begin among the tokens."""
        return self.lengths.cumsum(0) - self.lengths

    def parts(self) -> "Parts":
        """The answers, cut at the beginnings of blocks; none of an answer without tokens."""
        size = self.block_size or max(1, int(self.lengths.max()))
        first, stop = self.starts // size, self.starts + self.sizes
        num_parts = torch.where(self.sizes > 0, (stop - 1) // size - first + 1, 0)
        row = torch.repeat_interleave(num_parts)
        block = first[row] + torch.arange(len(row)) - (num_parts.cumsum(0) - num_parts)[row]
        start = torch.maximum(block * size, self.starts[row])
        return Parts(row, block, start, torch.minimum((block + 1) * size, stop[row]) - start)

    def padded(self, rows: Int[Tensor, " b"]) -> Int[Tensor, "b L"]:
        """Some rows, zeros behind them."""
        places = torch.arange(int(self.lengths[rows].max()))
        is_token = places < self.lengths[rows, None]
        at = self.offsets[rows, None] + places
        return self.tokens[at.masked_fill(~is_token, 0)].masked_fill(~is_token, 0)


class Parts(NamedTuple):
    """What is masked apart from each other, in the order of the rows."""

    row: Int[Tensor, " P"]
    block: Int[Tensor, " P"]
    start: Int[Tensor, " P"]
    """In its row."""
    size: Int[Tensor, " P"]

    def by_size(self, rows: Int[Tensor, " b"]) -> "Iterator[Parts]":
        """Those of some rows, that have a size in common together."""
        for size in self.size.unique():
            is_one = (self.size == size) & torch.isin(self.row, rows)
            if is_one.any():
                yield Parts(*(column[is_one] for column in self))


@dataclass(frozen=True)
class AnswerEstimate:
    """A bound on -log p of every answer, in nats; each depends on its own row and mask id alone."""

    nats: Float[Tensor, " B"]
    deviations: Float[Tensor, "B H"]
    """Noise of the drawn masks by stratum; 0 where every mask was taken.  Those of a sum of answers are the sums."""
    num_passes: Int[Tensor, " B"]
    """Masked copies of the row that went through the denoiser."""

    @property
    def mc_se(self) -> Float[Tensor, " B"]:
        """Standard error of nats from the drawn masks."""
        return self.deviations.square().sum(dim=1).sqrt()


def answer_bound(cross_entropy: CrossEntropy, a: Answers, *, num_masks: int, batch_rows: int = 64) -> AnswerEstimate:
    """The bound of every answer from at most ``num_masks`` masked copies of its row (arXiv 2502.09992, eq. 6).

    A part of one token takes one copy and is exact; an answer without tokens takes none, and is 0.  ``batch_rows``
    copies go through the denoiser together, those of rows of like length; it has no effect on the masks.  Raises
    ValueError for a batch_rows below 1 and as ``draw_masks`` does, and LossError for losses that are not finite.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; it must be at least 1")
    nats = torch.zeros(len(a.lengths), dtype=torch.float64)
    deviations = torch.zeros(len(a.lengths), max(0, num_masks - 1) // 2, dtype=torch.float64)
    num_passes = torch.zeros(len(a.lengths), dtype=torch.int64)
    parts = a.parts()
    rows = parts.row.unique()
    rows = rows[a.lengths[rows].argsort(stable=True)]
    for some in _chunks(rows, a.sizes[rows] * max(1, num_masks)):
        is_masked = torch.zeros(len(some), max(0, num_masks), int(a.sizes[some].max()), dtype=torch.bool)
        drawn: list[tuple[Parts, AnswerMasks, tuple[Tensor, Tensor, Tensor]]] = []
        for part in parts.by_size(some):
            size = int(part.size[0])
            masks = draw_masks(size, num_masks, a.mask_ids[part.row], a.noise_seed, part.block)
            place = (part.start - a.starts[part.row])[:, None] + torch.arange(size)
            copy = torch.arange(masks.is_masked.shape[1])
            at = ((part.row[:, None] == some).int().argmax(dim=1)[:, None, None], copy[:, None], place[:, None])
            is_masked[at] = masks.is_masked
            drawn.append((part, masks, at))
        losses = _losses(cross_entropy, a, some, is_masked, batch_rows)
        num_passes[some] = is_masked.any(dim=2).sum(dim=1)
        for part, masks, at in drawn:
            bound, of_part = bound_of_losses(masks, losses[at])
            nats.index_add_(0, part.row, bound)
            if masks.num_strata:
                deviations.index_add_(0, part.row, of_part)
    return AnswerEstimate(nats, deviations, num_passes)


def _chunks(rows: Int[Tensor, " B"], cells: Int[Tensor, " B"]) -> "Iterator[Int[Tensor, ' b']]":
    """Rows in their order, as many together as their masks leave room for."""
    first, most = 0, 0
    for place, of_row in enumerate(cells.tolist()):
        most = max(most, of_row)
        if place > first and (place + 1 - first) * most > _MAX_CELLS:
            yield rows[first:place]
            first, most = place, of_row
    if len(rows):
        yield rows[first:]


@torch.no_grad()
def _losses(
    cross_entropy: CrossEntropy,
    a: Answers,
    rows: Int[Tensor, " R"],
    is_masked: Bool[Tensor, "R J n"],
    batch_rows: int,
) -> Float[Tensor, "R J n"]:
    """The loss of every masked token of every copy, 0 elsewhere; copies without a mask are not looked at."""
    found = torch.zeros(is_masked.shape, dtype=torch.float64)
    of_row, of_copy = is_masked.any(dim=2).nonzero(as_tuple=True)
    for row, number in zip(of_row.split(batch_rows), of_copy.split(batch_rows), strict=True):
        xt = a.padded(rows[row])
        copy, place = is_masked[row, number].nonzero(as_tuple=True)
        select = copy * xt.shape[1] + a.starts[rows[row]][copy] + place
        targets = xt.flatten()[select]
        xt.view(-1)[select] = a.mask_token_id
        losses = cross_entropy(xt, rows[row], select, targets).double().cpu()
        check_losses(losses, rows[row][copy])
        found[row[copy], number[copy], place] = losses
    return found
