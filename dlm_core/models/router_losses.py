"""Losses and statistics of routers: the balance loss, the z-loss, tokens of each expert, and the tap for the logits.

Sums and counts, never means: the caller adds them over batches and workers, then divides.  Nothing here is part of the
bound of an objective.

Shapes: B rows, L seq_len, N tokens, E experts, K top_k, R groups of rows.
"""

import weakref
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dlm_core.cross_entropy import compute_dtype
from dlm_core.models.config import MoE
from dlm_core.models.moe import expert_scores, route
from dlm_core.objectives import NUM_T_BINS, t_bins


class RouterLoss(NamedTuple):
    """A loss as a sum, and what the global sum is to be divided by."""

    loss_sum: Float[Tensor, ""]
    """Differentiable."""
    denominator: Int[Tensor, ""]
    """Groups of rows, or tokens."""


def balance_loss(
    logits: Float[Tensor, "B L E"],
    valid: Bool[Tensor, "B L"],
    moe: MoE,
    *,
    group_seqs: int,
    selection_bias: Float[Tensor, " E"] | None = None,
) -> RouterLoss:
    """Sum over groups of ``group_seqs`` rows of  num_experts * sum_e f_e P_e,  and the number of groups.

    f_e is expert e's share of the top_k slots of the group's valid tokens, P_e the mean over them of its probability
    (softmax, or sigmoids that sum to 1).  1 for an even spread; at most num_experts / top_k.  Only P has a gradient.
    Switch Transformer (arXiv 2101.03961) eq. 4-6 with f over top_k slots, as LLaDA-MoE (2509.24389) plots it; code that
    follows Mixtral's counts ``top_k`` times as much, and takes all layers as one.  A group is what is balanced: take
    the same number of rows however the batch is split, and the mean over groups stays the same.  A group without a
    valid token adds 0.  Raises ValueError if the rows are no whole number of groups, or logits and valid don't fit.
    """
    num_rows = logits.shape[0]
    if logits.shape[-1] != moe.num_experts or logits.shape[:-1] != valid.shape:
        raise ValueError(
            f"logits are {list(logits.shape)} and valid is {list(valid.shape)}; wanted [B, L, {moe.num_experts}] and "
            "[B, L] of the same tokens"
        )
    if group_seqs < 1 or num_rows % group_seqs:
        raise ValueError(f"group_seqs is {group_seqs}, which does not divide the {num_rows} rows; take a divisor")
    logits = logits.masked_fill(~valid[..., None], 0.0)  # what padding holds may be anything, also nan
    scores = expert_scores(logits, moe)
    probs = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    _, expert_ids = route(rearrange(logits.detach(), "b l e -> (b l) e"), moe, selection_bias)
    slot_ids = rearrange(expert_ids, "(r t) k -> r (t k)", r=num_rows // group_seqs)
    is_valid = rearrange(valid, "(r g) l -> r (g l)", g=group_seqs).to(scores.dtype)
    slot_counts = probs.new_zeros(len(slot_ids), moe.num_experts)
    slot_counts.scatter_add_(1, slot_ids, repeat(is_valid, "r t -> r (t k)", k=moe.top_k))
    num_valid = is_valid.sum(dim=1, keepdim=True).clamp(min=1.0)
    share = slot_counts / (num_valid * moe.top_k)
    mean_prob = torch.einsum("rt,rte->re", is_valid, probs.view(*is_valid.shape, -1)) / num_valid
    loss_sum = moe.num_experts * (share * mean_prob).sum()
    return RouterLoss(loss_sum, valid.new_full((), len(slot_ids), dtype=torch.int64))


def z_loss(logits: Float[Tensor, "*N E"], valid: Bool[Tensor, "*N"]) -> RouterLoss:
    """Sum over valid tokens of  logsumexp(logits)^2,  and their number: ST-MoE (arXiv 2202.08906) eq. 5.

    Raises ValueError unless logits and valid are of the same tokens.
    """
    if logits.shape[:-1] != valid.shape:
        raise ValueError(
            f"logits are {list(logits.shape)} and valid is {list(valid.shape)}; wanted one row of logits a token"
        )
    logits = logits.masked_fill(~valid[..., None], 0.0)
    log_partition = logits.to(compute_dtype(logits.dtype)).logsumexp(dim=-1)
    return RouterLoss(log_partition.square().masked_fill(~valid, 0.0).sum(), valid.sum())


def tokens_per_expert(
    expert_ids: Int[Tensor, "*N K"], valid: Bool[Tensor, "*N"], num_experts: int
) -> Int[Tensor, " E"]:
    """How many valid tokens each expert gets; ``top_k`` times their number in all."""
    return _slot_counts(expert_ids, valid, torch.zeros_like(valid, dtype=torch.int64), 1, num_experts)[0]


def tokens_per_expert_and_bin(
    expert_ids: Int[Tensor, "*N K"], valid: Bool[Tensor, "*N"], t: Float[Tensor, "*N"], num_experts: int
) -> Int[Tensor, "bins E"]:
    """``tokens_per_expert`` for each of the equal bins of t that losses are kept for; a t of nan is in no bin."""
    timed = valid & ~t.isnan()
    return _slot_counts(expert_ids, timed, t_bins(t.nan_to_num()), NUM_T_BINS, num_experts)


def _slot_counts(expert_ids: Tensor, valid: Tensor, bins: Tensor, num_bins: int, num_experts: int) -> Tensor:
    cells = bins[..., None] * num_experts + expert_ids
    counts = torch.zeros(num_bins * num_experts, dtype=torch.int64, device=expert_ids.device)
    counts.scatter_add_(0, cells.flatten(), valid[..., None].expand_as(cells).flatten().long())
    return counts.view(num_bins, num_experts)


class RouterTap:
    """Takes the logits of every router from one forward pass:  ``with tap: model(xt)``,  then ``tap.logits``.

    {name of the router: logits [N, E]}, there after the ``with`` and until the next one; the N tokens are those of the
    rows one after the other, so that ``view(B, -1, E)`` is what ``balance_loss`` takes: L positions, or the 2 L of
    [xt ; x0] in block diffusion, of which the last layer has the L noisy ones alone.  Routers are the modules named
    ``...feed_forward.gate``, or ``...router.gate`` where AutoEP has replaced the layer: make the tap after
    ``deepspeed.initialize``, and before anything is compiled.  What activation checkpointing computes again in the
    backward pass is not taken.  Raises ValueError for a model without a router, or one that runs twice in a `with`.
    """

    def __init__(self, model: nn.Module) -> None:
        gates = {name: module for name, module in model.named_modules() if _is_gate(name)}
        if not gates:
            raise ValueError(
                f"{type(model).__name__} has no router: no module's name ends with feed_forward.gate or router.gate"
            )
        self.logits: dict[str, Tensor] = {}
        self._model, self._names = model, tuple(gates)
        self._places = [_Place(name) for name in gates]
        # Weak, since a model must stay one that can be copied, whatever was tapped.
        hooks = [partial(_take, weakref.ref(place)) for place in self._places]
        self._handles = [module.register_forward_hook(hook) for module, hook in zip(gates.values(), hooks, strict=True)]

    def __enter__(self) -> "RouterTap":
        self.logits = {}
        for place in self._places:
            place.is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise ValueError if a router gave nothing, or logits that no gradient reaches though it should."""
        for place in self._places:
            if place.logits is not None:
                self.logits[place.name] = place.logits
            place.logits, place.is_open = None, False
        if error is not None:
            return
        for name in self._names:
            if name not in self.logits:
                raise ValueError(
                    f"router {name} gave no logits: no forward pass ran in the `with`, or the model was compiled, or "
                    "its layer replaced, before the tap was made"
                )
            if torch.is_grad_enabled() and not self.logits[name].requires_grad:
                raise ValueError(
                    f"no gradient would reach router {name}: activation checkpointing with use_reentrant=True cuts it "
                    "off, use use_reentrant=False; or it is frozen, then tap it under torch.no_grad()"
                )

    def selection_bias(self, name: str) -> Float[Tensor, " E"] | None:
        """The bias that a router chooses with, or None: what ``balance_loss`` and ``route`` want to know."""
        for owner in (name, name.rpartition(".")[0]):  # AutoEP moves it from the gate to the router around it
            bias = getattr(self._model.get_submodule(owner), "e_score_correction_bias", None)
            if bias is not None:
                return bias
        return None

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


class _Place:
    """Where the hook of one router puts its logits.

    A compiler takes what the hook reads for fixed, and layers share what it compiles only where they agree in that: so
    the hook reads neither the name, nor how many routers there were before.
    """

    def __init__(self, name: str) -> None:
        self.name, self.is_open = name, False
        self.logits: Tensor | None = None


def _take(place: "weakref.ref[_Place]", module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
    here = place()
    if here is None or not here.is_open:
        return
    if here.logits is not None:
        raise ValueError(f"router {here.name} ran twice in one `with`; use one for each forward pass")
    here.logits = logits


def _is_gate(name: str) -> bool:
    return f".{name}".endswith((".feed_forward.gate", ".router.gate"))
