"""A small head with every gradient written out: loops over rows, and autograd of the formula over all logits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlm_core.cross_entropy import HeadLoss, masked_cross_entropy

V, D, N = 11, 5, 7
NEVER = 4
SELECT = [3, 0, 3, 6, 2, 0, 3, 5, 6]  # repeats rows 0, 3 and 6; rows 1 and 4 are never chosen
UNCHOSEN = [1, 4]
TARGETS = [10, 0, 5, 3, 3, 1, 9, 8, 10]
WEIGHT = [0.5, 2.0, 1.0, 0.0, 37.0, 1.25, 0.125, 3.0, 1.0]
M = len(SELECT)
SCALE = 2.5
CHUNKS = [None, 1, 3, M, M + 5]
IMPLEMENTATIONS = ["chunked", "torch"]
# Float64 keeps 16 digits and float32 7, of sums of a few tens of terms of size one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
# A rounding to bfloat16 is off by at most 2**-8 of the value; here that of the result, and where float32 and float64
# round the gradient of a logit to different sides.
BF16_ROUNDING = 2.0**-7


@dataclass(frozen=True)
class Case:
    hidden: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor
    select: torch.Tensor | None

    def loss(self, **options: Any) -> HeadLoss:
        return masked_cross_entropy(self.hidden, self.head, self.targets, self.weight, select=self.select, **options)


def make_case(dtype: torch.dtype = torch.float64, select: list[int] | None = SELECT) -> Case:
    generator = torch.Generator().manual_seed(7)
    chosen = range(N) if select is None else range(len(select))
    return Case(
        hidden=torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        head=torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        targets=torch.tensor([TARGETS[m] for m in chosen], dtype=torch.int64),
        weight=torch.tensor([WEIGHT[m] for m in chosen], dtype=torch.float32),
        select=None if select is None else torch.tensor(select, dtype=torch.int64),
    )


def row_loss(logits: list[float], target: int) -> float:
    largest = max(logits)
    return largest + math.log(sum(math.exp(logit - largest) for logit in logits)) - logits[target]


def loop(case: Case, mask_token_id: int | None) -> list[float]:
    """-log p(target) of every chosen row, by loops over Python floats."""
    hidden, head = case.hidden.tolist(), case.head.tolist()
    losses = []
    for m, target in enumerate(case.targets.tolist()):
        row = hidden[m if case.select is None else int(case.select[m])]
        logits = [math.fsum(h * w for h, w in zip(row, column, strict=True)) for column in head]
        if mask_token_id is not None:
            logits[mask_token_id] = -math.inf
        losses.append(row_loss(logits, target))
    return losses


def full_gradients(case: Case, mask_token_id: int | None, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the formula over the logits of every position, in float64."""
    hidden = case.hidden.detach().double().requires_grad_()
    head = case.head.detach().double().requires_grad_()
    logits = hidden @ head.T
    if mask_token_id is not None:
        logits = logits.masked_fill(torch.arange(V) == mask_token_id, -torch.inf)
    log_probs = logits.log_softmax(-1)
    select = range(N) if case.select is None else case.select.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for row, target, weight in zip(select, case.targets.tolist(), case.weight.tolist(), strict=True):
        total = total - weight * log_probs[row, target]
    hidden_grad, head_grad = torch.autograd.grad(total * scale, [hidden, head])
    return hidden_grad, head_grad


def gradients(case: Case, scale: float, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_grad, head_grad = torch.autograd.grad(case.loss(**options).loss_sum * scale, [case.hidden, case.head])
    return hidden_grad, head_grad


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest expected value."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    worst = (actual.double() - expected.double()).abs().max()
    assert float(worst) <= tolerance * max(1.0, float(expected.abs().max()))


class Products(TorchDispatchMode):
    """Records every operation and the shape of what it made, also inside an autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            self.shapes.append(tuple(result.shape))
        return result

    @property
    def num_products(self) -> int:
        return sum(name in ("mm", "addmm_") for name in self.names)

    def rows_of_logits(self, vocab_size: int = V) -> list[int]:
        """Heights of the matrices that are ``vocab_size`` wide."""
        return [shape[0] for shape in self.shapes if len(shape) == 2 and shape[1] == vocab_size]
