"""Parameter names of the families: which tensors, what is made of them, and what no family can hold."""

import re
from dataclasses import replace

import pytest
import torch

from dlm_core.models.config import Architecture, MoE, RopeScaling
from pipeline.errors import UserError
from pipeline.hf_names import FAMILIES, check_family, from_family, packed_tensors, to_family

LLAMA = Architecture(d_model=8, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=6, tied_head=False)
EXPERTS = MoE(num_experts=2, top_k=1, d_ff_expert=4, renormalise=False)
GROUPED = MoE(
    num_experts=4,
    top_k=2,
    d_ff_expert=4,
    num_shared_experts=2,
    router_score="sigmoid",
    routed_scale=2.5,
    num_groups=2,
    selection_bias=True,
    first_k_dense=1,
)
DIT = Architecture(
    d_model=8,
    num_layers=1,
    num_heads=2,
    d_ff=32,
    norm="layer",
    norm_eps=1e-5,
    activation="gelu",
    cond_dim=4,
    tied_head=False,
    head_bias=True,
)
HOLDS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=6),
    "qwen3_moe": replace(LLAMA, qk_norm=True, d_ff=None, moe=EXPERTS),
    "llada": LLAMA,
    "dream": replace(LLAMA, qkv_bias=True),
    "llada_moe": replace(LLAMA, qk_norm=True, d_ff=None, moe=EXPERTS),
    "llada2": replace(LLAMA, qk_norm=True, head_dim=8, rope_fraction=0.5, num_layers=2, moe=GROUPED),
    "mdlm": replace(DIT, time_conditioning=True),
    "bd3lm": DIT,
}
LAYER = "model.layers.0."
MATRICES = ("gate", "up", "down")


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


def _gated(prefix: str) -> set[str]:
    return {f"{prefix}{part}_proj.weight" for part in MATRICES}


def _llama_like(family: str) -> set[str]:
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    names |= {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    names |= {f"self_attn.{part}_proj.bias" for part in "qkv"} if family in ("qwen2", "dream") else set()
    has_norms = family.startswith("qwen3") or family == "llada_moe"
    names |= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} if has_norms else set()
    if family.endswith("_moe"):
        names |= {"mlp.gate.weight"} | _gated("mlp.experts.0.") | _gated("mlp.experts.1.")
    else:
        names |= _gated("mlp.")
    return wanted | {LAYER + name for name in names}


def _llada2() -> set[str]:
    wanted = {"model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"}
    wanted |= _gated("model.layers.0.mlp.") | _gated("model.layers.1.mlp.shared_experts.")
    wanted |= {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.expert_bias"}
    for expert in range(4):
        wanted |= _gated(f"model.layers.1.mlp.experts.{expert}.")
    attention = ("query_key_value", "query_layernorm", "key_layernorm", "dense")
    names = [f"attention.{part}.weight" for part in attention]
    names += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    return wanted | {f"model.layers.{layer}.{name}" for layer in range(2) for name in names}


LLADA_LAYER = "model.transformer.blocks.0."
LLADA = {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")} | {
    f"{LLADA_LAYER}{part}.weight"
    for part in ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
}


DIT_LAYER = ("norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight")
DIT_BIASED = ("mlp.0", "mlp.2", "adaLN_modulation")
DIT_NAMES = {f"backbone.{part}" for part in ("vocab_embed.embedding", "output_layer.norm_final.weight")} | {
    f"backbone.{part}.{kind}"
    for part in ("sigma_map.mlp.0", "sigma_map.mlp.2", "output_layer.linear", "output_layer.adaLN_modulation")
    for kind in ("weight", "bias")
}
DIT_NAMES |= {f"backbone.blocks.0.{name}" for name in DIT_LAYER}
DIT_NAMES |= {f"backbone.blocks.0.{name}.{kind}" for name in DIT_BIASED for kind in ("weight", "bias")}
ODD_NAMES = {"llada": LLADA, "llada2": _llada2(), "mdlm": DIT_NAMES, "bd3lm": DIT_NAMES}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_family_are_those_on_disk(family):
    wanted = ODD_NAMES.get(family) or _llama_like(family)
    assert to_family(family, HOLDS[family], _ours(family)).keys() == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_to_a_family_and_back_are_bitwise_the_same(family):
    ours = _ours(family)
    theirs = to_family(family, HOLDS[family], ours)
    back = from_family(family, HOLDS[family], theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in ours.values())


def test_matrices_of_llada_are_cut_in_the_order_of_its_names():
    ours = _ours("llada")
    theirs = to_family("llada", LLAMA, ours)
    gate_up = ours["blocks.0.feed_forward.gate_up.weight"]
    assert torch.equal(theirs[LLADA_LAYER + "k_proj.weight"], ours["blocks.0.attention.qkv.weight"][8:12])
    assert torch.equal(theirs[LLADA_LAYER + "ff_proj.weight"], gate_up[:6])  # SiLU is of this one
    assert torch.equal(theirs[LLADA_LAYER + "up_proj.weight"], gate_up[6:])
    assert torch.equal(theirs[LLADA_LAYER + "ff_out.weight"], ours["blocks.0.feed_forward.down.weight"])
    assert torch.equal(theirs["model.transformer.ff_out.weight"], ours["head.weight"])


def test_packed_tensors_of_llada2_are_ours_and_its_shared_experts_are_cut():
    ours = _ours("llada2")
    theirs = to_family("llada2", HOLDS["llada2"], ours)
    there, here = "model.layers.1.", "blocks.1."
    assert torch.equal(theirs[there + "attention.query_key_value.weight"], ours[here + "attention.qkv.weight"])
    bias = here + "feed_forward.gate.e_score_correction_bias"
    assert torch.equal(theirs[there + "mlp.gate.expert_bias"], ours[bias])
    shared = ours[here + "feed_forward.shared_experts.gate_up.weight"]
    assert torch.equal(theirs[there + "mlp.shared_experts.up_proj.weight"], shared[8:])
    assert [packed.ours for packed in packed_tensors("llada2", HOLDS["llada2"]) if packed.stays_float32] == [bias]


def test_dense_layers_and_shared_experts_of_llada_moe_have_their_places():
    moe = replace(EXPERTS, num_shared_experts=1, layer_frequency=2)
    a = replace(HOLDS["llada_moe"], num_layers=3, d_ff=6, qk_norm=False, moe=moe)
    names = {name for packed in packed_tensors("llada_moe", a) for name in packed.theirs}
    dense = _gated("model.layers.1.mlp.")
    assert dense <= names
    for layer in (0, 2):
        assert _gated(f"model.layers.{layer}.shared_expert.") <= names
        assert f"model.layers.{layer}.mlp.gate.weight" in names
    assert not [name for name in names - dense if name.startswith("model.layers.1.") and "expert" in name]


@pytest.mark.parametrize(
    ("family", "name", "size"),
    [
        ("dream", "self_attn.k_proj.bias", 4),
        ("llada2", "mlp.gate.expert_bias", 4),
    ],
)
def test_bias_that_we_have_not_is_written_as_zeros_and_read_as_nothing(family, name, size):
    a = HOLDS[family]
    a = replace(a, qkv_bias=False, moe=None if a.moe is None else replace(a.moe, selection_bias=False))
    ours = {key: tensor for key, tensor in _ours(family).items() if not key.endswith("bias")}
    theirs = to_family(family, a, {key: tensor.half() for key, tensor in ours.items()})
    name = f"model.layers.{a.num_layers - 1}.{name}"
    assert torch.equal(theirs[name], torch.zeros(size))
    assert theirs[name].dtype == (torch.float32 if family == "llada2" else torch.float16)
    theirs = to_family(family, a, ours)
    assert from_family(family, a, theirs).keys() == ours.keys()
    theirs[name][1] = 1e-30
    with pytest.raises(UserError, match=f"{re.escape(name)}.*: not all zeros, but the architecture has no such tensor"):
        from_family(family, a, theirs)


@pytest.mark.parametrize("family", ["dream", "llada_moe", "llada2"])
def test_tied_head_is_written_out_where_the_family_always_has_one(family):
    a = replace(HOLDS[family], tied_head=True)
    ours = {key: tensor for key, tensor in _ours(family).items() if key != "head.weight"}
    theirs = to_family(family, a, ours)
    assert torch.equal(theirs["lm_head.weight"], ours["embedding.weight"])
    assert from_family(family, a, theirs).keys() == ours.keys()
    theirs["lm_head.weight"] = theirs["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding once more; set tied_head to false"):
        from_family(family, a, theirs)


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


@pytest.mark.parametrize("family", ["llama", "llada"])
def test_tied_head_has_no_tensor_of_its_own(family):
    tied = replace(LLAMA, tied_head=True)
    untied = {name for packed in packed_tensors(family, LLAMA) for name in packed.theirs}
    head = "lm_head.weight" if family == "llama" else "model.transformer.ff_out.weight"
    assert untied - {name for packed in packed_tensors(family, tied) for name in packed.theirs} == {head}


def test_llada_may_have_biases_of_queries_keys_and_values():
    a = replace(LLAMA, qkv_bias=True)
    names = {name for packed in packed_tensors("llada", a) for name in packed.theirs}
    assert names - LLADA == {f"{LLADA_LAYER}{part}_proj.bias" for part in "qkv"}


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
        ("llada", {"qk_norm": True}, 'qk_norm is True; "llada" has False .*: its q_norm and k_norm span all heads'),
        ("llada", {"head_dim": 6}, 'head_dim is 6; "llada" has d_model / num_heads = 4 and nothing else'),
        ("llada", {"rope_scaling": RopeScaling("linear", 2.0)}, 'rope_scaling is .*; "llada" has None'),
        ("dream", {"qk_norm": True}, 'qk_norm is True; "dream" has False .*: qwen3 has it'),
        ("dream", {"head_dim": 6}, "head_dim is 6"),
        ("llada_moe", {"head_dim": 6}, "head_dim is 6"),
        ("llada_moe", {"qkv_bias": True}, "qkv_bias is True"),
        ("llada_moe", {"moe": None, "d_ff": 6}, 'moe is None; "llada_moe" has experts'),
        (
            "llada_moe",
            {"moe": replace(EXPERTS, num_experts=4, top_k=2, renormalise=True)},
            "moe.renormalise is True; .*: its code never divides the chosen scores by their sum",
        ),
        ("llada_moe", {"moe": replace(EXPERTS, selection_bias=True)}, "moe.selection_bias is True; .* leaves the bias"),
        ("llada_moe", {"moe": replace(EXPERTS, router_score="sigmoid")}, "moe.router_score is 'sigmoid'"),
        ("llada_moe", {"moe": replace(EXPERTS, routed_scale=2.0)}, r"moe.routed_scale is 2\.0"),
        ("llada2", {"qk_norm": False}, "qk_norm is False"),
        ("llada2", {"moe": None}, 'moe is None; "llada2" has experts'),
        ("llada2", {"moe": replace(GROUPED, router_score="softmax")}, "moe.router_score is 'softmax'"),
        (
            "llada2",
            {"moe": replace(GROUPED, layer_frequency=2), "num_layers": 3},
            'moe.layer_frequency is 2; "llada2" has 1 and nothing else',
        ),
        (
            "llada2",
            {"moe": replace(GROUPED, renormalise=False)},
            'moe.renormalise is False; "llada2" divides .* where top_k is above 1, and here it is 2',
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
        ("llada", {"tied_head": True}, r"model\.transformer\.ff_out\.weight; either tied_head is false"),
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
    for use in (lambda: to_family("falcon", LLAMA, {}), lambda: from_family("falcon", LLAMA, {})):
        with pytest.raises(UserError, match='the family is "falcon"; it must be one of llama, qwen2, qwen3, qwen3_moe'):
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
