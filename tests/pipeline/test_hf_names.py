"""Parameter names of the autoregressive families: which tensors, and what no family can hold."""

import re
from dataclasses import replace

import pytest
import torch

from dlm_core.models.config import Architecture, MoE
from pipeline.errors import UserError
from pipeline.hf_names import FAMILIES, check_family, from_family, packed_tensors, to_family

LLAMA = Architecture(d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=6, tied_head=False)
EXPERTS = MoE(num_experts=2, top_k=1, d_ff_expert=4, renormalise=False)
HOLDS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=6),
    "qwen3_moe": replace(LLAMA, qk_norm=True, d_ff=None, moe=EXPERTS),
}
LAYER = "model.layers.0."


def _ours(family: str) -> dict[str, torch.Tensor]:
    """Tensors of ours with distinct entries; sizes that the names alone don't give are small."""
    a = HOLDS[family]
    from dlm_core.models.config import ModelConfig
    from dlm_core.models.transformer import Denoiser

    state = Denoiser(ModelConfig(a, 5, 4)).state_dict()
    start = 0
    for tensor in state.values():
        tensor.copy_(torch.arange(start, start + tensor.numel()).view(tensor.shape))
        start += tensor.numel()
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_family_are_those_on_disk(family):
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    names += [f"self_attn.{part}_proj.bias" for part in "qkv"] if family == "qwen2" else []
    names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if family.startswith("qwen3") else []
    if family == "qwen3_moe":
        names += ["mlp.gate.weight"]
        names += [f"mlp.experts.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up", "down")]
    else:
        names += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert to_family(family, HOLDS[family], _ours(family)).keys() == wanted | {LAYER + name for name in names}


def test_packed_matrices_are_cut_in_the_order_of_their_names():
    ours = _ours("qwen3_moe")
    theirs = to_family("qwen3_moe", HOLDS["qwen3_moe"], ours)
    qkv = ours["blocks.0.attention.qkv.weight"]
    assert torch.equal(theirs[LAYER + "self_attn.q_proj.weight"], qkv[:8])
    assert torch.equal(theirs[LAYER + "self_attn.k_proj.weight"], qkv[8:12])
    assert torch.equal(theirs[LAYER + "self_attn.v_proj.weight"], qkv[12:])
    both = ours["blocks.0.feed_forward.experts.gate_up_proj"]
    assert torch.equal(theirs[LAYER + "mlp.experts.1.gate_proj.weight"], both[1, :4])
    assert torch.equal(theirs[LAYER + "mlp.experts.1.up_proj.weight"], both[1, 4:])
    down = ours["blocks.0.feed_forward.experts.down_proj"]
    assert torch.equal(theirs[LAYER + "mlp.experts.0.down_proj.weight"], down[0])


def test_tied_head_has_no_tensor_of_its_own():
    tied = replace(LLAMA, tied_head=True)
    assert "head.weight" not in {packed.ours for packed in packed_tensors("llama", tied)}


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("llama", {"qkv_bias": True}, 'qkv_bias is True; "llama" has False and nothing else'),
        ("llama", {"qk_norm": True}, "qk_norm is True"),
        ("llama", {"norm": "layer"}, "norm is 'layer'"),
        ("llama", {"activation": "gelu"}, "activation is 'gelu'"),
        ("llama", {"cond_dim": 8}, "cond_dim is 8"),
        ("llama", {"head_bias": True}, "head_bias is True"),
        ("llama", {"rope_fraction": 0.5}, r"rope_fraction is 0\.5"),
        ("llama", {"moe": EXPERTS, "d_ff": None}, 'moe is MoE.*; "llama" has none'),
        ("qwen2", {"qkv_bias": False}, "qkv_bias is False"),
        ("qwen2", {"head_dim": 6}, "head_dim is 6"),
        ("qwen3", {"qk_norm": False}, "qk_norm is False"),
        ("qwen3_moe", {"moe": None, "d_ff": 6}, 'moe is None; "qwen3_moe" has experts'),
        ("qwen3_moe", {"moe": replace(EXPERTS, num_shared_experts=1)}, "moe.num_shared_experts is 1"),
        ("qwen3_moe", {"moe": replace(EXPERTS, router_score="sigmoid")}, "moe.router_score is 'sigmoid'"),
        ("qwen3_moe", {"moe": replace(EXPERTS, selection_bias=True)}, "moe.selection_bias is True"),
        ("qwen3_moe", {"moe": replace(EXPERTS, routed_scale=2.0)}, r"moe.routed_scale is 2\.0"),
        (
            "qwen3_moe",
            {"moe": replace(EXPERTS, num_experts=4, num_groups=2)},
            'moe.num_groups is 2; "qwen3_moe" has 1 and nothing else',
        ),
    ],
)
def test_architecture_that_a_family_cannot_hold_is_refused(family, changed, message):
    check_family(family, HOLDS[family])
    with pytest.raises(UserError, match=message):
        check_family(family, replace(HOLDS[family], **changed))


@pytest.mark.parametrize(
    ("family", "changed", "named"),
    [
        ("qwen2", {"qkv_bias": False}, r"3 tensor\(s\) .* model\.layers\.0\.self_attn\.k_proj\.bias"),
        (
            "llama",
            {"tied_head": True},
            r"1 tensor\(s\) .* lm_head\.weight; either tied_head is false, or it is the embed",
        ),
    ],
)
def test_weights_with_tensors_that_have_no_place_are_refused(family, changed, named):
    theirs = to_family(family, HOLDS[family], _ours(family))
    asked = "llama" if family == "qwen2" else family
    with pytest.raises(UserError, match=named):
        from_family(asked, replace(HOLDS[family], **changed), theirs)


def test_head_size_that_qwen2_has_anyway_may_be_spelled_out():
    check_family("qwen2", replace(HOLDS["qwen2"], head_dim=4))


def test_family_that_does_not_exist_is_refused():
    for use in (lambda: to_family("llada", LLAMA, {}), lambda: from_family("llada", LLAMA, {})):
        with pytest.raises(UserError, match='the family is "llada"; it must be one of llama, qwen2, qwen3, qwen3_moe'):
            use()


@pytest.mark.parametrize(
    ("name", "num_rows", "wanted"),
    [
        ("self_attn.k_proj.weight", 6, 4),
        ("mlp.experts.1.gate_proj.weight", 5, 4),
        ("mlp.experts.0.down_proj.weight", 4, 8),
    ],
)
def test_weights_that_would_be_cut_in_another_place_are_refused(name, num_rows, wanted):
    theirs = to_family("qwen3_moe", HOLDS["qwen3_moe"], _ours("qwen3_moe"))
    theirs[LAYER + name] = torch.zeros(num_rows, *theirs[LAYER + name].shape[1:])
    with pytest.raises(UserError, match=rf"{re.escape(name)} has {num_rows} rows; the architecture gives it {wanted}"):
        from_family("qwen3_moe", HOLDS["qwen3_moe"], theirs)


def test_packed_experts_of_a_model_in_memory_are_refused_naming_the_files():
    theirs = to_family("qwen3_moe", HOLDS["qwen3_moe"], _ours("qwen3_moe"))
    packed = {name: tensor for name, tensor in theirs.items() if ".experts." not in name}
    packed[LAYER + "mlp.experts.gate_up_proj"] = torch.zeros(2, 8, 8)
    with pytest.raises(
        UserError, match=r"lack the tensor .*experts\.0\.gate_proj\.weight; .* the files of save_pretrained"
    ):
        from_family("qwen3_moe", HOLDS["qwen3_moe"], packed)


def test_weights_that_lack_a_tensor_are_refused_by_its_name():
    ours = _ours("llama")
    theirs = to_family("llama", LLAMA, ours)
    del theirs[LAYER + "self_attn.k_proj.weight"], ours["norm.weight"]
    with pytest.raises(UserError, match=r"the weights lack the tensor model\.layers\.0\.self_attn\.k_proj\.weight"):
        from_family("llama", LLAMA, theirs)
    with pytest.raises(UserError, match=r"the weights lack the tensor norm\.weight"):
        to_family("llama", LLAMA, ours)
