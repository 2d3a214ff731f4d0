"""The keys of a GGUF file that say what its model computes: which are read, and which may only have no effect.

transformers passes over every key that it doesn't know, and takes a value of its own for one that is missing.  So a key
that it doesn't read must have the value at which nothing is computed otherwise.  Names: constants.py of gguf-py; what
they mean: src/llama-hparams.h, src/llama-model.cpp (github.com/ggml-org/llama.cpp).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.gguf_header import INSTEAD

WITH_EXPERTS = "qwen3moe"
_COUNTS = ("block_count", "context_length", "embedding_length", "attention.head_count", "attention.head_count_kv")
"""Where head_count_kv is missing, llama.cpp takes head_count.  transformers makes the same shapes, but leaves the rows
of a Llama's queries and keys in the order of llama.cpp."""
_DENSE_COUNTS, _EXPERT_COUNTS = ("feed_forward_length",), ("expert_count", "expert_used_count")
_SIZES = ("attention.key_length", "attention.value_length", "vocab_size", "rope.dimension_count")
"""May be missing: tensors have them too, and others than transformers supposes are found by their shapes."""
_EPSILON, _ROPE_BASE = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_READ = {*_COUNTS, *_DENSE_COUNTS, *_SIZES, _EPSILON, _ROPE_BASE}
_READ_OF_EXPERTS = {*_EXPERT_COUNTS, "expert_feed_forward_length"}
_OF_A_STRETCH = {
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
"""Without one, which ``_check_rope`` sees to, they say nothing."""
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_gating_func": 1,
    "expert_shared_count": 0,
    "expert_used_count": 0,
    "expert_weights_norm": True,
    "expert_weights_scale": 1,
    "final_logit_softcapping": 0,
    "leading_dense_block_count": 0,
    "logit_scale": 1,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "router_logit_softcapping": 0,
    "use_parallel_residual": False,
}
"""Key -> the value without effect.  expert_gating_func 1 is the softmax."""
_LAYOUT = {"tensor_data_layout": "Meta AI original pth"}
"""Of every Llama: rows of queries and keys as transformers turns them back."""


def check_keys(path: Path, kind: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an architecture, without its name; UserError for one that is missing or would be passed over."""
    keys = {key.removeprefix(f"{kind}."): value for key, value in header.items() if key.startswith(f"{kind}.")}
    has_experts = kind == WITH_EXPERTS
    for name in (*_COUNTS, *(_EXPERT_COUNTS if has_experts else _DENSE_COUNTS)):
        if name not in keys:
            raise UserError(f"{path}: {kind}.{name} is missing; transformers would take a number of its own. {INSTEAD}")
    for name in sorted(keys.keys() & {*_COUNTS, *_DENSE_COUNTS, *_SIZES, *(_READ_OF_EXPERTS if has_experts else ())}):
        _check_count(path, kind, keys, name)
    for name, default in ((_EPSILON, None), (_ROPE_BASE, 10_000.0)):
        if not isinstance(value := keys.get(name, default), float):
            raise UserError(f"{path}: {kind}.{name} is {value!r}; a number is wanted. {INSTEAD}")
    neutral = _NEUTRAL | (_LAYOUT if kind == "llama" else {})
    for name in sorted(keys.keys() - _READ - _OF_A_STRETCH - (_READ_OF_EXPERTS if has_experts else set())):
        if name not in neutral or keys[name] != neutral[name]:
            only = (
                f"only {neutral[name]!r}, which has no effect, is read" if name in neutral else "it is not known here"
            )
            raise UserError(
                f"{path}: {kind}.{name} is {keys[name]!r}; {only}: transformers would pass over it. {INSTEAD}"
            )
    _check_rope(path, kind, keys)
    return keys


def _check_rope(path: Path, kind: str, keys: Mapping[str, Any]) -> None:
    """UserError for rotary positions that are stretched, or turn only a part of each head."""
    factor = keys.get("rope.scaling.factor")
    stretch = keys.get("rope.scaling.type", "none" if factor is None else "linear")
    if stretch != "none" and factor != 1:
        raise UserError(
            f"{path}: {kind}.rope.scaling.type is {stretch!r} and its factor {factor}, which transformers does not "
            f"read from a GGUF file: other positions would be computed. {INSTEAD}"
        )
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
    if keys.get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"{path}: {kind}.rope.dimension_count is {keys['rope.dimension_count']}; heads have {head_dim} dimensions, "
            "of which all must turn"
        )


def _check_count(path: Path, kind: str, keys: Mapping[str, Any], name: str) -> None:
    """UserError unless a key is a number of at least 1, the same for every layer."""
    value = keys[name]
    if type(value) is not int or value < 1:
        raise UserError(
            f"{path}: {kind}.{name} is {value!r}; a number of at least 1, for all layers, is wanted. {INSTEAD}"
        )
