"""Configuration of LLaDA2 (arXiv 2512.15745), with the keys of its published checkpoints."""

from typing import Any, ClassVar

from .diffusion_config import DiffusionConfig


class LLaDA2MoeConfig(DiffusionConfig):
    """Defaults are those of LLaDA2.0-mini; ``block_size`` is how many tokens are generated at once."""

    model_type = "llada2_moe"
    defaults: ClassVar[dict[str, Any]] = {
        "block_size": 32,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "mask_token_id": 156895,
        "max_position_embeddings": 16384,
        "moe_intermediate_size": 512,
        "n_group": 8,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 20,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000.0,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "use_cache": False,
        "use_qkv_bias": False,
        "vocab_size": 157184,
    }
    fixed: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "moe_router_enable_expert_bias": True,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
    }

    def __init__(self, **kwargs: Any) -> None:  # transformers 5 would put one of its own in its place
        super().__init__(**kwargs)
