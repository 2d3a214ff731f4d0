"""Noise schedules against autograd, finite differences and the closed form."""

import pytest
import torch

from dlm_core.schedules import LinearSchedule, nelbo_weight

STEP = 1e-5  # of the central difference: its rounding error is about 1e-16 / 1e-5
DIFFERENCE_ATOL = 1e-9  # two orders above that rounding error
FLOAT64_RTOL = 1e-14  # a few roundings of float64

SCHEDULES = [LinearSchedule()]
INNER_TIMES = torch.tensor([1e-3, 0.1, 0.25, 0.5, 0.9, 0.999], dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_at_the_ends_is_one_then_zero(schedule):
    alpha = schedule.alpha(torch.tensor([0.0, 1.0]))
    assert alpha.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_over_time_decreases(schedule):
    assert (schedule.alpha(torch.linspace(0, 1, 101)).diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dalpha_equals_autograd_of_alpha(schedule):
    t = INNER_TIMES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.dalpha(t.detach()), gradient, rtol=FLOAT64_RTOL, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nelbo_weight_equals_finite_difference_of_alpha(schedule):
    t = INNER_TIMES
    slope = (schedule.alpha(t + STEP) - schedule.alpha(t - STEP)) / (2 * STEP)
    mask_prob = 1 - schedule.alpha(t)
    weight = nelbo_weight(schedule.alpha(t), schedule.dalpha(t))
    torch.testing.assert_close(weight * mask_prob, -slope, rtol=0, atol=DIFFERENCE_ATOL)


def test_nelbo_weight_of_linear_schedule_is_one_over_t():
    schedule = LinearSchedule()
    weight = nelbo_weight(schedule.alpha(INNER_TIMES), schedule.dalpha(INNER_TIMES))
    # 1 - (1 - t) loses the bits of t below 2**-53, which is 1e-13 of the smallest t here
    torch.testing.assert_close(weight, 1 / INNER_TIMES, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_of_any_shape_and_dtype_keeps_them(dtype):
    t = torch.full((2, 3), 0.5, dtype=dtype)
    schedule = LinearSchedule()
    for value in (schedule.alpha(t), schedule.dalpha(t), nelbo_weight(schedule.alpha(t), schedule.dalpha(t))):
        assert value.shape == t.shape
        assert value.dtype == dtype
