"""Mixture of experts in place of a dense network: which experts a token goes to, and the experts.

No token is ever dropped.  It knows nothing of workers: DeepSpeed's AutoEP replaces ``SparseFeedForward`` from outside,
by the names of its parts, with experts spread over workers.  Losses of the router: router_losses.py.

Shapes: B batch, L seq_len, N flattened tokens, D d_model, F d_ff_expert, E experts, K top_k, J = N K pairs of a token
and one of its experts, sorted by expert.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlm_core.cross_entropy import compute_dtype
from dlm_core.models.config import Architecture, MoE
from dlm_core.models.feed_forward import FeedForward
from dlm_core.models.precision import product_dtype, without_autocast

Implementation = Literal["auto", "grouped", "loop"]

# Routing


class Router(nn.Linear):
    """Logits of the experts, in float32 (float64 for float64 tokens) under autocast too.

    ``e_score_correction_bias`` [E], if the MoE has a selection_bias, is what ``route`` adds for the choice: a buffer,
    set from outside, under the name that transformers and AutoEP know.  It stays float32 whatever the model is cast to:
    rounded, steps of 0.001 would no longer move it, and it would choose other experts.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, d_model: int, moe: MoE) -> None:
        super().__init__(d_model, moe.num_experts, bias=False)
        self.e_score_correction_bias = None
        if moe.selection_bias:
            del self.e_score_correction_bias
            self.register_buffer("e_score_correction_bias", torch.zeros(moe.num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = moved.float() if bias.is_meta else bias.to(moved.device)
        return self

    def forward(self, input: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """One logit a token and expert."""
        dtype = compute_dtype(input.dtype)
        with without_autocast(input.device):
            return F.linear(input.to(dtype), self.weight.to(dtype))


def expert_scores(logits: Float[Tensor, "*N E"], moe: MoE) -> Float[Tensor, "*N E"]:
    """Softmax over the experts, or sigmoid of each, in float32 (float64 for float64)."""
    logits = logits.to(compute_dtype(logits.dtype))
    return logits.softmax(dim=-1) if moe.router_score == "softmax" else logits.sigmoid()


def route(
    logits: Float[Tensor, "N E"], moe: MoE, selection_bias: Float[Tensor, " E"] | None = None
) -> tuple[Float[Tensor, "N K"], Int[Tensor, "N K"]]:
    """Weights and ids of the ``top_k`` experts of each token.

    The experts of the largest score + selection_bias, among those of the ``top_groups`` groups whose two largest sum
    to most.  The weights are scores without the bias; renormalised, they sum to 1; times ``routed_scale``.
    DeepSeek-V3 (arXiv 2412.19437) eq. 12-16 and section 2.1.2, with a softmax or without renormalisation if asked.
    """
    scores_NE = expert_scores(logits, moe)
    choice_NE = scores_NE if selection_bias is None else scores_NE + selection_bias
    if moe.num_groups > 1:
        grouped = rearrange(choice_NE, "n (g e) -> n g e", g=moe.num_groups)
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(moe.top_groups, dim=-1).indices
        is_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice_NE = rearrange(grouped.masked_fill(is_out[..., None], -torch.inf), "n g e -> n (g e)")
    ids_NK = choice_NE.topk(moe.top_k, dim=-1).indices
    weights_NK = scores_NE.gather(1, ids_NK)
    if moe.renormalise:
        weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    return weights_NK * moe.routed_scale, ids_NK


# Experts


def experts_loop(
    x: Float[Tensor, "N D"],
    expert_ids: Int[Tensor, "N K"],
    weights: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """sum_k weights_k * down_k (silu(gate_k x) * up_k x), k over a token's experts: one expert after the other.

    The reference, for every device and dtype.  ``gate_up`` holds the rows of gate, then those of up.
    """
    y_ND = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
    for expert, (w_in, w_out) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x.index_select(0, token), w_in).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, w_out)
        y_ND.index_add_(0, token, (out * weights[token, slot, None]).to(y_ND.dtype))
    return y_ND.to(x.dtype)


def experts_grouped(
    x: Float[Tensor, "N D"],
    expert_ids: Int[Tensor, "N K"],
    weights: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """The same as ``experts_loop`` for tokens sorted by expert, with one grouped product a matrix.

    One node of the autograd graph, which keeps gate and up alone; there is no second derivative.  Raises ValueError
    for what ``why_not_grouped`` names.
    """
    if reason := why_not_grouped(x, down.shape[2]):
        raise ValueError(f'experts can\'t be "grouped": {reason}; use "loop"')
    return _GroupedExperts.apply(x, expert_ids, weights, gate_up, down)


def why_not_grouped(x: Float[Tensor, "N D"], d_ff_expert: int) -> str | None:
    """What torch's grouped product can't do with these tokens, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch has no grouped product in {x.dtype}"
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f'torch has no grouped product on "{x.device.type}"'
    for name, width in (("d_model", x.shape[1]), ("d_ff_expert", d_ff_expert)):
        if width * x.dtype.itemsize % 16:
            return f"{name} {width} is no multiple of {16 // x.dtype.itemsize}, as torch's grouped product wants"
    return None


@torch.library.custom_op("dlm::grouped_product", mutates_args=())
def _grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Product of each group: of rows of a with its own b [E, ., .], or of columns of a with rows of b, [E, ., .]."""
    return F.grouped_mm(a, b, offs=ends)


@_grouped_product.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    # torch's own shape function, which compilers ask, knows bfloat16 alone (torch 2.13)
    sizes = (a.shape[0], b.shape[2]) if b.ndim == 3 else (ends.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(sizes)  # len(a) would be a number for good, and every other length be compiled anew


class _GroupedExperts(torch.autograd.Function):
    """The weight of a pair is applied between the two products, so that backward needs no output of an expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        sorted_ids, order = expert_ids.flatten().sort(stable=True)
        place_NK = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        place_NK = place_NK.view_as(expert_ids)
        ends_E = torch.searchsorted(sorted_ids, torch.arange(len(gate_up), device=x.device), right=True, out_int32=True)
        token_J = order // expert_ids.shape[1]
        weight_J = weights.flatten()[order]
        gate_up_J = _grouped_product(x[token_J], gate_up.transpose(1, 2), ends_E)
        gate, up = gate_up_J.chunk(2, dim=-1)
        hidden = (F.silu(gate).mul_(up) * weight_J[:, None]).to(x.dtype)
        out_J = _grouped_product(hidden, down.transpose(1, 2), ends_E)
        ctx.save_for_backward(x, gate_up, down, gate_up_J, weight_J, token_J, place_NK, ends_E)
        return _sum_of_pairs(out_J, place_NK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable has no types
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, gate_up, down, gate_up_J, weight_J, token_J, place_NK, ends_E = ctx.saved_tensors
        grad_J = grad_outputs[0][token_J]
        gate, up = gate_up_J.chunk(2, dim=-1)
        silu = F.silu(gate)
        hidden = silu * up
        hidden_grad = _grouped_product(grad_J, down, ends_E)  # of weight * hidden
        weight_grad_J = (hidden_grad * hidden).sum(dim=-1, dtype=weight_J.dtype)
        weight = weight_J[:, None].to(x.dtype)
        down_grad = _grouped_product(grad_J.t(), hidden.mul_(weight), ends_E)
        hidden_grad.mul_(weight)
        up_grad = silu.mul_(hidden_grad)
        gate_grad = torch.ops.aten.silu_backward(hidden_grad.mul_(up), gate)
        gate_up_grad_J = torch.cat([gate_grad, up_grad], dim=-1)
        gate_up_grad = _grouped_product(gate_up_grad_J.t(), x[token_J], ends_E)
        x_grad = _sum_of_pairs(_grouped_product(gate_up_grad_J, gate_up, ends_E), place_NK)
        return x_grad, None, weight_grad_J[place_NK], gate_up_grad, down_grad


def _sum_of_pairs(values: Float[Tensor, "J D"], place_NK: Int[Tensor, "N K"]) -> Float[Tensor, "N D"]:
    # a bag of embeddings: gather and sum in one pass
    return F.embedding_bag(place_NK, values, mode="sum")


class Experts(nn.Module):
    """The experts of a layer as two parameters, in the layout that transformers 5 and AutoEP share.

    ``gate_up_proj`` [E, 2F, D], rows of gate first; ``down_proj`` [E, D, F].  Drawn as ``nn.Linear`` draws its weight.
    ``implementation`` "auto" is "grouped" wherever that is possible.  Raises ValueError for an unknown one.
    """

    def __init__(self, d_model: int, moe: MoE, implementation: Implementation = "auto") -> None:
        super().__init__()
        if implementation not in ("auto", "grouped", "loop"):
            raise ValueError(f'implementation is "{implementation}"; it must be "auto", "grouped" or "loop"')
        self.implementation = implementation
        self.gate_up_proj = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.d_ff_expert, d_model))
        self.down_proj = nn.Parameter(torch.empty(moe.num_experts, d_model, moe.d_ff_expert))
        for parameter in (self.gate_up_proj, self.down_proj):
            bound = parameter.shape[2] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Float[Tensor, "N D"], expert_ids: Int[Tensor, "N K"], weights: Float[Tensor, "N K"]
    ) -> Float[Tensor, "N D"]:
        """Each token's weighted sum over its experts, in the dtype of x; products in that of autocast, if it is on."""
        dtype = product_dtype(x.dtype, x.device)
        given = (x.to(dtype), expert_ids, weights, self.gate_up_proj.to(dtype), self.down_proj.to(dtype))
        is_grouped = self.implementation == "grouped" or (
            self.implementation == "auto" and why_not_grouped(given[0], self.down_proj.shape[2]) is None
        )
        return (experts_grouped if is_grouped else experts_loop)(*given).to(x.dtype)


class SparseFeedForward(nn.Module):
    """Router, routed experts and, if there are any, shared ones:  sum_k weight_k expert_k(x) + shared(x).

    LLaDA-MoE (arXiv 2509.24389) eq. 3; DeepSeekMoE (2401.06066) eq. 9 without its residual.  Raises ValueError for an
    architecture without experts.
    """

    def __init__(self, a: Architecture, implementation: Implementation = "auto") -> None:
        super().__init__()
        if a.moe is None:
            raise ValueError("moe is None; experts need its sizes")
        self.moe = a.moe
        self.gate = Router(a.d_model, a.moe)
        self.experts = Experts(a.d_model, a.moe, implementation)
        shared = a.moe.num_shared_experts * a.moe.d_ff_expert
        self.shared_experts = FeedForward(a.d_model, shared) if shared else None

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Map each token by itself."""
        tokens = rearrange(x, "b l d -> (b l) d")
        weights, expert_ids = route(self.gate(tokens), self.moe, self.gate.e_score_correction_bias)
        y = self.experts(tokens, expert_ids, weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)
