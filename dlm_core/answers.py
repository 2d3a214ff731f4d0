"""The bound of an answer given its context, for rows of any lengths: LLaDA's conditional likelihood, in balance.

    -log p(answer | context) <= (1 / n) sum_k E_S (n / k) sum_{i in S} -log p(x_i | the row without S)

over the subsets S of k of the answer's n tokens (arXiv 2502.09992, eq. 6 and algorithm 3).  Which subsets are masked is
drawn in answer_masks.py.

What lives here: rows of any lengths through a denoiser, and their estimates.  What must not: models, tokenizers, tasks.

Shapes: B rows, b those of a batch, L the greatest length among them, M masked tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlm_core.answer_masks import AnswerMasks, bound_of_losses, draw_masks

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

    def __post_init__(self) -> None:
        num_rows = len(self.lengths)
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

    def padded(self, rows: Int[Tensor, " b"]) -> Int[Tensor, "b L"]:
        """Some rows, zeros behind them."""
        places = torch.arange(int(self.lengths[rows].max()))
        is_token = places < self.lengths[rows, None]
        at = self.offsets[rows, None] + places
        return self.tokens[at.masked_fill(~is_token, 0)].masked_fill(~is_token, 0)


@dataclass(frozen=True)
class AnswerEstimate:
    """A bound on -log p of every answer, in nats; each depends on its own row and mask id alone."""

    nats: Float[Tensor, " B"]
    mc_se: Float[Tensor, " B"]
    """Standard error of nats from the drawn masks; 0 where every mask was taken."""
    dof: Float[Tensor, " B"]
    """Degrees of freedom of mc_se, its strata; inf where nothing was drawn."""
    num_passes: Int[Tensor, " B"]
    """Masked copies of the row that went through the denoiser."""


def answer_bound(cross_entropy: CrossEntropy, a: Answers, *, num_masks: int, batch_rows: int = 64) -> AnswerEstimate:
    """The bound of every answer from at most ``num_masks`` masked copies of its row (arXiv 2502.09992, eq. 6).

    An answer of one token takes one copy and is exact; one without tokens takes none, and is 0.  ``batch_rows`` copies
    go through the denoiser together, those of rows of like length; it has no effect on the masks.  Raises ValueError
    for a batch_rows below 1, losses that are no numbers, and as ``draw_masks`` does.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; it must be at least 1")
    nats, mc_se = torch.zeros(2, len(a.lengths), dtype=torch.float64)
    dof, num_passes = torch.full_like(nats, torch.inf), torch.zeros(len(a.lengths), dtype=torch.int64)
    for size in a.sizes.unique().tolist():
        if size == 0:
            continue
        rows = (a.sizes == size).nonzero().squeeze(1)
        rows = rows[a.lengths[rows].argsort(stable=True)]
        for some in rows.split(max(1, _MAX_CELLS // (size * num_masks))):
            masks = draw_masks(size, num_masks, a.mask_ids[some], a.noise_seed)
            nats[some], variance = bound_of_losses(masks, _losses(cross_entropy, a, some, masks, batch_rows))
            mc_se[some], num_passes[some] = variance.sqrt(), masks.is_masked.shape[1]
            if masks.num_strata:
                dof[some] = masks.num_strata
    return AnswerEstimate(nats, mc_se, dof, num_passes)


@torch.no_grad()
def _losses(
    cross_entropy: CrossEntropy, a: Answers, rows: Int[Tensor, " B"], masks: AnswerMasks, batch_rows: int
) -> Float[Tensor, "B J n"]:
    """The loss of every masked token of every subset, 0 elsewhere."""
    found = torch.zeros(masks.is_masked.shape, dtype=torch.float64)
    num_subsets = found.shape[1]
    for copies in torch.arange(len(rows) * num_subsets).split(batch_rows):
        row, subset = copies // num_subsets, copies % num_subsets
        xt = a.padded(rows[row])
        copy, place = masks.is_masked[row, subset].nonzero(as_tuple=True)
        select = copy * xt.shape[1] + a.starts[rows[row]][copy] + place
        targets = xt.flatten()[select]
        xt.view(-1)[select] = a.mask_token_id
        losses = cross_entropy(xt, rows[row], select, targets).double().cpu()
        if losses.isnan().any():
            raise ValueError("the denoiser's logits hold nan, or no id of finite logit; a likelihood needs numbers")
        found[row[copy], subset[copy], place] = losses
    return found
