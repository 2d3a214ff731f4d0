"""Muon (arXiv 2502.16982) on pieces of matrices: which matrices there are, and how they meet to be made orthogonal.

An update needs its whole matrix, of which ZeRO has left every rank some elements.  Each matrix gets an owner: all ranks
send it their elements, it iterates, and sends back to each what is its own.  The exchange is written against runs
(fragments.py), so that it is the same for every ZeRO stage and with experts spread over ranks.
"""

import bisect
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.pretrain.fragments import Run

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: Jordan et al., https://kellerjordan.github.io/posts/muon."""
_RMS = 0.2
"""Root mean square of an update, as that of AdamW (arXiv 2502.16982, section 2.2): one learning rate serves both."""
_BATCH_NUMEL = 1 << 26
"""Elements of equal matrices that are iterated on together: enough to fill a GPU with small experts."""
_HIDDEN = re.compile(r"(.*\.)?blocks\.\d+\.(attention\.|feed_forward\.(?!(router\.)?gate\.)).*")
"""Names of what maps hidden vectors to hidden vectors, in the plain model and in AutoEP's layers."""


@dataclass(frozen=True, order=True)
class Matrix:
    """Consecutive rows of a parameter of the plain model that are one linear map."""

    name: str
    start: int
    """First element, counted in the flattened parameter."""
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


def takes_muon(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix of attention, of a dense network or of experts; routers are not."""
    return ndim >= 2 and _HIDDEN.fullmatch(name) is not None


def matrices_of(shapes: Mapping[str, Sequence[int]]) -> list[Matrix]:
    """The matrices of all parameters that take Muon, from the shapes of the plain model.

    What is stored together for speed is apart here: queries, keys and values; gate and up; the experts.
    """
    found: list[Matrix] = []
    for name, shape in shapes.items():
        if not takes_muon(name, len(shape)):
            continue
        rows, cols = shape[-2:]
        parts = (rows,)
        if name.endswith(".qkv.weight"):
            queries = shapes[name.removesuffix("qkv.weight") + "out.weight"][1]
            parts = (queries, (rows - queries) // 2, (rows - queries) // 2)
        elif "gate_up" in name:
            parts = (rows // 2, rows // 2)
        starts = itertools.accumulate(parts * math.prod(shape[:-2]), initial=0)
        sizes = parts * math.prod(shape[:-2])
        found += [Matrix(name, start * cols, size, cols) for start, size in zip(starts, sizes, strict=False)]
    return found


def orthogonal_update(updates: Tensor, iterations: int) -> Tensor:
    """Nearly orthogonal matrices of the row and column spaces of ``updates`` [n, rows, cols], at the scale of AdamW.

    ``0.2 sqrt(max(rows, cols)) newton_schulz(update)``, in float32.
    """
    rows, cols = updates.shape[1:]
    x = updates.transpose(1, 2) if rows > cols else updates
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x * (_RMS * math.sqrt(max(rows, cols)))
    return x.transpose(1, 2) if rows > cols else x


@dataclass(frozen=True)
class _Fragment:
    """Elements of a matrix that a rank holds."""

    start: int
    """First element, counted in the matrix."""
    numel: int
    tensor: int
    """Number of the tensor that holds them."""
    offset: int
    """Of the first element in that tensor."""


class MatrixExchange:
    """The way of the elements of some tensors to the owners of their matrices and back, planned once.

    Every rank makes it, and calls it, at the same time with tensors of the same purpose, be they all padding.
    """

    def __init__(self, runs: Sequence[Sequence[Run]], matrices: Sequence[Matrix], device: torch.device) -> None:
        """``runs`` of each tensor of this rank; ``device`` is where the ranks talk and the products are computed."""
        self._device = device
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._rank, world_size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        all_runs: list[Sequence[Sequence[Run]]] = [runs] * world_size
        if not is_alone:
            dist.all_gather_object(all_runs, runs)
        held = _holders(all_runs, matrices)
        owners = _owners(held, world_size)
        owned = sorted((m for m in held if owners[m] == self._rank), key=lambda m: (m.rows, m.cols, m))
        places = dict(zip(owned, itertools.accumulate((m.numel for m in owned), initial=0), strict=False))
        self._num_owned = sum(m.numel for m in owned)
        self._batches = _batches(owned)
        self._to_owners: list[list[tuple[int, int, int]]] = [[] for _ in range(world_size)]
        self._from_ranks: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
        self._to_holders: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
        self._from_owners: list[list[tuple[int, int, int]]] = [[] for _ in range(world_size)]
        for matrix, by_rank in held.items():
            owner = owners[matrix]
            for rank, pieces in _senders(matrix, by_rank, owner).items():
                if rank == self._rank:
                    self._to_owners[owner] += [(p.tensor, p.offset, p.numel) for p in pieces]
                if owner == self._rank:
                    self._from_ranks[rank] += [(places[matrix] + p.start, p.numel) for p in pieces]
            for rank, pieces in by_rank.items():
                if rank == self._rank:
                    self._from_owners[owner] += [(p.tensor, p.offset, p.numel) for p in pieces]
                if owner == self._rank:
                    self._to_holders[rank] += [(places[matrix] + p.start, p.numel) for p in pieces]

    def replace(self, updates: Sequence[Tensor], iterations: int) -> None:
        """Put ``orthogonal_update`` of each matrix in place of its elements in flat ``updates``."""
        asked = [updates[k][offset : offset + n] for to in self._to_owners for k, offset, n in to]
        received = self._exchange(asked, self._to_owners, self._from_ranks)
        whole = torch.empty(self._num_owned, device=self._device)
        for (place, n), piece in zip(itertools.chain(*self._from_ranks), received, strict=True):
            whole[place : place + n] = piece
        for place, shape in self._batches:
            batch = whole[place : place + math.prod(shape)].view(shape)
            batch.copy_(orthogonal_update(batch, iterations))
        answers = [whole[place : place + n] for to in self._to_holders for place, n in to]
        returned = self._exchange(answers, self._to_holders, self._from_owners)
        for (k, offset, n), piece in zip(itertools.chain(*self._from_owners), returned, strict=True):
            updates[k][offset : offset + n] = piece

    def _exchange(
        self,
        pieces: list[Tensor],
        outgoing: Sequence[Sequence[tuple[int, ...]]],
        incoming: Sequence[Sequence[tuple[int, ...]]],
    ) -> Sequence[Tensor]:
        """What the ranks sent, piece by piece in the order of ``incoming``; the last number of a piece is its size."""
        if len(outgoing) == 1:
            return pieces
        sizes = [[sum(piece[-1] for piece in to) for to in part] for part in (outgoing, incoming)]
        sent = (
            torch.cat([piece.to(self._device) for piece in pieces]) if pieces else torch.empty(0, device=self._device)
        )
        received = torch.empty(sum(sizes[1]), device=self._device)
        dist.all_to_all_single(received, sent, output_split_sizes=sizes[1], input_split_sizes=sizes[0])
        return received.split([piece[-1] for part in incoming for piece in part])


_Held = dict[Matrix, dict[int, list[_Fragment]]]


def _holders(all_runs: Sequence[Sequence[Sequence[Run]]], matrices: Sequence[Matrix]) -> _Held:
    """For each matrix that has elements in the runs, in one order on all ranks: which rank holds what."""
    by_name: dict[str, list[Matrix]] = {}
    for matrix in sorted(matrices):
        by_name.setdefault(matrix.name, []).append(matrix)
    held: _Held = {}
    for rank, tensors in enumerate(all_runs):
        for number, runs in enumerate(tensors):
            for run in runs:
                candidates, end = by_name[run.name], run.start + run.numel
                first = bisect.bisect_right(candidates, run.start, key=lambda m: m.start) - 1
                last = bisect.bisect_left(candidates, end, key=lambda m: m.start)
                for matrix in candidates[first:last]:
                    low, high = max(run.start, matrix.start), min(end, matrix.start + matrix.numel)
                    piece = _Fragment(low - matrix.start, high - low, number, run.offset + low - run.start)
                    held.setdefault(matrix, {}).setdefault(rank, []).append(piece)
    return {matrix: held[matrix] for matrix in sorted(held)}


def _owners(held: _Held, world_size: int) -> dict[Matrix, int]:
    """A rank for each matrix: the one with the least to do among those that hold much of it."""
    load, owners = [0] * world_size, dict[Matrix, int]()
    for matrix in sorted(held, key=lambda m: (-m.numel * min(m.rows, m.cols), m)):
        shares = {rank: sum(piece.numel for piece in pieces) for rank, pieces in held[matrix].items()}
        near = [rank for rank, share in shares.items() if 2 * share >= max(shares.values())]
        owners[matrix] = min(near, key=lambda rank: (load[rank], rank))
        load[owners[matrix]] += matrix.numel * min(matrix.rows, matrix.cols)
    return owners


def _senders(matrix: Matrix, by_rank: Mapping[int, Sequence[_Fragment]], owner: int) -> dict[int, list[_Fragment]]:
    """Fragments that together are the matrix once: of copies, the owner's own or else the first rank's."""
    taken: set[tuple[int, int]] = set()
    chosen: dict[int, list[_Fragment]] = {}
    for rank in sorted(by_rank, key=lambda rank: (rank != owner, rank)):
        for piece in by_rank[rank]:
            if (piece.start, piece.numel) not in taken:
                taken.add((piece.start, piece.numel))
                chosen.setdefault(rank, []).append(piece)
    covered = sorted(taken)
    ends = [0, *(start + numel for start, numel in covered)]
    assert [start for start, _ in covered] == ends[:-1], f"the ranks hold parts of {matrix} twice, or not at all"
    assert ends[-1] == matrix.numel, f"no rank holds the end of {matrix}"
    return chosen


def _batches(owned: Sequence[Matrix]) -> list[tuple[int, tuple[int, int, int]]]:
    """(first element, [n, rows, cols]) of matrices of one shape that follow one another."""
    found: list[tuple[int, tuple[int, int, int]]] = []
    place = 0
    for (rows, cols), group in itertools.groupby(owned, key=lambda m: (m.rows, m.cols)):
        left = len(list(group))
        while left:
            n = min(left, max(1, _BATCH_NUMEL // (rows * cols)))
            found.append((place, (n, rows, cols)))
            place, left = place + n * rows * cols, left - n
    return found
