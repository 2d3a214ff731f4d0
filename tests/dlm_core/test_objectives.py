"""What is predicted and what is summed, against loops over tokens; gradients; how a batch may be split."""

import itertools
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch

from dlm_core.cross_entropy import HeadLoss, exclude_token, logits_loss, masked_cross_entropy
from dlm_core.objectives import (
    NUM_T_BINS,
    Cart,
    Corrupted,
    ExactCount,
    LossOutput,
    MinSnr,
    Nelbo,
    OneMinusT,
    Snr,
    Targets,
    Uniform,
    Weighting,
    loss_output,
    masked_targets,
    next_token_targets,
)
from dlm_core.schedules import LinearSchedule, PolynomialSchedule
from tests.support.reference import Joint, Tokens, apply_mask, cross_entropy
from tests.support.toy_world import ExactDenoiser, enumerate_rows, exact_count_draws, mixed_batch

EXACT = 1e-12  # a few dozen float64 terms
FLOAT32 = 5e-6  # a few dozen float32 terms, rounded at 6e-8 each

LINEAR, SQUARE = LinearSchedule(), PolynomialSchedule(2.0)
V, MASK, ROWS, LENGTH = 7, 6, 8, 6
OFFSETS = pytest.mark.parametrize("target_offset", [0, 1])


@dataclass(frozen=True)
class Sums:
    loss_sum: float
    nelbo_sum: float
    num_tokens: int
    num_masked: int
    bin_loss_sum: list[float]
    bin_num_masked: list[int]


def _logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of every position; the mask is impossible."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, LENGTH, V, generator=generator, dtype=torch.float64)
    return exclude_token(logits.flatten(0, 1), MASK).view(ROWS, LENGTH, V).to(dtype)


def _loss(
    logits: torch.Tensor, batch: Corrupted, weighting: Weighting, bound: Weighting, target_offset: int = 0
) -> LossOutput:
    """The whole way from the logits of every position."""
    targets = masked_targets(batch, weighting, bound, target_offset=target_offset)
    return loss_output(logits_loss(logits.flatten(0, 1)[targets.select], targets.targets, targets.weight), targets)


def _predicted(batch: Corrupted, target_offset: int) -> list[tuple[int, int]]:
    return [
        (row, place)
        for row, place in itertools.product(range(len(batch.x0)), range(batch.x0.shape[1]))
        if batch.maskable[row, place] and int(batch.xt[row, place]) == MASK and place >= target_offset
    ]


def _naive(logits: torch.Tensor, batch: Corrupted, weighting: Weighting, bound: Weighting, target_offset: int) -> Sums:
    weight, nelbo_weight = weighting.token_weight(batch), bound.token_weight(batch)
    loss_sum = nelbo_sum = 0.0
    bin_loss_sum, bin_num_masked = [0.0] * NUM_T_BINS, [0] * NUM_T_BINS
    for row, place in _predicted(batch, target_offset):
        loss = cross_entropy(logits[row, place - target_offset].tolist(), int(batch.x0[row, place]))
        loss_sum += loss * float(weight[row, place])
        nelbo_sum += loss * float(nelbo_weight[row, place])
        index = min(math.floor(float(batch.t[row, place]) * 4), 3)
        bin_loss_sum[index] += loss
        bin_num_masked[index] += 1
    num_tokens = sum(bool(batch.maskable[row, place]) for row in range(ROWS) for place in range(target_offset, LENGTH))
    return Sums(loss_sum, nelbo_sum, num_tokens, sum(bin_num_masked), bin_loss_sum, bin_num_masked)


def _assert_sums(output: LossOutput, expected: Sums, rel: float = EXACT) -> None:
    assert float(output.loss_sum) == pytest.approx(expected.loss_sum, rel=rel)
    assert float(output.nelbo_sum) == pytest.approx(expected.nelbo_sum, rel=rel)
    assert int(output.num_tokens) == expected.num_tokens
    assert int(output.num_masked) == expected.num_masked
    assert output.bin_loss_sum.tolist() == pytest.approx(expected.bin_loss_sum, rel=rel)
    assert output.bin_num_masked.tolist() == expected.bin_num_masked


# Which tokens


@OFFSETS
def test_masked_targets_of_mixed_batch_equal_naive_loop(target_offset):
    batch = mixed_batch()
    targets = masked_targets(batch, OneMinusT(), Nelbo(SQUARE), target_offset=target_offset)
    predicted = _predicted(batch, target_offset)
    assert targets.select.tolist() == [row * LENGTH + place - target_offset for row, place in predicted]
    assert targets.targets.tolist() == [int(batch.x0[at]) for at in predicted]
    assert targets.t.tolist() == [float(batch.t[at]) for at in predicted]
    assert targets.weight.tolist() == pytest.approx([1 - float(batch.t[at]) for at in predicted], rel=EXACT)
    assert targets.nelbo_weight.tolist() == pytest.approx([2 / float(batch.t[at]) for at in predicted], rel=EXACT)
    assert int(targets.num_tokens) == int(batch.maskable[:, target_offset:].sum())


def test_mixed_batch_holds_what_it_says():
    batch = mixed_batch()
    assert batch.xt[3, 0] == MASK
    assert not batch.is_masked[3, 0]  # a masked prompt is not predicted
    assert batch.is_masked.sum(dim=1).tolist() == [2, 0, 2, 2, 3, 0, 3, 6]
    assert not batch.maskable[5].any()
    assert batch.is_masked[[2, 6, 7], 0].all()  # nobody predicts these with an offset of 1


def test_masked_targets_with_offset_leave_the_batch_as_it_is():
    batch = mixed_batch()
    masked_targets(batch, Uniform(), ExactCount(), target_offset=1)
    assert torch.equal(batch.maskable, mixed_batch().maskable)


def test_exact_count_with_offset_and_a_clean_first_token_equals_nll_given_it():
    joint = Joint(num_real=3, length=4, seed=2)
    exact, x = ExactDenoiser(joint), (1, 0, 2, 2)
    rows = enumerate_rows({x: 1.0}, [(p, t, (False, *hits)) for p, t, hits in exact_count_draws(3)], 3)
    kept = torch.tensor([False, True, True, True]).expand_as(rows.batch.x0)
    batch = replace(rows.batch, maskable=kept)
    targets = masked_targets(batch, ExactCount(), ExactCount(), target_offset=1)
    logits = exact(batch.xt, targets.select + 1)  # a model whose position l - 1 knows token l
    weight = targets.weight * rows.probability[targets.select // 4]
    first = math.fsum(p for y, p in joint.prob.items() if y[0] == x[0])
    found = float(logits_loss(logits, targets.targets, weight).loss_sum)
    assert found == pytest.approx(math.log(first) - math.log(joint.prob[x]), rel=EXACT)


@pytest.mark.parametrize("weighting", [Uniform(), OneMinusT(), Snr(LINEAR), MinSnr(LINEAR), Cart(0.5)], ids=str)
def test_masked_targets_with_a_bound_that_is_none_is_refused(weighting):
    with pytest.raises(ValueError, match=re.escape(f"{weighting} is not a bound")):
        masked_targets(mixed_batch(), ExactCount(), weighting)


# Next-token targets


def test_importance_of_a_token_multiplies_both_of_its_weights():
    batch = mixed_batch()
    importance = torch.rand(batch.t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    plain = masked_targets(batch, Uniform(), Nelbo(SQUARE))
    found = masked_targets(replace(batch, importance=importance), Uniform(), Nelbo(SQUARE))
    at = importance.flatten()[plain.select]
    assert torch.equal(found.weight, plain.weight * at)
    assert torch.equal(found.nelbo_weight, plain.nelbo_weight * at)


def test_masked_targets_of_text_with_the_mask_in_it_are_refused():
    batch = mixed_batch()
    with pytest.raises(ValueError, match=f"holds the mask token {MASK} in x0 too"):
        masked_targets(replace(batch, x0=batch.xt), Uniform(), Nelbo(SQUARE))


def test_next_token_targets_with_a_causal_model_sum_to_the_nll_given_the_first_token():
    joint = Joint(num_real=3, length=4, seed=6)
    x0 = torch.tensor([[1, 0, 2, 2], [0, 0, 1, 0]])
    targets = next_token_targets(x0, torch.ones_like(x0, dtype=torch.bool))
    expected = 0.0
    for x in x0.tolist():
        first = math.fsum(p for y, p in joint.prob.items() if y[0] == x[0])
        expected += math.log(first) - math.log(joint.prob[tuple(x)])
    logits = torch.stack([_causal(joint, tuple(x0[at // 4].tolist()), at % 4) for at in targets.select.tolist()])
    output = loss_output(logits_loss(logits, targets.targets, targets.weight), targets)
    assert float(output.loss_sum) == pytest.approx(expected, rel=EXACT)
    assert float(output.nelbo_sum) == pytest.approx(expected, rel=EXACT)
    assert (int(output.num_tokens), int(output.num_masked)) == (6, 6)
    assert output.bin_num_masked.tolist() == [0] * NUM_T_BINS
    assert output.bin_loss_sum.tolist() == [0.0] * NUM_T_BINS
    assert targets.t.isnan().all()


def _causal(joint: Joint, x: Tokens, place: int) -> torch.Tensor:
    """Logits of the token after ``place``, from those up to it."""
    xt = apply_mask(x, [other > place for other in range(len(x))], joint.mask_token_id)
    return torch.tensor(joint.logits(xt, place + 1), dtype=torch.float64)


def test_next_token_targets_leave_padding_out():
    x0 = torch.tensor([[5, 4, 3, 2], [1, 2, 3, 4], [9, 8, 7, 6], [3, 3, 3, 3]])
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    targets = next_token_targets(x0, valid)
    assert targets.select.tolist() == [0, 1, 4, 5, 6]
    assert targets.targets.tolist() == [4, 3, 2, 3, 4]
    assert targets.weight.tolist() == targets.nelbo_weight.tolist() == [1.0] * 5
    assert int(targets.num_tokens) == 5
    assert valid[:, 0].tolist() == [True, True, True, False]


def test_next_token_targets_after_left_padding_begin_with_the_second_token():
    valid = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    targets = next_token_targets(torch.arange(10).view(2, 5), valid)
    assert targets.select.tolist() == [2, 3, 6]
    assert targets.targets.tolist() == [3, 4, 7]
    assert int(targets.num_tokens) == 3


# Sums


@OFFSETS
@pytest.mark.parametrize("weighting", [Nelbo(LINEAR), ExactCount(3), OneMinusT(), Cart(0.4)], ids=str)
def test_loss_of_mixed_batch_equals_naive_loop(weighting, target_offset):
    logits, batch = _logits(), mixed_batch()
    output = _loss(logits, batch, weighting, Nelbo(SQUARE), target_offset)
    expected = _naive(logits, batch, weighting, Nelbo(SQUARE), target_offset)
    _assert_sums(output, expected)
    assert min(expected.bin_num_masked) > 0  # else a bin is not tested


@OFFSETS
def test_loss_through_the_chunked_head_equals_loss_of_its_logits(target_offset):
    generator, batch = torch.Generator().manual_seed(1), mixed_batch()
    hidden = torch.randn(ROWS * LENGTH, 3, generator=generator, dtype=torch.float64)
    head = torch.randn(V, 3, generator=generator, dtype=torch.float64)
    targets = masked_targets(batch, Nelbo(LINEAR), ExactCount(), target_offset=target_offset)
    loss = masked_cross_entropy(
        hidden, head, targets.targets, targets.weight, select=targets.select, mask_token_id=MASK, chunk_rows=2
    )
    logits = exclude_token(hidden @ head.T, MASK).view(ROWS, LENGTH, V)
    _assert_sums(loss_output(loss, targets), _naive(logits, batch, Nelbo(LINEAR), ExactCount(), target_offset))


@pytest.mark.parametrize(("t", "index"), [(0.0, 0), (0.2499, 0), (0.25, 1), (0.5, 2), (0.7499, 2), (0.75, 3), (1.0, 3)])
def test_loss_at_the_edge_of_a_bin_counts_in_the_right_one(t, index):
    ones = torch.ones(2, dtype=torch.float64)
    targets = Targets(torch.arange(2), torch.tensor([0, 1]), ones, ones, t * ones, torch.tensor(4))
    output = loss_output(logits_loss(torch.zeros(2, 3, dtype=torch.float64), targets.targets, ones), targets)
    assert output.bin_num_masked.tolist() == [2 if i == index else 0 for i in range(NUM_T_BINS)]
    expected = [2 * math.log(3) if i == index else 0.0 for i in range(NUM_T_BINS)]
    assert output.bin_loss_sum.tolist() == pytest.approx(expected, rel=EXACT)


def test_loss_puts_only_tokens_that_have_a_time_into_bins():
    t = torch.tensor([math.nan, 0.1, math.nan, 0.9], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    targets = Targets(torch.arange(4), torch.arange(4), ones, 2 * ones, t, torch.tensor(9))
    cross_entropy_each = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    output = loss_output(HeadLoss(torch.tensor(3.5, dtype=torch.float64), cross_entropy_each), targets)
    assert output.bin_loss_sum.tolist() == [2.0, 0.0, 0.0, 8.0]
    assert output.bin_num_masked.tolist() == [1, 0, 0, 1]
    assert (float(output.loss_sum), float(output.nelbo_sum)) == (3.5, 30.0)
    assert (int(output.num_tokens), int(output.num_masked)) == (9, 4)


def test_number_of_bins_is_four():
    assert NUM_T_BINS == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_is_summed_in_float32_or_better(dtype):
    logits, batch = _logits(dtype=dtype), mixed_batch()
    output = _loss(logits, batch, Nelbo(LINEAR), ExactCount())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {output.loss_sum.dtype, output.nelbo_sum.dtype, output.bin_loss_sum.dtype} == {wide}
    rel = EXACT if dtype == torch.float64 else FLOAT32
    _assert_sums(output, _naive(logits.double(), batch, Nelbo(LINEAR), ExactCount(), 0), rel)


def test_losses_of_parts_of_a_batch_add_up_to_the_whole():
    logits, batch = _logits(), mixed_batch()
    parts = [_loss(logits[i : i + 1], _rows(batch, slice(i, i + 1)), Nelbo(LINEAR), ExactCount()) for i in range(ROWS)]
    whole = _loss(logits, batch, Nelbo(LINEAR), ExactCount())
    for name in ("loss_sum", "nelbo_sum", "num_tokens", "num_masked", "bin_loss_sum", "bin_num_masked"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, name), rtol=EXACT, atol=0)


def _rows(batch: Corrupted, part: slice) -> Corrupted:
    return replace(
        batch,
        x0=batch.x0[part],
        xt=batch.xt[part],
        t=batch.t[part],
        is_text=batch.is_text[part],
        maskable=batch.maskable[part],
    )


# SUBS: nothing goes to the mask, and what is not masked is carried over


def test_excluded_mask_has_no_probability_and_the_others_sum_to_one():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probs = exclude_token(logits, MASK).log_softmax(dim=1).exp()
    assert probs[:, MASK].tolist() == [0.0] * 5
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(5, dtype=torch.float64), rtol=EXACT, atol=0)
    torch.testing.assert_close(probs[:, :MASK], logits[:, :MASK].softmax(dim=1), rtol=EXACT, atol=0)


def test_loss_over_masked_tokens_equals_loss_over_all_tokens_with_the_others_carried_over():
    logits, batch = _logits(), mixed_batch()
    log_probs = logits.log_softmax(dim=-1)
    carried = torch.full_like(log_probs, -torch.inf).scatter(2, batch.x0[..., None], 0.0)
    log_probs = torch.where(batch.is_masked[..., None], log_probs, carried)
    everywhere = -log_probs.gather(2, batch.x0[..., None]).squeeze(2) / batch.t
    output = _loss(logits, batch, Nelbo(LINEAR), Nelbo(LINEAR))
    assert float(output.loss_sum) == pytest.approx(float(everywhere.sum()), rel=EXACT)


# Gradients


@OFFSETS
def test_gradient_is_the_weighted_error_where_a_masked_token_is_predicted_and_zero_elsewhere(target_offset):
    logits, batch = _logits().requires_grad_(), mixed_batch()
    (gradient,) = torch.autograd.grad(_loss(logits, batch, Nelbo(LINEAR), ExactCount(), target_offset).loss_sum, logits)
    expected = torch.zeros_like(gradient)
    for row, place in _predicted(batch, target_offset):
        error = logits.detach()[row, place - target_offset].softmax(dim=0)
        error[batch.x0[row, place]] -= 1
        expected[row, place - target_offset] = error / batch.t[row, place]
    torch.testing.assert_close(gradient, expected, rtol=EXACT, atol=EXACT)


def test_loss_does_not_see_targets_and_logits_of_tokens_that_are_not_masked():
    logits, batch = _logits(), mixed_batch()
    shown = ~batch.is_masked & (batch.xt != batch.mask_token_id)
    other = replace(batch, **{x: torch.where(shown, (batch.x0 + 1) % 6, getattr(batch, x)) for x in ("x0", "xt")})
    elsewhere = torch.where(batch.is_masked[..., None], logits, logits + 3.0 * torch.arange(V))
    before = _loss(logits, batch, Nelbo(LINEAR), ExactCount())
    after = _loss(elsewhere, other, Nelbo(LINEAR), ExactCount())
    assert torch.equal(before.loss_sum, after.loss_sum)
    assert torch.equal(before.bin_loss_sum, after.bin_loss_sum)
    seen = replace(batch, x0=torch.where(batch.is_masked, (batch.x0 + 1) % 6, batch.x0))
    assert not torch.equal(before.loss_sum, _loss(logits, seen, Nelbo(LINEAR), ExactCount()).loss_sum)


def test_only_the_objective_has_a_gradient():
    output = _loss(_logits().requires_grad_(), mixed_batch(), Nelbo(LINEAR), ExactCount())
    assert output.loss_sum.requires_grad
    assert not output.nelbo_sum.requires_grad
    assert not output.bin_loss_sum.requires_grad


@pytest.mark.parametrize("micro_batch_seqs", [1, 2, 4])
@OFFSETS
def test_gradient_over_the_global_count_does_not_depend_on_how_the_batch_is_split(micro_batch_seqs, target_offset):
    batch, generator = mixed_batch(), torch.Generator().manual_seed(3)
    shapes = {"embedding": (V, 3), "head": (V, 3)}
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }

    def gradient(parts: list[Corrupted]) -> list[torch.Tensor]:
        outputs = []
        for part in parts:
            context = weights["embedding"][part.xt]
            hidden = (context + context.mean(dim=1, keepdim=True)).tanh().flatten(0, 1)
            targets = masked_targets(part, Nelbo(LINEAR), ExactCount(), target_offset=target_offset)
            head = masked_cross_entropy(
                hidden, weights["head"], targets.targets, targets.weight, select=targets.select, mask_token_id=MASK
            )
            outputs.append(loss_output(head, targets))
        num_tokens = sum(int(output.num_tokens) for output in outputs)
        accumulated = [torch.zeros_like(w) for w in weights.values()]
        for output in outputs:
            for total, part in zip(
                accumulated, torch.autograd.grad(output.loss_sum / num_tokens, list(weights.values())), strict=True
            ):
                total += part
        return accumulated

    starts = range(0, ROWS, micro_batch_seqs)
    split = gradient([_rows(batch, slice(start, start + micro_batch_seqs)) for start in starts])
    for part, whole in zip(split, gradient([batch]), strict=True):
        torch.testing.assert_close(part, whole, rtol=EXACT, atol=EXACT)
        assert float(whole.abs().max()) > 0.01  # else it says nothing


@pytest.mark.parametrize(("row", "num_tokens"), [(1, 6), (5, 0)])
def test_loss_without_a_masked_token_is_zero_with_a_zero_gradient(row, num_tokens):
    logits, batch = _logits()[row : row + 1].requires_grad_(), _rows(mixed_batch(), slice(row, row + 1))
    for weighting in (Nelbo(LINEAR), ExactCount(), Cart(0.3), Uniform()):
        output = _loss(logits, batch, weighting, ExactCount())
        (gradient,) = torch.autograd.grad(output.loss_sum, logits)
        assert torch.equal(gradient, torch.zeros_like(logits))
        _assert_sums(
            replace(output, loss_sum=output.loss_sum.detach()), Sums(0.0, 0.0, num_tokens, 0, [0.0] * 4, [0] * 4)
        )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["xt", "t", "is_text", "maskable", "importance"])
def test_corrupted_of_columns_in_another_shape_raises(name):
    batch = replace(mixed_batch(), importance=torch.ones_like(mixed_batch().t))
    cut = getattr(batch, name)[:, :1]
    with pytest.raises(
        ValueError, match=re.escape(f"{name} has the shape {tuple(cut.shape)}, x0 {tuple(batch.x0.shape)};")
    ):
        replace(batch, **{name: cut})


@pytest.mark.parametrize("t", [-0.005, 1.005, math.nan])
def test_corrupted_of_a_time_outside_the_unit_interval_raises(t):
    batch = mixed_batch()
    times = batch.t.clone()
    times[1, 2] = t
    with pytest.raises(ValueError, match=f"t is {t}; it must lie in"):
        replace(batch, t=times)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("target_offset", [-1, 2])
def test_masked_targets_of_an_offset_that_is_no_shift_raises(target_offset):
    with pytest.raises(ValueError, match=f"target_offset is {target_offset};"):
        masked_targets(mixed_batch(), Nelbo(LINEAR), target_offset=target_offset)


@pytest.mark.parametrize("value", [-0.5, math.nan])
def test_masked_targets_of_an_importance_that_is_none_raises(value):
    importance = torch.ones_like(mixed_batch().t)
    importance[0, 0] = value
    with pytest.raises(ValueError, match="importance is negative or nan somewhere"):
        masked_targets(replace(mixed_batch(), importance=importance), Nelbo(LINEAR))


def test_masked_targets_of_a_changed_token_raises_and_names_it():
    batch = mixed_batch()
    row, place = (~batch.is_masked & (batch.xt != MASK)).nonzero()[-1].tolist()
    xt = batch.xt.clone()
    xt[row, place] = (batch.x0[row, place] + 1) % MASK
    with pytest.raises(ValueError, match=rf"xt\[{row}, {place}\] is {int(xt[row, place])}, neither x0's"):
        masked_targets(replace(batch, xt=xt), Nelbo(LINEAR))


def test_without_a_bound_to_watch_there_is_no_sum_of_one():
    with_bound = _loss(_logits(), mixed_batch(), Nelbo(LINEAR), ExactCount())
    without = _loss(_logits(), mixed_batch(), Nelbo(LINEAR), None)
    assert without.nelbo_sum is None
    assert torch.equal(without.loss_sum, with_bound.loss_sum)
