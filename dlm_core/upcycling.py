"""From a dense model to one with experts: what becomes of its shape, and what copies of a network are divided by.

Light to import, without torch: plans ask for it.
"""

from dataclasses import replace

from dlm_core.models.config import Architecture, MoE


def upcycled(a: Architecture, moe: MoE) -> Architecture:
    """A dense architecture with experts in the place of networks, each as wide as the one it is a copy of.

    Sparse upcycling (arXiv 2212.05055).  Raises ValueError for a model that has experts, experts of another width than
    d_ff, or shared ones, which would be added to what the copies give.
    """
    if a.moe is not None:
        raise ValueError("the model has experts already")
    if moe.d_ff_expert != a.d_ff:
        raise ValueError(f"moe.d_ff_expert is {moe.d_ff_expert}; copies of a network are as wide as it: {a.d_ff}")
    if moe.num_shared_experts:
        raise ValueError(f"moe.num_shared_experts is {moe.num_shared_experts}; the copies give all of it, so 0")
    is_all = all(moe.is_sparse(layer) for layer in range(a.num_layers))
    return replace(a, moe=moe, d_ff=None if is_all else a.d_ff)


def even_weight_sum(moe: MoE) -> float:
    """Sum of a token's weights under a router whose logits are all 0: what copies of a network are to be divided by.

    routed_scale * (1 renormalised; else top_k / num_experts for a softmax, top_k / 2 for sigmoids): without that a
    model of copies would give less than the dense one (or more).  He et al. (arXiv 2410.07524) scale copies too.
    """
    each = 1.0 / moe.num_experts if moe.router_score == "softmax" else 0.5
    return moe.routed_scale * (1.0 if moe.renormalise else moe.top_k * each)
