"""Estimators of the likelihood of rows: means, errors and exact values, by enumeration in a world of 3 tokens."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from dlm_core.likelihood import (
    RowEstimate,
    Scoring,
    any_order_bound,
    block_bound,
    block_chain_nll,
    continuous_bound,
    discrete_bound,
    exact_count_bound,
    left_to_right_nll,
    ordered_nll,
)
from dlm_core.schedules import (
    ClippedSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    Schedule,
    SigmaLinearSchedule,
)
from tests.support import elbo, reference
from tests.support.block_world import (
    HOLED,
    INNER,
    LENGTH,
    MASK,
    MASKED_PROMPT,
    PROMPTED,
    ROWS,
    SINGLE,
    WHOLE,
    BlockView,
    Recorder,
    Row,
    Strata,
    TableDenoiser,
    V,
    answer_nll,
    any_order_mean,
    any_order_variance,
    block_chain_sum,
    block_strata,
    context_free_strata,
    continuous_strata,
    count_strata,
    discrete_strata,
    masked_sum,
    ordered_sum,
    scoring,
    strata_moments,
)
from tests.support.toy_world import ExactDenoiser

RTOL = 1e-10  # a few hundred float64 roundings
SIGMAS = 5.0  # of a mean with a known variance: a fair draw is beyond once in two million
SQUARE_SIGMAS = 6.0  # of a mean of squares: they are skewed, and their own variance is estimated
NUM_COPIES = 512  # of one row, each with noise of its own
NUM_DRAWS = 8
MAX_BLOCK_RATIO = 1.5  # of short blocks: the step from one count to the next falls between two draws
MAX_RATIO = 1.3  # of a standard error to the spread, from NUM_DRAWS draws on


class Form(NamedTuple):
    """A schedule, its mask probability once more, and where its times start."""

    schedule: Schedule
    mask_prob: Callable[[float], float]
    t_min: float


FORMS = {
    "linear": Form(LinearSchedule(), lambda t: t, 0.2),
    "cosine": Form(CosineSchedule(), lambda t: 1 - math.cos(math.pi * t / 2), 0.2),
    "clipped": Form(ClippedSchedule(0.3, 0.8), lambda t: 0.3 + 0.5 * t, 0.0),
    "clipped, late": Form(ClippedSchedule(0.1, 0.9), lambda t: 0.1 + 0.8 * t, 0.25),
    "geometric": Form(GeometricSchedule(0.2, 2.0), lambda t: -math.expm1(-0.2 * 10**t), 0.0),
    "sigma_linear": Form(SigmaLinearSchedule(0.25, 2.0), lambda t: -math.expm1(-0.25 - 1.75 * t), 0.0),
}


@pytest.fixture(scope="module")
def wrong() -> TableDenoiser:
    return TableDenoiser(num_real=V, length=LENGTH, seed=1)


@pytest.fixture(scope="module")
def joint() -> reference.Joint:
    return reference.Joint(num_real=V, length=LENGTH, seed=4, sharpness=2.0)


@pytest.fixture(scope="module")
def exact(joint) -> ExactDenoiser:
    return ExactDenoiser(joint)


def _copies(row: Row, num: int = NUM_COPIES) -> Scoring:
    return scoring([row] * num)


def _suffixes(joint: reference.Joint) -> list[Row]:
    """Every sequence, with a prompt of each length in turn."""
    return [Row(x, tuple(place >= i % LENGTH for place in range(LENGTH))) for i, x in enumerate(joint.sequences())]


def _expect(estimate: RowEstimate, values: list[float], rtol: float = RTOL) -> None:
    """Exact values, without noise."""
    assert estimate.nats.tolist() == pytest.approx(values, rel=rtol, abs=rtol)
    assert estimate.mc_se.tolist() == [0.0] * len(values)


def _expect_moments(estimate: RowEstimate, mean: float, variance: float, mc_variance: float) -> None:
    """Rows that are copies: mean and spread of their estimates, and what they say of their spread themselves."""
    nats, mc_se = estimate.nats, estimate.mc_se
    rounding = RTOL * mean
    assert abs(float(nats.mean()) - mean) <= SIGMAS * math.sqrt(variance / len(nats)) + rounding
    for squares, expected in (((nats - mean) ** 2, variance), (mc_se**2, mc_variance)):
        error = float(squares.std()) / math.sqrt(len(nats))
        assert abs(float(squares.mean()) - expected) <= SQUARE_SIGMAS * error + rounding


def _expect_strata(estimate: RowEstimate, *groups: Strata, max_ratio: float = MAX_RATIO) -> None:
    """The same of one draw a stratum; the standard error is never too small, and from NUM_DRAWS draws on not large.

    Groups are stratified on their own, so that their variances add.
    """
    mean, variance, mc_variance = (math.fsum(of) for of in zip(*map(strata_moments, groups), strict=True))
    _expect_moments(estimate, mean, variance, mc_variance)
    assert estimate.is_bound
    assert variance <= mc_variance
    assert len(groups[0]) < NUM_DRAWS or mc_variance <= max_ratio**2 * variance


# Times and masks drawn: the mean is the bound of enumeration, and the errors are its errors


@pytest.mark.parametrize("row", [WHOLE, MASKED_PROMPT])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_continuous_bound_has_mean_and_errors_of_enumeration(wrong, form, row):
    strata = continuous_strata(wrong.nll, row, MASK, (form.mask_prob, form.t_min), V, NUM_DRAWS)
    estimate = continuous_bound(
        wrong, _copies(row), form.schedule, t_min=form.t_min, num_draws=NUM_DRAWS, num_real_tokens=V
    )
    _expect_strata(estimate, strata)


def test_continuous_bound_with_exact_conditionals_has_mean_and_errors_of_enumeration(joint, exact):
    def nll(xt, place, token):
        return reference.cross_entropy(joint.logits(xt, place), token)

    form = FORMS["linear"]
    from_start = continuous_strata(nll, WHOLE, MASK, (form.mask_prob, 1e-9), V, num_draws=2)
    assert strata_moments(from_start)[0] == pytest.approx(answer_nll(joint, WHOLE), rel=1e-8)
    estimate = continuous_bound(
        exact, _copies(WHOLE), form.schedule, t_min=form.t_min, num_draws=NUM_DRAWS, num_real_tokens=V
    )
    _expect_strata(estimate, continuous_strata(nll, WHOLE, MASK, form[1:], V, NUM_DRAWS))


def test_continuous_bound_of_constant_predictions_has_variance_of_closed_form():
    t_min, n, log_v = 0.05, 4, math.log(V)
    s = scoring([WHOLE] * 4 * NUM_COPIES)
    arguments = {"t_min": t_min, "num_draws": 1, "num_real_tokens": V}
    estimate = continuous_bound(_constant, s, LinearSchedule(), **arguments)
    # one draw: t over all of [t_min, 1], and M masked of n give M / t
    diffusion = (1 - t_min) * (-math.log(t_min) - (1 - t_min))
    variance = n * log_v**2 * (diffusion + t_min * (1 - t_min))
    _expect_moments(replace(estimate, mc_se=(estimate.nats - n * log_v).abs()), n * log_v, variance, variance)
    assert estimate.mc_se.isnan().all()


def _constant(xt: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(len(select), V + 1, dtype=torch.float64)
    logits[:, MASK] = -torch.inf
    return logits


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["linear", "clipped", "geometric"])
def test_discrete_bound_has_mean_of_the_path_by_path_bound_and_its_errors(wrong, name, num_timesteps):
    form = FORMS[name]
    probs = [form.mask_prob(i / num_timesteps) for i in range(num_timesteps + 1)]
    alphas = [1.0, *(1 - p for p in probs)] if probs[0] > 0 else [1 - p for p in probs]

    def conditional(xt, place):
        shown = xt[place]
        return [float(v == shown) if shown != MASK else math.exp(-wrong.nll(xt, place, v)) for v in range(V)]

    mean = elbo.weighted_cross_entropy(alphas, conditional, WHOLE.x, MASK) + LENGTH * alphas[-1] * math.log(V)
    if num_timesteps <= 3:
        prior = [alphas[-1] / V] * V + [1 - alphas[-1]]
        paths = elbo.discrete_nelbo(alphas, conditional, WHOLE.x, MASK, prior=prior)
        assert mean == pytest.approx(paths, rel=RTOL)
    prior_nats = LENGTH * alphas[-1] * math.log(V)
    strata = discrete_strata(wrong.nll, WHOLE, MASK, form.mask_prob, num_timesteps, NUM_DRAWS)
    strata = [(of_draw + prior_nats, variance) for of_draw, variance in strata]
    assert strata_moments(strata)[0] == pytest.approx(mean, rel=RTOL)
    estimate = discrete_bound(
        wrong,
        _copies(WHOLE),
        form.schedule,
        num_timesteps=num_timesteps,
        num_draws=NUM_DRAWS,
        num_real_tokens=V,
    )
    _expect_strata(estimate, strata)


def test_discrete_bound_of_one_step_from_clean_to_masked_is_exact(wrong):
    estimate = discrete_bound(wrong, scoring(ROWS), LinearSchedule(), num_timesteps=1, num_draws=2, num_real_tokens=V)
    _expect(estimate, [masked_sum(wrong.nll, row, row.places, MASK) for row in ROWS])


# Counts drawn


def test_exact_count_bound_enumerated_equals_mean_over_every_order(wrong):
    estimate = exact_count_bound(wrong, scoring(ROWS), num_draws=2**LENGTH - 1)
    _expect(estimate, [any_order_mean(wrong.nll, row, MASK) if row.places else 0.0 for row in ROWS], rtol=1e-12)
    assert estimate.is_bound


@pytest.mark.parametrize(
    ("row", "num_draws"), [(WHOLE, 2), (WHOLE, 3), (WHOLE, 8), (WHOLE, 14), (HOLED, 5), (MASKED_PROMPT, 2)]
)
def test_exact_count_bound_drawn_has_mean_and_errors_of_enumeration(wrong, row, num_draws):
    strata = count_strata(wrong.nll, row, MASK, num_draws)
    assert strata_moments(strata)[0] == pytest.approx(any_order_mean(wrong.nll, row, MASK), rel=RTOL)
    _expect_strata(exact_count_bound(wrong, _copies(row), num_draws=num_draws), strata)


@pytest.mark.parametrize(("num_draws", "num_copies"), [(2, 800), (8, 400), (32, 200), (128, 100)])
def test_squared_errors_of_context_free_predictions_are_not_too_small_in_the_mean(num_draws, num_copies):
    # nearly all variance is in the first strata, where few tokens of many are masked
    num_tokens, vocab_size = 100, 2
    losses = [0.1 + 2.9 * place / num_tokens for place in range(num_tokens)]
    table = torch.tensor([[-loss, math.log(-math.expm1(-loss)), -math.inf] for loss in losses], dtype=torch.float64)
    x0 = torch.zeros(num_copies, num_tokens, dtype=torch.int64)
    s = Scoring(x0, torch.ones_like(x0, dtype=torch.bool), vocab_size, torch.arange(num_copies), batch_rows=4096)
    strata = context_free_strata(losses, num_draws)
    _, variance, mc_variance = strata_moments(strata)
    _expect_strata(exact_count_bound(lambda xt, select: table[select % num_tokens], s, num_draws=num_draws), strata)
    assert variance < (mc_variance if num_draws > 2 else 0.8 * mc_variance)


def test_exact_count_bound_is_enumerated_from_as_many_draws_as_there_are_masks(wrong):
    rows = [SINGLE, INNER, PROMPTED, WHOLE]
    for num_draws, num_exact in ((1, 1), (2, 1), (3, 2), (6, 2), (7, 3), (14, 3), (15, 4)):
        estimate = exact_count_bound(wrong, scoring(rows), num_draws=num_draws)
        assert (estimate.mc_se == 0).tolist() == [place < num_exact for place in range(4)]


def test_exact_count_bound_of_one_draw_is_exact_for_single_tokens_and_without_error_for_others(wrong):
    estimate = exact_count_bound(wrong, scoring([SINGLE, INNER, WHOLE]), num_draws=1)
    assert float(estimate.nats[0]) == pytest.approx(masked_sum(wrong.nll, SINGLE, SINGLE.places, MASK), rel=RTOL)
    assert estimate.nats.isfinite().all()
    assert float(estimate.mc_se[0]) == 0.0
    assert estimate.mc_se[1:].isnan().all()


def test_exact_count_bound_has_a_fraction_of_the_variance_of_drawn_times(wrong):
    num_draws = 14
    counts = exact_count_bound(wrong, _copies(WHOLE), num_draws=num_draws)
    times = continuous_bound(wrong, _copies(WHOLE), LinearSchedule(), t_min=0.2, num_draws=num_draws, num_real_tokens=V)
    assert float(counts.nats.var()) < 0.5 * float(times.nats.var())
    assert float(counts.mc_se.square().mean()) < 0.5 * float(times.mc_se.square().mean())


def test_count_bounds_of_constant_predictions_have_no_variance():
    log_v, s = math.log(V), scoring(ROWS)
    exact_count = exact_count_bound(_constant, s, num_draws=3)
    blocks = block_bound(lambda xt, x0, select: _constant(xt, select), s, 2, num_draws=3)
    for estimate in (exact_count, blocks):
        assert estimate.nats.tolist() == pytest.approx([len(row.places) * log_v for row in ROWS], rel=RTOL)
        assert estimate.mc_se.tolist() == pytest.approx([0.0] * len(ROWS), abs=RTOL)


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("row", [WHOLE, HOLED])
def test_block_bound_has_mean_and_errors_of_enumeration(wrong, row, block_size):
    parts = block_strata(wrong.nll, row, MASK, block_size, NUM_DRAWS)
    estimate = block_bound(BlockView(wrong, block_size, MASK), _copies(row), block_size, num_draws=NUM_DRAWS)
    _expect_strata(estimate, *parts, max_ratio=MAX_BLOCK_RATIO)


def test_any_order_bound_has_mean_and_errors_of_enumeration(wrong):
    num_orders = 2
    estimate = any_order_bound(wrong, _copies(WHOLE, 64), num_orders=num_orders)
    assert estimate.is_bound
    variance = any_order_variance(wrong.nll, WHOLE, MASK) / num_orders
    _expect_moments(estimate, any_order_mean(wrong.nll, WHOLE, MASK), variance, variance)


def test_one_draw_has_an_unknown_error_only_where_something_is_drawn(wrong):
    s = scoring([WHOLE._replace(scored=(False,) * LENGTH), SINGLE, WHOLE])
    drawn = {
        "times": continuous_bound(wrong, s, LinearSchedule(), t_min=0.5, num_draws=1, num_real_tokens=V),
        "orders": any_order_bound(wrong, s, num_orders=1),
        "single tokens": block_bound(BlockView(wrong, 1, MASK), s, 1, num_draws=1),
        "pairs": block_bound(BlockView(wrong, 2, MASK), s, 2, num_draws=1),
    }
    assert {name: estimate.mc_se.isnan().tolist() for name, estimate in drawn.items()} == {
        "times": [False, True, True],
        "orders": [False, False, True],
        "single tokens": [False, False, False],
        "pairs": [False, False, True],
    }
    assert all(float(estimate.mc_se.nan_to_num().max()) == 0 for estimate in drawn.values())


@pytest.mark.parametrize("block_size", [None, 2, 4])
def test_count_bounds_with_exact_conditionals_estimate_nll(joint, exact, block_size):
    rows = [Row(x, (True,) * LENGTH) for x in joint.prob] * 4
    if block_size is None:
        estimate = exact_count_bound(exact, scoring(rows), num_draws=6)
    else:
        view = BlockView(exact, block_size, MASK)
        estimate = block_bound(view, scoring(rows), block_size, num_draws=NUM_DRAWS)
    nll = math.fsum(answer_nll(joint, row) for row in rows)
    error = math.sqrt(float(estimate.mc_se.square().sum()))
    assert 0 < error < 0.03 * nll
    assert abs(float(estimate.nats.sum()) - nll) < SIGMAS * error


# Exact values


def test_every_exact_form_with_exact_conditionals_equals_nll(joint, exact):
    rows = _suffixes(joint)
    s, nll = scoring(rows), [answer_nll(joint, row) for row in rows]
    _expect(exact_count_bound(exact, s, num_draws=15), nll)
    _expect(left_to_right_nll(exact, s), nll)
    for block_size in (1, 2, 4):
        _expect(block_chain_nll(BlockView(exact, block_size, MASK), s, block_size), nll)
    orders = any_order_bound(exact, s, num_orders=2)
    assert orders.nats.tolist() == pytest.approx(nll, rel=RTOL)
    assert float(orders.mc_se.max()) < RTOL


def test_ordered_nll_in_every_order_with_exact_conditionals_equals_nll(joint, exact):
    rows = [Row(x, (True,) * LENGTH) for x in joint.prob]
    s, nll = scoring(rows), [answer_nll(joint, row) for row in rows]
    for rank in itertools.permutations(range(LENGTH)):
        _expect(ordered_nll(exact, s, torch.tensor(rank).repeat(len(rows), 1)), nll)


def test_ordered_nll_of_wrong_predictions_equals_naive_loop_in_each_row_s_order(wrong):
    rows = [row for row in ROWS for _ in range(6)]
    ranks, sums = [], []
    for i, row in enumerate(rows):
        orders = list(itertools.permutations(row.places))
        order = orders[7 * i % len(orders)]
        # the rank of a token that is not scored means nothing
        ranks.append([order.index(place) if place in order else (0, 9, -1)[i % 3] for place in range(LENGTH)])
        sums.append(ordered_sum(wrong.nll, row, order, MASK))
    estimate = ordered_nll(wrong, scoring(rows), torch.tensor(ranks))
    _expect(estimate, sums)
    assert not estimate.is_bound


def test_left_to_right_nll_of_wrong_predictions_equals_naive_loop_with_one_pass_a_token(wrong):
    recorder = Recorder(wrong)
    estimate = left_to_right_nll(recorder, scoring(ROWS))
    _expect(estimate, [ordered_sum(wrong.nll, row, row.places, MASK) for row in ROWS])
    assert not estimate.is_bound
    assert len(recorder.calls) == LENGTH
    assert recorder.num_asked == sum(len(row.places) for row in ROWS)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_block_chain_nll_of_wrong_predictions_equals_naive_loop_with_block_size_passes(wrong, block_size):
    recorder = Recorder(BlockView(wrong, block_size, MASK))
    estimate = block_chain_nll(recorder, scoring(ROWS), block_size)
    _expect(estimate, [block_chain_sum(wrong.nll, row, MASK, block_size) for row in ROWS])
    assert not estimate.is_bound
    assert len(recorder.calls) == block_size
    assert recorder.num_asked == sum(len(row.places) for row in ROWS)


def test_block_forms_of_single_tokens_are_the_autoregressive_nll(wrong):
    view = BlockView(wrong, 1, MASK)
    rows = [WHOLE, PROMPTED, SINGLE]
    autoregressive = [
        math.fsum(wrong.nll(row.x[:i] + (MASK,) * (LENGTH - i), i, row.x[i]) for i in row.places) for row in rows
    ]
    _expect(block_chain_nll(view, scoring(rows), 1), autoregressive)
    _expect(block_bound(view, scoring(rows), 1, num_draws=2), autoregressive)


def test_block_chain_nll_of_one_block_is_the_left_to_right_nll(wrong):
    chain = block_chain_nll(BlockView(wrong, LENGTH, MASK), scoring(ROWS), LENGTH)
    _expect(chain, left_to_right_nll(wrong, scoring(ROWS)).nats.tolist())
