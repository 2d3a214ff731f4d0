"""The sparse layer against transformers' Qwen3-MoE and GLM-4-MoE, tiny and random, with the same weights."""

import pytest
import torch

from dlm_core.models.config import Architecture, MoE
from dlm_core.models.moe import SparseFeedForward

FLOAT32 = 1e-5  # outputs of order 1 from other orders of summation
D_MODEL = 16


def drawn_layer(moe: MoE) -> SparseFeedForward:
    layer = SparseFeedForward(Architecture(d_model=D_MODEL, num_heads=2, d_ff=None, moe=moe))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return layer


def assert_same(ours: SparseFeedForward, theirs: torch.nn.Module) -> None:
    """Outputs, and gradients of the input and of the parameters that both name alike."""
    x = torch.randn(3, 20, D_MODEL, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        named = dict(layer.named_parameters())
        shared = [named[name].grad for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]
        results.append([y.detach(), leaf.grad, *shared])
    assert float(results[1][0].abs().mean()) > 0.1
    for found, wanted in zip(*results, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT32 * scale)


@pytest.mark.parametrize("renormalise", [True, False])
def test_layer_equals_that_of_qwen3_moe(renormalise):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    ours = drawn_layer(MoE(8, 3, 12, renormalise=renormalise))
    config = Qwen3MoeConfig(
        hidden_size=D_MODEL,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        norm_topk_prob=renormalise,
        hidden_act="silu",
        experts_implementation="eager",
    )
    theirs = Qwen3MoeSparseMoeBlock(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours, theirs)


@pytest.mark.parametrize("renormalise", [True, False])
def test_layer_equals_that_of_glm4_moe(renormalise):
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

    moe = MoE(
        12,
        3,
        8,
        num_shared_experts=2,
        router_score="sigmoid",
        renormalise=renormalise,
        routed_scale=2.5,
        num_groups=4,
        top_groups=2,
        selection_bias=True,
    )
    ours = drawn_layer(moe)
    config = Glm4MoeConfig(
        hidden_size=D_MODEL,
        n_routed_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=8,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=renormalise,
        hidden_act="silu",
        experts_implementation="eager",
    )
    theirs = Glm4MoeMoE(config)
    state = ours.state_dict()
    gate, up = state.pop("shared_experts.gate_up.weight").chunk(2)
    state["shared_experts.gate_proj.weight"], state["shared_experts.up_proj.weight"] = gate, up
    state["shared_experts.down_proj.weight"] = state.pop("shared_experts.down.weight")
    theirs.load_state_dict(state, strict=True)
    assert_same(ours, theirs)
