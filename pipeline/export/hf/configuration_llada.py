"""Configuration of LLaDA (arXiv 2502.09992), with the keys of its published checkpoints."""

from typing import Any, ClassVar

from .diffusion_config import DiffusionConfig


class LLaDAConfig(DiffusionConfig):
    """Defaults are those of LLaDA-8B; ``embedding_size`` is the number of rows of the embedding."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }
    defaults: ClassVar[dict[str, Any]] = {
        "d_model": 4096,
        "embedding_size": 126464,
        "include_qkv_bias": False,
        "init_std": 0.02,
        "mask_token_id": 126336,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 12288,
        "multi_query_attention": None,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_cache": False,
        "vocab_size": 126464,
        "weight_tying": False,
    }
    fixed: ClassVar[dict[str, Any]] = {
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_type": "llama",
        "include_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rope": True,
        "scale_logits": False,
    }

    def __init__(self, **kwargs: Any) -> None:  # transformers 5 would put one of its own in its place
        super().__init__(**kwargs)
