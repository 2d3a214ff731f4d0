"""Chains of discrete steps against fractions."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from dlm_core.schedules import (
    ClippedSchedule,
    CosineSchedule,
    CosineSquaredSchedule,
    DiscreteChain,
    LinearSchedule,
    LogarithmicSchedule,
    PolynomialSchedule,
)

FLOAT64_RTOL = 2e-14  # some tens of float64 roundings


def _float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _exact_alphas(betas) -> list[Fraction]:
    return list(itertools.accumulate((1 - Fraction(beta) for beta in betas), lambda a, b: a * b, initial=Fraction(1)))


CHAINS = {
    "irregular": DiscreteChain((0.1, 0.35, 0.0, 0.9)),
    "clean at first": DiscreteChain((0.0, 0.0, 0.5)),
    "masked early": DiscreteChain((0.25, 1.0, 0.5)),
    "one step": DiscreteChain((0.75,)),
    "linear": DiscreteChain.linear(7, 1e-4, 0.02),
    "hardly noised": DiscreteChain.linear(5, 1e-12, 1e-11),
    "cosine": DiscreteChain.cosine(6),
    "of a schedule": DiscreteChain.of_schedule(PolynomialSchedule(2.0), 5),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


@every_chain
def test_chain_alphas_are_products_of_what_is_kept(chain):
    alphas = chain.alphas()
    assert alphas.dtype == torch.float64
    assert chain.num_timesteps == len(chain.betas)
    assert alphas.tolist() == pytest.approx([float(a) for a in _exact_alphas(chain.betas)], rel=FLOAT64_RTOL)


@every_chain
def test_chain_thetas_are_the_posterior_of_one_step(chain):
    alphas = _exact_alphas(chain.betas)
    expected = [
        float((before - after) / (1 - after)) if after < 1 else 0.0 for before, after in itertools.pairwise(alphas)
    ]
    thetas = chain.thetas()
    assert thetas.dtype == torch.float64
    assert thetas.tolist() == pytest.approx(expected, rel=FLOAT64_RTOL, abs=1e-300)
    assert ((thetas >= 0) & (thetas <= 1)).all()


@every_chain
def test_chain_loss_of_constant_predictions_telescopes(chain):
    masked = (chain.thetas() * (1 - chain.alphas()[1:])).sum()
    assert float(masked) == pytest.approx(1 - float(chain.alphas()[-1]), rel=0, abs=FLOAT64_RTOL)


@pytest.mark.parametrize("num_timesteps", [1, 2, 5])
def test_chain_of_the_linear_schedule_reveals_one_in_t(num_timesteps):
    chain = DiscreteChain.of_schedule(LinearSchedule(), num_timesteps)
    expected = [1 / t for t in range(1, num_timesteps + 1)]  # (t - s) / t with s = t - 1, not s / t
    assert chain.thetas().tolist() == pytest.approx(expected, rel=FLOAT64_RTOL)


def test_linear_chain_has_equal_steps_of_beta():
    num_timesteps, first, last = 5, 0.1, 0.35
    expected = [first + (t - 1) / (num_timesteps - 1) * (last - first) for t in range(1, num_timesteps + 1)]
    assert DiscreteChain.linear(num_timesteps, first, last).betas == pytest.approx(expected, rel=FLOAT64_RTOL)
    assert DiscreteChain.linear(1, 0.1, 0.1).betas == (0.1,)


@pytest.mark.parametrize(
    "schedule",
    [
        LinearSchedule(),
        CosineSchedule(),
        CosineSquaredSchedule(),
        LogarithmicSchedule(),
        *map(PolynomialSchedule, (0.5, 2.0, 3.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_timesteps", [1, 4, 9])
def test_chain_of_schedule_passes_through_its_alphas(schedule, num_timesteps):
    chain = DiscreteChain.of_schedule(schedule, num_timesteps)
    expected = [float(schedule.alpha(_float64(t / num_timesteps))) for t in range(num_timesteps + 1)]
    assert chain.num_timesteps == num_timesteps
    assert chain.alphas().tolist() == pytest.approx(expected, rel=0, abs=FLOAT64_RTOL)
    assert chain.alphas()[-1] == 0


def test_chain_of_alphas_stays_at_zero():
    chain = DiscreteChain.of_alphas([1.0, 0.75, 0.75, 0.0, 0.0])
    assert chain.betas == (0.25, 0.0, 1.0, 0.0)


def _cosine_alphas(num_timesteps: int, offset: float) -> list[float]:
    angles = [math.pi * t / (2 * num_timesteps) + offset for t in range(1, num_timesteps + 1)]
    return [1.0, *(math.cos(angle) ** 2 for angle in angles)]


@pytest.mark.parametrize("share", [-0.499, -0.3, 0.0, 0.1, 0.249])
@pytest.mark.parametrize("num_timesteps", [2, 3, 10])
def test_cosine_chain_follows_the_squared_cosine(num_timesteps, share):
    offset = share * math.pi / num_timesteps
    alphas = DiscreteChain.cosine(num_timesteps, offset).alphas()
    assert alphas.tolist() == pytest.approx(_cosine_alphas(num_timesteps, offset), rel=0, abs=FLOAT64_RTOL)


def test_cosine_chain_without_offset_is_that_of_the_schedule():
    expected = DiscreteChain.of_schedule(CosineSquaredSchedule(), 8).alphas()
    torch.testing.assert_close(DiscreteChain.cosine(8).alphas(), expected, rtol=0, atol=FLOAT64_RTOL)


@pytest.mark.parametrize("share", [-0.751, 0.251])
@pytest.mark.parametrize("num_timesteps", [2, 3, 10])
def test_cosine_chain_that_would_rise_raises(num_timesteps, share):
    offset = share * math.pi / num_timesteps
    alphas = _cosine_alphas(num_timesteps, offset)
    step = next(t for t in range(1, num_timesteps + 1) if alphas[t] > alphas[t - 1])
    with pytest.raises(ValueError, match=rf"alpha_{step} is .* after .*; alpha must not rise"):
        DiscreteChain.cosine(num_timesteps, offset)
    closer = 0.995 * offset
    assert DiscreteChain.cosine(num_timesteps, closer).num_timesteps == num_timesteps


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiscreteChain((0.5, -0.1)), "beta_2 is -0.1"),
        (lambda: DiscreteChain((1.005, 0.5)), "beta_1 is 1.005"),
        (lambda: DiscreteChain((0.5, 0.5, math.nan)), "beta_3 is nan"),
        (lambda: DiscreteChain.linear(3, 0.5, 1.5), "beta_3 is 1.5"),
        (lambda: DiscreteChain.of_alphas([0.9, 0.5]), "alpha_0 is 0.9"),
        (lambda: DiscreteChain.of_alphas([1.0, 0.5, 0.6]), "alpha_2 is 0.6 after 0.5"),
        (lambda: DiscreteChain.of_alphas([1.0, -0.1]), "alpha_1 is -0.1 after 1.0"),
        (lambda: DiscreteChain.of_alphas([1.0, math.nan]), "alpha_1 is nan after 1.0"),
        (lambda: DiscreteChain.of_schedule(ClippedSchedule(0.25, 0.75), 4), "alpha_0 is 0.75"),
    ],
)
def test_chain_that_cannot_be_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: DiscreteChain(()),
        lambda: DiscreteChain.linear(0, 0.1, 0.2),
        lambda: DiscreteChain.cosine(0),
        lambda: DiscreteChain.of_schedule(LinearSchedule(), 0),
        lambda: DiscreteChain.of_alphas([]),
        lambda: DiscreteChain.linear(-1, 0.1, 0.2),
        lambda: DiscreteChain.cosine(-1),
        lambda: DiscreteChain.of_schedule(LinearSchedule(), -1),
    ],
    ids=["constructor", "linear", "cosine", "of_schedule", "of_alphas", "linear < 0", "cosine < 0", "schedule < 0"],
)
def test_chain_without_a_step_raises(build):
    with pytest.raises(
        ValueError, match=r"at least one step; (betas is empty|alphas is empty|num_timesteps is (0|-1)$)"
    ):
        build()
