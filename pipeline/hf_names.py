"""The one table of other projects' parameter names, and what a packed tensor of ours is made of.

What lives here: names and how tensors are cut.  What must not: files, configurations, vocabularies.

Names are those on disk: one tensor an expert and a projection, as every version of transformers writes them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dlm_core.models.config import Architecture
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Packed:
    """One tensor of ours and the rows of theirs that it is made of, in order."""

    ours: str
    theirs: tuple[str, ...]
    num_rows: tuple[int, ...] = ()
    """Rows of each of theirs, where they are joined."""
    num_experts: int = 0
    """Experts stacked in front, whose number stands for {e} in their names; 0 for a plain matrix."""

    def names(self, expert: int) -> tuple[str, ...]:
        """Theirs of one expert, or of a plain matrix."""
        return tuple(name.format(e=expert) for name in self.theirs)


def check_family(family: Family, a: Architecture) -> None:
    """UserError unless the family is known and can hold this architecture, naming the first field in the way."""
    if family not in FAMILIES:
        raise UserError(f'the family is "{family}"; it must be one of {", ".join(FAMILIES)}')
    has_experts = family == "qwen3_moe"
    wanted: dict[str, object] = {
        "norm": "rms",
        "activation": "swiglu",
        "cond_dim": None,
        "head_bias": False,
        "rope_fraction": 1.0,
        "qkv_bias": family == "qwen2",
        "qk_norm": family in ("qwen3", "qwen3_moe"),
    }
    if family == "qwen2" and a.head_size * a.num_heads != a.d_model:
        wanted["head_dim"] = None
    for name, value in wanted.items():
        if getattr(a, name) != value:
            raise UserError(f'{name} is {getattr(a, name)!r}; "{family}" has {value!r} and nothing else')
    if (a.moe is not None) != has_experts:
        raise UserError(f'moe is {a.moe}; "{family}" has {"experts" if has_experts else "none"}')
    if a.moe is None:
        return
    fixed = {"num_shared_experts": 0, "router_score": "softmax", "num_groups": 1, "selection_bias": False}
    for name, value in {**fixed, "routed_scale": 1.0}.items():
        if getattr(a.moe, name) != value:
            raise UserError(f'moe.{name} is {getattr(a.moe, name)!r}; "{family}" has {value!r} and nothing else')


def packed_tensors(family: Family, a: Architecture) -> Iterator[Packed]:
    """Every parameter of a model, with the tensors of the family that it is made of.

    Raises UserError where the family cannot hold the architecture.
    """
    check_family(family, a)
    yield _same("embedding.weight", "model.embed_tokens.weight")
    for layer in range(a.num_layers):
        yield from _layer(a, layer, f"blocks.{layer}.", f"model.layers.{layer}.")
    yield _same("norm.weight", "model.norm.weight")
    if not a.tied_head:
        yield _same("head.weight", "lm_head.weight")


def _same(ours: str, theirs: str) -> Packed:
    return Packed(ours, (theirs,))


def _layer(a: Architecture, layer: int, ours: str, theirs: str) -> Iterator[Packed]:
    q, kv = a.num_heads * a.head_size, a.kv_heads * a.head_size
    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        names = tuple(f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv")
        yield Packed(f"{ours}attention.qkv.{kind}", names, (q, kv, kv))
    yield _same(f"{ours}attention.out.weight", f"{theirs}self_attn.o_proj.weight")
    for part in ("q_norm", "k_norm") if a.qk_norm else ():
        yield _same(f"{ours}attention.{part}.weight", f"{theirs}self_attn.{part}.weight")
    yield _same(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight")
    yield _same(f"{ours}feed_forward_norm.weight", f"{theirs}post_attention_layernorm.weight")
    if a.moe is not None and a.is_sparse(layer):
        f, expert = a.moe.d_ff_expert, theirs + "mlp.experts.{e}."
        yield _same(f"{ours}feed_forward.gate.weight", f"{theirs}mlp.gate.weight")
        pair = (f"{expert}gate_proj.weight", f"{expert}up_proj.weight")
        yield Packed(f"{ours}feed_forward.experts.gate_up_proj", pair, (f, f), a.moe.num_experts)
        down = (f"{expert}down_proj.weight",)
        yield Packed(f"{ours}feed_forward.experts.down_proj", down, (a.d_model,), a.moe.num_experts)
    else:
        f = a.d_ff or 0
        pair = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        yield Packed(f"{ours}feed_forward.gate_up.weight", pair, (f, f))
        yield _same(f"{ours}feed_forward.down.weight", f"{theirs}mlp.down_proj.weight")


def to_family(family: Family, a: Architecture, ours: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Their tensors from ours, bit for bit: views, no copies.

    Raises UserError where the family cannot hold the architecture, or a tensor is missing.
    """
    theirs: dict[str, Tensor] = {}
    for packed in packed_tensors(family, a):
        tensor = _take(ours, packed.ours)
        for expert, stacked in enumerate(tensor.unbind() if packed.num_experts else (tensor,)):
            parts = stacked.split(packed.num_rows) if len(packed.theirs) > 1 else (stacked,)
            theirs |= zip(packed.names(expert), parts, strict=True)
    return theirs


def from_family(family: Family, a: Architecture, theirs: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Our tensors from theirs, bit for bit: the inverse of ``to_family``.

    Raises UserError where the family cannot hold the architecture, or a tensor is missing, left over or, where it is
    joined to others, has other rows than the architecture gives it; other shapes are for ``load_state_dict`` to refuse.
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
        ours[packed.ours] = torch.stack(rows) if packed.num_experts else rows[0]
    if left:
        hint = "is it another family or number of layers?"
        if left == {"lm_head.weight"}:
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
