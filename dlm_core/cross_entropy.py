"""The head and its loss: cross-entropy of chosen rows, in chunks, without the logits of the whole batch.

What lives here: from hidden states (or logits) to nats a token.  What must not: the weights of an objective
(objectives.py), models.

Shapes: N rows of hidden states, M chosen among them, D d_model, V vocab_size.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(xt [B, L], select [M]) -> logits [M, V] of the tokens at the flat positions ``select`` of xt."""

CHUNK_BYTES = 128 << 20
"""Room for the logits of one chunk: enough for a full-speed matrix product, little beside a batch of logits."""


class HeadLoss(NamedTuple):
    """What the head returns for the chosen rows; nats."""

    loss_sum: Float[Tensor, ""]
    """sum_m weight_m * cross_entropy_m; differentiable."""
    cross_entropy: Float[Tensor, " M"]
    """-log p(target_m), without a gradient."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of a softmax and of a loss: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_id(token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"mask_token_id is {token_id}; the head has the ids 0..{vocab_size - 1}")


def exclude_token(logits: Float[Tensor, "M V"], mask_token_id: int) -> Float[Tensor, "M V"]:
    """Give one id probability zero (logit -inf).  Raises ValueError for an id that the logits lack.

    Zero-masking, the first half of SUBS (MDLM, arXiv 2406.07524, section 3.2.3); the second half, copying what is not
    masked, is that only masked positions are ever asked for.
    """
    _check_id(mask_token_id, logits.shape[-1])
    ids = torch.arange(logits.shape[-1], device=logits.device)  # no id is copied from the host
    return logits.masked_fill(ids == mask_token_id, -torch.inf)


def token_cross_entropy(logits: Float[Tensor, "M V"], targets: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """-log softmax(logits)[target] of every row, nats; in float64 for float64 logits, else in float32."""
    no_id = torch.iinfo(torch.int64).min  # by default a target of -100 would silently cost nothing
    return F.cross_entropy(logits.to(compute_dtype(logits.dtype)), targets, reduction="none", ignore_index=no_id)


class LossError(FloatingPointError):
    """A token of ``row`` costs nan, or more than any number: its logits hold nan, or give it no probability."""

    def __init__(self, row: int, nats: float) -> None:
        super().__init__(row, nats)
        self.row, self.nats = row, nats

    def __str__(self) -> str:
        return f"a token of row {self.row} costs {self.nats} nats: logits hold nan, or give it no probability"


def check_losses(cross_entropy: Float[Tensor, " M"], rows: Int[Tensor, " M"]) -> None:
    """Raise LossError for a loss that is not finite; ``rows`` are those of the tokens."""
    if not (is_finite := cross_entropy.isfinite()).all():
        first = int((~is_finite).nonzero()[0])
        raise LossError(int(rows[first]), float(cross_entropy[first]))


def _check_counts(num_rows: int, targets: Tensor, weight: Tensor) -> None:
    if not num_rows == len(targets) == len(weight):
        raise ValueError(
            f"there are {len(targets)} targets and {len(weight)} weights for {num_rows} rows; wanted one each"
        )


def logits_loss(logits: Float[Tensor, "M V"], targets: Int[Tensor, " M"], weight: Float[Tensor, " M"]) -> HeadLoss:
    """The same as ``masked_cross_entropy`` from logits that are already there; ``weight`` gets no gradient.

    Raises ValueError unless each row has one target and one weight.
    """
    _check_counts(len(logits), targets, weight)
    cross_entropy = token_cross_entropy(logits, targets)
    return HeadLoss((weight.detach().to(cross_entropy) * cross_entropy).sum(), cross_entropy.detach())


def masked_cross_entropy(
    hidden: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " M"],
    weight: Float[Tensor, " M"],
    *,
    select: Int[Tensor, " M"] | None = None,
    head_bias: Float[Tensor, " V"] | None = None,
    mask_token_id: int | None = None,
    chunk_rows: int | None = None,
    implementation: Literal["chunked", "torch"] = "chunked",
) -> HeadLoss:
    """Weighted cross-entropy of chosen rows:  sum_m weight_m * -log softmax(head_weight @ hidden[select_m])[target_m].

    ``head_bias`` is added to the logits, if given.  Only the rows ``select`` (all by default) go through the head.  The
    logit of ``mask_token_id`` is -inf.  Products run in the dtype of ``hidden``; softmax, loss and sums in float32
    (float64 for float64).  M = 0 gives a loss of 0 with zero gradients.  ``targets`` and ``weight`` get no gradient.

    The summand of MDLM (arXiv 2406.07524) eq. 10, by chunks of rows as Cut Cross-Entropy (2411.09009) does by blocks.

    "chunked" takes ``chunk_rows`` rows at a time (by default what fits CHUNK_BYTES) and each chunk's gradient while its
    logits are at hand: three matrix products and no recomputation.  There is no second derivative.
    "torch" calls torch's own chunked ``linear_cross_entropy`` (torch >= 2.12), which recomputes when it must return the
    loss of every row; benchmarks/objective.py has both.

    Gradients are in the dtype of ``hidden``: with float16, whose largest number is 65504, keep weights small.

    Raises ValueError unless each chosen row has one target and one weight, for a mask_token_id that the head lacks or
    an unknown implementation, if torch lacks the function asked for, rounds its losses, or is given chunk_rows.
    """
    _check_counts(len(hidden) if select is None else len(select), targets, weight)
    if mask_token_id is not None:
        _check_id(mask_token_id, len(head_weight))
    if implementation not in ("chunked", "torch"):
        raise ValueError(f'implementation is "{implementation}"; it must be "chunked" or "torch"')
    if implementation == "torch":
        rows = hidden if select is None else hidden[select]
        return _torch_head(rows, head_weight, head_bias, targets, weight, mask_token_id, chunk_rows)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1")
    if not torch.is_grad_enabled():  # else the gradient would be taken all the same
        hidden, head_weight = hidden.detach(), head_weight.detach()
        head_bias = None if head_bias is None else head_bias.detach()
    columns = (hidden, head_weight, head_bias, targets, weight, select)
    return HeadLoss(*_ChunkedHead.apply(*columns, mask_token_id, chunk_rows))


def _torch_head(
    rows: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    mask_token_id: int | None,
    chunk_rows: int | None,
) -> HeadLoss:
    if not hasattr(F, "linear_cross_entropy"):
        raise ValueError(f'torch {torch.__version__} has no linear_cross_entropy; use implementation="chunked"')
    if rows.dtype != compute_dtype(rows.dtype):
        raise ValueError(
            f'implementation="torch" rounds the losses to the {rows.dtype} of hidden; use "chunked", or give float32'
        )
    if chunk_rows is not None:
        raise ValueError(f'chunk_rows is {chunk_rows}, but implementation="torch" chooses its own chunks; leave it out')
    bias = None if head_bias is None else head_bias.to(rows.dtype)
    if mask_token_id is not None:
        bias = torch.zeros(len(head_weight), dtype=rows.dtype, device=rows.device) if bias is None else bias
        bias = bias.index_fill(0, torch.tensor([mask_token_id], device=rows.device), -torch.inf)
    cross_entropy = F.linear_cross_entropy(
        rows, head_weight, targets, linear_bias=bias, reduction="none", options=torch.nn.LinearCrossEntropyOptions()
    ).to(compute_dtype(rows.dtype))
    return HeadLoss((weight.detach().to(cross_entropy.dtype) * cross_entropy).sum(), cross_entropy.detach())


class _ChunkedHead(torch.autograd.Function):
    """The gradient is taken in the forward pass: the loss is a sum, so the incoming gradient only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        targets: Tensor,
        weight: Tensor,
        select: Tensor | None,
        mask_token_id: int | None,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden.dtype)
        rows = hidden if select is None else hidden[select]
        weight = weight.to(dtype)
        size = chunk_rows or max(16, CHUNK_BYTES // (dtype.itemsize * len(head_weight)))
        head = head_weight.to(rows.dtype)
        rows_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(head_weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        bias_grad = None if head_bias is None else torch.zeros_like(head_bias, dtype=dtype)
        cross_entropy = torch.empty(len(rows), dtype=dtype, device=hidden.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            chunk, wanted = rows[part], targets[part, None]
            logits = (chunk @ head.t()).to(dtype)
            if head_bias is not None:
                logits += head_bias
            if mask_token_id is not None:
                logits[:, mask_token_id] = -torch.inf
            top, at_target = logits.amax(dim=-1, keepdim=True), logits.gather(1, wanted)
            grad = logits.sub_(top).exp_()
            total = grad.sum(dim=-1, keepdim=True)
            cross_entropy[part] = (total.log() + top - at_target).squeeze(1)
            if not any(ctx.needs_input_grad[:3]):
                continue
            scale = weight[part, None]
            grad = grad.mul_(scale / total).scatter_add_(1, wanted, -scale)
            if bias_grad is not None:
                bias_grad += grad.sum(dim=0)
            grad = grad.to(chunk.dtype)
            if rows_grad is not None:
                torch.mm(grad, head, out=rows_grad[part])
            if head_grad is not None and grad.dtype == dtype:
                head_grad.addmm_(grad.t(), chunk)
            elif head_grad is not None:
                head_grad += grad.t() @ chunk
            del logits, grad  # or the next chunk's would be made beside them
        if rows_grad is not None and select is not None:
            rows_grad = torch.zeros_like(hidden).index_add_(0, select, rows_grad)
        ctx.save_for_backward(rows_grad, None if head_grad is None else head_grad.to(head_weight.dtype), bias_grad)
        ctx.mark_non_differentiable(cross_entropy)
        return (weight * cross_entropy).sum(), cross_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable has no types
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]  # 1 / num_tokens, say: in bf16 it would be off by up to 2^-8, alike for every entry
        hidden_grad, head_grad, bias_grad = (
            None if grad is None else (grad.to(scale.dtype) * scale).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden_grad, head_grad, bias_grad, None, None, None, None, None
