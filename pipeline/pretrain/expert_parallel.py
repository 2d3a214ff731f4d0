"""Experts spread over workers by AutoEP: its section of the DeepSpeed configuration, and what becomes of the model.

Everything that AutoEP would otherwise read from ``model.config`` or guess from a preset is spelled out: what it guesses
wrong, it computes wrong without a word.
"""

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm_core.models.config import Architecture
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import nn

LAYERS = r"(?:.*\.)?blocks\.\d+\.feed_forward"
"""Full names of the layers that may have experts; AutoEP leaves those without alone."""


def expert_parallel_section(a: Architecture, ep_size: int, *, on_gpu: bool) -> dict[str, Any]:
    """Value of ``expert_parallel`` in the DeepSpeed configuration (0.19.8): AutoEP with ``ep_size`` workers a group.

    It replaces each ``SparseFeedForward`` by a layer of its own when the engine is built: make a ``RouterTap``, and an
    optimizer's parameter groups by name, after that, and call ``route_in_float32``.
    Its activation for grouped products is a kernel for GPUs, so that a CPU takes its loop over experts.
    Raises UserError for a model without experts, or a number of experts that the workers can't share evenly.
    """
    moe = a.moe
    if moe is None:
        raise UserError(f"ep_size is {ep_size}, but the architecture has no experts; set it to 1")
    if ep_size < 1 or moe.num_experts % ep_size:
        divisors = [size for size in range(1, moe.num_experts + 1) if moe.num_experts % size == 0]
        raise UserError(
            f"ep_size is {ep_size}, which does not divide moe.num_experts {moe.num_experts}; take one of "
            f"{', '.join(map(str, divisors))}"
        )
    section: dict[str, Any] = {
        "enabled": True,
        "autoep_size": ep_size,
        "moe_layer_pattern": LAYERS,
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,  # w1 holds gate and up
        "expert_activation": "swiglu",
        "top_k": moe.top_k,
        "score_func": moe.router_score,
        "score_apply": "post",
        "route_norm": moe.renormalise,
        "routed_scaling_factor": moe.routed_scale,
        "load_balance_coeff": None,
        "use_grouped_mm": on_gpu,
    }
    if moe.num_groups > 1:
        section |= {"num_expert_groups": moe.num_groups, "num_limited_groups": moe.top_groups}
    if moe.num_shared_experts:
        section |= {"has_shared_experts": True, "shared_experts_pattern": "shared_experts"}
    return section


def route_in_float32(model: "nn.Module") -> None:
    """Let the gates of replaced layers compute in float32, as ours do, whatever the model was cast to.

    In bfloat16 a few percent of all tokens would go to other experts than without expert parallelism.  Call it after
    ``deepspeed.initialize``.  Raises UserError if no layer of the model was replaced.
    """
    from dlm_core.models.moe import Router

    gates = [module for name, module in model.named_modules() if name.endswith("router.gate")]
    if not gates:
        raise UserError(
            "no layer of the model was replaced by AutoEP; call route_in_float32 after deepspeed.initialize"
        )
    for gate in gates:
        gate.forward = MethodType(Router.forward, gate)


def with_experts_apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, with the experts that AutoEP has spread in groups of their own.

    ZeRO wants them marked, to average each expert's gradient over the workers that hold it alone.  The parameters must
    be those of the replaced layers: give DeepSpeed a function ``parameters -> optimizer``, which it calls after that.
    """
    found = []
    for group in groups:
        spread: dict[str, list[Any]] = {}
        shared = []
        for parameter in group["params"]:
            is_spread = not getattr(parameter, "allreduce", True)
            (spread.setdefault(parameter.group_name, []) if is_spread else shared).append(parameter)
        found += [{**group, "params": shared}] if shared else []
        found += [{**group, "params": experts, "moe": True, "name": name} for name, experts in spread.items()]
    return found


# Names of the plain model


class Piece(NamedTuple):
    """Consecutive elements of a flattened parameter of the plain model."""

    name: str
    start: int
    numel: int


def plain_pieces(model: "nn.Module") -> dict[int, tuple[Piece, ...]]:
    """By id, which elements of the plain model each parameter of ``model`` holds, one piece behind the other.

    A layer of AutoEP has those of its own experts, with gate and up apart.
    """
    found = {}
    for name, parameter in model.named_parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 leaves an empty tensor behind
        found[id(parameter)] = (Piece(plain_name(model, name), 0, numel),)
    for prefix, layer in _replaced_layers(model):
        first, num_experts = layer.ep_rank * layer.num_local_experts, layer.num_local_experts
        gate, up, down = layer.experts.w1, layer.experts.w3, layer.experts.w2
        size = found[id(gate)][0].numel // num_experts  # of one matrix of one expert, in all three
        for half, parameter in enumerate((gate, up)):
            starts = [(2 * expert + half) * size for expert in range(first, first + num_experts)]
            found[id(parameter)] = tuple(Piece(f"{prefix}.experts.gate_up_proj", start, size) for start in starts)
        found[id(down)] = (Piece(f"{prefix}.experts.down_proj", first * size, num_experts * size),)
    return found


def plain_name(model: "nn.Module", name: str) -> str:
    """Name in the plain model of a parameter or a buffer that is no expert's; AutoEP has the gate in ``router``."""
    for prefix, _ in _replaced_layers(model):
        if name.startswith(f"{prefix}.router."):
            return f"{prefix}.gate.{name.removeprefix(f'{prefix}.router.').removeprefix('gate.')}"
    return name


def _replaced_layers(model: "nn.Module") -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if getattr(module, "_is_autoep_layer", False):
            yield name, module
