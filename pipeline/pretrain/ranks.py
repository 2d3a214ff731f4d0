"""What the ranks of a gang say to each other outside the model: sums, one rank's word, the words of all."""

import struct
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")


class RanksDisagreeError(RuntimeError):
    """Ranks that must do the same are about to do different things."""


def bits_of(number: float) -> int:
    """The bits of a float as an integer, for ``Ranks.boundary``: nan agrees with nan."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def outcome_of(work: Callable[[], Any]) -> Any:
    """What some work returns, or the exception that it raises, so that it can be told to the other ranks."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - carried to every rank, raised there
        return error


class Ranks:
    """This process among the ranks; collectives over all of them."""

    def __init__(self, device: Any) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.workers = dist.get_world_size()
        self.device = device

    def sum(self, value: Any) -> Any:
        """Sum over ranks of a tensor, on the host."""
        import torch.distributed as dist

        total = value.clone().to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def from_first(self, value: Any) -> Any:
        """What rank 0 gave: any object that can be pickled."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def of_all(self, value: Any) -> list[Any]:
        """What every rank gave, by rank."""
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.workers
        dist.all_gather_object(gathered, value)
        return gathered

    def any(self, value: bool) -> bool:
        """Whether any rank says so: all of them decide alike."""
        import torch

        return bool(self.sum(torch.tensor([float(value)])) > 0)

    def tensors_of_all(self, tensor: Any) -> list[Any]:
        """What every rank gave, by rank, on the host: tensors of one shape and type on the device."""
        import torch
        import torch.distributed as dist

        gathered = [torch.empty_like(tensor) for _ in range(self.workers)]
        dist.all_gather(gathered, tensor)
        return [one.cpu() for one in gathered]

    def boundary(self, wants: bool, **same: int) -> bool:
        """Whether any rank wants it, once all ranks have shown that they are at the same point: one small collective.

        ``same``: where this rank is and what it does next (64-bit integers, such as the step, and whether it saves).
        Ranks that take different branches would otherwise wait for each other in different collectives.
        Raises RanksDisagreeError on every rank.
        """
        import torch
        import torch.distributed as dist

        own = list(same.values())
        most = torch.tensor([int(wants), *own, *(~value for value in own)], device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        any_wants, *found = most.tolist()
        if found[: len(own)] != [~lowest for lowest in found[len(own) :]]:
            shown = "; ".join(f"rank {rank}: {values}" for rank, values in enumerate(self.of_all(same)))
            raise RanksDisagreeError(
                f"the ranks are no longer in step, which is a defect or an error of a device: {shown}. Resume from the "
                "last checkpoint; if it happens at the same step again, report it"
            )
        return bool(any_wants)


def done_by_first(ranks: Ranks, work: Callable[[], Found]) -> Found:
    """What the work returns on rank 0, the only one to do it; what it raises is raised on all."""
    found = ranks.from_first(outcome_of(work) if ranks.rank == 0 else None)
    if isinstance(found, Exception):
        raise found
    return found


def done_by_all(ranks: Ranks, work: Callable[[], Found]) -> list[Found]:
    """What the work returns, by rank; what the first of those that fail raises is raised on all."""
    outcomes = ranks.of_all(outcome_of(work))
    for found in outcomes:
        if isinstance(found, Exception):
            raise found
    return outcomes
