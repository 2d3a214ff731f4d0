"""Cross-entropy of logits that are already there, and what it shares with the chunked head."""

import math

import pytest
import torch
import torch.nn.functional as F

from dlm_core.cross_entropy import compute_dtype, exclude_token, logits_loss, token_cross_entropy
from tests.support.head_case import NEVER, TARGETS, TOLERANCE, N, V, assert_close, make_case, row_loss


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
    logits = (make_case(dtype).hidden @ make_case(dtype).head.T).detach()
    targets = torch.tensor(TARGETS[:N])
    losses = token_cross_entropy(logits, targets)
    assert losses.dtype == compute_dtype(dtype)
    expected = [row_loss(row, target) for row, target in zip(logits.tolist(), TARGETS[:N], strict=True)]
    assert_close(losses, torch.tensor(expected, dtype=torch.float64), TOLERANCE[losses.dtype])


def test_token_cross_entropy_of_excluded_logits_has_zero_gradient_at_the_excluded_id():
    logits = torch.randn(4, V, dtype=torch.float64, requires_grad=True)
    token_cross_entropy(exclude_token(logits, NEVER), torch.tensor([0, 1, 2, 3])).sum().backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[:, NEVER]) == 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_loss_equals_the_head_that_made_the_logits(dtype):
    case = make_case(dtype)
    ours, of_logits = case.loss(), logits_loss(case.hidden[case.select] @ case.head.T, case.targets, case.weight)
    assert of_logits.loss_sum.dtype == ours.loss_sum.dtype
    assert not of_logits.cross_entropy.requires_grad
    tolerance = TOLERANCE[ours.loss_sum.dtype]
    assert_close(of_logits.cross_entropy, ours.cross_entropy, tolerance)
    assert_close(of_logits.loss_sum.detach(), ours.loss_sum.detach(), tolerance)


def test_logits_loss_gradient_is_the_weighted_probability_less_one_at_the_target():
    case = make_case()
    logits = (case.hidden[case.select] @ case.head.T).detach().requires_grad_()
    (grad,) = torch.autograd.grad(logits_loss(logits, case.targets, case.weight).loss_sum, [logits])
    expected = case.weight[:, None].double() * (logits.detach().softmax(-1) - F.one_hot(case.targets, V))
    assert_close(grad, expected, TOLERANCE[torch.float64])


def test_logits_loss_of_float32_is_float32_whatever_the_weight():
    logits, targets = torch.zeros(1, V), torch.tensor([0])
    assert logits_loss(logits, targets, torch.ones(1, dtype=torch.float64)).loss_sum.dtype == torch.float32


def test_logits_loss_gives_weight_no_gradient():
    logits, weight = torch.zeros(1, V, requires_grad=True), torch.ones(1, requires_grad=True)
    logits_loss(logits, torch.tensor([0]), weight).loss_sum.backward()
    assert weight.grad is None
    assert logits.grad is not None
