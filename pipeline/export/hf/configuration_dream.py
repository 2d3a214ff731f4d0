"""Configuration of Dream (arXiv 2508.15487), with the keys of its published checkpoints."""

from typing import Any, ClassVar

from .diffusion_config import DiffusionConfig


class DreamConfig(DiffusionConfig):
    """Defaults are those of Dream-7B."""

    model_type = "Dream"
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "mask_token_id": 151666,
        "max_position_embeddings": 131072,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_cache": False,
        "vocab_size": 152064,
    }
    fixed: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }

    def __init__(self, **kwargs: Any) -> None:  # transformers 5 would put one of its own in its place
        super().__init__(**kwargs)
