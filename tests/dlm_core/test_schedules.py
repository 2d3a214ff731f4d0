"""Noise schedules against closed forms in 40 digits, differences, autograd and quadrature."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dlm_core.schedules import (
    SCHEDULES,
    ClippedSchedule,
    CosineSchedule,
    CosineSquaredSchedule,
    GeometricSchedule,
    LinearSchedule,
    LogarithmicSchedule,
    PolynomialSchedule,
    Schedule,
    SigmaLinearSchedule,
)
from tests.support.schedule_forms import FORMS, Form, exact_mask_prob

FLOAT64_RTOL = 2e-14  # some tens of float64 roundings: exp(12 t) of the geometric schedule multiplies one by 12
NEAR_ONE_RTOL = 1e-13  # at t = 0.99 sines and tangents of pi t magnify the rounding of their argument a hundredfold
FLOAT32_RTOL = 5e-6  # the same in float32
STEP = 1e-6  # of the central difference, relative to t
DIFFERENCE_ATOL = 2e-9  # STEP**2 times a third derivative of up to 2000, and 1e-16 / STEP
QUADRATURE_ATOL = 1e-12  # 3000 terms of order 1, rounded at 1e-16
SCHEDULE_OF: dict[str, Schedule] = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
    "cosine_sqr": CosineSquaredSchedule(),
    "sigma_linear": SigmaLinearSchedule(),
    "geometric": GeometricSchedule(),
    "square": PolynomialSchedule(2.0),
    "sqrt": PolynomialSchedule(0.5),
    "log": LogarithmicSchedule(),
    "cube": PolynomialSchedule(3.0),
    "sigma_linear(0.125, 5)": SigmaLinearSchedule(0.125, 5.0),
    "geometric(0.01, 8)": GeometricSchedule(0.01, 8.0),
    "clipped(0.3, 0.8)": ClippedSchedule(0.3, 0.8),
    "clipped(0, 0.5)": ClippedSchedule(0.0, 0.5),
    # 0.1 + (0.45 - 0.1) is not 0.45 in float64, nor 0.05 + 0.3 0.35 in float32
    "clipped(0.1, 0.45)": ClippedSchedule(0.1, 0.45),
    "clipped(0.05, 0.35)": ClippedSchedule(0.05, 0.35),
}


@dataclass(frozen=True)
class Case:
    """A schedule and what it ought to be."""

    schedule: Schedule
    form: Form


CASES = {name: Case(schedule, FORMS[name]) for name, schedule in SCHEDULE_OF.items()}
TIMES = (1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
OUTSIDE = [(-1e-9, "-1e-09"), (math.nextafter(1.0, 2.0), "1.0000000000000002"), (math.nan, "nan")]
EXACT_ENDS = {name: case for name, case in CASES.items() if case.form.exact_ends}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _times(case: Case) -> torch.Tensor:
    return case.form.scale * _float64(TIMES)


def _exact_mask_prob(case: Case, t: torch.Tensor) -> torch.Tensor:
    return _float64([exact_mask_prob(case.form, value) for value in t.tolist()])


# Values


@every_case
def test_mask_prob_at_any_time_has_all_its_digits(case):
    t = _times(case)
    torch.testing.assert_close(case.schedule.mask_prob(t), _exact_mask_prob(case, t), rtol=FLOAT64_RTOL, atol=0)


@every_case
def test_alpha_is_one_minus_mask_prob(case):
    t = _times(case)
    torch.testing.assert_close(case.schedule.alpha(t), 1 - _exact_mask_prob(case, t), rtol=0, atol=FLOAT64_RTOL)


@every_case
def test_nelbo_weight_and_dalpha_equal_their_closed_forms(case):
    t = _times(case)
    weight = _float64([case.form.weight(value) for value in t.tolist()])
    torch.testing.assert_close(case.schedule.nelbo_weight(t), weight, rtol=NEAR_ONE_RTOL, atol=0)
    dalpha = -weight * _exact_mask_prob(case, t)
    torch.testing.assert_close(case.schedule.dalpha(t), dalpha, rtol=NEAR_ONE_RTOL, atol=0)


@every_case
def test_dalpha_equals_autograd_of_alpha(case):
    t = _times(case).requires_grad_()
    (gradient,) = torch.autograd.grad(case.schedule.alpha(t).sum(), t)
    dalpha = case.schedule.dalpha(t.detach())
    # the derivative of 1 - exp(-sigma) is taken as 1 minus itself, which loses the digits of a small alpha
    tolerance = NEAR_ONE_RTOL * dalpha.abs() / (1 - _exact_mask_prob(case, t.detach()))
    assert ((dalpha - gradient).abs() <= tolerance).all()


@every_case
def test_nelbo_weight_equals_difference_quotient_of_alpha(case):
    t = _times(case)[4:]  # below, alpha has too few digits for a difference
    after, before = (case.schedule.alpha(t * (1 + sign * STEP)) for sign in (1, -1))
    slope = -(after - before) / (2 * STEP)  # times t
    expected = t * case.schedule.nelbo_weight(t) * (1 - case.schedule.alpha(t))
    torch.testing.assert_close(slope, expected, rtol=0, atol=DIFFERENCE_ATOL)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_prob_at_the_ends_is_exact(case, dtype):
    schedule, (first, last) = case.schedule, torch.tensor(case.form.ends, dtype=dtype)
    mask_prob, alpha = (f(torch.tensor([0.0, 1.0], dtype=dtype)) for f in (schedule.mask_prob, schedule.alpha))
    rtol = 0 if case.form.exact_ends else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(mask_prob, torch.stack([first, last]), rtol=rtol, atol=0)
    assert alpha.tolist() == (1 - mask_prob).tolist()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_prob_over_time_never_falls_nor_leaves_its_ends(case, dtype):
    mask_prob = case.schedule.mask_prob(torch.linspace(0, 1, 2001, dtype=dtype))
    assert (mask_prob.diff() >= 0).all()
    assert 0 <= mask_prob[0] <= mask_prob[-1] <= 1
    rising = case.schedule.mask_prob(case.form.scale * torch.linspace(0, 1, 51, dtype=torch.float64))
    assert (rising.diff() > 0).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_every_method_keeps_shape_and_dtype(case, dtype, shape):
    schedule, t = case.schedule, torch.full(shape, 0.3 * case.form.scale, dtype=dtype)
    exact = _float64(0.3 * case.form.scale)
    for method in (schedule.mask_prob, schedule.alpha, schedule.dalpha, schedule.nelbo_weight):
        value = method(t)
        assert (value.shape, value.dtype) == (shape, dtype)
        torch.testing.assert_close(value, method(exact).to(dtype).expand(shape), rtol=FLOAT32_RTOL, atol=0)
    inverse = schedule.time_of(schedule.mask_prob(t))
    assert (inverse.shape, inverse.dtype) == (shape, dtype)


@every_case
def test_methods_return_new_tensors(case):
    t = _times(case)
    kept = t.clone()
    mask_prob = case.schedule.mask_prob(t)
    case.schedule.time_of(mask_prob.clone()).zero_()
    mask_prob.zero_()
    assert torch.equal(t, kept)


# The inverse


def _inverse_tolerance(case: Case, t: torch.Tensor, rtol: float) -> torch.Tensor:
    """A relative error of mask_prob is one of 1 / weight in t."""
    return rtol * (t + _float64([1 / case.form.weight(value) if value > 0 else 0.0 for value in t.tolist()]))


@every_case
def test_time_of_mask_prob_is_the_time(case):
    t = _times(case)
    error = (case.schedule.time_of(case.schedule.mask_prob(t)) - t).abs()
    assert (error <= _inverse_tolerance(case, t, FLOAT64_RTOL)).all()


@every_case
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, FLOAT32_RTOL), (torch.float64, FLOAT64_RTOL)])
def test_time_of_mask_prob_in_any_dtype_lies_in_the_unit_interval(case, dtype, rtol):
    t = torch.linspace(0, 1, 33, dtype=dtype)
    found = case.schedule.time_of(case.schedule.mask_prob(t))
    assert ((found >= 0) & (found <= 1)).all()
    if case.form.scale == 1:
        inner = slice(1, 32)  # at the very end the slope may be 0
        error = (found - t)[inner].abs().double()
        assert (error <= _inverse_tolerance(case, t[inner].double(), rtol)).all()


@every_case
def test_mask_prob_of_time_of_is_the_probability(case):
    first, last = case.form.ends
    p = first + (last - first) * _float64([1e-9, 0.01, 0.25, 0.5, 0.75, 0.99])
    torch.testing.assert_close(case.schedule.mask_prob(case.schedule.time_of(p)), p, rtol=FLOAT64_RTOL, atol=0)


@pytest.mark.parametrize("case", EXACT_ENDS.values(), ids=EXACT_ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_of_the_ends_is_zero_and_one(case, dtype):
    ends = torch.tensor(case.form.ends, dtype=dtype)
    beyond = torch.tensor([0.0, 4 * torch.finfo(dtype).eps], dtype=dtype)  # as far as rounding may carry mask_prob
    assert case.schedule.time_of(ends).tolist() == case.schedule.time_of(ends + beyond).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "schedule",
    [
        *(GeometricSchedule(low, high) for low in (1e-4, 1e-3, 0.03) for high in (5.0, 12.0, 20.0)),
        *(SigmaLinearSchedule(low, high) for low in (0.01, 0.125) for high in (5.0, 12.0, 50.0)),
    ],
    ids=str,
)
def test_time_of_a_rounded_end_is_the_end(schedule, dtype):
    ends = schedule.mask_prob(_float64([0.0, 1.0])).to(dtype)
    assert schedule.time_of(ends).tolist() == [0.0, 1.0]


# The weight of a step


@pytest.mark.parametrize("num_timesteps", [1, 2, 7])
@every_case
def test_discrete_weight_is_the_share_of_the_masked_that_one_step_masked(case, num_timesteps):
    index = torch.arange(1, num_timesteps + 1)
    probs = [exact_mask_prob(case.form, i / num_timesteps) for i in range(num_timesteps + 1)]
    expected = [num_timesteps * (after - before) / after for before, after in itertools.pairwise(probs)]
    weight = case.schedule.discrete_weight(index.double(), num_timesteps)
    assert weight.tolist() == pytest.approx(expected, rel=NEAR_ONE_RTOL, abs=NEAR_ONE_RTOL)


@every_case
def test_discrete_weight_of_many_steps_is_the_nelbo_weight_between_them(case):
    num_timesteps, index = 10**6, _float64([250_000.0, 900_000.0])
    middle = case.schedule.nelbo_weight((index - 0.5) / num_timesteps)
    torch.testing.assert_close(case.schedule.discrete_weight(index, num_timesteps), middle, rtol=1e-4, atol=0)


def test_discrete_weight_of_a_step_that_masks_nothing_raises():
    steep = PolynomialSchedule(400.0)  # 0.1 ** 400 is 0 in float64
    with pytest.raises(ValueError, match=r"PolynomialSchedule\(exponent=400.0\) masks nothing at one of 10 steps"):
        steep.discrete_weight(_float64([9.0, 1.0]), 10)


# The integral of the weighted loss over t


def _integral(case: Case, of_mask_prob: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Integral of f(mask_prob(t)) nelbo_weight(t) over [0, 1]: Gauss-Legendre between the powers of 2^(-1/4).

    It leaves out [0, 1e-36]; a stiff schedule, or one with an infinite slope at 0, is smooth on each part.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    bounds = 2.0 ** (-torch.arange(481, dtype=torch.float64) / 4)
    center, half = (bounds[:-1] + bounds[1:])[:, None] / 2, (bounds[:-1] - bounds[1:])[:, None] / 2
    t = (center + half * torch.from_numpy(nodes)).flatten()
    loss = of_mask_prob(case.schedule.mask_prob(t)) * case.schedule.nelbo_weight(t)
    return float((loss * (half * torch.from_numpy(weights)).flatten()).sum())


@every_case
def test_weighted_loss_depends_on_the_schedule_through_its_ends_alone(case):
    first, last = case.form.ends
    integral = _integral(case, lambda p: p * (3 * p * p + p.cos()))
    expected = last**3 + math.sin(last) - first**3 - math.sin(first)
    assert integral == pytest.approx(expected, rel=0, abs=QUADRATURE_ATOL)


@every_case
def test_weighted_loss_of_constant_predictions_is_the_share_that_gets_masked(case):
    first, last = case.form.ends
    assert _integral(case, lambda p: p) == pytest.approx(last - first, rel=0, abs=QUADRATURE_ATOL)


# The registry


def test_registry_holds_the_published_schedules_by_name():
    at_a_quarter = {
        "linear": 0.25,
        "cosine": 1 - math.cos(math.pi / 8),
        "cosine_sqr": 1 - math.cos(math.pi / 8) ** 2,
        "sigma_linear": 1.0,
        "geometric": 1 - math.exp(-(1e-4**0.75 * 20**0.25)),
        "square": 0.0625,
        "sqrt": 0.5,
        "log": math.log2(1.25),
    }
    found = {name: float(schedule.mask_prob(_float64(0.25))) for name, schedule in SCHEDULES.items()}
    assert found == pytest.approx(at_a_quarter, rel=FLOAT64_RTOL)


def test_registry_schedules_have_the_published_parameters():
    assert {name: CASES[name].schedule for name in SCHEDULES} == SCHEDULES
    assert SigmaLinearSchedule() == SigmaLinearSchedule(sigma_min=0.0, sigma_max=1e8)
    assert GeometricSchedule() == GeometricSchedule(sigma_min=1e-4, sigma_max=20.0)


# What schedules refuse


@pytest.mark.parametrize("method", ["mask_prob", "alpha", "dalpha", "nelbo_weight"])
@pytest.mark.parametrize(("bad", "shown"), OUTSIDE)
@pytest.mark.parametrize("schedule", [CosineSchedule(), ClippedSchedule(0.3, 0.8)], ids=type)
def test_schedule_at_one_time_outside_the_unit_interval_raises(method, bad, shown, schedule):
    with pytest.raises(ValueError, match=rf"t is {shown}; it must lie in \[0.0, 1.0\]"):
        getattr(schedule, method)(_float64([[0.5], [bad]]))


@pytest.mark.parametrize(
    ("schedule", "bad", "message"),
    [
        (LinearSchedule(), -1e-9, r"mask_prob is -1e-09; it must lie in \[0.0, 1.0\]"),
        (CosineSchedule(), 1.5, "mask_prob is 1.5"),
        (CosineSquaredSchedule(), math.nan, "mask_prob is nan"),
        (ClippedSchedule(0.3, 0.8), 0.25, r"mask_prob is 0.25; it must lie in \[0.3, 0.8\]"),
        (ClippedSchedule(0.3, 0.8), 0.81, "mask_prob is 0.81"),
        (GeometricSchedule(), 0.0, "mask_prob is 0.0"),
        (SigmaLinearSchedule(0.0, 2.0), 0.9, "mask_prob is 0.9"),
        (ClippedSchedule(1.0, 1.0), 1.0, "mask_prob is 1.0 at every t of ClippedSchedule"),
    ],
)
def test_time_of_one_probability_never_taken_raises(schedule, bad, message):
    good = float(schedule.mask_prob(_float64(0.5)))
    with pytest.raises(ValueError, match=message):
        schedule.time_of(_float64([good, bad, good]))


@pytest.mark.parametrize(
    "schedule", [case.schedule for case in CASES.values() if case.form.ends[0] == 0], ids=lambda schedule: str(schedule)
)
def test_nelbo_weight_where_nothing_is_masked_raises(schedule):
    with pytest.raises(ValueError, match=rf"the NELBO weight diverges .*{type(schedule).__name__}.*t_min"):
        schedule.nelbo_weight(_float64([0.5, 0.0]))


@pytest.mark.parametrize("schedule", [GeometricSchedule(), SigmaLinearSchedule(0.5, 2.0), ClippedSchedule(0.3, 0.8)])
def test_nelbo_weight_at_zero_is_finite_where_some_are_masked(schedule):
    assert schedule.nelbo_weight(_float64([0.0])).isfinite().all()


def test_dalpha_where_it_is_infinite_raises():
    with pytest.raises(ValueError, match=r"dalpha diverges at t = 0 for PolynomialSchedule\(exponent=0.5\)"):
        PolynomialSchedule(0.5).dalpha(_float64([0.5, 0.0]))
    assert PolynomialSchedule(1.0).dalpha(_float64([0.5, 0.0])).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("low", [1.0, 0.4])
def test_clipped_schedule_of_no_width_is_constant(low):
    schedule, t = ClippedSchedule(low, low), _float64([0.0, 0.3, 1.0])
    assert schedule.mask_prob(t).tolist() == pytest.approx([low] * 3, rel=FLOAT64_RTOL)
    assert schedule.nelbo_weight(t).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PolynomialSchedule(0.0), "exponent is 0.0"),
        (lambda: PolynomialSchedule(-1.0), "exponent is -1.0"),
        (lambda: PolynomialSchedule(math.inf), "exponent is inf"),
        (lambda: PolynomialSchedule(math.nan), "exponent is nan"),
        (lambda: SigmaLinearSchedule(-0.5, 3.0), "sigma runs from -0.5 to 3.0"),
        (lambda: SigmaLinearSchedule(3.0, 3.0), "sigma runs from 3.0 to 3.0"),
        (lambda: SigmaLinearSchedule(0.0, math.inf), "sigma runs from 0.0 to inf"),
        (lambda: SigmaLinearSchedule(math.nan, 3.0), "sigma runs from nan to 3.0"),
        (lambda: GeometricSchedule(0.0, 3.0), "sigma runs from 0.0 to 3.0"),
        (lambda: GeometricSchedule(4.0, 3.0), "sigma runs from 4.0 to 3.0"),
        (lambda: GeometricSchedule(2.0, 2.0), "sigma runs from 2.0 to 2.0"),
        (lambda: GeometricSchedule(1.0, math.inf), "sigma runs from 1.0 to inf"),
        (lambda: ClippedSchedule(-0.1, 0.5), r"clipped to \[-0.1, 0.5\]"),
        (lambda: ClippedSchedule(0.6, 0.5), r"clipped to \[0.6, 0.5\]"),
        (lambda: ClippedSchedule(0.6, 1.005), r"clipped to \[0.6, 1.005\]"),
        (lambda: ClippedSchedule(0.6, math.nan), r"clipped to \[0.6, nan\]"),
    ],
)
def test_schedule_with_bad_parameters_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@dataclass(frozen=True)
class _Wrong(Schedule):
    """A schedule of somebody's own, as given."""

    prob: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor] = torch.ones_like

    def __str__(self) -> str:
        return "Wrong"

    def _mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return self.prob(t)

    def _slope(self, t: torch.Tensor) -> torch.Tensor:
        return self.slope(t)

    def _time_of(self, mask_prob: torch.Tensor) -> torch.Tensor:
        return mask_prob


@pytest.mark.parametrize(
    ("prob", "found"),
    [(lambda t: 1.5 * t, "1.5"), (lambda t: t - 0.25, "-0.25"), (lambda t: t / 0 * 0, "nan")],
    ids=["above", "below", "nan"],
)
@pytest.mark.parametrize("method", ["mask_prob", "alpha", "nelbo_weight"])
def test_schedule_whose_formula_leaves_the_unit_interval_is_refused(method, prob, found):
    with pytest.raises(ValueError, match=rf"mask_prob of Wrong is {found}; it must lie in"):
        getattr(_Wrong(prob), method)(_float64([0.0, 1.0]))


@pytest.mark.parametrize(("value", "found"), [(-0.5, "-0.5"), (math.nan, "nan")])
@pytest.mark.parametrize("method", ["dalpha", "nelbo_weight"])
def test_schedule_whose_alpha_rises_is_refused(method, value, found):
    schedule = _Wrong(lambda t: 0.5 + t / 4, lambda t: torch.where(t > 0.5, value, 0.0))
    with pytest.raises(ValueError, match=rf"alpha of Wrong rises: mask_prob has the slope {found} at t = 0\.75;"):
        getattr(schedule, method)(_float64([0.25, 0.75]))
    assert getattr(schedule, method)(_float64([0.5])).tolist() == [0.0]  # standing still is allowed


def test_discrete_weight_of_a_step_in_which_alpha_rises_raises():
    schedule = _Wrong(lambda t: torch.where(t > 0.5, 0.25, 0.5))
    assert schedule.discrete_weight(_float64([1.0, 2.0]), 4).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="alpha of Wrong rises in one of 4 steps"):
        schedule.discrete_weight(_float64([1.0, 3.0]), 4)


@pytest.mark.parametrize(
    ("index", "num_timesteps", "message"),
    [
        (0.0, 4, r"index is 0\.0; it must lie in \[1\.0, 4\.0\]"),
        (5.0, 4, r"index is 5\.0; it must lie in \[1\.0, 4\.0\]"),
        (1.0, 0, "num_timesteps is 0;"),
        (1.0, -1, "num_timesteps is -1;"),
    ],
)
def test_discrete_weight_of_a_step_that_is_none_raises(index, num_timesteps, message):
    with pytest.raises(ValueError, match=message):
        LinearSchedule().discrete_weight(_float64([index]), num_timesteps)
