"""A head with a bias is a head whose rows have one more column, beside hidden states that end in 1."""

import pytest
import torch

from dlm_core.cross_entropy import HeadLoss, masked_cross_entropy
from tests.support.head_case import CHUNKS, NEVER, SELECT, TOLERANCE, Case, V, make_case

BIAS = torch.linspace(-2.0, 3.0, V, dtype=torch.float64)


def _with_bias(case: Case, bias: torch.Tensor, **options) -> HeadLoss:
    return case.loss(head_bias=bias, **options)


def _with_column(case: Case, bias: torch.Tensor, **options) -> HeadLoss:
    hidden = torch.cat([case.hidden, torch.ones_like(case.hidden[:, :1])], dim=1)
    head = torch.cat([case.head, bias[:, None]], dim=1)
    return masked_cross_entropy(hidden, head, case.targets, case.weight, select=case.select, **options)


@pytest.mark.parametrize("options", [*({"chunk_rows": rows} for rows in CHUNKS), {"implementation": "torch"}])
@pytest.mark.parametrize("mask_token_id", [None, NEVER])
@pytest.mark.parametrize("select", [SELECT, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_with_bias_equals_one_more_column(options, mask_token_id, select, dtype):
    found = {}
    for form in (_with_bias, _with_column):
        case, bias = make_case(dtype, select), BIAS.to(dtype, copy=True).requires_grad_()
        out = form(case, bias, mask_token_id=mask_token_id, **options)
        (2.5 * out.loss_sum).backward()
        found[form] = [out.loss_sum.detach(), out.cross_entropy, case.hidden.grad, case.head.grad, bias.grad]
    for ours, wanted in zip(found[_with_bias], found[_with_column], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=10 * TOLERANCE[dtype], atol=100 * TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["chunked", "torch"])
def test_bias_alone_gets_its_gradient(implementation):
    case, bias = make_case(), BIAS.clone().requires_grad_()
    frozen = Case(case.hidden.detach(), case.head.detach(), case.targets, case.weight, case.select)
    _with_bias(frozen, bias, implementation=implementation).loss_sum.backward()
    other = BIAS.clone().requires_grad_()
    _with_bias(case, other, implementation=implementation).loss_sum.backward()
    assert bias.grad is not None
    assert float(bias.grad.abs().sum()) > 1.0
    torch.testing.assert_close(bias.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_bias_of_bf16_gets_a_gradient_summed_in_float32():
    case, bias = make_case(torch.bfloat16), BIAS.to(torch.bfloat16).requires_grad_()
    _with_bias(case, bias).loss_sum.backward()
    wide, exact = make_case(torch.bfloat16), BIAS.to(torch.bfloat16).double().requires_grad_()
    logits = (wide.hidden @ wide.head.t()).double()[SELECT] + exact
    nats = torch.nn.functional.cross_entropy(logits, wide.targets, reduction="none")
    (nats * wide.weight.double()).sum().backward()
    assert bias.grad is not None
    assert exact.grad is not None
    assert bias.grad.dtype == torch.bfloat16
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=2.0**-8, atol=1e-4)


def test_without_grad_mode_the_bias_still_counts():
    case = make_case()
    with torch.no_grad():
        plain, biased = case.loss(), _with_bias(case, BIAS)
    assert not biased.loss_sum.requires_grad
    assert abs(float(plain.loss_sum - biased.loss_sum)) > 1e-3
