"""The expected loss of every objective in a world small enough to enumerate: what is a bound, what isn't, and why."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from dlm_core.blocks import per_token
from dlm_core.corruption import mask_exact_count, mask_tokens, sample_times
from dlm_core.cross_entropy import Denoise, exclude_token
from dlm_core.objectives import (
    Cart,
    Corrupted,
    DiscreteTime,
    ExactCount,
    InverseMaskProb,
    MinSnr,
    Nelbo,
    OneMinusT,
    Snr,
    Uniform,
    Weighting,
    prior_loss,
)
from dlm_core.schedules import SCHEDULES, ClippedSchedule, LinearSchedule, PolynomialSchedule, Schedule
from tests.support import elbo
from tests.support.reference import Joint, Tokens, all_masks, apply_mask
from tests.support.toy_world import (
    Enumerated,
    ExactBlockDenoiser,
    ExactDenoiser,
    bernoulli_draws,
    context_free,
    enumerate_rows,
    exact_count_draws,
    expected_loss,
    expected_output,
    interval_nodes,
    log_time_nodes,
    row_losses,
    schedule_draws,
)

V, L, MASK = 3, 4, 3
LINEAR, SQUARE = LinearSchedule(), PolynomialSchedule(2.0)
ALL_SCHEDULES: dict[str, Schedule] = {**SCHEDULES, "cube": PolynomialSchedule(3.0)}
SCHEDULE_CASES = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
PROBS = (0.7, 0.2, 0.1)  # a prediction that ignores its context
TEXT = (2, 0, 1, 0)

EXACT = 1e-12  # a few hundred terms of float64; polynomials are integrated without error
QUADRATURE = 1e-10  # ten thousand terms, and what ten Gauss nodes leave on each e-fold of t
SIGMAS = 5.0  # a fair draw leaves this many standard errors once in two million
TINY_T = 1e-26  # the square root of it is what an integral over t leaves out at most: 1e-13


@pytest.fixture(scope="module")
def joint() -> Joint:
    return Joint(num_real=V, length=L, seed=4, sharpness=2.0)


@pytest.fixture(scope="module")
def denoise(joint) -> ExactDenoiser:
    return ExactDenoiser(joint)


def _nll(joint: Joint, x: Tokens) -> float:
    return -math.log(joint.prob[x])


def _entropy(joint: Joint) -> float:
    return math.fsum(p * _nll(joint, x) for x, p in joint.prob.items())


def _some(joint: Joint) -> list[Tokens]:
    """The likeliest sequence, the least likely, and two between."""
    ranked = sorted(joint.prob, key=joint.prob.__getitem__)
    return [ranked[0], ranked[27], ranked[54], ranked[-1]]


def _one(x: Tokens, draws: Sequence) -> Enumerated:
    return enumerate_rows({x: 1.0}, draws, MASK)


def _over_time(x: Tokens, schedule: Schedule) -> Enumerated:
    return _one(x, schedule_draws(schedule, *log_time_nodes(TINY_T), len(x)))


def _linear_time(x: Tokens) -> Enumerated:
    return _one(x, schedule_draws(LINEAR, *interval_nodes(), len(x)))


def _masked_once(x: Tokens, mask_prob: float) -> Enumerated:
    """Every mask at one mask probability."""
    return _one(x, bernoulli_draws([0.5], [1.0], [mask_prob], len(x)))


def _ends(schedule: Schedule) -> tuple[float, float]:
    first, last = schedule.mask_prob(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return first, last


def _grid(num_steps: int) -> tuple[list[float], list[float]]:
    return [i / num_steps for i in range(1, num_steps + 1)], [1 / num_steps] * num_steps


def _between(joint: Joint, x: Tokens, low: float, high: float) -> float:
    """The integral over mask probabilities from low to high of the masked cross-entropy / mask probability, naively."""
    terms = []
    losses = {is_masked: _masked_loss(joint, x, is_masked) for is_masked in all_masks(len(x))}
    for p, share in zip(*interval_nodes(low, high), strict=True):
        for is_masked, loss in losses.items() if high > low else ():
            terms.append(share / p * math.prod(p if hit else 1 - p for hit in is_masked) * loss)
    return math.fsum(terms)


def _masked_loss(joint: Joint, x: Tokens, is_masked: Sequence[bool]) -> float:
    xt = apply_mask(x, is_masked, joint.mask_token_id)
    hidden = [place for place, hit in enumerate(is_masked) if hit]
    return -math.fsum(math.log(joint.conditional(xt, place)[x[place]]) for place in hidden)


def _any_order(joint: Joint, x: Tokens) -> float:
    """Mean over all orders of the chain rule."""
    totals = []
    for order in itertools.permutations(range(len(x))):
        for step, place in enumerate(order):
            is_masked = [other in order[step:] for other in range(len(x))]
            xt = apply_mask(x, is_masked, joint.mask_token_id)
            totals.append(-math.log(joint.conditional(xt, place)[x[place]]))
    return math.fsum(totals) / math.factorial(len(x))


# Exact conditionals: every form is -log p


def test_all_forms_with_exact_conditionals_equal_nll(joint, denoise):
    for x in _some(joint):
        nll = pytest.approx(_nll(joint, x), rel=EXACT)
        assert _any_order(joint, x) == nll
        assert expected_loss(_linear_time(x), Nelbo(LINEAR), denoise) == nll
        assert expected_loss(_linear_time(x), InverseMaskProb(LINEAR), denoise) == nll  # the lambda-form
        assert expected_loss(_one(x, exact_count_draws(L)), ExactCount(), denoise) == nll


def test_exact_count_with_exact_conditionals_equals_nll_of_every_sequence(joint, denoise):
    rows = [_one(x, exact_count_draws(L)) for x in joint.prob]
    losses = [expected_loss(row, ExactCount(), denoise) for row in rows]
    assert losses == pytest.approx([_nll(joint, x) for x in joint.prob], rel=EXACT)


@SCHEDULE_CASES
def test_nelbo_of_schedule_with_exact_conditionals_equals_integral_over_its_mask_probs(joint, denoise, schedule):
    x = _some(joint)[1]
    first, last = _ends(schedule)
    found = expected_loss(_over_time(x, schedule), Nelbo(schedule), denoise)
    assert found == pytest.approx(_between(joint, x, first, last), rel=QUADRATURE)
    outside = _between(joint, x, 0.0, first) + _between(joint, x, last, 1.0)
    assert found + outside == pytest.approx(_nll(joint, x), rel=QUADRATURE)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_block_forms_with_exact_conditionals_equal_nll(joint, denoise, block_size):
    times = interval_nodes(num_nodes=max(1, block_size - 1))
    block_denoise = ExactBlockDenoiser(denoise, block_size)
    for x in _some(joint):
        nll = pytest.approx(_nll(joint, x), rel=EXACT)
        timed = _one(x, schedule_draws(LINEAR, *times, block_size))
        counted = _one(x, exact_count_draws(block_size))
        for rows, weighting in [(timed, Nelbo(LINEAR)), (counted, ExactCount(block_size))]:
            assert expected_loss(rows, weighting, _seeing(block_denoise, rows.batch)) == nll


def _seeing(denoise: ExactBlockDenoiser, batch: Corrupted) -> Denoise:
    return lambda xt, select: denoise(xt, batch.x0, select)


def test_block_denoiser_ignores_later_blocks_and_its_own_clean_tokens(joint, denoise):
    x0, xt = torch.tensor([[2, 0, 1, 0]]), torch.tensor([[3, 3, 3, 0]])
    seen = ExactBlockDenoiser(denoise, 2)(xt, x0, torch.tensor([1, 2]))
    assert seen[0].tolist() == joint.logits((3, 3, 3, 3), 1)
    assert seen[1].tolist() == joint.logits((2, 0, 3, 0), 2)


def test_exact_count_after_a_prompt_and_before_padding_equals_conditional_nll():
    joint = Joint(num_real=V, length=3, seed=1)
    x, exact = (1, 2, 0), ExactDenoiser(joint)
    rows = _one((*x, 0), [(p, t, (False, *hits, False)) for p, t, hits in exact_count_draws(2)])
    is_text, maskable = torch.tensor([True, True, True, False]), torch.tensor([False, True, True, False])
    batch = replace(rows.batch, is_text=is_text.expand_as(rows.batch.x0), maskable=maskable.expand_as(rows.batch.x0))

    def padded(xt: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
        return exact(xt[:, :3], select // 4 * 3 + select % 4)

    found = expected_loss(replace(rows, batch=batch), ExactCount(), padded)
    prompt = math.fsum(p for y, p in joint.prob.items() if y[0] == x[0])
    assert found == pytest.approx(_nll(joint, x) + math.log(prompt), rel=EXACT)


# Predictions that ignore the context


def test_nelbo_with_uniform_logits_equals_log_of_vocabulary():
    uniform = context_free([1 / V] * V)
    rows = _linear_time(TEXT)
    assert expected_loss(rows, Nelbo(LINEAR), uniform) == pytest.approx(L * math.log(V), rel=EXACT)
    with_mask = lambda xt, select: torch.zeros(len(select), V + 1, dtype=torch.float64)  # noqa: E731
    without = lambda xt, select: exclude_token(with_mask(xt, select), MASK)  # noqa: E731
    assert expected_loss(rows, Nelbo(LINEAR), with_mask) == pytest.approx(L * math.log(V + 1), rel=EXACT)
    assert expected_loss(rows, Nelbo(LINEAR), without) == pytest.approx(L * math.log(V), rel=EXACT)


def test_nelbo_with_uniform_logits_over_clipped_times_needs_a_second_epsilon_to_lose_a_thousandth():
    t_min = 1e-3
    times, shares = interval_nodes(t_min, 1.0)
    shares = [share / (1 - t_min) for share in shares]
    uniform = context_free([1 / V] * V)
    ours = _one(TEXT, schedule_draws(LINEAR, times, shares, L))
    assert expected_loss(ours, Nelbo(LINEAR), uniform) == pytest.approx(L * math.log(V), rel=EXACT)
    twice = _one(TEXT, bernoulli_draws(times, shares, [(1 - t_min) * t for t in times], L))  # as MDLM's code masks
    assert expected_loss(twice, Nelbo(LINEAR), uniform) == pytest.approx(0.999 * L * math.log(V), rel=EXACT)


@SCHEDULE_CASES
def test_nelbo_with_constant_predictions_in_three_terms_equals_their_cross_entropy(schedule):
    first, last = _ends(schedule)
    constant = -math.fsum(math.log(PROBS[v]) for v in TEXT)
    diffusion = expected_loss(_over_time(TEXT, schedule), Nelbo(schedule), context_free(PROBS))
    assert diffusion == pytest.approx((last - first) * constant, rel=QUADRATURE)
    reconstruction = expected_loss(_masked_once(TEXT, first), Uniform(), context_free(PROBS))
    prior = L * float(prior_loss(torch.tensor(1 - last, dtype=torch.float64), V))
    unmasked = (1 - last) * (L * math.log(V) - constant)  # what the prior leaves clean is uniform, not PROBS
    assert diffusion + reconstruction + prior == pytest.approx(constant + unmasked, rel=QUADRATURE)


@SCHEDULE_CASES
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_discrete_time_with_constant_predictions_telescopes(schedule, num_steps):
    first, last = _ends(schedule)
    rows = _one(TEXT, schedule_draws(schedule, *_grid(num_steps), L))
    found = expected_loss(rows, DiscreteTime(schedule, num_steps), context_free(PROBS))
    constant = -math.fsum(math.log(PROBS[v]) for v in TEXT)
    assert found == pytest.approx((last - first) * constant, rel=QUADRATURE)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_exact_count_with_constant_predictions_equals_their_cross_entropy(block_size):
    rows = _one(TEXT, exact_count_draws(block_size))
    found = expected_loss(rows, ExactCount(block_size), context_free(PROBS))
    assert found == pytest.approx(-math.fsum(math.log(PROBS[v]) for v in TEXT), rel=EXACT)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.8), (0.45, 0.95)])
def test_inverse_mask_prob_of_clipped_schedule_is_its_nelbo_over_the_width(joint, denoise, low, high):
    schedule = ClippedSchedule(low, high)
    rows = _one(_some(joint)[2], schedule_draws(schedule, *interval_nodes(), L))
    nelbo = expected_loss(rows, Nelbo(schedule), denoise)
    found = expected_loss(rows, InverseMaskProb(schedule), denoise)
    assert (high - low) * found == pytest.approx(nelbo, rel=EXACT)
    assert nelbo == pytest.approx(_between(joint, _some(joint)[2], low, high), rel=EXACT)


def test_inverse_mask_prob_with_everything_masked_is_the_chain_rule_for_single_token_blocks(joint, denoise):
    schedule = ClippedSchedule(1.0, 1.0)
    x = _some(joint)[0]
    rows = _one(x, schedule_draws(schedule, [0.3], [1.0], 1))
    found = expected_loss(rows, InverseMaskProb(schedule), _seeing(ExactBlockDenoiser(denoise, 1), rows.batch))
    assert found == pytest.approx(_nll(joint, x), rel=EXACT)


# Variance


def test_nelbo_of_uniform_logits_has_the_variance_of_the_closed_form():
    t_min = 1e-3
    times, shares = log_time_nodes(t_min)
    rows = _one((0, 1), schedule_draws(LINEAR, times, [share / (1 - t_min) for share in shares], 2))
    losses = row_losses(rows.batch, Nelbo(LINEAR), context_free([1 / V] * V))
    mean = float(losses @ rows.probability)
    variance = float((losses - mean).square() @ rows.probability)
    assert mean == pytest.approx(2 * math.log(V), rel=QUADRATURE)
    per_token = (-math.log(t_min) - (1 - t_min)) / (1 - t_min)
    assert per_token == pytest.approx(5.915, abs=5e-4)
    assert variance / (2 * math.log(V) ** 2) == pytest.approx(per_token, rel=QUADRATURE)


@pytest.mark.parametrize("block_size", [None, 2])
def test_exact_count_with_uniform_logits_is_log_of_vocabulary_on_every_draw(block_size):
    rows = _one(TEXT, exact_count_draws(block_size or L))
    losses = row_losses(rows.batch, ExactCount(block_size), context_free([1 / V] * V)).tolist()
    assert losses == pytest.approx([L * math.log(V)] * len(losses), rel=EXACT)


def test_exact_count_with_other_constant_predictions_varies_from_draw_to_draw():
    losses = row_losses(_one((0, 1), exact_count_draws(2)).batch, ExactCount(), context_free(PROBS)).tolist()
    rare, common = -math.log(PROBS[1]), -math.log(PROBS[0])
    assert sorted(losses) == pytest.approx([2 * common, common + rare, 2 * rare], rel=EXACT)


def test_exact_count_on_independent_masks_with_uniform_logits_is_log_of_vocabulary_where_any_is_masked():
    rows = _linear_time(TEXT)
    losses = row_losses(rows.batch, ExactCount(), context_free([1 / V] * V)).tolist()
    num_masked = rows.batch.is_masked.sum(dim=1).tolist()
    assert losses == pytest.approx([L * math.log(V) if k else 0.0 for k in num_masked], rel=EXACT)


# Discrete time


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_sqr", "geometric", "sqrt", "log"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_discrete_time_in_three_terms_equals_the_bound_summed_over_paths(name, num_steps):
    schedule, joint = SCHEDULES[name], Joint(num_real=V, length=2, seed=8)
    denoise, x = ExactDenoiser(joint), (2, 1)
    first, last = _ends(schedule)
    diffusion = expected_loss(
        _one(x, schedule_draws(schedule, *_grid(num_steps), 2)), DiscreteTime(schedule, num_steps), denoise
    )
    reconstruction = expected_loss(_masked_once(x, first), Uniform(), denoise)
    prior = 2 * float(prior_loss(torch.tensor(1 - last, dtype=torch.float64), V))
    times = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alphas = schedule.alpha(times).tolist()
    alphas = alphas if alphas[0] == 1.0 else [1.0, *alphas]
    start = [(1 - last) and (1 - last) / V] * V + [last]
    expected = elbo.discrete_nelbo(alphas, joint.conditional, x, MASK, prior=start)
    assert diffusion + reconstruction + prior == pytest.approx(expected, rel=QUADRATURE)


def test_discrete_time_over_the_data_falls_to_the_entropy_but_not_for_every_text():
    joint = Joint(num_real=V, length=3, seed=3, sharpness=2.0)
    denoise = ExactDenoiser(joint)

    def bound(sequences: dict[Tokens, float], num_steps: int) -> float:
        rows = enumerate_rows(sequences, schedule_draws(LINEAR, *_grid(num_steps), 3), MASK)
        return expected_loss(rows, DiscreteTime(LINEAR, num_steps), denoise)

    gaps = [bound(joint.prob, num_steps) - _entropy(joint) for num_steps in (1, 2, 4, 8, 64)]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < 0.04 * gaps[0]  # it falls like 1 / T
    marginals = [[math.fsum(p for x, p in joint.prob.items() if x[l] == v) for v in range(V)] for l in range(3)]
    parallel = -math.fsum(p * math.log(p) for marginal in marginals for p in marginal)
    assert gaps[0] == pytest.approx(parallel - _entropy(joint), rel=EXACT)
    assert any(bound({x: 1.0}, 2) > bound({x: 1.0}, 1) + 0.01 for x in joint.prob)


# A clipped interval is a bound once its three terms are there


def _three_terms(joint: Joint, x: dict[Tokens, float], low: float, high: float, denoise: Denoise) -> float:
    schedule = ClippedSchedule(low, high)
    diffusion = expected_loss(
        enumerate_rows(x, schedule_draws(schedule, *interval_nodes(), L), MASK), Nelbo(schedule), denoise
    )
    once = enumerate_rows(x, bernoulli_draws([0.5], [1.0], [low], L), MASK)
    prior = L * float(prior_loss(torch.tensor(1 - high, dtype=torch.float64), V))
    return diffusion + expected_loss(once, Uniform(), denoise) + prior


def test_clipped_nelbo_in_three_terms_bounds_the_entropy_and_meets_it_at_the_full_interval(joint, denoise):
    for low, high in [(0.3, 0.8), (0.45, 0.95), (0.0, 0.9), (0.2, 1.0)]:
        assert _three_terms(joint, joint.prob, low, high, denoise) > _entropy(joint) + 1e-3
    for x in _some(joint):
        assert _three_terms(joint, {x: 1.0}, 0.0, 1.0, denoise) == pytest.approx(_nll(joint, x), rel=EXACT)
    gaps = [_three_terms(joint, joint.prob, low, 1.0, denoise) - _entropy(joint) for low in (0.2, 0.02, 0.002)]
    assert 0 < gaps[2] < gaps[1] / 50 < gaps[0] / 2500  # the gap falls like low squared


# What isn't a bound


def test_unweighted_loss_of_independent_masks_is_the_k_form_only_as_a_mean_within_each_row(joint, denoise):
    x = _some(joint)[1]
    num_masked = _linear_time(x).batch.is_masked.sum(dim=1)
    rows = _linear_time(x)
    seen = rows.probability * (num_masked > 0)
    within_rows = Enumerated(rows.batch, seen / seen.sum() / num_masked.clamp(min=1))
    assert L * expected_loss(within_rows, Uniform(), denoise) == pytest.approx(_nll(joint, x), rel=EXACT)
    assert expected_loss(rows, ExactCount(), denoise) == pytest.approx(_nll(joint, x) * L / (L + 1), rel=EXACT)


def test_losses_over_masked_tokens_of_the_batch_are_no_bound(joint, denoise):
    rows = enumerate_rows(dict.fromkeys(joint.prob, 1.0), schedule_draws(LINEAR, *interval_nodes(), L), MASK)

    def expected(values: torch.Tensor) -> torch.Tensor:
        return (rows.probability * values).view(len(joint.prob), -1).sum(dim=1)

    num_masked = expected(rows.batch.is_masked.sum(dim=1).double())
    assert num_masked.tolist() == pytest.approx([L / 2] * len(num_masked), rel=EXACT)
    nll = torch.tensor([_nll(joint, x) for x in joint.prob], dtype=torch.float64)
    weighted = L * expected(row_losses(rows.batch, Nelbo(LINEAR), denoise)) / num_masked
    assert weighted.tolist() == pytest.approx((2 * nll).tolist(), rel=EXACT)
    # per text it falls below -log p; over the data it stays above, since fewer clean neighbours tell less
    unweighted = L * expected(row_losses(rows.batch, Uniform(), denoise)) / num_masked
    assert float((unweighted - nll).min()) < -0.5
    prob = torch.tensor(list(joint.prob.values()), dtype=torch.float64)
    assert float(prob @ unweighted) > _entropy(joint) + 0.1


def test_unweighted_sum_lies_below_the_entropy_for_uniform_times_and_is_the_one_step_bound_at_time_one(joint, denoise):
    rows = enumerate_rows(joint.prob, schedule_draws(LINEAR, *interval_nodes(), L), MASK)
    assert expected_loss(rows, Uniform(), denoise) < 0.6 * _entropy(joint)
    all_masked = enumerate_rows(joint.prob, [(1.0, 1.0, (True,) * L)], MASK)
    one_step = expected_loss(all_masked, DiscreteTime(LINEAR, 1), denoise)
    assert expected_loss(all_masked, Uniform(), denoise) == pytest.approx(one_step, rel=EXACT)


@pytest.mark.parametrize(
    ("weighting", "schedule"),
    [
        (Cart(0.1), LINEAR),
        (Cart(1.0), LINEAR),
        (OneMinusT(), LINEAR),
        (Snr(LINEAR), LINEAR),
        (MinSnr(LINEAR), LINEAR),
        (InverseMaskProb(ClippedSchedule(0.0, 0.5)), ClippedSchedule(0.0, 0.5)),
    ],
    ids=str,
)
def test_weighting_that_is_no_bound_can_lie_below_the_entropy(joint, denoise, weighting, schedule):
    rows = enumerate_rows(joint.prob, schedule_draws(schedule, *interval_nodes(num_nodes=20), L), MASK)
    assert expected_loss(rows, weighting, denoise) < 0.95 * _entropy(joint)


@pytest.mark.parametrize(
    "weighting",
    [Nelbo(LINEAR), ExactCount(), InverseMaskProb(PolynomialSchedule(2.0)), Uniform(), OneMinusT(), Cart(0.3)],
    ids=str,
)
def test_reported_nelbo_does_not_depend_on_the_objective(joint, denoise, weighting):
    x = _some(joint)[3]
    output = expected_output(_linear_time(x), weighting, Nelbo(LINEAR), denoise)
    assert float(output.nelbo_sum) == pytest.approx(_nll(joint, x), rel=EXACT)


# Drawn, as in training


NUM_ROWS = 20_000


def _drawn(x: Tokens, form: str) -> tuple[Corrupted, Weighting]:
    """Many copies of a text as a form of the objective noises them: one time a row or a block, or exact counts."""
    x0, sample_ids = torch.tensor(x).expand(NUM_ROWS, -1), torch.arange(NUM_ROWS)
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    num_blocks = 2 if "block" in form else 1
    u = sample_times(1, 0, NUM_ROWS * num_blocks, t_min=1e-6).view(NUM_ROWS, num_blocks)
    t = per_token(u, L)
    if "time" in form:
        xt = mask_tokens(x0, SQUARE.mask_prob(u), sample_ids, noise_seed=1, step=0, mask_token_id=MASK)
        return Corrupted(x0, xt, t, everywhere, everywhere, MASK), Nelbo(SQUARE)
    counts = 1 + torch.floor(u * (L // num_blocks)).to(torch.int64)
    xt = mask_exact_count(x0, counts, sample_ids, noise_seed=1, step=0, mask_token_id=MASK, maskable=everywhere)
    return Corrupted(x0, xt, t, everywhere, everywhere, MASK), ExactCount(L // num_blocks)


@pytest.mark.parametrize("form", ["row times", "block times", "row counts", "block counts"])
def test_loss_of_drawn_times_and_masks_estimates_nll(joint, denoise, form):
    x = _some(joint)[2]
    batch, weighting = _drawn(x, form)
    losses = row_losses(
        batch, weighting, _seeing(ExactBlockDenoiser(denoise, L // 2), batch) if "block" in form else denoise
    )
    standard_error = float(losses.std()) / math.sqrt(NUM_ROWS)
    assert abs(float(losses.mean()) - _nll(joint, x)) < SIGMAS * standard_error
    assert standard_error < 0.02 * _nll(joint, x)  # else the line above says nothing


# Reweighting by context, in expectation over masks


@pytest.mark.parametrize("t", [0.0, 0.25, 0.9])
def test_cart_expected_over_masks_is_its_clean_value_times_the_share_of_clean_tokens(t):
    p, place, length = Fraction(1, 3), 1, 4
    rows = _one(TEXT, bernoulli_draws([t], [1.0], [t], length))
    weights = Cart(float(p)).token_weight(rows.batch)
    found = float(weights[:, place] @ rows.probability)
    clean = (1 - (1 - p) ** place + 1 - (1 - p) ** (length - 1 - place)) / 2
    assert found == pytest.approx((1 - t) * float(clean), rel=EXACT)
