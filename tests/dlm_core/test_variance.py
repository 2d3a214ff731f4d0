"""Where to sample t, which mask rates to train on, and how noisy a gradient is: against exact laws and naive sums."""

import itertools
import math
import random
import re
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch

from dlm_core.schedules import SCHEDULES, ClippedSchedule, LinearSchedule, PolynomialSchedule, Schedule
from dlm_core.variance import (
    GradientSums,
    PiecewiseDensity,
    WeightedTimes,
    moment_sums,
    uniform_log_mask_prob,
    variance_of_sums,
)
from tests.support.toy_world import interval_nodes

EXACT = 1e-12  # a few float64 operations
INVERSE = 1e-9  # a time found from a mask probability has lost digits where that is flat, near both ends
DIFFERENCES = 1e-6  # central differences of width 1e-5: 1e-10 from the third derivative, up to 1e-8 from rounding

LINEAR = LinearSchedule()
T_MIN = 1e-3
# sigma_linear has masked everything long before t_min
SMOOTH: dict[str, Schedule] = {
    **{name: schedule for name, schedule in SCHEDULES.items() if name != "sigma_linear"},
    "cube": PolynomialSchedule(3.0),
    "clipped": ClippedSchedule(0.3, 0.8),
}
SMOOTH_SCHEDULES = pytest.mark.parametrize("schedule", SMOOTH.values(), ids=SMOOTH)
FUNCTIONS: dict[str, Callable[[float], float]] = {
    "one": lambda t: 1.0,
    "cubic": lambda t: 1 - 2 * t + 5 * t**3,
    "exp": math.exp,
}


def _f64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Times of uniform log mask probability


def _log_mask_prob(schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    return schedule.mask_prob(t).log()


@SMOOTH_SCHEDULES
def test_times_have_evenly_spread_log_mask_probs(schedule):
    u = torch.linspace(0, 1, 9, dtype=torch.float64)[:-1]
    drawn = uniform_log_mask_prob(u, schedule, T_MIN)
    first, last = _log_mask_prob(schedule, _f64([T_MIN, 1.0])).tolist()
    found = _log_mask_prob(schedule, drawn.t).tolist()
    assert found == pytest.approx([first + (last - first) * x for x in u.tolist()], rel=INVERSE, abs=EXACT)
    assert float(drawn.t[0]) == pytest.approx(T_MIN, rel=INVERSE)


@SMOOTH_SCHEDULES
def test_nelbo_weight_times_importance_is_constant(schedule):
    drawn = uniform_log_mask_prob(torch.linspace(0, 0.99, 7, dtype=torch.float64), schedule, T_MIN)
    first, last = schedule.mask_prob(_f64([T_MIN, 1.0])).tolist()
    expected = math.log(last / first) / (1 - T_MIN)
    product = (schedule.nelbo_weight(drawn.t) * drawn.importance).tolist()
    assert product == pytest.approx([expected] * 7, rel=EXACT)


@SMOOTH_SCHEDULES
def test_importance_is_the_slope_of_time_over_that_of_uniform_time(schedule):
    u, h = _f64([0.02, 0.3, 0.6, 0.9]), 1e-5
    after, before = (uniform_log_mask_prob(u + d, schedule, T_MIN).t for d in (h, -h))
    slope = ((after - before) / (2 * h) / (1 - T_MIN)).tolist()
    assert uniform_log_mask_prob(u, schedule, T_MIN).importance.tolist() == pytest.approx(slope, rel=DIFFERENCES)


@pytest.mark.parametrize("name", ["linear", "cosine", "square", "sqrt", "log", "cube", "clipped"])
@pytest.mark.parametrize("t_min", [1e-3, 0.2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_mean_over_weighted_times_is_the_mean_over_uniform_times(name, t_min, function):
    nodes, shares = interval_nodes(num_nodes=40)
    drawn = uniform_log_mask_prob(_f64(nodes), SMOOTH[name], t_min)
    f = FUNCTIONS[function]
    found = math.fsum(
        share * i * f(t) for share, i, t in zip(shares, drawn.importance.tolist(), drawn.t.tolist(), strict=True)
    )
    assert found == pytest.approx(_uniform_mean(f, t_min), rel=1e-8)  # what 40 Gauss nodes leave


def _uniform_mean(f: Callable[[float], float], t_min: float) -> float:
    nodes, shares = interval_nodes(t_min, 1.0, 20)
    return math.fsum(share * f(t) for t, share in zip(nodes, shares, strict=True)) / (1 - t_min)


@SMOOTH_SCHEDULES
def test_times_stay_within_their_range_up_to_the_ends(schedule):
    drawn = uniform_log_mask_prob(_f64([0.0, 1e-17, 1 - 2**-53, 1.0]), schedule, T_MIN)
    assert (drawn.t >= T_MIN).all()
    assert (drawn.t <= 1.0).all()
    assert float(drawn.t[-1]) == pytest.approx(1.0, abs=1e-7)


def test_times_of_float32_uniforms_are_float64():
    drawn = uniform_log_mask_prob(torch.tensor([0.25]), LINEAR, T_MIN)
    assert drawn.t.dtype == drawn.importance.dtype == torch.float64
    assert float(drawn.t) == pytest.approx(T_MIN**0.75, rel=EXACT)


@pytest.mark.parametrize("t_min", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_uniform_log_mask_prob_without_room_below_t_min_is_refused(t_min):
    with pytest.raises(ValueError, match=f"t_min is {t_min};"):
        uniform_log_mask_prob(_f64([0.5]), LINEAR, t_min)


@pytest.mark.parametrize(
    ("schedule", "span"),
    [(ClippedSchedule(0.5, 0.5), "0.0"), (SCHEDULES["sigma_linear"], "0.0"), (PolynomialSchedule(200.0), "inf")],
)
def test_uniform_log_mask_prob_of_a_schedule_that_stands_still_is_refused(schedule, span):
    with pytest.raises(ValueError, match=re.escape(f"of {schedule} spans {span} from t_min {T_MIN}")):
        uniform_log_mask_prob(_f64([0.5]), schedule, T_MIN)


# How noisy the loss of uniform logits is: of L tokens M are masked, the loss is nelbo_weight * importance * M / L


def _estimator_variance(draw: Callable[[torch.Tensor], WeightedTimes], edges: Sequence[float], length: int) -> float:
    """Over u and the binomial number of masked tokens; the linear schedule."""
    first = second = 0.0
    for low, high in itertools.pairwise(edges):
        nodes, shares = interval_nodes(low, high, 40)
        drawn = draw(_f64(nodes))
        for share, t, importance in zip(shares, drawn.t.tolist(), drawn.importance.tolist(), strict=True):
            for count in range(length + 1):
                p = share * math.comb(length, count) * t**count * (1 - t) ** (length - count)
                loss = importance * count / (length * t)
                first, second = first + p * loss, second + p * loss**2
    assert first == pytest.approx(1.0, rel=INVERSE)
    return second - first**2


def _uniform_variance(length: int) -> float:
    return (-math.log(T_MIN) / (1 - T_MIN) - 1) / length


@pytest.mark.parametrize("length", [1, 2, 8])
def test_uniform_log_mask_prob_moves_the_variance_of_uniform_logits_from_masks_to_times(length):
    span = -math.log(T_MIN)
    found = _estimator_variance(lambda u: uniform_log_mask_prob(u, LINEAR, T_MIN), [0, 0.5, 1], length)
    mean, square = (1 - T_MIN) / span, (1 - T_MIN**2) / (2 * span)
    of_masks, of_times = (mean - square) / mean**2 / length, square / mean**2 - 1
    assert found == pytest.approx(of_masks + of_times, rel=INVERSE)
    # larger than with uniform times for all but a single token, unless strata take the times' part away
    assert found > (1 - INVERSE) * _uniform_variance(length)
    assert (found > 1.25 * _uniform_variance(length)) is (length > 1)
    assert of_masks < 0.6 * _uniform_variance(length)


@pytest.mark.parametrize("length", [1, 4])
def test_optimal_density_lowers_the_variance_of_uniform_logits(length):
    num_bins = 50
    width = (1 - T_MIN) / num_bins
    moments = []
    for index in range(num_bins):
        low = T_MIN + width * index
        inverse_time = math.log((low + width) / low) / width  # mean of 1 / t over the bin
        moments.append(1 + (inverse_time - 1) / length)
    density = PiecewiseDensity.optimal(T_MIN, _f64(moments), floor=1e-3)
    edges = [0.0, *itertools.accumulate(density.mass)]
    edges[-1] = 1.0
    found = _estimator_variance(density.sample, edges, length)
    by_bins = math.fsum(m / (num_bins**2 * q) for m, q in zip(moments, density.mass, strict=True)) - 1
    assert found == pytest.approx(by_bins, rel=1e-6)  # Gauss nodes over the first bin, where 1 / t varies twentyfold
    assert found < 0.9 * _uniform_variance(length)


# A density on bins


MASS = (0.125, 0.5, 0.0625, 0.3125)  # exact in float64
EDGES = [0.0, 0.125, 0.625, 0.6875, 1.0]


def _naive_time(u: float, t_min: float) -> tuple[float, float, int]:
    """Time, importance and bin of u by walking through the bins."""
    index = max(i for i in range(4) if EDGES[i] <= u)
    t = t_min + (1 - t_min) * (index + (u - EDGES[index]) / MASS[index]) / 4
    return t, 0.25 / MASS[index], index


@pytest.mark.parametrize("t_min", [0.0, 0.2])
def test_sample_inverts_the_distribution_function(t_min):
    density = PiecewiseDensity(t_min, MASS)
    u = [0.0, 0.01, 0.1249, 0.125, 0.3, 0.62, 0.625, 0.65, 0.6875, 0.9, 1 - 2**-53]
    drawn = density.sample(_f64(u))
    expected = [_naive_time(x, t_min) for x in u]
    assert drawn.t.tolist() == pytest.approx([t for t, _, _ in expected], rel=EXACT)
    assert drawn.importance.tolist() == [importance for _, importance, _ in expected]
    assert density.bin_of(drawn.t[1:3]).tolist() == [0, 0]
    assert density.bin_of(drawn.t).tolist()[-2:] == [3, 3]


def test_bin_of_sample_is_the_bin_whose_mass_holds_u():
    density = PiecewiseDensity(0.1, MASS)
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    assert density.bin_of(density.sample(u).t).tolist() == [_naive_time(x, 0.1)[2] for x in u.tolist()]


def test_bin_of_edges_and_of_times_just_outside_is_a_bin():
    density = PiecewiseDensity(0.5, MASS)
    times = _f64([0.5, 0.5 - 1e-9, 0.61, 0.63, 0.75, 0.875, 1.0, 1.0 + 1e-9])
    assert density.bin_of(times).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("t_min", [0.0, 1e-3])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_mean_over_sampled_times_is_the_mean_over_uniform_times(t_min, function):
    density, f = PiecewiseDensity(t_min, MASS), FUNCTIONS[function]
    total = 0.0
    for low, high in itertools.pairwise(EDGES):
        nodes, shares = interval_nodes(low, high, 10)
        drawn = density.sample(_f64(nodes))
        total += math.fsum(
            share * i * f(t) for share, i, t in zip(shares, drawn.importance.tolist(), drawn.t.tolist(), strict=True)
        )
    assert total == pytest.approx(_uniform_mean(f, t_min), rel=EXACT)


def test_sample_keeps_the_order_of_strata_and_stays_in_range():
    density = PiecewiseDensity(0.1, (0.1,) * 10)  # whose float sum is a little below 1
    u = torch.arange(1000, dtype=torch.float64) / 1000
    t = density.sample(torch.cat([u, _f64([1 - 2**-53, 1.0])])).t
    assert (t.diff() >= 0).all()
    assert (t[0], t[-1]) == (0.1, 1.0)
    assert t[:1000].tolist() == pytest.approx((0.1 + 0.9 * u).tolist(), rel=EXACT)
    assert density.sample(torch.tensor([0.5])).t.dtype == torch.float64
    short = PiecewiseDensity(0.0, (0.5, 0.5 - 5e-10))  # as far from 1 as a sum may be
    assert short.sample(_f64([1.0])).t.tolist() == [1.0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_optimal_mass_is_the_root_of_the_second_moment_but_for_the_floor(scale):
    density = PiecewiseDensity.optimal(0.1, scale * _f64([1.0, 4.0, 0.0, 25.0]), floor=0.2)
    expected = [0.8 * 1 / 8 + 0.05, 0.8 * 2 / 8 + 0.05, 0.05, 0.8 * 5 / 8 + 0.05]
    assert density.mass == pytest.approx(expected, rel=EXACT)
    assert density.t_min == 0.1


def test_optimal_keeps_a_tenth_uniform_by_default():
    assert PiecewiseDensity.optimal(0.0, _f64([0.0, 9.0])).mass == pytest.approx((0.05, 0.95), rel=EXACT)


def test_optimal_with_everything_for_the_floor_is_uniform():
    assert PiecewiseDensity.optimal(0.0, _f64([0.0, 9.0]), floor=1.0).mass == (0.5, 0.5)


def test_optimal_without_any_loss_is_uniform():
    assert PiecewiseDensity.optimal(0.0, torch.zeros(4), floor=0.5).mass == pytest.approx([0.25] * 4, rel=EXACT)


def test_optimal_density_has_less_variance_than_any_other():
    draw = random.Random(0)
    moments = [draw.expovariate(1.0) ** 3 for _ in range(6)]

    def second_moment(mass: Sequence[float]) -> float:
        return math.fsum(m / (36 * q) for m, q in zip(moments, mass, strict=True))

    least = second_moment(PiecewiseDensity.optimal(0.0, _f64(moments), floor=1e-12).mass)
    assert least == pytest.approx((math.fsum(math.sqrt(m) for m in moments) / 6) ** 2, rel=1e-9)
    for _ in range(200):
        other = [draw.expovariate(1.0) for _ in moments]
        assert least < second_moment([q / sum(other) for q in other])


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.001, math.nan])
def test_optimal_with_a_floor_out_of_range_is_refused(floor):
    with pytest.raises(ValueError, match=f"floor is {floor};"):
        PiecewiseDensity.optimal(0.0, torch.ones(2), floor=floor)


def test_optimal_of_no_bin_is_refused():
    with pytest.raises(ValueError, match=re.escape("second moments are []; wanted at least one")):
        PiecewiseDensity.optimal(0.0, torch.zeros(0))


@pytest.mark.parametrize("moment", [-1.0, math.inf, math.nan])
def test_optimal_of_impossible_moments_is_refused(moment):
    with pytest.raises(ValueError, match=re.escape(f"second moments are [1.0, {moment}];")):
        PiecewiseDensity.optimal(0.0, torch.tensor([1.0, moment]))


@pytest.mark.parametrize("t_min", [1.0, -0.1, math.nan])
def test_piecewise_density_with_t_min_out_of_range_is_refused(t_min):
    with pytest.raises(ValueError, match=f"t_min is {t_min};"):
        PiecewiseDensity(t_min, (1.0,))


@pytest.mark.parametrize(
    "mass", [(), (0.0, 1.0), (-0.5, 1.5), (0.5, 0.5 + 1.5e-9), (0.5, 0.5 - 1.5e-9), (math.inf, 1.0)]
)
def test_piecewise_density_with_impossible_masses_is_refused(mass):
    with pytest.raises(ValueError, match=re.escape(f"the masses of the bins are {mass};")):
        PiecewiseDensity(0.0, mass)


def test_piecewise_density_takes_masses_that_sum_to_one_up_to_rounding():
    assert PiecewiseDensity(0.0, (0.5, 0.5 + 1e-10)).mass[0] == 0.5


# Variance from sums

VALUES = [3.0, -1.5, 4.25, 10.0, 0.5, 2.0, -7.0]


def test_variance_of_sums_is_the_unbiased_variance():
    assert moment_sums(_f64(VALUES)).tolist() == [7.0, 11.25, math.fsum(v * v for v in VALUES)]
    assert float(variance_of_sums(moment_sums(_f64(VALUES)))) == pytest.approx(statistics.variance(VALUES), rel=EXACT)


@pytest.mark.parametrize("parts", [[0, 3, 7], [0, 1, 2, 7], [0, 0, 7]])
def test_variance_of_sums_added_over_workers_is_that_of_one_process(parts):
    total = torch.stack([moment_sums(_f64(VALUES[a:b])) for a, b in itertools.pairwise(parts)]).sum(dim=0)
    assert float(variance_of_sums(total)) == pytest.approx(statistics.variance(VALUES), rel=EXACT)


def test_variance_of_sums_takes_any_number_of_rows():
    groups = [VALUES[:2], VALUES[2:6], VALUES]
    sums = torch.stack([moment_sums(_f64(group)) for group in groups]).view(3, 1, 3)
    expected = [[statistics.variance(group)] for group in groups]
    assert variance_of_sums(sums).tolist() == [pytest.approx(row, rel=EXACT) for row in expected]


def test_variance_of_equal_values_is_never_negative():
    sums = [moment_sums(torch.full((n,), 0.1 * n, dtype=torch.float64)) for n in range(2, 50)]
    assert all(0.0 <= float(variance_of_sums(s)) < 1e-12 for s in sums)  # of values of size one
    assert any(float(s[2] - s[1] * s[1] / s[0]) < 0 for s in sums)  # else rounding was never negative


def test_moment_sums_are_float64_whatever_the_values():
    sums = moment_sums(torch.full((4096,), 0.1, dtype=torch.bfloat16))
    assert sums.dtype == torch.float64
    assert float(sums[1]) == 4096 * float(torch.tensor(0.1, dtype=torch.bfloat16))


@pytest.mark.parametrize("count", [0, 1])
def test_variance_of_fewer_than_two_values_is_refused(count):
    sums = torch.stack([moment_sums(torch.ones(5)), moment_sums(torch.ones(count))])
    with pytest.raises(ValueError, match=f"at least 2 values; there are {count}$"):
        variance_of_sums(sums)
    assert float(variance_of_sums(moment_sums(torch.ones(2)))) == 0.0


# Variance of gradients


def _gradients() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _add(parts: Sequence[GradientSums]) -> GradientSums:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def test_gradient_variance_is_the_trace_of_the_covariance():
    gradients = _gradients()
    found = _add([GradientSums.of(gradient) for gradient in gradients])
    assert found.variance() == pytest.approx(float(torch.cov(gradients.T).trace()), rel=EXACT)
    by_entry = math.fsum(statistics.variance(column) for column in gradients.T.tolist())
    assert found.variance() == pytest.approx(by_entry, rel=EXACT)


def test_gradient_sums_of_workers_add_up_to_those_of_one():
    each = [GradientSums.of(gradient) for gradient in _gradients()]
    split = _add([_add(each[:1]), _add(each[1:4]), _add(each[4:])])
    whole = _add(each)
    assert split.count == whole.count == 6
    assert split.variance() == pytest.approx(whole.variance(), rel=EXACT)
    assert whole.total.tolist() == pytest.approx(_gradients().sum(dim=0).tolist(), rel=EXACT)


def test_gradient_sums_of_narrow_gradients_are_float64():
    sums = GradientSums.of(torch.full((3,), 0.1, dtype=torch.float32))
    assert sums.total.dtype == torch.float64
    assert sums.square_norm == pytest.approx(3 * float(torch.tensor(0.1)) ** 2, rel=EXACT)


def test_gradient_variance_of_equal_draws_is_never_negative():
    sums = [_add([GradientSums.of(_f64([0.1 * n, 0.7]))] * n) for n in range(2, 40)]
    assert all(0.0 <= s.variance() < 1e-12 for s in sums)
    assert any(s.square_norm < float(s.total @ s.total) / s.count for s in sums)  # else rounding was never negative


def test_gradient_variance_of_one_draw_is_refused():
    with pytest.raises(ValueError, match=r"there is 1$"):
        GradientSums.of(torch.ones(2)).variance()
