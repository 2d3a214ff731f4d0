"""The one table of other projects' parameter names, and what a packed tensor of ours is made of.

What lives here: names and how tensors are cut.  What must not: files, configurations, vocabularies.

Names are those on disk: one tensor an expert and a projection, as every version of transformers writes them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from dlm_core.models.config import Architecture, MoE
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "llada", "dream", "llada_moe", "llada2", "mdlm", "bd3lm"]
FAMILIES: tuple[Family, ...] = get_args(Family)
DITS: tuple[Family, ...] = ("mdlm", "bd3lm")
"""Families around a DiT; the others are spelled like Llama."""


@dataclass(frozen=True)
class Packed:
    """One tensor of ours and the rows of theirs that it is made of, in order."""

    ours: str
    """Empty where theirs are zeros."""
    theirs: tuple[str, ...]
    num_rows: tuple[int, ...] = ()
    """Rows of each of theirs, where they are joined; their sizes, where they are zeros."""
    num_experts: int = 0
    """Experts stacked in front, whose number stands for {e} in their names; 0 for a plain matrix."""
    role: Literal["same", "copy", "zeros"] = "same"
    """``copy``: theirs hold once more what other tensors of theirs hold as ``ours``; ``zeros``: ours has no such
    tensor, and theirs is a vector of zeros.  Both are written out, and compared, not kept, when they are read."""
    stays_float32: bool = False
    """Whether files of a lower precision hold it in float32 too."""

    def names(self, expert: int) -> tuple[str, ...]:
        """Theirs of one expert, or of a plain matrix."""
        return tuple(name.format(e=expert) for name in self.theirs)


# What a family can hold

_EVERYWHERE = {"norm": "rms", "activation": "swiglu", "cond_dim": None, "head_bias": False}
_IN_DITS = {
    "norm": "layer",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "head_bias": True,
    "tied_head": False,
    "qkv_bias": False,
    "qk_norm": False,
    "rope_base": 10_000.0,
    "rope_fraction": 1.0,
    "rope_scaling": None,
}
_FIXED: dict[Family, dict[str, object]] = {
    "llama": {"qkv_bias": False, "qk_norm": False, "rope_fraction": 1.0},
    "qwen2": {"qkv_bias": True, "qk_norm": False, "rope_fraction": 1.0},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "rope_fraction": 1.0},
    "qwen3_moe": {"qkv_bias": False, "qk_norm": True, "rope_fraction": 1.0},
    "llada": {"qk_norm": False, "rope_fraction": 1.0, "rope_scaling": None},
    "dream": {"qk_norm": False, "rope_fraction": 1.0},
    "llada_moe": {"qkv_bias": False, "rope_fraction": 1.0},
    "llada2": {"qk_norm": True},
    "mdlm": {},
    "bd3lm": {"time_conditioning": False},
}
"""Fields of Architecture with a single value in a family; head_dim and moe are checked by themselves."""
_SOFTMAX: dict[str, object] = {
    "num_shared_experts": 0,
    "router_score": "softmax",
    "num_groups": 1,
    "selection_bias": False,
    "routed_scale": 1.0,
}
_FIXED_MOE: dict[Family, dict[str, object]] = {
    "qwen3_moe": _SOFTMAX,
    "llada_moe": {name: _SOFTMAX[name] for name in _SOFTMAX if name != "num_shared_experts"} | {"renormalise": False},
    "llada2": {"router_score": "sigmoid", "layer_frequency": 1},
}
"""The same for MoE; a family that is not here has no experts."""
_WHY: dict[tuple[Family, str], str] = {
    ("llada", "qk_norm"): "its q_norm and k_norm span all heads at once; qwen3 has one for a head",
    ("llada", "rope_scaling"): "its configuration knows rope_theta alone",
    ("dream", "qk_norm"): "qwen3 has it",
    ("llada_moe", "moe.renormalise"): "its code never divides the chosen scores by their sum",
    ("llada_moe", "moe.selection_bias"): "its code leaves the bias in the weights of the experts, ours takes it out",
    ("bd3lm", "time_conditioning"): "it is told the mean level of a row, ours that of each block",
}
_WHOLE_HEADS = ("qwen2", "llada", "dream", "llada_moe", *DITS)
"""Families without a field for the size of a head."""


def check_family(family: Family, a: Architecture) -> None:
    """UserError unless the family is known and can hold this architecture, naming the first field in the way."""
    if family not in FAMILIES:
        raise UserError(f'the family is "{family}"; it must be one of {", ".join(FAMILIES)}')
    for name, wanted in {**(_IN_DITS if family in DITS else _EVERYWHERE), **_FIXED[family]}.items():
        _check(family, name, getattr(a, name), wanted)
    if family in _WHOLE_HEADS and a.head_size * a.num_heads != a.d_model:
        raise UserError(
            f'architecture.head_dim is {a.head_dim}; "{family}" has d_model / num_heads = '
            f"{a.d_model / a.num_heads:g} and nothing else"
        )
    has_experts = family in _FIXED_MOE
    if (a.moe is not None) != has_experts:
        raise UserError(f'architecture.moe is {a.moe}; "{family}" has {"experts" if has_experts else "none"}')
    if family in DITS:
        _check(family, "num_kv_heads", a.kv_heads, a.num_heads)
        _check(family, "d_ff", a.d_ff, 4 * a.d_model)
        if family == "mdlm" and a.cond_dim is None:
            raise UserError('architecture.cond_dim is None; "mdlm" always has a conditioning vector')
    if a.moe is None:
        return
    for name, wanted in _FIXED_MOE[family].items():
        _check(family, f"moe.{name}", getattr(a.moe, name), wanted)
    if family == "llada2" and a.moe.renormalise != (a.moe.top_k > 1):
        raise UserError(
            f'architecture.moe.renormalise is {a.moe.renormalise}; "llada2" divides the chosen scores by their '
            f"sum where top_k is above 1, and here it is {a.moe.top_k}"
        )


def _check(family: Family, name: str, found: object, wanted: object) -> None:
    if found != wanted:
        why = f": {_WHY[family, name]}" if (family, name) in _WHY else ""
        raise UserError(f'architecture.{name} is {found!r}; "{family}" has {wanted!r} and nothing else{why}')


# Names


@dataclass(frozen=True)
class _Names:
    """What a family calls its tensors; those of a layer without what ``layer`` says.  The defaults are Llama's."""

    layer: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    attention_norm: str = "input_layernorm.weight"
    feed_forward_norm: str = "post_attention_layernorm.weight"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Queries, keys and values, or one name where they are packed as ours are."""
    qk_norms: tuple[str, str] = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    out: str = "self_attn.o_proj.weight"
    dense: str = "mlp."
    gate_up_down: tuple[str, str, str] = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    """Of a dense network, an expert and the shared experts, each behind its own prefix."""
    shared: str = "mlp.shared_experts."
    selection_bias: str = ""
    """Empty where there never is one; elsewhere it is zeros if ours has none."""
    has_biases: bool = False
    """Whether queries, keys and values always have them."""
    has_head: bool = False
    """Whether a head that is the embedding is written out."""


_LLAMA = _Names()
_NAMES: dict[Family, _Names] = {
    **dict.fromkeys(FAMILIES, _LLAMA),
    "llada": _Names(
        layer="model.transformer.blocks.{}.",
        embedding="model.transformer.wte.weight",
        norm="model.transformer.ln_f.weight",
        head="model.transformer.ff_out.weight",
        attention_norm="attn_norm.weight",
        feed_forward_norm="ff_norm.weight",
        qkv=("q_proj", "k_proj", "v_proj"),
        out="attn_out.weight",
        dense="",
        gate_up_down=("ff_proj.weight", "up_proj.weight", "ff_out.weight"),
    ),
    "dream": replace(_LLAMA, has_biases=True, has_head=True),
    "llada_moe": replace(_LLAMA, shared="shared_expert.", has_head=True),
    "llada2": replace(
        _LLAMA,
        embedding="model.word_embeddings.weight",
        qkv=("attention.query_key_value",),
        qk_norms=("attention.query_layernorm.weight", "attention.key_layernorm.weight"),
        out="attention.dense.weight",
        selection_bias="mlp.gate.expert_bias",
        has_head=True,
    ),
}


def packed_tensors(family: Family, a: Architecture) -> Iterator[Packed]:
    """Every tensor of a model, with the tensors of the family that it is made of; and what the family adds to them.

    A ``copy`` comes after the tensor that it repeats.  Raises UserError where the family cannot hold the architecture.
    """
    check_family(family, a)
    if family in DITS:
        yield from _dit(a)
        return
    names = _NAMES[family]
    yield _same("embedding.weight", names.embedding)
    for layer in range(a.num_layers):
        ours, theirs = f"blocks.{layer}.", names.layer.format(layer)
        yield from _attention(a, names, ours, theirs)
        if a.moe is not None and a.is_sparse(layer):
            yield from _experts(a, a.moe, names, ours + "feed_forward.", theirs)
        else:
            yield from _gated(names, ours + "feed_forward.", theirs + names.dense, a.d_ff or 0)
    yield _same("norm.weight", names.norm)
    if not a.tied_head:
        yield _same("head.weight", names.head)
    elif names.has_head:
        yield Packed("embedding.weight", (names.head,), role="copy")


def _same(ours: str, theirs: str) -> Packed:
    return Packed(ours, (theirs,))


_BOTH = (".weight", ".bias")
_DIT = {"embedding.weight": "vocab_embed.embedding", "norm.weight": "output_layer.norm_final.weight"} | {
    f"head{kind}": f"output_layer.linear{kind}" for kind in _BOTH
}
_DIT_CONDITION = {
    f"{ours}{kind}": f"{theirs}{kind}"
    for ours, theirs in (
        ("conditioning.up", "sigma_map.mlp.0"),
        ("conditioning.out", "sigma_map.mlp.2"),
        ("modulation", "output_layer.adaLN_modulation"),
    )
    for kind in _BOTH
}
_DIT_LAYER = {
    "attention_norm.weight": "norm1.weight",
    "attention.qkv.weight": "attn_qkv.weight",
    "attention.out.weight": "attn_out.weight",
    "feed_forward_norm.weight": "norm2.weight",
    "feed_forward.up.weight": "mlp.0.weight",
    "feed_forward.up.bias": "mlp.0.bias",
    "feed_forward.down.weight": "mlp.2.weight",
    "feed_forward.down.bias": "mlp.2.bias",
}
_DIT_LAYER_CONDITION = {f"modulation{kind}": f"adaLN_modulation{kind}" for kind in _BOTH}


def _dit(a: Architecture) -> Iterator[Packed]:
    """The DiT of MDLM and BD3-LM: one to one, queries, keys and values packed in the same order."""
    has_condition = a.cond_dim is not None
    for ours, theirs in (_DIT | (_DIT_CONDITION if has_condition else {})).items():
        yield _same(ours, f"backbone.{theirs}")
    for layer in range(a.num_layers):
        for ours, theirs in (_DIT_LAYER | (_DIT_LAYER_CONDITION if has_condition else {})).items():
            yield _same(f"blocks.{layer}.{ours}", f"backbone.blocks.{layer}.{theirs}")


def _attention(a: Architecture, names: _Names, ours: str, theirs: str) -> Iterator[Packed]:
    """Attention and both norms of a layer."""
    q, kv = a.num_heads * a.head_size, a.kv_heads * a.head_size
    num_rows = (q, kv, kv) if len(names.qkv) > 1 else (q + 2 * kv,)
    yield Packed(f"{ours}attention.qkv.weight", tuple(f"{theirs}{part}.weight" for part in names.qkv), num_rows)
    biases = tuple(f"{theirs}{part}.bias" for part in names.qkv)
    if a.qkv_bias:
        yield Packed(f"{ours}attention.qkv.bias", biases, num_rows)
    elif names.has_biases:
        yield Packed("", biases, num_rows, role="zeros")
    yield _same(f"{ours}attention.out.weight", theirs + names.out)
    for part, norm in zip(("q_norm", "k_norm"), names.qk_norms, strict=True) if a.qk_norm else ():
        yield _same(f"{ours}attention.{part}.weight", theirs + norm)
    yield _same(f"{ours}attention_norm.weight", theirs + names.attention_norm)
    yield _same(f"{ours}feed_forward_norm.weight", theirs + names.feed_forward_norm)


def _gated(names: _Names, ours: str, theirs: str, d_ff: int) -> Iterator[Packed]:
    """A dense network, or the shared experts, which are one."""
    gate, up, down = (theirs + part for part in names.gate_up_down)
    yield Packed(f"{ours}gate_up.weight", (gate, up), (d_ff, d_ff))
    yield _same(f"{ours}down.weight", down)


def _experts(a: Architecture, moe: MoE, names: _Names, ours: str, theirs: str) -> Iterator[Packed]:
    """Router, experts and shared experts of a layer."""
    gate, up, down = (f"{theirs}mlp.experts.{{e}}.{part}" for part in names.gate_up_down)
    yield _same(f"{ours}gate.weight", f"{theirs}mlp.gate.weight")
    if names.selection_bias:
        bias, sizes = (theirs + names.selection_bias,), (moe.num_experts,)
        if moe.selection_bias:
            yield Packed(f"{ours}gate.e_score_correction_bias", bias, sizes, stays_float32=True)
        else:
            yield Packed("", bias, sizes, role="zeros", stays_float32=True)
    widths = (moe.d_ff_expert, moe.d_ff_expert)
    yield Packed(f"{ours}experts.gate_up_proj", (gate, up), widths, moe.num_experts)
    yield Packed(f"{ours}experts.down_proj", (down,), (a.d_model,), moe.num_experts)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.d_ff_expert
        yield from _gated(names, f"{ours}shared_experts.", theirs + names.shared, width)


# Tensors


def to_family(family: Family, a: Architecture, ours: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Their tensors from ours, bit for bit: views, no copies; and zeros where they have a tensor that ours has not.

    Raises UserError where the family cannot hold the architecture, or a tensor is missing.
    """
    import torch

    theirs: dict[str, Tensor] = {}
    for packed in packed_tensors(family, a):
        if packed.role == "zeros":
            like = _take(ours, "embedding.weight")
            dtype = torch.float32 if packed.stays_float32 else like.dtype
            zeros = torch.zeros(sum(packed.num_rows), dtype=dtype, device=like.device)
            theirs |= zip(packed.theirs, zeros.split(packed.num_rows), strict=True)
            continue
        tensor = _take(ours, packed.ours)
        for expert, stacked in enumerate(tensor.unbind() if packed.num_experts else (tensor,)):
            parts = stacked.split(packed.num_rows) if len(packed.theirs) > 1 else (stacked,)
            theirs |= zip(packed.names(expert), parts, strict=True)
    return theirs


def from_family(family: Family, a: Architecture, theirs: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Our tensors from theirs, bit for bit: the inverse of ``to_family``.

    Raises UserError where the family cannot hold the architecture, or a tensor is missing, left over, no copy or zeros
    as the architecture wants it or, where it is joined to others, has other rows than the architecture gives it; other
    shapes are for ``load_state_dict`` to refuse.
    """
    import torch

    ours: dict[str, Tensor] = {}
    left = set(theirs)
    for packed in packed_tensors(family, a):
        rows = [
            torch.cat(parts) if len(parts) > 1 else parts[0]
            for expert in range(max(1, packed.num_experts))
            for parts in [_parts(packed, expert, theirs)]
        ]
        for name in (name for expert in range(max(1, packed.num_experts)) for name in packed.names(expert)):
            left.remove(name)
        if packed.role == "same":
            ours[packed.ours] = torch.stack(rows) if packed.num_experts else rows[0]
        elif packed.role == "zeros" and bool(rows[0].any()):
            raise UserError(f"{', '.join(packed.theirs)}: not all zeros, but the architecture has no such tensor")
        elif packed.role == "copy" and not torch.equal(rows[0], ours[packed.ours]):
            raise UserError(f"{packed.theirs[0]} is not the embedding once more; set tied_head to false")
    if left:
        hint = "is it another family or number of layers?"
        if left == {_NAMES[family].head}:
            hint = "either tied_head is false, or it is the embedding once more, as in a model in memory: leave it out"
        raise UserError(
            f'the weights hold {len(left)} tensor(s) that "{family}" of this architecture has no place for, among them '
            f"{min(left)}; {hint}"
        )
    return ours


def _parts(packed: Packed, expert: int, theirs: Mapping[str, "Tensor"]) -> list["Tensor"]:
    """Theirs that make one of ours; UserError for rows that would be cut in another place."""
    parts = [_take(theirs, name) for name in packed.names(expert)]
    for name, part, num_rows in zip(packed.names(expert), parts, packed.num_rows or (None,) * len(parts), strict=True):
        if num_rows is not None and len(part) != num_rows:
            raise UserError(f"{name} has {len(part)} rows; the architecture gives it {num_rows}")
    return parts


def _take(tensors: Mapping[str, "Tensor"], name: str) -> "Tensor":
    if name not in tensors:
        packed = name.partition(".experts.")[0] + ".experts.gate_up_proj"
        hint = "; they are of a model in memory, whose experts are packed: read the files of save_pretrained"
        raise UserError(f"the weights lack the tensor {name}{hint if packed in tensors else ''}")
    return tensors[name]
