"""The denoiser against transformers' models: tiny random weights in their format on disk, offline, both ways."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig, MoE, RopeScaling
from dlm_core.models.transformer import Denoiser
from pipeline.hf_names import Family, from_family, to_family

LOGITS_ATOL = 1e-5  # float32 logits of order 1 from two orders of summation
V = 19

SMALL = Architecture(
    d_model=16, num_layers=3, num_heads=4, d_ff=24, tied_head=False, init="normal", init_std=0.25, norm_eps=1e-2
)
SPARSE = dataclasses.replace(
    SMALL, qk_norm=True, num_kv_heads=2, head_dim=6, d_ff=None, moe=MoE(num_experts=5, top_k=2, d_ff_expert=8)
)
LLAMA3 = RopeScaling("llama3", 8.0, original_seq_len=16, low_factor=1.0, high_factor=4.0)
YARN = RopeScaling("yarn", 4.0, original_seq_len=16, low_factor=1.0, high_factor=32.0)


def _like(a: Architecture, **values) -> Architecture:
    return dataclasses.replace(a, **values)


CASES: list[tuple[Family, Architecture]] = [
    ("llama", SMALL),
    ("llama", _like(SMALL, num_kv_heads=2, rope_base=500.0, tied_head=True)),
    ("llama", _like(SMALL, num_kv_heads=1, head_dim=10, rope_scaling=LLAMA3)),
    ("llama", _like(SMALL, rope_scaling=YARN)),
    ("llama", _like(SMALL, rope_scaling=RopeScaling("linear", 2.0))),
    ("qwen2", _like(SMALL, qkv_bias=True, num_kv_heads=2)),
    ("qwen3", _like(SMALL, qk_norm=True, num_kv_heads=2, head_dim=6)),
    ("qwen3_moe", SPARSE),
    ("qwen3_moe", _like(SPARSE, moe=MoE(num_experts=5, top_k=3, d_ff_expert=8, renormalise=False))),
]


def _peer_config(family: Family, a: Architecture) -> dict:
    scaling: dict = {"rope_type": "default", "rope_theta": a.rope_base}
    if a.rope_scaling is not None:
        s = a.rope_scaling
        names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
        scaling |= {"rope_type": s.kind, "factor": s.factor}
        if s.kind != "linear":
            scaling |= {"original_max_position_embeddings": s.original_seq_len}
            scaling |= dict(zip(names[s.kind], (s.low_factor, s.high_factor), strict=True))
    values = {
        "model_type": family,
        "vocab_size": V,
        "hidden_size": a.d_model,
        "intermediate_size": a.d_ff,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_size,
        "rms_norm_eps": a.norm_eps,
        "rope_parameters": scaling,
        "tie_word_embeddings": a.tied_head,
        "max_position_embeddings": 64,
    }
    if a.moe is not None:
        values |= {
            "intermediate_size": 1,
            "num_experts": a.moe.num_experts,
            "num_experts_per_tok": a.moe.top_k,
            "moe_intermediate_size": a.moe.d_ff_expert,
            "norm_topk_prob": a.moe.renormalise,
        }
    return values


def _model(a: Architecture) -> Denoiser:
    model = Denoiser(ModelConfig(a, V, 4))
    model.init_weights(3)
    with torch.no_grad():  # norms and biases away from 1 and 0, so that their order and place matter
        for index, parameter in enumerate(p for p in model.parameters() if p.ndim < 2):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model


def _peer(family: Family, model: Denoiser, folder):
    """transformers' model from a directory that holds our weights under their names."""
    from transformers import AutoModelForCausalLM

    a = model.config.architecture
    state = {name: tensor.contiguous() for name, tensor in to_family(family, a, model.state_dict()).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_peer_config(family, a)))
    peer, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return peer.eval()


@pytest.mark.parametrize(("family", "architecture"), CASES)
def test_denoiser_logits_equal_those_of_peer_causal_and_bidirectional(family, architecture, tmp_path):
    model = _model(architecture)
    peer = _peer(family, model, tmp_path)
    xt = torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(0))
    everywhere = torch.zeros(3, 1, 11, 11)  # additive: 0 = may attend
    with torch.no_grad():
        theirs = {
            "causal": peer(input_ids=xt, use_cache=False).logits.flatten(0, 1),
            "full": peer(input_ids=xt, attention_mask=everywhere, use_cache=False).logits.flatten(0, 1),
        }
        ours = {mask: model(xt, mask=AttentionMask(mask)) for mask in ("causal", "full")}
    real = torch.arange(V) != model.config.mask_token_id
    for mask in ("causal", "full"):
        torch.testing.assert_close(ours[mask][:, real], theirs[mask][:, real], rtol=0, atol=LOGITS_ATOL)
    assert float((theirs["causal"] - theirs["full"]).abs().max()) > 100 * LOGITS_ATOL  # else the mask was not applied


@pytest.mark.parametrize(("family", "architecture"), CASES)
def test_weights_to_a_family_and_back_are_bitwise_the_same(family, architecture):
    state = _model(architecture).state_dict()
    theirs = to_family(family, architecture, state)
    back = from_family(family, architecture, theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in state.values())


def _glm(a: Architecture):
    """Glm4Moe: partial rotary, QK norm, sigmoid group-limited router, shared expert, dense first layer: LLaDA2's."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    assert a.moe is not None
    values = _peer_config("qwen3_moe", a) | {
        "intermediate_size": a.d_ff,
        "n_routed_experts": a.moe.num_experts,
        "n_shared_experts": a.moe.num_shared_experts,
        "n_group": a.moe.num_groups,
        "topk_group": a.moe.top_groups,
        "routed_scaling_factor": a.moe.routed_scale,
        "first_k_dense_replace": a.moe.first_k_dense,
        "use_qk_norm": True,
        "attn_implementation": "eager",
    }
    values["rope_parameters"] |= {"partial_rotary_factor": a.rope_fraction}
    values.pop("model_type")
    return Glm4MoeForCausalLM(Glm4MoeConfig(**values)).eval()


def _glm_state(model: Denoiser) -> dict[str, torch.Tensor]:
    """Our weights under their names in memory, where experts are stacked."""
    a, ours = model.config.architecture, model.state_dict()
    q, kv = a.num_heads * a.head_size, a.kv_heads * a.head_size
    state = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    plain = {
        "attention.out.weight": "self_attn.o_proj.weight",
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.down.weight": "mlp.down_proj.weight",
        "feed_forward.gate.weight": "mlp.gate.weight",
        "feed_forward.gate.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        "feed_forward.experts.gate_up_proj": "mlp.experts.gate_up_proj",
        "feed_forward.experts.down_proj": "mlp.experts.down_proj",
        "feed_forward.shared_experts.down.weight": "mlp.shared_experts.down_proj.weight",
    }
    halves = {"feed_forward.gate_up": "mlp", "feed_forward.shared_experts.gate_up": "mlp.shared_experts"}
    for layer in range(a.num_layers):
        there, here = f"model.layers.{layer}.", f"blocks.{layer}."
        state |= {there + theirs: ours[here + name] for name, theirs in plain.items() if here + name in ours}
        parts = ours[here + "attention.qkv.weight"].split((q, kv, kv))
        state |= {f"{there}self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        for name, theirs in halves.items():
            if f"{here}{name}.weight" in ours:
                gate, up = ours[f"{here}{name}.weight"].chunk(2)
                state |= {f"{there}{theirs}.gate_proj.weight": gate, f"{there}{theirs}.up_proj.weight": up}
    return state


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_llada2_logits_equal_those_of_glm_experts(renormalise, mask):
    moe = MoE(
        num_experts=8,
        top_k=3,
        d_ff_expert=8,
        num_shared_experts=1,
        router_score="sigmoid",
        renormalise=renormalise,
        routed_scale=2.5,
        num_groups=4,
        top_groups=2,
        selection_bias=True,
        first_k_dense=1,
    )
    model = _model(_like(SMALL, qk_norm=True, num_kv_heads=2, head_dim=8, rope_fraction=0.5, moe=moe))
    for index, (name, buffer) in enumerate(model.named_buffers()):
        assert name.endswith("e_score_correction_bias")
        buffer.copy_(0.5 * torch.randn(8, generator=torch.Generator().manual_seed(index)))
    peer = _glm(model.config.architecture)
    peer.load_state_dict(_glm_state(model), strict=True)
    xt = torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(0))
    everywhere = None if mask == "causal" else torch.zeros(3, 1, 11, 11)
    with torch.no_grad():
        theirs = peer(input_ids=xt, attention_mask=everywhere, use_cache=False).logits.flatten(0, 1)
        ours = model(xt, mask=AttentionMask(mask))
    real = torch.arange(V) != model.config.mask_token_id
    torch.testing.assert_close(ours[:, real], theirs[:, real], rtol=0, atol=LOGITS_ATOL)
