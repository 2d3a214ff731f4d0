"""Experts that are copies of a dense network: what they give together is what it gave."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dlm_core.models.config import Architecture, MoE
from dlm_core.models.feed_forward import FeedForward
from dlm_core.models.moe import SparseFeedForward, route
from dlm_core.upcycling import even_weight_sum, upcycled

EXACT = 1e-12  # float64, sums in another order
D_MODEL, D_FF = 8, 12
DENSE = Architecture(d_model=D_MODEL, num_layers=4, num_heads=2, d_ff=D_FF)

ROUTERS = {
    "qwen3": MoE(12, 3, D_FF),
    "llada-moe": MoE(12, 3, D_FF, renormalise=False),
    "one": MoE(12, 1, D_FF, renormalise=False),
    "all": MoE(5, 5, D_FF, renormalise=False),
    "scaled": MoE(12, 2, D_FF, routed_scale=2.5),
    "scaled softmax": MoE(12, 2, D_FF, renormalise=False, routed_scale=0.5),
    "sigmoid": MoE(12, 4, D_FF, router_score="sigmoid", renormalise=False),
    "scaled sigmoid": MoE(12, 4, D_FF, router_score="sigmoid", renormalise=False, routed_scale=2.5),
    "llada2": MoE(
        12, 4, D_FF, router_score="sigmoid", routed_scale=2.5, num_groups=3, top_groups=2, selection_bias=True
    ),
    "groups": MoE(12, 3, D_FF, renormalise=False, num_groups=4, top_groups=2),
    "one group": MoE(12, 2, D_FF, router_score="sigmoid", renormalise=False, num_groups=6, top_groups=1),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_and_copies(moe: MoE) -> tuple[FeedForward, SparseFeedForward]:
    """A network, and experts that are it, divided by what an even router's weights sum to."""
    dense = FeedForward(D_MODEL, D_FF).double().requires_grad_(False)
    sparse = SparseFeedForward(replace(DENSE, d_ff=None, moe=moe)).double().requires_grad_(False)
    for seed, tensor in enumerate(dense.state_dict().values()):
        tensor.copy_(drawn(*tensor.shape, seed=seed))
    sparse.experts.gate_up_proj.copy_(dense.gate_up.weight)
    sparse.experts.down_proj.copy_(dense.down.weight / even_weight_sum(moe))
    sparse.gate.weight.zero_()
    return dense, sparse


@pytest.mark.parametrize("kind", ROUTERS)
def test_copies_under_an_even_router_give_what_the_network_gave(kind):
    dense, sparse = dense_and_copies(ROUTERS[kind])
    x = drawn(2, 5, D_MODEL, seed=9)
    torch.testing.assert_close(sparse(x), dense(x), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", ROUTERS)
def test_copies_under_any_router_do_so_only_where_weights_are_renormalised_or_all_are_taken(kind):
    moe = ROUTERS[kind]
    dense, sparse = dense_and_copies(moe)
    sparse.gate.weight.copy_(drawn(moe.num_experts, D_MODEL, seed=3))
    x = drawn(2, 5, D_MODEL, seed=9)
    error = float((sparse(x) - dense(x)).abs().max())
    takes_all = moe.router_score == "softmax" and moe.top_k == moe.num_experts
    assert (error < EXACT * float(dense(x).abs().max())) == (moe.renormalise or takes_all)


@pytest.mark.parametrize("kind", ROUTERS)
def test_even_weight_sum_is_that_of_the_router(kind):
    moe = ROUTERS[kind]
    weights, _ = route(torch.zeros(3, moe.num_experts, dtype=torch.float64), moe)
    wanted = torch.full((3,), even_weight_sum(moe), dtype=torch.float64)
    torch.testing.assert_close(weights.sum(dim=-1), wanted, rtol=EXACT, atol=EXACT)


def test_upcycled_keeps_everything_but_the_networks_that_became_experts():
    moe = MoE(4, 2, D_FF)
    assert upcycled(DENSE, moe) == replace(DENSE, moe=moe, d_ff=None)
    for first, every in itertools.product(range(4), (1, 2)):
        if (first, every) == (0, 1) or every > 4 - first:
            continue
        some = replace(moe, first_k_dense=first, layer_frequency=every)
        assert upcycled(DENSE, some) == replace(DENSE, moe=some)


@pytest.mark.parametrize(
    ("a", "moe", "named"),
    [
        (replace(DENSE, d_ff=None, moe=MoE(4, 2, D_FF)), MoE(4, 2, D_FF), "has experts already"),
        (DENSE, MoE(4, 2, D_FF - 1), r"moe\.d_ff_expert is 11; .* 12"),
        (DENSE, MoE(4, 2, D_FF, num_shared_experts=2), r"moe\.num_shared_experts is 2"),
        (DENSE, MoE(4, 2, D_FF, first_k_dense=4), r"moe\.first_k_dense is 4"),
        (DENSE, MoE(4, 2, D_FF, first_k_dense=3, layer_frequency=2), r"moe\.layer_frequency is 2"),
        (replace(DENSE, activation="gelu"), MoE(4, 2, D_FF), 'activation is "gelu"'),
    ],
)
def test_upcycled_of_what_cannot_be_copied_names_the_field(a, moe, named):
    with pytest.raises(ValueError, match=named):
        upcycled(a, moe)
