"""The chunked head: against a float64 loop over rows and autograd of the formula written out in full."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlm_core import cross_entropy as module
from dlm_core.cross_entropy import (
    HeadLoss,
    compute_dtype,
    exclude_token,
    logits_loss,
    masked_cross_entropy,
    token_cross_entropy,
)

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


def _case(dtype: torch.dtype = torch.float64, select: list[int] | None = SELECT) -> Case:
    generator = torch.Generator().manual_seed(7)
    chosen = range(N) if select is None else range(len(select))
    return Case(
        hidden=torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        head=torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        targets=torch.tensor([TARGETS[m] for m in chosen], dtype=torch.int64),
        weight=torch.tensor([WEIGHT[m] for m in chosen], dtype=torch.float32),
        select=None if select is None else torch.tensor(select, dtype=torch.int64),
    )


def _row_loss(logits: list[float], target: int) -> float:
    largest = max(logits)
    return largest + math.log(sum(math.exp(logit - largest) for logit in logits)) - logits[target]


def _loop(case: Case, never: int | None) -> list[float]:
    """-log p(target) of every chosen row, by loops over Python floats."""
    hidden, head = case.hidden.tolist(), case.head.tolist()
    losses = []
    for m, target in enumerate(case.targets.tolist()):
        row = hidden[m if case.select is None else int(case.select[m])]
        logits = [math.fsum(h * w for h, w in zip(row, column, strict=True)) for column in head]
        if never is not None:
            logits[never] = -math.inf
        losses.append(_row_loss(logits, target))
    return losses


def _full_gradients(case: Case, never: int | None, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the formula over the logits of every position, in float64."""
    hidden = case.hidden.detach().double().requires_grad_()
    head = case.head.detach().double().requires_grad_()
    logits = hidden @ head.T
    if never is not None:
        logits = logits.masked_fill(torch.arange(V) == never, -torch.inf)
    log_probs = logits.log_softmax(-1)
    select = range(N) if case.select is None else case.select.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for row, target, weight in zip(select, case.targets.tolist(), case.weight.tolist(), strict=True):
        total = total - weight * log_probs[row, target]
    hidden_grad, head_grad = torch.autograd.grad(total * scale, [hidden, head])
    return hidden_grad, head_grad


def _gradients(case: Case, scale: float, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_grad, head_grad = torch.autograd.grad(case.loss(**options).loss_sum * scale, [case.hidden, case.head])
    return hidden_grad, head_grad


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest expected value."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    worst = (actual.double() - expected.double()).abs().max()
    assert float(worst) <= tolerance * max(1.0, float(expected.abs().max()))


class _Products(TorchDispatchMode):
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


# Loss and gradients


@pytest.mark.parametrize("never", [None, NEVER])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("select", [SELECT, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_of_chosen_rows_equals_the_loop(dtype, select, chunk_rows, never):
    case = _case(dtype, select)
    out = case.loss(chunk_rows=chunk_rows, never=never)
    losses = _loop(case, never)
    _assert_close(out.cross_entropy, torch.tensor(losses, dtype=torch.float64), TOLERANCE[dtype])
    expected = sum(w * loss for w, loss in zip(case.weight.tolist(), losses, strict=True))
    assert float(out.loss_sum.detach()) == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert out.loss_sum.dtype == out.cross_entropy.dtype == dtype


@pytest.mark.parametrize("never", [None, NEVER])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("select", [SELECT, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_scaled_from_above_equal_autograd_of_the_full_formula(dtype, select, chunk_rows, never):
    case = _case(dtype, select)
    expected = _full_gradients(case, never, SCALE)
    for grad, reference in zip(_gradients(case, SCALE, chunk_rows=chunk_rows, never=never), expected, strict=True):
        assert grad.dtype == dtype
        _assert_close(grad, reference, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_gradcheck_in_float64_passes(chunk_rows):
    case = _case()

    def loss_sum(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return replace(case, hidden=hidden, head=head).loss(chunk_rows=chunk_rows, never=NEVER).loss_sum

    assert torch.autograd.gradcheck(loss_sum, (case.hidden, case.head))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_sum_is_the_weighted_sum_of_cross_entropy_which_has_no_gradient(implementation):
    case = _case()
    out = case.loss(implementation=implementation)
    assert float(out.loss_sum.detach()) == pytest.approx(float((case.weight * out.cross_entropy).sum()), rel=1e-14)
    assert out.loss_sum.requires_grad
    assert not out.cross_entropy.requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_rows_not_chosen_is_exactly_zero(implementation):
    hidden_grad, _ = _gradients(_case(), SCALE, implementation=implementation)
    assert torch.count_nonzero(hidden_grad[UNCHOSEN]) == 0
    assert all(torch.count_nonzero(hidden_grad[row]) for row in set(SELECT))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_the_id_never_predicted_is_exactly_zero(dtype, implementation):
    hidden_grad, head_grad = _gradients(_case(dtype), SCALE, never=NEVER, implementation=implementation)
    assert torch.count_nonzero(head_grad[NEVER]) == 0
    assert torch.count_nonzero(head_grad[[v for v in range(V) if v != NEVER]].sum(1)) == V - 1
    assert head_grad.isfinite().all()
    assert hidden_grad.isfinite().all()


def test_probability_with_an_id_never_predicted_is_normalised_over_the_others():
    case = _case(select=[2])
    total = sum(
        math.exp(-float(replace(case, targets=torch.tensor([v])).loss(never=NEVER).cross_entropy[0]))
        for v in range(V)
        if v != NEVER
    )
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_of_zero_gives_zero_loss_and_gradients_but_keeps_cross_entropy(implementation):
    case = _case()
    silent = replace(case, weight=torch.zeros(M))
    assert float(silent.loss(implementation=implementation).loss_sum.detach()) == 0.0
    assert all(torch.count_nonzero(grad) == 0 for grad in _gradients(silent, SCALE, implementation=implementation))
    assert torch.equal(silent.loss().cross_entropy, case.loss().cross_entropy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("never", [None, NEVER])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_chosen_row_gives_zero_loss_and_zero_gradients(dtype, never, implementation):
    case = _case(dtype, select=[])
    out = case.loss(never=never, implementation=implementation)
    assert float(out.loss_sum.detach()) == 0.0
    assert out.cross_entropy.shape == (0,)
    hidden_grad, head_grad = _gradients(case, SCALE, never=never, implementation=implementation)
    assert hidden_grad.shape == (N, D)
    assert head_grad.shape == (V, D)
    assert torch.count_nonzero(hidden_grad) == torch.count_nonzero(head_grad) == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("never", [None, NEVER])
@pytest.mark.parametrize("select", [SELECT, None])
def test_torch_implementation_equals_chunked(select, never, dtype):
    case = _case(dtype, select)
    ours, theirs = case.loss(never=never), case.loss(never=never, implementation="torch")
    _assert_close(theirs.cross_entropy, ours.cross_entropy, TOLERANCE[dtype])
    _assert_close(theirs.loss_sum.detach(), ours.loss_sum.detach(), TOLERANCE[dtype])
    of_theirs = _gradients(case, SCALE, never=never, implementation="torch")
    for grad, reference in zip(of_theirs, _gradients(case, SCALE, never=never), strict=True):
        _assert_close(grad, reference, TOLERANCE[dtype])


def test_torch_implementation_in_bf16_gives_float32_near_chunked():
    """Torch returns the loss of a row in bfloat16: losses of up to 16 are off by at most 2**-5."""
    ours, theirs = (_case(torch.bfloat16).loss(implementation=name) for name in IMPLEMENTATIONS)
    assert theirs.loss_sum.dtype == theirs.cross_entropy.dtype == torch.float32
    assert float(ours.cross_entropy.max()) < 16
    assert float((theirs.cross_entropy - ours.cross_entropy).abs().max()) <= 2.0**-5


# Who asks for a gradient


@pytest.mark.parametrize(
    ("of_hidden", "of_head", "products_a_chunk"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_gradients_asked_for_are_computed(dtype, of_hidden, of_head, products_a_chunk):
    both = _case(dtype)
    expected = _gradients(both, SCALE, chunk_rows=3)
    wanted = (of_hidden, of_head)
    case = replace(
        both,
        hidden=both.hidden.detach().requires_grad_(of_hidden),
        head=both.head.detach().requires_grad_(of_head),
    )
    with _Products() as products:
        loss_sum = case.loss(chunk_rows=3).loss_sum
    assert products.num_products == products_a_chunk * M // 3
    assert ("scatter_add_" in products.names) == loss_sum.requires_grad == any(wanted)
    if any(wanted):
        (loss_sum * SCALE).backward()
    for tensor, is_wanted, grad in zip((case.hidden, case.head), wanted, expected, strict=True):
        assert (tensor.grad is not None) == is_wanted
        assert tensor.grad is None or torch.equal(tensor.grad, grad)


def test_without_grad_mode_no_gradient_is_computed():
    case = _case()
    with torch.no_grad(), _Products() as products:
        out = case.loss(chunk_rows=3)
    assert products.num_products == M // 3
    assert not out.loss_sum.requires_grad
    assert float(out.loss_sum) == float(case.loss(chunk_rows=3).loss_sum.detach())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_gets_no_gradient(implementation):
    case = _case()
    case.weight.requires_grad_()
    case.loss(implementation=implementation).loss_sum.backward()
    assert case.weight.grad is None
    assert case.head.grad is not None


def test_inputs_are_left_as_they_were():
    case, before = _case(), _case()
    case.loss(chunk_rows=3, never=NEVER).loss_sum.backward()
    for name in ("hidden", "head", "targets", "weight", "select"):
        assert torch.equal(getattr(case, name), getattr(before, name))


def test_backward_again_gives_the_same_gradients():
    case = _case()
    loss_sum = case.loss().loss_sum
    first = torch.autograd.grad(loss_sum, [case.hidden, case.head], retain_graph=True)
    again = torch.autograd.grad(loss_sum, [case.hidden, case.head])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_second_derivative_is_refused():
    case = _case()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(case.loss().loss_sum * scale, [case.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Precision


def test_large_logits_in_float32_keep_differences_of_one():
    """Logits of 10,000 and 10,001: bfloat16, with steps of 64 there, would call them equal."""
    hidden = torch.full((2, 1), 100.0, requires_grad=True)
    head = torch.tensor([[100.0], [100.01], [-100.0]], requires_grad=True)
    out = masked_cross_entropy(hidden, head, torch.tensor([1, 0]), torch.ones(2))
    gap = float(100 * head[1].detach() - 100 * head[0].detach())
    expected = torch.tensor([math.log1p(math.exp(-gap)), math.log1p(math.exp(gap))])
    _assert_close(out.cross_entropy, expected, 2e-3)  # logits of 10,000 have float32 steps of 1e-3
    (head_grad,) = torch.autograd.grad(out.loss_sum, [head])
    likely = 1 / (1 + math.exp(-gap))
    assert head_grad[1].item() == pytest.approx(100 * (2 * likely - 1), abs=0.2)
    assert head_grad[2].item() == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_beyond_the_range_of_exp_stay_finite(sign):
    hidden = torch.tensor([[sign * 1e4]], requires_grad=True)
    head = torch.tensor([[1.0], [0.5]], requires_grad=True)
    out = masked_cross_entropy(hidden, head, torch.tensor([0]), torch.ones(1))
    assert float(out.cross_entropy) == (0.0 if sign > 0 else 5e3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss_sum, [hidden, head]))


@pytest.mark.parametrize("never", [None, NEVER])
def test_bf16_loss_is_the_float32_loss_of_its_own_products(never):
    case = _case(torch.bfloat16)
    out = case.loss(never=never, chunk_rows=M)
    logits = (case.hidden[case.select] @ case.head.T).detach().double()
    if never is not None:
        logits[:, never] = -math.inf
    losses = [_row_loss(row, target) for row, target in zip(logits.tolist(), TARGETS, strict=True)]
    assert out.loss_sum.dtype == out.cross_entropy.dtype == torch.float32
    _assert_close(out.cross_entropy, torch.tensor(losses), TOLERANCE[torch.float32])
    expected = sum(w * loss for w, loss in zip(WEIGHT, losses, strict=True))
    assert float(out.loss_sum.detach()) == pytest.approx(expected, rel=TOLERANCE[torch.float32])


@pytest.mark.parametrize("never", [None, NEVER])
def test_bf16_gradients_are_the_products_of_rounded_logit_gradients(never):
    case = _case(torch.bfloat16, select=[5, 0, 3, 6, 2, 1])
    rows, targets, weight = case.hidden[case.select].detach(), case.targets, case.weight
    logits = (rows @ case.head.T).detach().double()
    if never is not None:
        logits[:, never] = -math.inf
    by_logit = ((logits.softmax(-1) - F.one_hot(targets, V)) * weight[:, None]).bfloat16()
    hidden_grad, head_grad = _gradients(case, 1.0, never=never, chunk_rows=len(rows))
    assert hidden_grad.dtype == head_grad.dtype == torch.bfloat16
    _assert_close(hidden_grad[case.select], by_logit.double() @ case.head.detach().double(), BF16_ROUNDING)
    _assert_close(head_grad, by_logit.double().T @ rows.double(), BF16_ROUNDING)


def test_bf16_sums_over_many_chunks_are_taken_in_float32():
    """A bfloat16 sum of equal terms stops growing at 256 of them."""
    num_rows = 1000
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    head = torch.tensor([[1.0], [0.5]], dtype=torch.bfloat16, requires_grad=True)
    zeros = torch.zeros(num_rows, dtype=torch.int64)
    out = masked_cross_entropy(hidden, head, zeros, torch.ones(num_rows), select=zeros, chunk_rows=1)
    unlikely = 1 / (1 + math.exp(0.5))
    assert float(out.loss_sum.detach()) == pytest.approx(-num_rows * math.log1p(-unlikely), rel=1e-5)
    (head_grad,) = torch.autograd.grad(out.loss_sum, [head])
    assert head_grad[0].item() == pytest.approx(-num_rows * unlikely, rel=BF16_ROUNDING)
    assert head_grad[1].item() == pytest.approx(num_rows * unlikely, rel=BF16_ROUNDING)


@pytest.mark.parametrize("num_tokens", [982, 1020])
def test_bf16_gradient_takes_the_scale_from_above_unrounded(num_tokens):
    """1 / num_tokens rounded to bfloat16 is off by nearly 2**-8, the same way for every entry of the gradient."""
    case = _case(torch.bfloat16)
    exact = _gradients(case, 1.0)
    for grad, reference in zip(_gradients(case, 1.0 / num_tokens), exact, strict=True):
        assert torch.equal(grad, (reference.double() / num_tokens).bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_weight_does_not_widen_a_float32_loss(implementation):
    case = _case(torch.float32)
    expected = case.loss(implementation=implementation).loss_sum
    loss_sum = replace(case, weight=case.weight.double()).loss(implementation=implementation).loss_sum
    assert loss_sum.dtype == torch.float32
    assert float(loss_sum.detach()) == float(expected.detach())


# Chunks


@pytest.mark.parametrize("chunk_rows", [1, 3, 8])
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunk_rows):
    num_rows, vocab_size = 40, 64
    hidden = torch.randn(num_rows, 1, requires_grad=True)
    head = torch.randn(vocab_size, 1, requires_grad=True)
    zeros = torch.zeros(num_rows, dtype=torch.int64)
    with _Products() as products:
        masked_cross_entropy(
            hidden, head, zeros, torch.ones(num_rows), never=1, chunk_rows=chunk_rows
        ).loss_sum.backward()
    assert max(products.rows_of_logits(vocab_size)) == chunk_rows
    assert max(math.prod(shape) for shape in products.shapes) == chunk_rows * vocab_size


@pytest.mark.parametrize(
    ("dtype", "room_bytes", "expected"),
    [
        (torch.float32, 20 * V * 4, 20),
        (torch.float32, 20 * V * 4 - 1, 19),
        (torch.float64, 20 * V * 8, 20),
        (torch.bfloat16, 20 * V * 4, 20),
        (torch.float32, 1, 16),
        (torch.float32, 1 << 30, 50),
    ],
)
def test_default_chunk_is_what_fits_the_room_and_at_least_16_rows(monkeypatch, dtype, room_bytes, expected):
    monkeypatch.setattr(module, "CHUNK_BYTES", room_bytes)
    zeros = torch.zeros(50, dtype=torch.int64)
    with _Products() as products:
        masked_cross_entropy(
            torch.ones(1, D, dtype=dtype), torch.ones(V, D, dtype=dtype), zeros, torch.ones(50), select=zeros
        )
    assert max(products.rows_of_logits()) == expected


def test_default_room_holds_128_rows_of_a_quarter_million_ids():
    vocab_size = 1 << 18
    zeros = torch.zeros(130, dtype=torch.int64)
    with _Products() as products:
        masked_cross_entropy(torch.zeros(130, 1), torch.zeros(vocab_size, 1), zeros, torch.ones(130))
    assert sorted(set(products.rows_of_logits(vocab_size))) == [1, 2, 128]  # one: the head, transposed


# Errors


@pytest.mark.parametrize("chunk_rows", [0, -3])
def test_chunk_rows_below_one_is_refused(chunk_rows):
    with pytest.raises(ValueError, match=f"chunk_rows is {chunk_rows}; it must be at least 1"):
        _case().loss(chunk_rows=chunk_rows)


@pytest.mark.parametrize("chunk_rows", [0, 3])
def test_chunk_rows_for_the_torch_implementation_is_refused(chunk_rows):
    with pytest.raises(ValueError, match=f'chunk_rows is {chunk_rows}, but implementation="torch"'):
        _case().loss(chunk_rows=chunk_rows, implementation="torch")


def test_torch_without_its_chunked_head_is_refused(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(ValueError, match=re.escape(f"torch {torch.__version__} has no linear_cross_entropy")):
        _case().loss(implementation="torch")
    assert _case().loss().loss_sum.isfinite()


# What is shared with the losses of whole logits


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_compute_dtype_widens_all_but_float64_to_float32(dtype, expected):
    assert compute_dtype(dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exclude_token_sets_one_column_and_copies(dtype):
    logits = torch.arange(12, dtype=dtype).reshape(3, 4)
    excluded = exclude_token(logits, 2)
    assert excluded.dtype == dtype
    assert excluded.tolist() == [[0, 1, -math.inf, 3], [4, 5, -math.inf, 7], [8, 9, -math.inf, 11]]
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_cross_entropy_of_rows_equals_the_loop(dtype):
    logits = (_case(dtype).hidden @ _case(dtype).head.T).detach()
    targets = torch.tensor(TARGETS[:N])
    losses = token_cross_entropy(logits, targets)
    assert losses.dtype == compute_dtype(dtype)
    expected = [_row_loss(row, target) for row, target in zip(logits.tolist(), TARGETS[:N], strict=True)]
    _assert_close(losses, torch.tensor(expected, dtype=torch.float64), TOLERANCE[losses.dtype])


def test_token_cross_entropy_of_excluded_logits_has_zero_gradient_at_the_excluded_id():
    logits = torch.randn(4, V, dtype=torch.float64, requires_grad=True)
    token_cross_entropy(exclude_token(logits, NEVER), torch.tensor([0, 1, 2, 3])).sum().backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[:, NEVER]) == 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_loss_equals_the_head_that_made_the_logits(dtype):
    case = _case(dtype)
    ours, of_logits = case.loss(), logits_loss(case.hidden[case.select] @ case.head.T, case.targets, case.weight)
    assert of_logits.loss_sum.dtype == ours.loss_sum.dtype
    assert not of_logits.cross_entropy.requires_grad
    tolerance = TOLERANCE[ours.loss_sum.dtype]
    _assert_close(of_logits.cross_entropy, ours.cross_entropy, tolerance)
    _assert_close(of_logits.loss_sum.detach(), ours.loss_sum.detach(), tolerance)


def test_logits_loss_gradient_is_the_weighted_probability_less_one_at_the_target():
    case = _case()
    logits = (case.hidden[case.select] @ case.head.T).detach().requires_grad_()
    (grad,) = torch.autograd.grad(logits_loss(logits, case.targets, case.weight).loss_sum, [logits])
    expected = case.weight[:, None].double() * (logits.detach().softmax(-1) - F.one_hot(case.targets, V))
    _assert_close(grad, expected, TOLERANCE[torch.float64])


def test_logits_loss_of_float32_is_float32_whatever_the_weight():
    logits, targets = torch.zeros(1, V), torch.tensor([0])
    assert logits_loss(logits, targets, torch.ones(1, dtype=torch.float64)).loss_sum.dtype == torch.float32


def test_logits_loss_gives_weight_no_gradient():
    logits, weight = torch.zeros(1, V, requires_grad=True), torch.ones(1, requires_grad=True)
    logits_loss(logits, torch.tensor([0]), weight).loss_sum.backward()
    assert weight.grad is None
    assert logits.grad is not None
