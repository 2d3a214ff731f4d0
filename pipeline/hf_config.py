"""config.json of other projects <-> our record, both spellings of keys (transformers 4 and 5) read, the older written.

A setting that changes the function and that we don't compute is refused by name, as is a key that hf_keys.py doesn't
know: it could be such a setting.  Nothing in a config.json is executed: ``auto_map`` is not looked at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dlm_core.models.config import Architecture, ModelConfig, MoE
from pipeline.config import from_json, parse_json, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.hf_keys import (
    ANY_KEYS,
    DTYPE_KEYS,
    FREE_KEYS,
    IN_BLOCKS,
    KEYS,
    MASK_OF,
    MODEL_TYPES,
    REQUIRED,
    ROPE_KEYS,
    SHIFTED,
    Free,
    Is,
    Key,
    Only,
)
from pipeline.hf_names import DITS, Family, check_family
from pipeline.hf_rope import read_rope, their_scaling
from pipeline.scoring import Likelihood
from pipeline.weights import ModelRecord, Origin

AUTOREGRESSIVE: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "qwen3_moe")
CONFIG, GENERATION = "config.json", "generation_config.json"
NAMED_MASK = "config.json names a mask token: taken as a next-token model all the same, as its family is"
"""Notice of a directory that says no more."""
_WRITTEN_BY = "4.57.1"
"""Whose spelling the keys have, for every version that reads them, and not the version that the proof ran.

Without it, and with some later ones, transformers 4.57.2 to 4.57.6 take the tokenizer of a directory with more than
100,000 tokens for one of Mistral's with a wrong regex (tokenization_utils_base.py).
"""
_CLASSES: dict[Family, tuple[str, ...]] = {
    "llama": ("LlamaForCausalLM",),
    "qwen2": ("Qwen2ForCausalLM",),
    "qwen3": ("Qwen3ForCausalLM",),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
    "llada": ("LLaDAModelLM",),
    "dream": ("DreamModel",),
    "llada_moe": ("LLaDAMoEModelLM",),
    "llada2": ("LLaDA2MoeModelLM",),
}
_AUTO_MAPS: dict[Family, dict[str, str]] = {
    "llada": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "dream": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
        "AutoModelForCausalLM": "modeling_dream.DreamModel",
    },
    "llada_moe": {
        "AutoConfig": "configuration_lladamoe.LLaDAMoEConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "llada2": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
}


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning, as far as they are known."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    """The first, where a model has several."""
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    eos_token_ids: list[int] = field(default_factory=list[int])
    """All that generation ends with, where that is not just ``eos_token_id``: the end of a turn too."""


@dataclass(frozen=True)
class Described:
    """What the files of a directory say of the model in it."""

    family: Family
    model: ModelConfig
    seq_len: int
    special: SpecialIds
    objective: Likelihood
    block_size: int = 0
    """Of a block_nelbo."""
    target_offset: Literal[0, 1] = 0
    dtype: str | None = None
    """As in "bfloat16": what the weights were saved in, if it says so."""
    notices: tuple[str, ...] = ()
    within_documents: bool = False
    tokenizer: str = ""
    """Fingerprint of the artifact that the token ids belong to, if it is known."""
    lineage: Sequence[Origin] = ()
    """What is known of the weights before they were written here."""

    def record(self) -> ModelRecord:
        """The record of a model whose weights are just these."""
        return ModelRecord(
            self.model,
            self.seq_len,
            self.objective,
            self.block_size,
            self.target_offset,
            self.within_documents,
            self.tokenizer,
            [*self.lineage],
        )


# Reading


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; CorruptionError if the file holds none, UserError for a key that stands twice in it."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # json's own, and Python's for numbers of thousands of digits
        raise CorruptionError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptionError(f"{path} holds no JSON object")
    return value


def read_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Described:
    """What a config.json says; ``generation`` is generation_config.json, whose token ids fill the gaps.

    Raises UserError, with the key, for a model_type that is not known, a key that is missing or not known, and a value
    that we don't compute.
    """
    family = _family(config)
    ours = _values(family, config)
    ids = _special_ids(family, ours, generation or {})
    ours |= read_rope(family, config, ours["seq_len"])
    architecture = _architecture(family, ours)
    check_family(family, architecture)
    model = from_json(
        ModelConfig,
        {"architecture": to_json(architecture), "vocab_size": _rows(ours), "mask_token_id": ids.mask_token_id},
        where="config.json",
    )
    is_causal = family in AUTOREGRESSIVE
    has_blocks = family in IN_BLOCKS
    notices = [f"read as {family} by this project's own table; no code beside it was looked at"]
    if is_causal and ids.mask_token_id is not None:
        notices.append(NAMED_MASK)
    return Described(
        family,
        model,
        ours["seq_len"],
        ids,
        "autoregressive_nll" if is_causal else "block_nelbo" if has_blocks else "masked_nelbo",
        block_size=ours["block_size"] if has_blocks else 0,
        target_offset=1 if family in SHIFTED else 0,
        dtype=next((str(config[key]).removeprefix("torch.") for key in DTYPE_KEYS if config.get(key)), None),
        notices=tuple(notices),
    )


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if model_type == "llada" and "num_experts" in config:  # as the public repository of LLaDA-MoE has it
        return "llada_moe"
    if model_type == "llada2_moe_veomni":
        raise UserError(
            'config.json: model_type is "llada2_moe_veomni", whose experts are merged; split them into the files of '
            '"llada2_moe" with the tools of that project'
        )
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(f"config.json: model_type is {model_type!r}; known are {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[model_type]


def _values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Ours by name, from every key of the family; UserError for values that we don't compute and keys not known."""
    keys: dict[str, Key] = ANY_KEYS | KEYS[family]
    seconds = {key.other for key in keys.values() if isinstance(key, Is) and key.other}
    known = keys.keys() | seconds | FREE_KEYS | ROPE_KEYS | set(DTYPE_KEYS)
    if unknown := [name for name in sorted(config) if name not in known and config[name] is not None]:
        raise UserError(
            f'config.json: {unknown[0]} is {config[unknown[0]]!r}, a key that is not known for "{family}" and may '
            "change what the model computes; if it has no effect, take it out of a copy of the file"
        )
    ours: dict[str, Any] = {}
    for name, key in keys.items():
        match key:
            case Is():
                ours[key.ours] = _taken(family, config, name, key)
            case Only():
                _check_value(family, config, name, key)
            case Free():
                pass
    return ours


def _taken(family: Family, config: Mapping[str, Any], name: str, key: Is) -> Any:
    names = [spelled for spelled in (name, key.other) if spelled in config]
    if len(names) == 2 and config[names[0]] != config[names[1]]:
        raise UserError(
            f"config.json: {names[0]} is {config[names[0]]!r} and {names[1]} is {config[names[1]]!r}, which are the "
            "same thing; leave one of them out"
        )
    if not names and key.default is REQUIRED:
        raise UserError(f'config.json: {name} is missing; a model of "{family}" cannot be told without it')
    value = config[names[0]] if names else key.default
    _check_kind(name, key, value)
    return value


_LISTS = ("layer_types", "mlp_only_layers", "moe_layer_freq")
_FLAGS = ("tied_head", "moe.renormalise", "qk_norm", "qkv_bias", "adaln", "time_conditioning", "multi_query_attention")
_COUNTED = ("num_layers", "moe.num_experts")
"""Ours, of each of which there are tensors with a name."""
_MOST = 10_000


def _check_kind(name: str, key: Is, value: Any) -> None:
    """UserError for what cannot be reckoned with; ranges are for our own classes to check."""
    wanted = "true or false" if key.ours in _FLAGS else "a number"
    if value is None:
        is_fine = key.default is None or key.ours == "num_kv_heads" or key.ours.endswith("_token_id")
    elif key.ours in _FLAGS:
        is_fine = isinstance(value, bool)
    elif key.ours in _LISTS:
        is_fine, wanted = isinstance(value, list), "a list"
    elif key.ours == "init_fn":
        is_fine, wanted = isinstance(value, str), "a name"
    elif key.ours.endswith("_token_id"):
        is_fine, wanted = isinstance(value, int | list), "a token id"
    else:
        is_fine = isinstance(value, int | float)
    if not is_fine:
        raise UserError(f"config.json: {name} is {value!r}; {wanted} is wanted")
    if key.ours in _COUNTED and value is not None and value > _MOST:
        raise UserError(f"config.json: {name} is {value}; at most {_MOST:,} is computed here")


def _check_value(family: Family, config: Mapping[str, Any], name: str, key: Only) -> None:
    default = key.value if key.default is REQUIRED else key.default
    value = config.get(name, default)
    if not any(_is_same(value, allowed) for allowed in (key.value, *key.same)):
        said = f"is {value!r}" if name in config else f"is missing, which means {value!r} there"
        raise UserError(f'config.json: {name} {said}; of "{family}" only {key.value!r} is computed here')


def _is_same(one: Any, other: Any) -> bool:
    """Equal, where false is not 0 but 1.0 is 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _rows(ours: Mapping[str, Any]) -> Any:
    """Rows of the embedding."""
    rows = ours.get("embedding_size")
    if rows is not None and rows < ours["vocab_size"]:
        raise UserError(
            f"config.json: embedding_size is {rows}, fewer than vocab_size {ours['vocab_size']}; it must not be smaller"
        )
    return ours["vocab_size"] if rows is None else rows


def _special_ids(family: Family, ours: Mapping[str, Any], generation: Mapping[str, Any]) -> SpecialIds:
    def first(name: str) -> Any:
        value = generation.get(name) if ours[name] is None else ours[name]
        value = next(iter(value), None) if isinstance(value, list) else value
        return None if isinstance(value, int) and value < 0 else value  # -1: there is none

    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    ids: dict[str, Any] = {name: first(name) for name in names}
    ends = ours["eos_token_id"] if generation.get("eos_token_id") is None else generation["eos_token_id"]
    ends = ends if isinstance(ends, list) else [None if ends == -1 else ends]
    ids["eos_token_ids"] = [] if ends in ([], [None], [ids["eos_token_id"]]) else ends
    if ids["mask_token_id"] is None and family in DITS:
        ids["mask_token_id"] = ours["vocab_size"] - 1  # behind the words of GPT-2
    if ids["mask_token_id"] is None and MASK_OF.get(family, math.inf) < ours["vocab_size"]:
        ids["mask_token_id"] = MASK_OF[family]
    if ids["mask_token_id"] is None and family not in AUTOREGRESSIVE:
        raise UserError(
            f'config.json: mask_token_id is missing; "{family}" is a diffusion model, so write the id of its mask '
            "token into a copy of the file"
        )
    return from_json(SpecialIds, ids, where="config.json")


def _architecture(family: Family, ours: Mapping[str, Any]) -> Architecture:
    """The architecture; UserError for sizes that don't fit."""
    if any(kind != "full_attention" for kind in ours["layer_types"] or ()):
        raise UserError(
            f'config.json: layer_types is {ours["layer_types"]!r}; only "full_attention" everywhere is computed here'
        )
    values = {name: ours[name] for name in ("d_model", "num_layers", "num_heads", "rope_base", "rope_scaling")}
    values |= {"rope_fraction": ours["rope_fraction"]}
    if family in DITS:
        return from_json(Architecture, values | _dit_values(ours), where="config.json")
    kv_heads, head_dim = ours["num_kv_heads"] or None, ours.get("head_dim") or None
    d_ff = ours["d_ff"]
    if family == "llada":
        d_ff = ours["mlp_ratio"] * ours["d_model"] if d_ff is None else d_ff
        kv_heads = 1 if kv_heads is None and ours["multi_query_attention"] else kv_heads
    moe = _moe(family, ours)
    is_dense = moe is None or any(not moe.is_sparse(layer) for layer in range(ours["num_layers"]))
    draws_normal = ours.get("init_fn") != "mitchell"
    values |= {
        "num_kv_heads": None if kv_heads == ours["num_heads"] else kv_heads,
        "head_dim": None if head_dim and head_dim * ours["num_heads"] == ours["d_model"] else head_dim,
        "d_ff": d_ff if is_dense else None,
        "moe": to_json(moe) if moe else None,
        "norm_eps": ours["norm_eps"],
        "qkv_bias": family in ("qwen2", "dream") or ours.get("qkv_bias", False),
        "qk_norm": family in ("qwen3", "qwen3_moe", "llada2") or bool(ours.get("qk_norm")),
        "tied_head": ours.get("tied_head", False),
        "init": "normal" if draws_normal else "mitchell",
        "init_std": ours["initializer_range"] if draws_normal else None,
    }
    architecture = from_json(Architecture, values, where="config.json")
    if ours.get("rotary_dim") not in (None, architecture.rotary_dim):
        raise UserError(
            f"config.json: rotary_dim is {ours['rotary_dim']}; partial_rotary_factor makes it {architecture.rotary_dim}"
        )
    return architecture


def _dit_values(ours: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of MDLM and BD3-LM leaves to its model file."""
    return {
        "d_ff": 4 * ours["d_model"],
        "norm": "layer",
        "norm_eps": 1e-5,
        "activation": "gelu",
        "cond_dim": ours["cond_dim"] if ours.get("adaln", True) else None,
        "time_conditioning": ours.get("time_conditioning", False),
        "tied_head": False,
        "head_bias": True,
        "init": "mdlm",
        "init_std": None,
    }


def _moe(family: Family, ours: Mapping[str, Any]) -> MoE | None:
    fields = {name.removeprefix("moe."): value for name, value in ours.items() if name.startswith("moe.")}
    if not fields:
        return None
    layers = range(ours["num_layers"])
    if family == "qwen3_moe":
        dense, step = ours["mlp_only_layers"] or [], ours["decoder_sparse_step"]
        if step < 1:
            raise UserError(f"config.json: decoder_sparse_step is {step}; it must be at least 1")
        fields |= _places([layer not in dense and (layer + 1) % step == 0 for layer in layers], "mlp_only_layers")
    if family == "llada_moe":
        frequency = ours["moe_layer_freq"]
        if len(frequency) != len(layers):
            raise UserError(f"config.json: moe_layer_freq has {len(frequency)} entries for {len(layers)} layers")
        shared, width = ours["d_ff_shared"] or 0, fields["d_ff_expert"]
        if shared % width:
            raise UserError(
                f"config.json: shared_expert_intermediate_size is {shared}; only multiples of "
                f"expert_intermediate_size {width} are computed here"
            )
        fields |= _places([bool(kind) for kind in frequency], "moe_layer_freq")
        fields |= {"renormalise": False, "num_shared_experts": shared // width}
    if family == "llada2":
        fields |= {"router_score": "sigmoid", "selection_bias": True, "renormalise": fields["top_k"] > 1}
        fields["num_shared_experts"] = fields["num_shared_experts"] or 0
        if fields["num_groups"] == fields["top_groups"]:  # all groups: no limit
            fields |= {"num_groups": 1, "top_groups": 1}
    return from_json(MoE, fields, where="config.json")


def _places(sparse: Sequence[bool], name: str) -> dict[str, int]:
    """first_k_dense and layer_frequency that put experts into just these layers."""
    found = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
    if not found:
        raise UserError(f"config.json: {name} leaves no layer with experts; it is the dense family then")
    first = found[0]
    step = found[1] - first if len(found) > 1 else max(1, len(sparse) - first)
    if found != list(range(first, len(sparse), step)):
        raise UserError(
            f"config.json: {name} puts experts into the layers {found}; only every n-th layer from a first one on is "
            "computed here"
        )
    return {"first_k_dense": first, "layer_frequency": step}


# Writing


def write_config(family: Family, record: ModelRecord, special: SpecialIds, dtype: str = "float32") -> dict[str, Any]:
    """A config.json with every key of the family, in the spelling that transformers 4 and 5 read.

    Raises UserError where the family cannot say what the model is: its architecture, its mask token, its offset.
    """
    if family in DITS:
        raise UserError(f'"{family}" is read here and not written; write one of {", ".join(_CLASSES)}')
    a = record.model.architecture
    check_family(family, a)
    _check_record(family, record)
    ours = _own_values(family, record, special)
    config: dict[str, Any] = {"architectures": list(_CLASSES[family])}
    if family in _AUTO_MAPS:
        config["auto_map"] = dict(_AUTO_MAPS[family])
    config["model_type"] = next(name for name, known in MODEL_TYPES.items() if known == family)
    for name, key in sorted(KEYS[family].items()):
        config[name] = ours[key.ours] if isinstance(key, Is) else key.value
    config |= {"rope_theta": a.rope_base, "torch_dtype": dtype, "transformers_version": _WRITTEN_BY}
    if family in ("llada_moe", "llada2"):
        config["partial_rotary_factor"] = a.rope_fraction
    if family != "llada":
        config["rope_scaling"] = None if a.rope_scaling is None else their_scaling(a.rope_scaling)
    return config


def write_generation_config(special: SpecialIds) -> dict[str, Any]:
    """A generation_config.json with the ids that are known; Dream doesn't load without the file."""
    ids = {name: value for name, value in to_json(special).items() if value is not None}
    several = ids.pop("eos_token_ids")
    ids |= {"eos_token_id": several} if several else {}
    return {"_from_model_config": True, **ids, "transformers_version": _WRITTEN_BY}


def _check_record(family: Family, record: ModelRecord) -> None:
    if family in AUTOREGRESSIVE:
        return
    if record.model.mask_token_id is None:
        raise UserError(
            f'mask_token_id is None; "{family}" is a diffusion model. Initialise one from these weights (ar_init), or '
            f"write one of {', '.join(AUTOREGRESSIVE)}"
        )
    wanted = int(family in SHIFTED)
    if record.target_offset != wanted:
        other = "llada" if wanted else "dream"
        raise UserError(
            f'target_offset is {record.target_offset}; "{family}" reads its predictions at offset {wanted} and would '
            f'give garbage. Write "{other}" if its architecture fits, or train with the other offset'
        )


def _own_values(family: Family, record: ModelRecord, special: SpecialIds) -> dict[str, Any]:
    """Every name that the keys of the family are made of."""
    a = record.model.architecture
    moe, sparse = a.moe, [a.is_sparse(layer) for layer in range(a.num_layers)]
    ours: dict[str, Any] = to_json(a) | to_json(replace(special, mask_token_id=record.model.mask_token_id))
    ours |= {
        "vocab_size": record.model.vocab_size,
        "embedding_size": record.model.vocab_size,
        "seq_len": record.seq_len,
        "block_size": record.block_size or record.seq_len,  # one block of all positions: everyone sees everyone
        "num_kv_heads": a.kv_heads,
        "head_dim": a.head_size,
        "rotary_dim": a.rotary_dim,
        "initializer_range": a.init_std or 0.02,
        "init_fn": "mitchell" if a.init == "mitchell" else "normal",
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "layer_types": ["full_attention"] * a.num_layers,
    }
    if moe is not None:
        ours |= {f"moe.{name}": value for name, value in to_json(moe).items()}
        ours["moe.num_shared_experts"] = moe.num_shared_experts or None  # a 0 would make matrices without rows
        shared = moe.num_shared_experts * moe.d_ff_expert
        ours |= {
            "d_ff": a.d_ff or moe.d_ff_expert,  # without dense layers a size that no tensor has
            "d_ff_shared": shared or None,
            "moe.num_shared_experts": moe.num_shared_experts or None,  # of 0 experts their class would make tensors too
            "moe_layer_freq": [int(is_sparse) for is_sparse in sparse],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, is_sparse in enumerate(sparse) if not is_sparse],
        }
    return ours
