"""The terms beside the weighted cross-entropy, against their definitions: prior, scores, confidence."""

import math

import pytest
import torch

from dlm_core.cross_entropy import exclude_token
from dlm_core.objectives import confidence_loss, log_concrete_score, log_ratio, prior_loss, score_entropy
from tests.support.reference import Joint, Tokens
from tests.support.toy_world import ExactDenoiser

EXACT = 1e-12  # a few dozen float64 terms
FLOAT32 = 5e-6  # a few dozen float32 terms, rounded at 6e-8 each

V, MASK = 7, 6


def _logits(seed: int, num_rows: int) -> torch.Tensor:
    """The mask is impossible."""
    generator = torch.Generator().manual_seed(seed)
    return exclude_token(torch.randn(num_rows, V, generator=generator, dtype=torch.float64), MASK)


# Prior


@pytest.mark.parametrize("alpha_1", [0.0, 0.05, 1.0])
def test_prior_loss_is_the_divergence_from_masks_and_uniform_tokens(alpha_1):
    num_real, x0 = 5, 2
    end = [alpha_1 * (v == x0) for v in range(num_real)] + [1 - alpha_1]
    prior = [alpha_1 / num_real] * num_real + [1 - alpha_1]
    divergence = math.fsum(q * math.log(q / p) for q, p in zip(end, prior, strict=True) if q > 0)
    found = prior_loss(torch.tensor(alpha_1, dtype=torch.float64), num_real)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(divergence, rel=EXACT)


# Scores


JOINT = Joint(num_real=3, length=3, seed=12)


def _marginal(xt: Tokens, alpha_t: float) -> float:
    """p_t(xt): over every text, the chance that it is noised to xt."""
    total = 0.0
    for x, p in JOINT.prob.items():
        total += p * math.prod((1 - alpha_t) if b == 3 else alpha_t * (a == b) for a, b in zip(x, xt, strict=True))
    return total


@pytest.mark.parametrize("alpha_t", [0.2, 0.5, 0.9])
def test_concrete_score_is_the_ratio_of_marginals(alpha_t):
    denoise = ExactDenoiser(JOINT)
    for xt in JOINT.noised_sequences():
        select = torch.tensor([place for place in range(3) if xt[place] == 3], dtype=torch.int64)
        if not len(select):
            continue
        log_probs = denoise(torch.tensor([xt]), select).log_softmax(dim=1)
        alphas = torch.full((len(select),), alpha_t, dtype=torch.float64)
        score = log_concrete_score(log_probs, alphas).exp()
        for row, place in enumerate(select.tolist()):
            for v in range(3):
                y = (*xt[:place], v, *xt[place + 1 :])
                expected = _marginal(y, alpha_t) / _marginal(xt, alpha_t)
                assert float(score[row, v]) == pytest.approx(expected, rel=EXACT)
            assert float(score[row, 3]) == 0.0


def _score_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, targets, and alpha_t with its slope for 1 - t^2."""
    log_probs = _logits(5, 6).log_softmax(dim=1)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.8, 0.95], dtype=torch.float64)
    return log_probs, torch.tensor([0, 5, 2, 1, 4, 0]), 1 - t**2, -2 * t


def test_score_entropy_of_normalised_score_is_the_weighted_cross_entropy():
    log_probs, targets, alpha_t, dalpha_t = _score_case()
    found = score_entropy(log_concrete_score(log_probs, alpha_t), targets, alpha_t, dalpha_t)
    expected = [
        -float(dalpha_t[m]) / (1 - float(alpha_t[m])) * -float(log_probs[m, targets[m]]) for m in range(len(targets))
    ]
    assert found.tolist() == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("excess", [0.3, 1.0, 2.5])
def test_score_entropy_of_unnormalised_score_pays_for_its_excess_mass(excess):
    log_probs, targets, alpha_t, dalpha_t = _score_case()
    log_score = log_concrete_score(log_probs, alpha_t)
    normal = score_entropy(log_score, targets, alpha_t, dalpha_t)
    found = score_entropy(log_score + math.log(excess), targets, alpha_t, dalpha_t)
    ratio = alpha_t / (1 - alpha_t)
    extra = (excess - 1 - math.log(excess)) * ratio * -dalpha_t / alpha_t
    torch.testing.assert_close(found, normal + extra, rtol=EXACT, atol=0)


def test_log_ratio_is_that_of_signal_to_noise():
    found = log_ratio(torch.tensor([0.25, 0.5, 1e-20], dtype=torch.float64))
    assert found.tolist() == pytest.approx([-math.log(3), 0.0, -20 * math.log(10)], rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("alpha_t", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_score_where_all_or_nothing_is_masked_is_refused(alpha_t):
    log_probs, targets, alphas, dalpha_t = _score_case()
    alphas[2] = alpha_t
    with pytest.raises(ValueError, match=rf"alpha_t is {alpha_t};"):
        log_concrete_score(log_probs, alphas)
    with pytest.raises(ValueError, match=rf"alpha_t is {alpha_t};"):
        score_entropy(log_probs, targets, alphas, dalpha_t)


# Confidence


def _confidence_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Five rows; the prediction is right in 0, 2 and 3."""
    logits = _logits(9, 5)
    best = logits.argmax(dim=1)
    return logits, torch.where(torch.tensor([True, False, True, True, False]), best, (best + 1) % 6)


def test_confidence_loss_is_the_entropy_where_the_prediction_is_right():
    logits, targets = _confidence_case()
    expected = 0.0
    for row in (0, 2, 3):
        weights = [math.exp(z) for z in logits[row, :MASK].tolist()]
        probs = [w / math.fsum(weights) for w in weights]
        expected -= math.fsum(p * math.log(p) for p in probs)
    found = confidence_loss(logits, targets)
    assert float(found.entropy_sum) == pytest.approx(expected, rel=EXACT)
    assert int(found.num_correct) == 3


def test_confidence_loss_with_impossible_ids_has_the_finite_gradient_of_the_entropy():
    logits, targets = _confidence_case()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(confidence_loss(logits, targets).entropy_sum, logits)
    log_probs = logits.detach().log_softmax(dim=1)
    probs = log_probs.exp()
    terms = (probs * log_probs).nan_to_num()  # 0 log 0 = 0
    expected = -(terms - probs * terms.sum(dim=1, keepdim=True))
    expected[[1, 4]] = 0.0
    torch.testing.assert_close(gradient, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_confidence_loss_without_a_right_prediction_is_zero_with_a_zero_gradient(num_rows):
    logits = torch.eye(4, dtype=torch.float64)[:num_rows].requires_grad_()
    found = confidence_loss(logits, torch.full((num_rows,), 3))
    (gradient,) = torch.autograd.grad(found.entropy_sum, logits)
    assert (float(found.entropy_sum.detach()), int(found.num_correct)) == (0.0, 0)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_confidence_loss_of_narrow_logits_is_taken_in_float32():
    logits, targets = _confidence_case()
    narrow = confidence_loss(logits.bfloat16(), targets)
    assert narrow.entropy_sum.dtype == torch.float32
    wide = confidence_loss(logits.bfloat16().double(), targets)
    assert wide.entropy_sum.dtype == torch.float64
    assert float(narrow.entropy_sum) == pytest.approx(float(wide.entropy_sum), rel=FLOAT32)


@pytest.mark.parametrize("alpha_1", [-0.005, 1.005, math.nan])
def test_prior_loss_of_an_alpha_that_is_no_probability_raises(alpha_1):
    with pytest.raises(ValueError, match=f"alpha_1 is {alpha_1}; it must lie in"):
        prior_loss(torch.tensor(alpha_1, dtype=torch.float64), 4)
