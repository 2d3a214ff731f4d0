"""Tiny random autoregressive models as transformers saves them: what an import begins with."""

import json
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 50
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "rope_theta": 500.0,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_scaling": LLAMA3},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 6, "rope_scaling": YARN, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 6,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}


def make_peer(name: str, **changes: Any) -> Any:
    """A model in memory, its norms and biases away from 1 and 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = COMMON | MODELS[name] | changes
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(
                (1.0 if parameter.ndim == 1 else 0.0) + 0.25 * torch.randn(parameter.shape, generator=generator)
            )
    return model


def save_peer(name: str, directory: Path, *, shard_bytes: int = 10**9, dtype: str = "float32", **changes: Any) -> Path:
    """A directory of ``save_pretrained``."""
    model = make_peer(name, **changes).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=shard_bytes)
    return directory


def change_config(directory: Path, **values: Any) -> None:
    """Set keys of its config.json; None takes one out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def save_in_fresh_process(name: str, directory: str) -> str:
    """``save_peer`` in bfloat16 shards, for processes with another transformers; its version."""
    import transformers

    save_peer(name, Path(directory), shard_bytes=4000, dtype="bfloat16")
    return transformers.__version__
