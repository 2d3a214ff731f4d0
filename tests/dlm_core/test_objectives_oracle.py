"""The training loss in a world small enough to enumerate, and against a naive loop over tokens."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch

from dlm_core.corruption import mask_tokens, sample_times
from dlm_core.objectives import NUM_T_BINS, LossOutput, masked_nelbo
from dlm_core.schedules import LinearSchedule, nelbo_weight
from tests.support import reference
from tests.support.toy_world import ExactDenoiser

FLOAT64_RTOL = 1e-10  # thousands of float64 roundings
FLOAT32_RTOL = 5e-6  # the loss is float32: about a hundred terms, rounded at 6e-8 each
SIGMAS = 5.0  # a fair draw leaves this many standard errors once in two million
NUM_NODES = 5  # Gauss-Legendre is exact up to degree 9; the integrand has degree L - 1

SCHEDULE = LinearSchedule()


@pytest.fixture(scope="module", params=[3, 4], ids=["L=3", "L=4"])
def joint(request) -> reference.Joint:
    return reference.Joint(num_real=3, length=request.param, seed=request.param, sharpness=2.0)


@pytest.fixture(scope="module")
def denoise(joint) -> ExactDenoiser:
    return ExactDenoiser(joint)


def _time_nodes() -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes in (0, 1) and weights of an integral over t."""
    nodes, weights = np.polynomial.legendre.leggauss(NUM_NODES)
    return torch.from_numpy(nodes + 1) / 2, torch.from_numpy(weights) / 2


def _weight(t: torch.Tensor) -> torch.Tensor:
    return nelbo_weight(SCHEDULE.alpha(t), SCHEDULE.dalpha(t))


def _expected_loss(x: reference.Tokens, logits_at, mask_token_id: int) -> float:
    """masked_nelbo over every mask and every node of t, each row weighted with its probability."""
    nodes, node_weights = _time_nodes()
    masks = torch.tensor(reference.all_masks(len(x)))
    t = nodes.repeat_interleave(len(masks))
    is_masked = masks.repeat(NUM_NODES, 1)
    x0 = torch.tensor(x).expand(len(t), -1)
    xt = torch.where(is_masked, mask_token_id, x0)
    alpha_t, num_masked = SCHEDULE.alpha(t), is_masked.sum(dim=1)
    probability = (1 - alpha_t) ** num_masked * alpha_t ** (len(x) - num_masked)
    select = is_masked.flatten().nonzero().squeeze(1)
    output = masked_nelbo(
        logits_at(xt, select),
        x0.flatten()[select],
        select // len(x),
        t,
        _weight(t) * probability * node_weights.repeat_interleave(len(masks)),
        torch.ones_like(is_masked),
    )
    return float(output.loss_sum)


def _random_batch(num_rows: int = 8, seq_len: int = 6, vocab_size: int = 7):
    """x0, xt, t and logits of every position; the mask token is the last id."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(vocab_size - 1, (num_rows, seq_len), generator=generator)
    t = sample_times(0, 0, num_rows, 1e-3)
    xt = mask_tokens(x0, t, torch.arange(num_rows), noise_seed=0, step=0, mask_token_id=vocab_size - 1)
    logits = torch.randn(num_rows, seq_len, vocab_size, generator=generator)
    logits[..., -1] = -torch.inf
    return x0, xt, t, logits


def _loss(logits, x0, xt, t, loss_mask=None) -> LossOutput:
    """masked_nelbo from the logits of every position."""
    mask_token_id, seq_len = logits.shape[-1] - 1, x0.shape[1]
    select = (xt == mask_token_id).flatten().nonzero().squeeze(1)
    return masked_nelbo(
        logits.flatten(0, 1)[select],
        x0.flatten()[select],
        select // seq_len,
        t,
        _weight(t),
        torch.ones_like(x0, dtype=torch.bool) if loss_mask is None else loss_mask,
    )


# The bound is the likelihood when the denoiser is exact


def test_nelbo_with_exact_conditionals_equals_nll(joint, denoise):
    for x, p in joint.prob.items():
        assert _expected_loss(x, denoise, joint.mask_token_id) == pytest.approx(-math.log(p), rel=FLOAT32_RTOL)


def test_nelbo_weighting_in_float64_equals_nll(joint):
    nodes, node_weights = _time_nodes()
    alphas, weights = SCHEDULE.alpha(nodes).tolist(), _weight(nodes).tolist()
    cache = {(xt, place): joint.logits(xt, place) for xt in joint.noised_sequences() for place in range(joint.length)}
    for x, p in joint.prob.items():
        terms = []
        for is_masked in reference.all_masks(joint.length):
            xt, num_masked = reference.apply_mask(x, is_masked, joint.mask_token_id), sum(is_masked)
            masked = (place for place in range(joint.length) if is_masked[place])
            loss = math.fsum(reference.cross_entropy(cache[xt, place], x[place]) for place in masked)
            for alpha, weight, node_weight in zip(alphas, weights, node_weights.tolist(), strict=True):
                probability = (1 - alpha) ** num_masked * alpha ** (joint.length - num_masked)
                terms.append(node_weight * weight * probability * loss)
        assert math.fsum(terms) == pytest.approx(-math.log(p), rel=FLOAT64_RTOL)


def test_nelbo_with_wrong_conditionals_exceeds_nll_on_average(joint):
    blank = (joint.mask_token_id,) * joint.length
    marginals = torch.tensor([joint.logits(blank, place) for place in range(joint.length)])
    losses = {
        x: _expected_loss(x, lambda _, select: marginals[select % joint.length], joint.mask_token_id)
        for x in joint.prob
    }
    independent = joint.product_of_marginals()
    for x, loss in losses.items():
        assert loss == pytest.approx(-math.log(independent[x]), rel=FLOAT32_RTOL)
    gap = math.fsum(p * (losses[x] + math.log(p)) for x, p in joint.prob.items())
    assert gap > 0.1  # nats: the mutual information of the positions of this joint


def test_nelbo_with_uniform_logits_equals_log_of_real_vocabulary():
    logits = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    loss = _expected_loss((0, 2, 1), lambda _, select: logits.expand(len(select), -1), mask_token_id=3)
    assert loss == pytest.approx(3 * math.log(3), rel=FLOAT32_RTOL)


def test_nelbo_over_sampled_times_and_masks_estimates_nll(joint, denoise):
    num_rows, mask_token_id = 20_000, joint.mask_token_id
    x = max(joint.prob, key=joint.prob.__getitem__)
    x0 = torch.tensor(x).expand(num_rows, -1)
    t = sample_times(1, 0, num_rows, t_min=1e-6)
    xt = mask_tokens(x0, t, torch.arange(num_rows), noise_seed=1, step=0, mask_token_id=mask_token_id)
    select = (xt == mask_token_id).flatten().nonzero().squeeze(1)
    rows = select // joint.length
    logits, targets, weight = denoise(xt, select), x0.flatten()[select], _weight(t)
    output = masked_nelbo(logits, targets, rows, t, weight, torch.ones_like(x0, dtype=torch.bool))
    cross_entropy = -logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    row_losses = torch.zeros(num_rows, dtype=torch.float64).index_add_(0, rows, weight[rows] * cross_entropy)
    standard_error = float(row_losses.std()) / math.sqrt(num_rows)
    assert abs(float(output.loss_sum) / num_rows + math.log(joint.prob[x])) < SIGMAS * standard_error
    assert standard_error < -0.05 * math.log(joint.prob[x])  # else the line above says nothing


def test_nelbo_over_sampled_masks_with_uniform_logits_estimates_log_vocabulary():
    num_rows, seq_len, t_min = 2000, 32, 1e-3
    x0 = torch.zeros(num_rows, seq_len, dtype=torch.int64)
    t = sample_times(2, 0, num_rows, t_min)
    xt = mask_tokens(x0, t, torch.arange(num_rows), noise_seed=2, step=0, mask_token_id=5)
    logits = torch.zeros(num_rows, seq_len, 6)
    logits[..., -1] = -torch.inf
    output = _loss(logits, x0, xt, t)
    # One row's mean loss has variance (-ln t_min - (1 - t_min)) / (1 - t_min) / seq_len, in units of log(V)^2
    sigma = math.sqrt((-math.log(t_min) - (1 - t_min)) / (1 - t_min) / (seq_len * num_rows))
    ratio = float(output.loss_sum) / int(output.num_tokens) / math.log(5)
    assert abs(ratio - 1) < SIGMAS * sigma


# Against a naive loop


def test_masked_nelbo_of_random_batch_equals_naive_loop():
    x0, xt, t, logits = _random_batch()
    loss_sum, num_masked = 0.0, 0
    bin_loss_sum, bin_num_masked = [0.0] * NUM_T_BINS, [0] * NUM_T_BINS
    for row in range(x0.shape[0]):
        for place in range(x0.shape[1]):
            if int(xt[row, place]) != 6:
                continue
            loss = reference.cross_entropy(logits[row, place].tolist(), int(x0[row, place]))
            loss_sum += loss / float(t[row])
            num_masked += 1
            index = math.floor(float(t[row]) * NUM_T_BINS)
            bin_loss_sum[index] += loss
            bin_num_masked[index] += 1
    output = _loss(logits, x0, xt, t)
    assert float(output.loss_sum) == pytest.approx(loss_sum, rel=FLOAT32_RTOL)
    assert output.bin_loss_sum.tolist() == pytest.approx(bin_loss_sum, rel=FLOAT32_RTOL)
    assert output.bin_num_masked.tolist() == bin_num_masked
    assert int(output.num_masked) == num_masked
    assert int(output.num_tokens) == x0.numel()
    assert min(bin_num_masked) > 0  # else a bin is not tested


@pytest.mark.parametrize(("t", "index"), [(0.0, 0), (0.2499, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 3)])
def test_masked_nelbo_at_the_edge_of_a_bin_counts_in_the_right_one(t, index):
    output = masked_nelbo(
        torch.zeros(2, 3),
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        torch.tensor([t]),
        torch.ones(1),
        torch.ones(1, 4, dtype=torch.bool),
    )
    assert output.bin_num_masked.tolist() == [2 if i == index else 0 for i in range(NUM_T_BINS)]
    assert float(output.bin_loss_sum[index]) == pytest.approx(2 * math.log(3), rel=FLOAT32_RTOL)


def test_masked_nelbo_with_padding_counts_valid_tokens_alone():
    x0, xt, t, logits = _random_batch()
    loss_mask = torch.arange(x0.shape[1])[None, :] < torch.arange(1, x0.shape[0] + 1)[:, None]
    output = _loss(logits, x0, xt, t, loss_mask)
    assert int(output.num_tokens) == sum(min(row + 1, x0.shape[1]) for row in range(x0.shape[0]))


def test_masked_nelbo_of_bfloat16_logits_is_taken_in_float32():
    x0, xt, t, logits = _random_batch()
    rounded = logits.bfloat16()
    output = _loss(rounded, x0, xt, t)
    assert output.loss_sum.dtype == torch.float32
    assert torch.equal(output.loss_sum, _loss(rounded.float(), x0, xt, t).loss_sum)


# Gradients


def test_masked_nelbo_has_gradient_at_masked_positions_alone():
    x0, xt, t, logits = _random_batch()
    logits.requires_grad_()
    _loss(logits, x0, xt, t).loss_sum.backward()
    is_masked = xt == 6
    assert torch.equal(logits.grad[~is_masked], torch.zeros_like(logits.grad[~is_masked]))
    one_hot = torch.nn.functional.one_hot(x0, 7)
    expected = (logits.detach().softmax(dim=-1) - one_hot) / t.float()[:, None, None]
    torch.testing.assert_close(logits.grad[is_masked], expected[is_masked], rtol=FLOAT32_RTOL, atol=FLOAT32_RTOL)


def test_masked_nelbo_with_other_unmasked_targets_and_logits_is_unchanged():
    x0, xt, t, logits = _random_batch()
    is_masked = xt == 6
    other_x0 = torch.where(is_masked, x0, (x0 + 1) % 6)
    other_logits = torch.where(is_masked[..., None], logits, logits + 3.0 * torch.arange(7))
    changed = _loss(other_logits, other_x0, xt, t)
    for before, after in zip(astuple(_loss(logits, x0, xt, t)), astuple(changed), strict=True):
        assert torch.equal(before, after)
    masked_target_changed = torch.where(is_masked, (x0 + 1) % 6, x0)
    assert not torch.equal(_loss(logits, masked_target_changed, xt, t).loss_sum, changed.loss_sum)


def test_masked_nelbo_without_masked_positions_is_zero_with_gradient_path():
    weights = torch.ones(4, 7, requires_grad=True)
    output = masked_nelbo(
        weights[torch.zeros(0, dtype=torch.int64)],
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([0.5, 0.9]),
        torch.tensor([2.0, 1.0]),
        torch.ones(2, 3, dtype=torch.bool),
    )
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == 0.0
    assert torch.equal(weights.grad, torch.zeros(4, 7))
    assert int(output.num_tokens) == 6
    assert int(output.num_masked) == 0
    assert output.bin_num_masked.tolist() == [0] * NUM_T_BINS


@pytest.mark.parametrize("micro_batch_seqs", [1, 2, 3, 8])
def test_masked_nelbo_summed_over_micro_batches_equals_the_whole_batch(micro_batch_seqs):
    x0, xt, t, logits = _random_batch()
    logits.requires_grad_()
    whole = _loss(logits, x0, xt, t)
    (whole_gradient,) = torch.autograd.grad(whole.loss_sum, logits)
    parts = torch.arange(8).split(micro_batch_seqs)
    outputs = [_loss(logits[part], x0[part], xt[part], t[part]) for part in parts]
    (gradient,) = torch.autograd.grad(sum(output.loss_sum for output in outputs), logits)
    torch.testing.assert_close(gradient, whole_gradient, rtol=FLOAT32_RTOL, atol=0)
    for name in ("loss_sum", "bin_loss_sum"):
        total = sum(getattr(output, name).detach() for output in outputs)
        torch.testing.assert_close(total, getattr(whole, name).detach(), rtol=FLOAT32_RTOL, atol=0)
    for name in ("num_tokens", "num_masked", "bin_num_masked"):
        assert torch.equal(sum(getattr(output, name) for output in outputs), getattr(whole, name))
