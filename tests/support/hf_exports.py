"""Directories that transformers loads, written by hand: tiny random models of the diffusion families."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pipeline.export.hf
from dlm_core.models.config import Architecture, ModelConfig, MoE, RopeScaling
from dlm_core.models.transformer import Denoiser
from pipeline.hf_names import Family, to_family

V, MASK, PAD, EOS = 19, 4, 1, 2
SEQ_LEN = 64

SMALL = Architecture(
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    d_ff=24,
    tied_head=False,
    init="normal",
    init_std=0.25,
    norm_eps=1e-2,
    rope_base=500.0,
)
EXPERTS = MoE(num_experts=5, top_k=2, d_ff_expert=8, renormalise=False)
GROUPED = MoE(
    num_experts=8,
    top_k=3,
    d_ff_expert=8,
    num_shared_experts=2,
    router_score="sigmoid",
    routed_scale=2.5,
    num_groups=4,
    top_groups=2,
    selection_bias=True,
    first_k_dense=1,
)
LLAMA3 = RopeScaling("llama3", 8.0, original_seq_len=16, low_factor=1.0, high_factor=4.0)
YARN = RopeScaling("yarn", 4.0, original_seq_len=16, low_factor=1.0, high_factor=32.0)
_MIXED = replace(EXPERTS, num_shared_experts=2, first_k_dense=1)
_PLAIN = replace(GROUPED, num_shared_experts=0, num_groups=1, top_groups=1, top_k=1, renormalise=False)

EXPORTS: dict[str, tuple[Family, Architecture]] = {
    "llada": ("llada", SMALL),
    "llada-tied": ("llada", replace(SMALL, tied_head=True, num_kv_heads=None)),
    "llada-biases": ("llada", replace(SMALL, qkv_bias=True)),
    "dream": ("dream", replace(SMALL, qkv_bias=True)),
    "dream-tied-no-biases": ("dream", replace(SMALL, tied_head=True, rope_scaling=YARN)),
    "llada_moe": ("llada_moe", replace(SMALL, qk_norm=True, d_ff=None, moe=EXPERTS)),
    "llada_moe-dense-first": ("llada_moe", replace(SMALL, moe=_MIXED, rope_scaling=RopeScaling("linear", 2.0))),
    "llada2": ("llada2", replace(SMALL, qk_norm=True, head_dim=8, rope_fraction=0.5, moe=GROUPED)),
    "llada2-no-bias": (
        "llada2",
        replace(
            SMALL,
            qk_norm=True,
            qkv_bias=True,
            rope_scaling=LLAMA3,
            moe=replace(_PLAIN, selection_bias=False),
        ),
    ),
}
"""A model of every option that a family has."""


def random_model(a: Architecture) -> Denoiser:
    """Weights with norms and biases away from 1 and 0, so that their order and place matter."""
    model = Denoiser(ModelConfig(a, V, MASK))
    model.init_weights(3)
    with torch.no_grad():
        for index, (_, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if tensor.ndim < 2:
                tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
    return model.eval()


def write_export(folder: Path, family: Family, model: Denoiser) -> None:
    """config.json, generation_config.json, model.safetensors and the code that they name."""
    folder.mkdir(parents=True)
    state = {
        name: tensor.clone()
        for name, tensor in to_family(family, model.config.architecture, model.state_dict()).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    stem, config_class, auto_classes = CODE[family]
    auto_map = {"AutoConfig": f"configuration_{stem}.{config_class}"}
    auto_map |= {auto: f"modeling_{stem}.{name}" for auto, name in auto_classes.items()}
    config = {"auto_map": auto_map, "architectures": [auto_classes["AutoModelForCausalLM"]], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | config_of(family, model.config)))
    ids = {"mask_token_id": MASK, "pad_token_id": PAD, "eos_token_id": EOS}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    code = Path(pipeline.export.hf.__file__).parent
    for name in (
        f"configuration_{stem}",
        f"modeling_{stem}",
        "diffusion_config",
        "diffusion_modules",
        "diffusion_generation",
    ):
        shutil.copy(code / f"{name}.py", folder)


CODE: dict[Family, tuple[str, str, Mapping[str, str]]] = {
    "llada": ("llada", "LLaDAConfig", dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "LLaDAModelLM")),
    "dream": ("dream", "DreamConfig", dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "DreamModel")),
    "llada_moe": (
        "lladamoe",
        "LLaDAMoEConfig",
        dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "LLaDAMoEModelLM"),
    ),
    "llada2": (
        "llada2_moe",
        "LLaDA2MoeConfig",
        {"AutoModel": "LLaDA2MoeModel", "AutoModelForCausalLM": "LLaDA2MoeModelLM"},
    ),
}
"""File names' stem, configuration and models of a family."""


def _rope_scaling(a: Architecture) -> dict[str, Any] | None:
    s = a.rope_scaling
    if s is None:
        return None
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast"), "linear": ()}
    values: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        values |= {"original_max_position_embeddings": s.original_seq_len}
    return values | dict(zip(names[s.kind], (s.low_factor, s.high_factor), strict=False))


def config_of(family: Family, config: ModelConfig) -> dict[str, Any]:
    """config.json of a family, with the keys of its published checkpoints."""
    a, moe = config.architecture, config.architecture.moe
    common = {
        "vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_base,
        "use_cache": False,
    }
    if family == "llada":
        fixed = {
            "rope": True,
            "activation_type": "silu",
            "block_type": "llama",
            "layer_norm_type": "rms",
            "alibi": False,
        }
        return (
            common
            | fixed
            | {
                "model_type": "llada",
                "d_model": a.d_model,
                "n_layers": a.num_layers,
                "n_heads": a.num_heads,
                "n_kv_heads": a.kv_heads,
                "mlp_hidden_size": a.d_ff,
                "embedding_size": config.vocab_size,
                "max_sequence_length": SEQ_LEN,
                "include_bias": False,
                "include_qkv_bias": a.qkv_bias,
                "weight_tying": a.tied_head,
                "attention_dropout": 0.0,
                "residual_dropout": 0.0,
                "embedding_dropout": 0.0,
            }
        )
    common |= {
        "hidden_size": a.d_model,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": SEQ_LEN,
        "tie_word_embeddings": False,
        "rope_scaling": _rope_scaling(a),
        "attention_dropout": 0.0,
    }
    if family == "dream":
        return common | {"model_type": "Dream", "intermediate_size": a.d_ff, "use_sliding_window": False}
    assert moe is not None
    common |= {"num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
    shared = moe.num_shared_experts
    if family == "llada_moe":
        return common | {
            "model_type": "lladamoe",
            "dense_intermediate_size": a.d_ff,
            "expert_intermediate_size": moe.d_ff_expert,
            "shared_expert_intermediate_size": shared * moe.d_ff_expert if shared else None,
            "moe_layer_freq": [int(a.is_sparse(layer)) for layer in range(a.num_layers)],
            "qk_layernorm": a.qk_norm,
            "attention_bias": False,
            "norm_topk_prob": None,
            "routed_scaling_factor": 1,
            "partial_rotary_factor": 1,
        }
    return common | {
        "model_type": "llada2_moe",
        "intermediate_size": a.d_ff,
        "moe_intermediate_size": moe.d_ff_expert,
        "num_shared_experts": shared or None,
        "first_k_dense_replace": moe.first_k_dense,
        "head_dim": a.head_size,
        "partial_rotary_factor": a.rope_fraction,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.routed_scale,
        "use_qkv_bias": a.qkv_bias,
        "use_bias": False,
        "use_qk_norm": True,
        "block_size": 4,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    }
