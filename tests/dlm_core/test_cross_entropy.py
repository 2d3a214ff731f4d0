"""The chunked head: against a float64 loop over rows and autograd of the formula written out in full."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dlm_core import cross_entropy as module
from dlm_core.cross_entropy import exclude_token, logits_loss, masked_cross_entropy, token_cross_entropy
from tests.support.head_case import (
    BF16_ROUNDING,
    CHUNKS,
    IMPLEMENTATIONS,
    NEVER,
    SCALE,
    SELECT,
    TARGETS,
    TOLERANCE,
    UNCHOSEN,
    WEIGHT,
    D,
    M,
    N,
    Products,
    V,
    assert_close,
    full_gradients,
    gradients,
    loop,
    make_case,
    row_loss,
)

IMPLEMENTED = [(dtype, name) for name in IMPLEMENTATIONS for dtype in (torch.float64, torch.float32)]
IMPLEMENTED.append((torch.bfloat16, "chunked"))


# Loss and gradients


@pytest.mark.parametrize("mask_token_id", [None, NEVER])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("select", [SELECT, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_of_chosen_rows_equals_the_loop(dtype, select, chunk_rows, mask_token_id):
    case = make_case(dtype, select)
    out = case.loss(chunk_rows=chunk_rows, mask_token_id=mask_token_id)
    losses = loop(case, mask_token_id)
    assert_close(out.cross_entropy, torch.tensor(losses, dtype=torch.float64), TOLERANCE[dtype])
    expected = sum(w * loss for w, loss in zip(case.weight.tolist(), losses, strict=True))
    assert float(out.loss_sum.detach()) == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert out.loss_sum.dtype == out.cross_entropy.dtype == dtype


@pytest.mark.parametrize("mask_token_id", [None, NEVER])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("select", [SELECT, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_scaled_from_above_equal_autograd_of_the_full_formula(dtype, select, chunk_rows, mask_token_id):
    case = make_case(dtype, select)
    expected = full_gradients(case, mask_token_id, SCALE)
    for grad, reference in zip(
        gradients(case, SCALE, chunk_rows=chunk_rows, mask_token_id=mask_token_id), expected, strict=True
    ):
        assert grad.dtype == dtype
        assert_close(grad, reference, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_gradcheck_in_float64_passes(chunk_rows):
    case = make_case()

    def loss_sum(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return replace(case, hidden=hidden, head=head).loss(chunk_rows=chunk_rows, mask_token_id=NEVER).loss_sum

    assert torch.autograd.gradcheck(loss_sum, (case.hidden, case.head))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_sum_is_the_weighted_sum_of_cross_entropy_which_has_no_gradient(implementation):
    case = make_case()
    out = case.loss(implementation=implementation)
    assert float(out.loss_sum.detach()) == pytest.approx(float((case.weight * out.cross_entropy).sum()), rel=1e-14)
    assert out.loss_sum.requires_grad
    assert not out.cross_entropy.requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_rows_not_chosen_is_exactly_zero(implementation):
    hidden_grad, _ = gradients(make_case(), SCALE, implementation=implementation)
    assert torch.count_nonzero(hidden_grad[UNCHOSEN]) == 0
    assert all(torch.count_nonzero(hidden_grad[row]) for row in set(SELECT))


@pytest.mark.parametrize(("dtype", "implementation"), IMPLEMENTED)
def test_gradient_of_the_id_never_predicted_is_exactly_zero(dtype, implementation):
    hidden_grad, head_grad = gradients(make_case(dtype), SCALE, mask_token_id=NEVER, implementation=implementation)
    assert torch.count_nonzero(head_grad[NEVER]) == 0
    assert torch.count_nonzero(head_grad[[v for v in range(V) if v != NEVER]].sum(1)) == V - 1
    assert head_grad.isfinite().all()
    assert hidden_grad.isfinite().all()


def test_probability_with_an_id_never_predicted_is_normalised_over_the_others():
    case = make_case(select=[2])
    total = sum(
        math.exp(-float(replace(case, targets=torch.tensor([v])).loss(mask_token_id=NEVER).cross_entropy[0]))
        for v in range(V)
        if v != NEVER
    )
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_of_zero_gives_zero_loss_and_gradients_but_keeps_cross_entropy(implementation):
    case = make_case()
    silent = replace(case, weight=torch.zeros(M))
    assert float(silent.loss(implementation=implementation).loss_sum.detach()) == 0.0
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(silent, SCALE, implementation=implementation))
    assert torch.equal(silent.loss().cross_entropy, case.loss().cross_entropy)


@pytest.mark.parametrize("mask_token_id", [None, NEVER])
@pytest.mark.parametrize(("dtype", "implementation"), IMPLEMENTED)
def test_no_chosen_row_gives_zero_loss_and_zero_gradients(dtype, mask_token_id, implementation):
    case = make_case(dtype, select=[])
    out = case.loss(mask_token_id=mask_token_id, implementation=implementation)
    assert float(out.loss_sum.detach()) == 0.0
    assert out.cross_entropy.shape == (0,)
    hidden_grad, head_grad = gradients(case, SCALE, mask_token_id=mask_token_id, implementation=implementation)
    assert hidden_grad.shape == (N, D)
    assert head_grad.shape == (V, D)
    assert torch.count_nonzero(hidden_grad) == torch.count_nonzero(head_grad) == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask_token_id", [None, NEVER])
@pytest.mark.parametrize("select", [SELECT, None])
def test_torch_implementation_equals_chunked(select, mask_token_id, dtype):
    case = make_case(dtype, select)
    ours, theirs = (
        case.loss(mask_token_id=mask_token_id),
        case.loss(mask_token_id=mask_token_id, implementation="torch"),
    )
    assert_close(theirs.cross_entropy, ours.cross_entropy, TOLERANCE[dtype])
    assert_close(theirs.loss_sum.detach(), ours.loss_sum.detach(), TOLERANCE[dtype])
    of_theirs = gradients(case, SCALE, mask_token_id=mask_token_id, implementation="torch")
    for grad, reference in zip(of_theirs, gradients(case, SCALE, mask_token_id=mask_token_id), strict=True):
        assert_close(grad, reference, TOLERANCE[dtype])


def test_torch_implementation_in_bf16_which_rounds_losses_is_refused():
    with pytest.raises(ValueError, match=r'implementation="torch" rounds the losses to the torch.bfloat16 of hidden'):
        make_case(torch.bfloat16).loss(implementation="torch")


# Who asks for a gradient


@pytest.mark.parametrize(
    ("of_hidden", "of_head", "products_a_chunk"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_gradients_asked_for_are_computed(dtype, of_hidden, of_head, products_a_chunk):
    both = make_case(dtype)
    expected = gradients(both, SCALE, chunk_rows=3)
    wanted = (of_hidden, of_head)
    case = replace(
        both,
        hidden=both.hidden.detach().requires_grad_(of_hidden),
        head=both.head.detach().requires_grad_(of_head),
    )
    with Products() as products:
        loss_sum = case.loss(chunk_rows=3).loss_sum
    assert products.num_products == products_a_chunk * M // 3
    assert ("scatter_add_" in products.names) == loss_sum.requires_grad == any(wanted)
    if any(wanted):
        (loss_sum * SCALE).backward()
    for tensor, is_wanted, grad in zip((case.hidden, case.head), wanted, expected, strict=True):
        assert (tensor.grad is not None) == is_wanted
        assert tensor.grad is None or torch.equal(tensor.grad, grad)


def test_without_grad_mode_no_gradient_is_computed():
    case = make_case()
    with torch.no_grad(), Products() as products:
        out = case.loss(chunk_rows=3)
    assert products.num_products == M // 3
    assert not out.loss_sum.requires_grad
    assert float(out.loss_sum) == float(case.loss(chunk_rows=3).loss_sum.detach())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_gets_no_gradient(implementation):
    case = make_case()
    case.weight.requires_grad_()
    case.loss(implementation=implementation).loss_sum.backward()
    assert case.weight.grad is None
    assert case.head.grad is not None


def test_inputs_are_left_as_they_were():
    case, before = make_case(), make_case()
    case.loss(chunk_rows=3, mask_token_id=NEVER).loss_sum.backward()
    for name in ("hidden", "head", "targets", "weight", "select"):
        assert torch.equal(getattr(case, name), getattr(before, name))


def test_backward_again_gives_the_same_gradients():
    case = make_case()
    loss_sum = case.loss().loss_sum
    first = torch.autograd.grad(loss_sum, [case.hidden, case.head], retain_graph=True)
    again = torch.autograd.grad(loss_sum, [case.hidden, case.head])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_second_derivative_is_refused():
    case = make_case()
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
    assert_close(out.cross_entropy, expected, 2e-3)  # logits of 10,000 have float32 steps of 1e-3
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


@pytest.mark.parametrize("mask_token_id", [None, NEVER])
def test_bf16_loss_is_the_float32_loss_of_its_own_products(mask_token_id):
    case = make_case(torch.bfloat16)
    out = case.loss(mask_token_id=mask_token_id, chunk_rows=M)
    logits = (case.hidden[case.select] @ case.head.T).detach().double()
    if mask_token_id is not None:
        logits[:, mask_token_id] = -math.inf
    losses = [row_loss(row, target) for row, target in zip(logits.tolist(), TARGETS, strict=True)]
    assert out.loss_sum.dtype == out.cross_entropy.dtype == torch.float32
    assert_close(out.cross_entropy, torch.tensor(losses), TOLERANCE[torch.float32])
    expected = sum(w * loss for w, loss in zip(WEIGHT, losses, strict=True))
    assert float(out.loss_sum.detach()) == pytest.approx(expected, rel=TOLERANCE[torch.float32])


@pytest.mark.parametrize("mask_token_id", [None, NEVER])
def test_bf16_gradients_are_the_products_of_rounded_logit_gradients(mask_token_id):
    case = make_case(torch.bfloat16, select=[5, 0, 3, 6, 2, 1])
    rows, targets, weight = case.hidden[case.select].detach(), case.targets, case.weight
    logits = (rows @ case.head.T).detach().double()
    if mask_token_id is not None:
        logits[:, mask_token_id] = -math.inf
    by_logit = ((logits.softmax(-1) - F.one_hot(targets, V)) * weight[:, None]).bfloat16()
    hidden_grad, head_grad = gradients(case, 1.0, mask_token_id=mask_token_id, chunk_rows=len(rows))
    assert hidden_grad.dtype == head_grad.dtype == torch.bfloat16
    assert_close(hidden_grad[case.select], by_logit.double() @ case.head.detach().double(), BF16_ROUNDING)
    assert_close(head_grad, by_logit.double().T @ rows.double(), BF16_ROUNDING)


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
    case = make_case(torch.bfloat16)
    exact = gradients(case, 1.0)
    for grad, reference in zip(gradients(case, 1.0 / num_tokens), exact, strict=True):
        assert torch.equal(grad, (reference.double() / num_tokens).bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_weight_does_not_widen_a_float32_loss(implementation):
    case = make_case(torch.float32)
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
    with Products() as products:
        masked_cross_entropy(
            hidden, head, zeros, torch.ones(num_rows), mask_token_id=1, chunk_rows=chunk_rows
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
    with Products() as products:
        masked_cross_entropy(
            torch.ones(1, D, dtype=dtype), torch.ones(V, D, dtype=dtype), zeros, torch.ones(50), select=zeros
        )
    assert max(products.rows_of_logits()) == expected


def test_default_room_holds_128_rows_of_a_quarter_million_ids():
    vocab_size = 1 << 18
    zeros = torch.zeros(130, dtype=torch.int64)
    with Products() as products:
        masked_cross_entropy(torch.zeros(130, 1), torch.zeros(vocab_size, 1), zeros, torch.ones(130))
    assert sorted(set(products.rows_of_logits(vocab_size))) == [1, 2, 128]  # one: the head, transposed


# Errors


@pytest.mark.parametrize("chunk_rows", [0, -3])
def test_chunk_rows_below_one_is_refused(chunk_rows):
    with pytest.raises(ValueError, match=f"chunk_rows is {chunk_rows}; it must be at least 1"):
        make_case().loss(chunk_rows=chunk_rows)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("num_targets", "num_weights"), [(M, 1), (M, M + 1), (1, M), (M - 1, M - 1)])
@pytest.mark.parametrize("selected", [True, False])
def test_other_numbers_of_targets_or_weights_than_rows_are_refused(selected, num_targets, num_weights):
    case = make_case()
    hidden, select = (case.hidden, case.select) if selected else (case.hidden[case.select], None)
    targets, weight = torch.zeros(num_targets, dtype=torch.int64), torch.ones(num_weights)
    message = f"there are {num_targets} targets and {num_weights} weights for {M} rows"
    with pytest.raises(ValueError, match=message):
        masked_cross_entropy(hidden, case.head, targets, weight, select=select)
    with pytest.raises(ValueError, match=message):
        logits_loss(torch.zeros(M, V), targets, weight)


@pytest.mark.parametrize("mask_token_id", [-1, V])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_id_that_the_head_lacks_is_refused(implementation, mask_token_id):
    message = rf"mask_token_id is {mask_token_id}; the head has the ids 0..{V - 1}"
    with pytest.raises(ValueError, match=message):
        make_case().loss(mask_token_id=mask_token_id, implementation=implementation)
    with pytest.raises(ValueError, match=message):
        exclude_token(torch.zeros(2, V), mask_token_id)


@pytest.mark.parametrize("mask_token_id", [0, V - 1])
def test_first_and_last_id_can_be_the_mask(mask_token_id):
    assert exclude_token(torch.zeros(2, V), mask_token_id).isinf().nonzero()[:, 1].tolist() == [mask_token_id] * 2
    case = replace(make_case(), targets=torch.full((M,), 1))
    assert case.loss(mask_token_id=mask_token_id).loss_sum.isfinite()


@pytest.mark.usefixtures("unchecked")
def test_unknown_implementation_is_refused():
    case = make_case()
    arguments = (case.hidden, case.head, case.targets, case.weight)
    with pytest.raises(ValueError, match='implementation is "Torch"; it must be "chunked" or "torch"'):
        masked_cross_entropy(*arguments, select=case.select, implementation="Torch")


def test_target_of_minus_a_hundred_costs_no_silent_nothing():
    with pytest.raises(IndexError, match="-100"):
        token_cross_entropy(torch.zeros(1, 3), torch.tensor([-100]))


@pytest.mark.parametrize("wide", ["head", "hidden"])
def test_head_and_hidden_of_other_dtypes_multiply_in_that_of_hidden(wide):
    narrow = make_case(torch.bfloat16)
    case = replace(narrow, **{wide: getattr(narrow, wide).float().detach().requires_grad_()})
    same = case if wide == "hidden" else narrow
    same = replace(same, head=same.head.detach().to(same.hidden.dtype).requires_grad_())
    assert torch.equal(case.loss().cross_entropy, same.loss().cross_entropy)
    for grad, value, reference in zip(
        gradients(case, 1.0), (case.hidden, case.head), gradients(same, 1.0), strict=True
    ):
        assert grad.dtype == value.dtype
        assert torch.equal(grad.to(reference.dtype), reference.to(grad.dtype).to(reference.dtype))


@pytest.mark.parametrize("chunk_rows", [0, 3])
def test_chunk_rows_for_the_torch_implementation_is_refused(chunk_rows):
    with pytest.raises(ValueError, match=f'chunk_rows is {chunk_rows}, but implementation="torch"'):
        make_case().loss(chunk_rows=chunk_rows, implementation="torch")


def test_torch_without_its_chunked_head_is_refused(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(ValueError, match=re.escape(f"torch {torch.__version__} has no linear_cross_entropy")):
        make_case().loss(implementation="torch")
    assert make_case().loss().loss_sum.isfinite()
