"""The one table of other projects' config.json: what every key of every family is to us.

What lives here: keys, the value that a family's own class takes where a key is absent, and which values we compute.
What must not: how they are read and written (hf_config.py), tensors (hf_names.py).

Sources: the configuration classes of transformers 4.57 and 5, and the public model files of LLaDA, LLaDA-MoE, LLaDA2,
Dream, MDLM and BD3-LM.
"""

from dataclasses import dataclass
from typing import Any, Final

from pipeline.hf_names import Family

REQUIRED: Final = object()


@dataclass(frozen=True)
class Is:
    """A key that is a field of ours."""

    ours: str
    """Field of the architecture, or one of the names that hf_config.py makes of and into it."""
    default: Any = REQUIRED
    """What their class takes where the key is absent."""
    other: str = ""
    """A second spelling, read and never written."""


@dataclass(frozen=True)
class Only:
    """A key that changes the function, and the one value of it that we compute, which is written."""

    value: Any
    same: tuple[Any, ...] = ()
    """Other values that mean the same."""
    default: Any = REQUIRED
    """What their class takes where the key is absent, if that is not ``value``."""


@dataclass(frozen=True)
class Free:
    """A key that changes nothing of the function; this value is written."""

    value: Any = None


Key = Is | Only | Free

MODEL_TYPES: dict[str, Family] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "llada": "llada",
    "Dream": "dream",
    "lladamoe": "llada_moe",
    "llada2_moe": "llada2",
    "mdlm": "mdlm",
    "bd3lm": "bd3lm",
}
"""By model_type; a "llada" with experts is "llada_moe", as hf_config.py knows."""

_FREE_WORDS = """
    architectures _attn_implementation attn_implementation _attn_implementation_autoset auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cls_token_id _commit_hash custom_pipelines decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id _from_model_config id2label is_decoder is_encoder_decoder
    is_llama_config label2id length_penalty max_length min_length model_max_length _model_name_or_path model_type
    _name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torchscript transformers.js_config transformers_version typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
FREE_KEYS = frozenset(_FREE_WORDS.split())
"""Keys of any family without effect on the function: how text was generated, what a file was written by, labels."""

ROPE_KEYS = frozenset(("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"))
DTYPE_KEYS = ("dtype", "torch_dtype")

_ANY: dict[str, Key] = {
    "add_cross_attention": Only(False),
    "cross_attention_hidden_size": Only(None),
    "layer_types": Is("layer_types", None),
    "num_nextn_predict_layers": Only(0, same=(None,)),
    "pruned_heads": Only({}, same=(None,)),
    "quantization_config": Only(None),
    "rope_interleaved": Only(False),
    "tie_encoder_decoder": Only(False),
    "use_mrope": Only(False),
    "use_sliding_window": Only(False),
}
"""Read wherever they stand, and never written."""

_IDS: dict[str, Key] = {
    "bos_token_id": Is("bos_token_id", None),
    "eos_token_id": Is("eos_token_id", None),
    "pad_token_id": Is("pad_token_id", None),
    "mask_token_id": Is("mask_token_id", None),
}
_TRUNK: dict[str, Key] = {
    "vocab_size": Is("vocab_size"),
    "hidden_size": Is("d_model"),
    "num_hidden_layers": Is("num_layers"),
    "num_attention_heads": Is("num_heads"),
    "hidden_act": Only("silu"),
    "rms_norm_eps": Is("norm_eps", 1e-6),
    "initializer_range": Is("initializer_range", 0.02),
    "tie_word_embeddings": Is("tied_head", False),
    "attention_dropout": Free(0.0),
    "use_cache": Free(False),
}
"""What all families share that are spelled like Llama."""

_WINDOW: dict[str, Key] = {
    "use_sliding_window": Only(False),
    "sliding_window": Free(None),
    "max_window_layers": Free(28),
}
"""A window that is off: its size is then without effect."""
_LAYER_TYPES: dict[str, Key] = {"layer_types": Is("layer_types", None)}

_LLAMA: dict[str, Key] = {
    **_TRUNK,
    **_IDS,
    "intermediate_size": Is("d_ff"),
    "num_key_value_heads": Is("num_kv_heads", None),
    "head_dim": Is("head_dim", None),
    "max_position_embeddings": Is("seq_len", 2048),
    "bos_token_id": Is("bos_token_id", 1),
    "eos_token_id": Is("eos_token_id", 2),
    "attention_bias": Only(False),
    "mlp_bias": Only(False),
    "pretraining_tp": Free(1),
}
_QWEN2: dict[str, Key] = {
    **_TRUNK,
    **_IDS,
    **_WINDOW,
    **_LAYER_TYPES,
    "intermediate_size": Is("d_ff"),
    "num_key_value_heads": Is("num_kv_heads", 32),
    "head_dim": Is("head_dim", None),
    "max_position_embeddings": Is("seq_len", 32_768),
}
_QWEN3: dict[str, Key] = {**_QWEN2, "head_dim": Is("head_dim", 128), "attention_bias": Only(False)}
_QWEN3_MOE: dict[str, Key] = {
    **_QWEN2,
    "num_key_value_heads": Is("num_kv_heads", 4),
    "attention_bias": Only(False),
    "moe_intermediate_size": Is("moe.d_ff_expert", 768),
    "num_experts": Is("moe.num_experts", 128, other="num_local_experts"),
    "num_experts_per_tok": Is("moe.top_k", 8),
    "norm_topk_prob": Is("moe.renormalise", False),
    "decoder_sparse_step": Is("decoder_sparse_step", 1),
    "mlp_only_layers": Is("mlp_only_layers", None),
    "output_router_logits": Free(False),
    "router_aux_loss_coef": Free(0.001),
}
_DREAM: dict[str, Key] = {
    **_TRUNK,
    **_IDS,
    **_WINDOW,
    "intermediate_size": Is("d_ff"),
    "num_key_value_heads": Is("num_kv_heads", 32),
    "max_position_embeddings": Is("seq_len", 32_768),
    "mask_token_id": Is("mask_token_id", 151_666),
    "pad_token_id": Is("pad_token_id", 151_643),
    "tie_word_embeddings": Only(False),
}
_LLADA: dict[str, Key] = {
    "activation_type": Only("silu", default="swiglu"),
    "alibi": Only(False),
    "alibi_bias_max": Free(8.0),
    "attention_dropout": Free(0.0),
    "attention_layer_norm": Only(False),
    "attention_layer_norm_with_affine": Free(True),
    "bias_for_layer_norm": Only(False, same=(None,)),
    "block_group_size": Only(1),
    "block_type": Only("llama", default="sequential"),
    "bos_token_id": Is("bos_token_id", None),
    "d_model": Is("d_model", 768),
    "embedding_dropout": Free(0.0),
    "embedding_size": Is("embedding_size", 50_304),
    "eos_token_id": Is("eos_token_id", None),
    "flash_attention": Free(False),
    "include_bias": Only(False),
    "include_qkv_bias": Is("qkv_bias", False),
    "init_cutoff_factor": Free(None),
    "init_device": Free("meta"),
    "init_fn": Is("init_fn", "normal"),
    "init_std": Is("initializer_range", 0.02),
    "input_emb_norm": Only(False),
    "layer_norm_type": Only("rms", default="default"),
    "layer_norm_with_affine": Only(True),
    "mask_token_id": Is("mask_token_id", None),
    "max_sequence_length": Is("seq_len", 1024),
    "mlp_hidden_size": Is("d_ff", None),
    "mlp_ratio": Is("mlp_ratio", 4),
    "multi_query_attention": Is("multi_query_attention", None),
    "n_heads": Is("num_heads", 12),
    "n_kv_heads": Is("num_kv_heads", None),
    "n_layers": Is("num_layers", 12),
    "pad_token_id": Is("pad_token_id", None),
    "precision": Free("amp_bf16"),
    "residual_dropout": Free(0.0),
    "rms_norm_eps": Is("norm_eps", 1e-5),
    "rope": Only(True, default=False),
    "rope_full_precision": Free(True),
    "scale_logits": Only(False),
    "tie_word_embeddings": Free(False),
    "use_cache": Free(False),
    "vocab_size": Is("vocab_size", 50_257),
    "weight_tying": Is("tied_head", True),
}
_LLADA_MOE: dict[str, Key] = {
    **_TRUNK,
    **_IDS,
    "attention_bias": Only(False),
    "clip_qkv": Only(None),
    "dense_intermediate_size": Is("d_ff"),
    "expert_intermediate_size": Is("moe.d_ff_expert"),
    "max_position_embeddings": Is("seq_len", 4096),
    "moe_layer_freq": Is("moe_layer_freq"),
    "moe_router_enable_expert_bias": Only(False, same=(None,)),
    "moe_router_score_function": Only("softmax", default=None),
    "norm_topk_prob": Only(None, same=(False,)),
    "num_experts": Is("moe.num_experts"),
    "num_experts_per_tok": Is("moe.top_k"),
    "num_key_value_heads": Is("num_kv_heads", None),
    "output_router_logits": Free(False),
    "qk_layernorm": Is("qk_norm", False),
    "rms_norm_eps": Is("norm_eps", 1e-5),
    "routed_scaling_factor": Only(1),
    "router_aux_loss_coef": Free(0.01),
    "router_num_group": Only(None),
    "router_topk_group": Only(None),
    "shared_expert_intermediate_size": Is("d_ff_shared", None),
    "tie_word_embeddings": Only(False),
}
_LLADA2: dict[str, Key] = {
    **_TRUNK,
    **_IDS,
    **_WINDOW,
    "block_size": Is("block_size", 32),
    "embedding_dropout": Free(0.0),
    "first_k_dense_replace": Is("moe.first_k_dense", 0),
    "head_dim": Is("head_dim", None),
    "intermediate_size": Is("d_ff", None),
    "max_position_embeddings": Is("seq_len", 16_384),
    "moe_intermediate_size": Is("moe.d_ff_expert"),
    "moe_router_enable_expert_bias": Only(True),
    "n_group": Is("moe.num_groups", 8),
    "norm_head": Only(False),
    "norm_softmax": Only(False),
    "norm_topk_prob": Only(True),
    "num_experts": Is("moe.num_experts", 16),
    "num_experts_per_tok": Is("moe.top_k", 2),
    "num_key_value_heads": Is("num_kv_heads", 0),
    "num_shared_experts": Is("moe.num_shared_experts", None),
    "output_dropout": Free(0.0),
    "output_router_logits": Free(False),
    "rms_norm_eps": Is("norm_eps", 1e-5),
    "rotary_dim": Is("rotary_dim", None),
    "routed_scaling_factor": Is("moe.routed_scale", 2.5),
    "router_dtype": Only("fp32"),
    "score_function": Only("sigmoid"),
    "tie_word_embeddings": Only(False),
    "topk_group": Is("moe.top_groups", 4),
    "use_bias": Only(False, default=True),
    "use_qk_norm": Only(True),
    "use_qkv_bias": Is("qkv_bias", False),
    "use_rmsnorm": Only(True),
    "using_split_qkv_in_self_attention": Only(False),
}
_MDLM: dict[str, Key] = {
    **_IDS,
    "vocab_size": Is("vocab_size", 50_258),
    "model_length": Is("seq_len", 1024),
    "hidden_dim": Is("d_model", 768),
    "cond_dim": Is("cond_dim", 129),
    "n_blocks": Is("num_layers", 12),
    "n_heads": Is("num_heads", 12),
    "dropout": Free(0.1),
    "time_conditioning": Is("time_conditioning", False),
}
_BD3LM: dict[str, Key] = {
    **_MDLM,
    "adaln": Is("adaln", True),
    "attn_backend": Free("sdpa"),
    "block_size": Is("block_size", 1),
    "causal": Only(False),
    "cross_attn": Only(True),
    "sampling_eps_max": Free(0.999),
    "sampling_eps_min": Free(1e-3),
    "time_conditioning": Only(False),  # theirs is the mean of a row's levels, ours one a block
    "var_min": Free(True),
}

KEYS: dict[Family, dict[str, Key]] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "llada": _LLADA,
    "dream": _DREAM,
    "llada_moe": _LLADA_MOE,
    "llada2": _LLADA2,
    "mdlm": _MDLM,
    "bd3lm": _BD3LM,
}
"""Every key of a family, without those that all may have (ANY_KEYS, FREE_KEYS, ROPE_KEYS, DTYPE_KEYS)."""
ANY_KEYS = _ANY

MASK_OF: dict[Family, int] = {"llada_moe": 156_895, "llada2": 156_895}
"""Mask token of the published vocabularies of families whose config.json doesn't name it."""
SHIFTED: tuple[Family, ...] = ("dream",)
"""Diffusion families that read token l at position l - 1."""
IN_BLOCKS: tuple[Family, ...] = ("llada2", "bd3lm")
"""Families whose blocks of positions see themselves and those before them."""
