"""Configuration of LLaDA-MoE (arXiv 2509.24389), with the keys of its published checkpoints."""

from typing import Any, ClassVar

from .diffusion_config import DiffusionConfig


class LLaDAMoEConfig(DiffusionConfig):
    """Defaults are those of LLaDA-MoE-7B-A1B; ``moe_layer_freq`` has a 1 for every layer with experts."""

    model_type = "lladamoe"
    defaults: ClassVar[dict[str, Any]] = {
        "dense_intermediate_size": 8192,
        "expert_intermediate_size": 1024,
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "mask_token_id": 156895,
        "max_position_embeddings": 8192,
        "moe_layer_freq": (1,) * 16,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "shared_expert_intermediate_size": None,
        "use_cache": False,
        "vocab_size": 157184,
    }
    fixed: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "partial_rotary_factor": 1,
        "routed_scaling_factor": 1,
        "router_num_group": None,
        "router_topk_group": None,
        "tie_word_embeddings": False,
    }

    def __init__(self, **kwargs: Any) -> None:  # transformers 5 would put one of its own in its place
        super().__init__(**kwargs)
