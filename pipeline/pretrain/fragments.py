"""Where every number of the model's training state lies on this rank, whatever ZeRO and AutoEP have done to it.

DeepSpeed flattens parameters, cuts them over ranks, pads them, and spreads experts.  Everything of ours that must
survive another number of ranks, or needs a parameter's shape (checkpoints, averages, Muon, norms), is written against
what stands here: flat tensors, and which elements of which parameter of the plain model they hold.

Written for DeepSpeed 0.19.8, whose wrappers of an optimizer it reads; the tests compare with the plain model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.pretrain.expert_parallel import Piece, plain_name, plain_pieces
from pipeline.tensor_files import TensorFiles

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Consecutive elements of one parameter of the plain model, consecutive too in a tensor of this rank."""

    name: str
    """Of the parameter, as in ``Denoiser.state_dict()``."""
    start: int
    """First element, counted in the flattened parameter."""
    numel: int
    offset: int
    """Of the first element in the flattened tensor of this rank."""


@dataclass(frozen=True)
class LocalTensor:
    """A parameter of the optimizer on this rank: float32 master values of parts of the model; the rest is padding.

    The optimizer's state for it (first moment, average, ...) lies in tensors of the same layout.
    """

    tensor: Any
    runs: tuple[Run, ...]
    copy: int = 0
    """Which of the equal tensors this is, that ``num_copies`` ranks hold: those of ZeRO 0 alone are held by many."""
    num_copies: int = 1


def local_tensors(engine: Any) -> list[LocalTensor]:
    """Every tensor that the client's optimizer is given on this rank, in the order of its parameter groups.

    The same list at any time: ZeRO 1 to 3 call the optimizer with one group after the other, and in between those of
    ZeRO 3 are empty.  What a rank holds of a group may be padding alone.
    """
    pieces = plain_pieces(engine.module)
    held = _held(engine)
    found = {id(part.parameter) for h in held for part in h.parts}
    lost = [name for name, p in engine.module.named_parameters() if id(p) not in found]
    assert not lost, f"the optimizer was not given {', '.join(lost)}"
    return [
        LocalTensor(
            tensor=h.tensor,
            runs=tuple(run for part in h.parts for run in _runs(pieces[id(part.parameter)], part)),
            copy=h.copy,
            num_copies=h.num_copies,
        )
        for h in held
    ]


def owned(tensors: Iterable[LocalTensor]) -> list[LocalTensor]:
    """The same tensors with the runs that this rank is to write: of all ranks' lists, each element is in one.

    Ranks that hold copies share them evenly.
    """
    return [replace(tensor, runs=tuple(_share(tensor))) for tensor in tensors]


def persistent_buffers(engine: Any) -> "dict[str, Tensor]":
    """Buffers that belong to the model's state, by their names in the plain model; to be changed in place.

    They are no parameters of the optimizer, and the same on every rank: the selection biases of routers, in float32.
    """
    found = {}
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[plain_name(engine.module, f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def fill_masters(tensors: Iterable[LocalTensor], weights: TensorFiles) -> None:
    """Give master values the numbers of a file of the plain model's weights, those that this rank holds."""
    import torch

    for local in tensors:
        flat = local.tensor.detach().view(-1)
        for run in local.runs:
            values = np.empty(run.numel, np.float32)
            weights.read_elements(run.name, run.start, values)
            flat[run.offset : run.offset + run.numel].copy_(torch.from_numpy(values))


def push_masters(engine: Any) -> None:
    """Make the model's parameters, in its own precision, agree on every rank with changed master values.

    To be called by all ranks between two steps, never between the micro batches of one.
    """
    import torch

    wrapper = engine.optimizer
    stage = engine.zero_optimization_stage()
    with torch.no_grad():
        if stage == 3:
            wrapper._partition_all_parameters()  # what was gathered and kept holds old values; the next pass gathers
            for number in range(len(wrapper.fp16_groups)):
                wrapper._reassign_or_swap_out_partitioned_parameters(number)
        elif stage in (1, 2):
            wrapper.update_lp_params()
        elif _has_masters(wrapper):
            for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    parameter.copy_(master)


# What DeepSpeed holds


class _Part(NamedTuple):
    """Some elements of a parameter of the engine's module, or none, and where a tensor of the optimizer has them."""

    parameter: Any
    start: int
    numel: int
    offset: int


class _Held(NamedTuple):
    tensor: Any
    parts: list[_Part]
    copy: int = 0
    num_copies: int = 1


def _held(engine: Any) -> list[_Held]:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_whole(engine.optimizer))
    return list(_partitions(engine.optimizer) if stage == 3 else _slices(engine.optimizer))


def _has_masters(wrapper: Any) -> bool:
    """Whether ZeRO 0 keeps masters apart, as it does in bf16; in float32 there is no wrapper."""
    return hasattr(wrapper, "fp32_groups")


def _whole(wrapper: Any) -> Iterator[_Held]:
    """ZeRO 0: whole parameters; each rank has those that are not spread."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    given = [group["params"] for group in wrapper.param_groups]
    parameters = wrapper.fp16_groups if _has_masters(wrapper) else given
    for masters, of_model in zip(given, parameters, strict=True):
        for master, p in zip(masters, of_model, strict=True):
            spread_over = None if getattr(p, "allreduce", True) else p.group_name
            ranks: Any = (
                groups._get_data_parallel_group()
                if spread_over is None
                else groups._get_expert_data_parallel_group(spread_over)
            )
            yield _Held(master, [_Part(p, 0, p.numel(), 0)], dist.get_rank(ranks), dist.get_world_size(ranks))


def _slices(wrapper: Any) -> Iterator[_Held]:
    """ZeRO 1 and 2: equal slices of all parameters of a group, one behind the other."""
    import torch.distributed as dist

    if hasattr(wrapper, "bf16_groups"):  # ZeRO 1 that adds up bf16 gradients in float32
        flat, parameters = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups
        places = [[0, *accumulate(p.numel() for p in group)][:-1] for group in parameters]
    else:
        flat, parameters = wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups
        places = wrapper.round_robin_bit16_offsets
    for tensor, group, starts, ranks in zip(flat, parameters, places, wrapper.real_dp_process_group, strict=True):
        begin = dist.get_rank(ranks) * tensor.numel()
        parts = []
        for p, place in zip(group, starts, strict=True):
            first, last = max(place, begin), min(place + p.numel(), begin + tensor.numel())
            parts.append(_Part(p, first - place, max(0, last - first), first - begin))
        yield _Held(tensor, parts)


def _partitions(wrapper: Any) -> Iterator[_Held]:
    """ZeRO 3: an equal, padded slice of each parameter of a subgroup, one behind the other."""
    import torch.distributed as dist

    for tensor, group in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
        parts, offset = [], 0
        for p in group:
            size = p.partition_numel()
            start = size * dist.get_rank(p.ds_process_group)
            parts.append(_Part(p, start, max(0, min(size, p.ds_numel - start)), offset))
            offset += size
        yield _Held(tensor, parts)


# Runs


def _runs(pieces: tuple[Piece, ...], part: _Part) -> Iterator[Run]:
    """The elements of a part, under the names of the plain model."""
    first = 0
    for piece in pieces:
        begin, end = max(part.start, first), min(part.start + part.numel, first + piece.numel)
        if begin < end:
            yield Run(piece.name, piece.start + begin - first, end - begin, part.offset + begin - part.start)
        first += piece.numel


def _share(tensor: LocalTensor) -> Iterator[Run]:
    total = sum(run.numel for run in tensor.runs)
    begin, end = (total * place // tensor.num_copies for place in (tensor.copy, tensor.copy + 1))
    first = 0
    for run in tensor.runs:
        low, high = max(begin - first, 0), min(end - first, run.numel)
        if low < high:
            yield Run(run.name, run.start + low, high - low, run.offset + low)
        first += run.numel
