"""Whether ranks that should hold the same weights do: the guard against devices that err in silence."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.errors import NumericsError
from pipeline.pretrain.fragments import persistent_buffers
from pipeline.pretrain.ranks import Ranks

_SHOWN = 3


def check_replicas(engine: Any, ranks: Ranks, step: int) -> None:
    """NumericsError that names the tensors and the ranks, if copies of weights differ in any bit.

    To be called between the last backward pass of a step and the engine's step: ZeRO 1 and 2 then spread the weights
    anew from their owners, and all that is left of a copy that was wrong is the gradient it gave.

    Compared are parameters and buffers of the model that ranks hold whole, experts among the ranks that hold the same
    ones.  ZeRO-3 keeps small parameters whole; of the others each rank has its own part, and nothing to compare.
    """
    import torch

    held = list(_held_whole(engine))
    if not held:
        return
    first_holders = torch.tensor([first for _, _, first in held], device=ranks.device)
    sums = torch.stack([_sum_of_bits(tensor) for _, tensor, _ in held])
    by_rank = [table.tolist() for table in ranks.tensors_of_all(torch.stack([first_holders, sums]))]
    wrong: dict[str, list[int]] = {}
    for column, (name, _, _) in enumerate(held):
        by_holders: dict[int, dict[int, int]] = {}
        for rank, (firsts, found) in enumerate(by_rank):
            by_holders.setdefault(firsts[column], {})[rank] = found[column]
        if outvoted := [rank for copies in by_holders.values() for rank in _outvoted(copies)]:
            wrong[name] = outvoted
    if wrong:
        shown = [f"{name} on rank {', '.join(map(str, outvoted))}" for name, outvoted in wrong.items()]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise NumericsError(
            f"in step {step} the weights differ from those of the other ranks: {'; '.join(shown[:_SHOWN])}{more}. A "
            "device or its memory may err: resume from the last checkpoint without it. If it happens again at the same "
            "step on other devices, it is a defect of the training"
        )


def _outvoted(copies: dict[int, int]) -> list[int]:
    """Ranks whose value is not the one that most have; that of the lowest rank where as many have either."""
    common, _ = Counter(copies.values()).most_common(1)[0]
    return [rank for rank, value in copies.items() if value != common]


def _held_whole(engine: Any) -> Iterator[tuple[str, Any, int]]:
    """(name, tensor, first rank that holds the same) of what this rank holds whole; as many on every rank."""
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_id") or parameter.ds_persist:  # ZeRO-3 cuts up what need not persist
            yield name, parameter.data, 0 if getattr(parameter, "allreduce", True) else _first_holder(parameter)
    for name, buffer in persistent_buffers(engine).items():  # others are counters of each rank
        yield name, buffer, 0


def _first_holder(expert: Any) -> int:
    """Lowest rank with the same experts."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    return min(dist.get_process_group_ranks(groups._get_expert_data_parallel_group(expert.group_name)))


def _sum_of_bits(tensor: Any) -> Any:
    """The elements' bits read as integers, summed modulo 2^64: the same in any order."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64)
