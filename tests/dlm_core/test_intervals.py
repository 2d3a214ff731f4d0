"""Quantiles of Student's t against tables, closed forms and draws."""

import math

import numpy as np
import pytest
import torch

from dlm_core.intervals import difference_interval, effective_dof, mean_interval, t_quantile, wilson_interval

TABLE = {1.0: 12.7062, 2.0: 4.3027, 3.0: 3.1824, 7.0: 2.3646, 30.0: 2.0423, 1000.0: 1.9623, math.inf: 1.9600}
"""Two-sided, 95 %: as printed in textbooks."""


@pytest.mark.parametrize("dof", TABLE)
def test_quantiles_are_those_of_the_tables(dof: float) -> None:
    assert t_quantile(dof) == pytest.approx(TABLE[dof], abs=6e-5)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_quantiles_of_one_and_two_degrees_have_closed_forms(level: float) -> None:
    assert t_quantile(1.0, level) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-6)
    assert t_quantile(2.0, level) == pytest.approx(math.sqrt(2 * level**2 / (1 - level**2)), rel=1e-6)


def test_intervals_of_means_of_few_hold_the_truth_as_often_as_they_say() -> None:
    draws = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half_width = t_quantile(7.0) * draws.std(dim=1) / math.sqrt(8)
    covered = float((draws.mean(dim=1).abs() < half_width).double().mean())
    assert covered == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / 20_000))


@pytest.mark.parametrize("sigmas", [[1.0] * 7, [1.0, 2.0, 3.0], [5.0, 0.1, 0.1, 0.1]])
def test_degrees_of_a_sum_of_squares_come_from_moments_that_are_right_in_the_mean(sigmas: list[float]) -> None:
    """3 S^2 - 2 Q over Q, of S = sum d^2 and Q = sum d^4: numerator and denominator are those of Satterthwaite."""
    scale = torch.tensor(sigmas, dtype=torch.float64)
    d = scale * torch.randn(400_000, len(sigmas), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, fourth = d.square().sum(dim=1), d.pow(4).sum(dim=1)
    wanted = float(scale.square().sum() ** 2 / scale.pow(4).sum())
    assert float((3 * total**2 - 2 * fourth).mean() / fourth.mean()) == pytest.approx(wanted, rel=0.03)
    for row, s, q in zip(d[:50].tolist(), total.tolist(), fourth.tolist(), strict=False):
        assert effective_dof(row) == pytest.approx(min(3 * s**2 / q - 2, len(sigmas)), rel=1e-9)


def test_degrees_are_between_one_and_the_number_of_deviations_whatever_their_scale() -> None:
    assert effective_dof([0.3] * 5) == effective_dof([-1e-200] * 5) == effective_dof([1e200] * 5) == 5.0
    assert effective_dof([1.0, 1e-9, 0.0]) == pytest.approx(1.0)
    assert effective_dof([]) == effective_dof([0.0, 0.0]) == math.inf


@pytest.mark.parametrize(("dof", "level", "words"), [(0.5, 0.95, r"dof is 0\.5"), (math.nan, 0.95, "dof is nan")])
def test_less_than_one_degree_of_freedom_is_refused(dof: float, level: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        t_quantile(dof, level)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, math.nan])
def test_a_level_that_is_no_probability_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level is"):
        t_quantile(3.0, level)


@pytest.mark.parametrize(("share", "num_trials"), [(0.3, 10), (0.5, 7), (0.95, 400), (0.0, 5), (1.0, 5), (0.0, 1)])
def test_ends_of_a_share_are_where_the_normal_test_just_accepts(share: float, num_trials: int) -> None:
    for end in wilson_interval(share, num_trials):
        assert 0.0 <= end <= 1.0
        z = t_quantile(math.inf)
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / num_trials, rel=1e-9, abs=1e-15)
    low, high = wilson_interval(share, num_trials)
    assert low <= share <= high
    assert low < high


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_intervals_of_shares_hold_the_probability(p: float) -> None:
    """Summed over all outcomes; of a few trials coverage goes up and down around the level."""
    n, held = 60, 0.0
    for hits in range(n + 1):
        low, high = wilson_interval(hits / n, n)
        held += math.comb(n, hits) * p**hits * (1 - p) ** (n - hits) * (low <= p <= high)
    assert 0.93 < held < 0.97


def test_shares_and_trials_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="num_trials is 0; an interval needs at least 1"):
        wilson_interval(0.5, 0)
    with pytest.raises(ValueError, match=r"share is 1\.5; it must lie in \[0, 1\]"):
        wilson_interval(1.5, 9)


@pytest.mark.parametrize("n", [20, 50, 164])
@pytest.mark.parametrize(("num_samples", "k"), [(2, 1), (10, 1), (10, 5), (20, 10)])
@pytest.mark.parametrize(
    ("a", "b"), [(0.05, 1.0), (0.1, 0.4), (0.5, 0.5), (5.0, 5.0), (0.5, 20.0), (2.0, 40.0), (50.0, 50.0)]
)
def test_intervals_of_pass_at_k_hold_its_mean_over_problems(
    n: int, num_samples: int, k: int, a: float, b: float
) -> None:
    """Of problems whose chances follow a beta law; near 0 and 1 Student's t alone holds it as seldom as 55 times."""
    chance, repeats = np.random.default_rng([n, num_samples, k]), 500
    passed = chance.binomial(num_samples, chance.beta(a, b, (repeats, n)))
    estimates = [1 - math.comb(num_samples - c, k) / math.comb(num_samples, k) for c in range(num_samples + 1)]
    mean = 1 - math.exp(sum(math.log(b + i) - math.log(a + b + i) for i in range(k)))
    held = 0
    for counts in passed.tolist():
        low, high = mean_interval([estimates[c] for c in counts])
        held += low <= mean <= high
    assert held / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize(("a", "b"), [(0.1, 0.4), (0.5, 0.5), (5.0, 5.0), (0.5, 20.0), (20.0, 0.5)])
def test_intervals_of_shares_of_unlike_parts_hold_the_share(n: int, a: float, b: float) -> None:
    """Each of n gaps has 1 to 12 tokens and a chance of its own, the same for all of them."""
    chance, repeats = np.random.default_rng([n, int(10 * a), int(10 * b)]), 1000
    sizes = 1 + np.arange(n) % 12
    hits = chance.binomial(sizes, chance.beta(a, b, (repeats, n)))
    held = 0
    for right in hits / sizes:
        low, high = mean_interval(right.tolist(), sizes.astype(float).tolist())
        held += low <= a / (a + b) <= high
    assert held / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)


def test_weights_of_a_mean_count_by_their_proportions_alone() -> None:
    values = [0.1, 0.9, 0.4, 0.7]
    assert mean_interval(values, [3.0] * 4) == pytest.approx(mean_interval(values), rel=1e-12)
    assert mean_interval(values, [2.0, 4.0, 6.0, 8.0]) == pytest.approx(
        mean_interval(values, [1.0, 2.0, 3.0, 4.0]), rel=1e-12
    )
    (low, high), (low_2, high_2) = mean_interval([0.0] * 9), mean_interval([0.0] * 9, [1.0] * 8 + [50.0])
    assert low == low_2 == 0.0
    assert high_2 > 2 * high  # nearly all of it is one trial
    with pytest.raises(ValueError, match=r"the least weight is 0\.0"):
        mean_interval(values, [1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("n", [12, 40])
@pytest.mark.parametrize(("p_a", "p_b"), [(0.0, 0.05), (0.02, 0.02), (0.1, 0.1), (0.05, 0.3), (0.4, 0.4), (0.1, 0.8)])
def test_intervals_of_differences_of_shares_hold_them(n: int, p_a: float, p_b: float) -> None:
    """All outcomes of n pairs, of which a alone succeeds with probability p_a and b alone with p_b."""
    held = 0.0
    for a in range(n + 1):
        for b in range(n - a + 1):
            alike = [0.5] * (n - a - b)
            low, high = difference_interval([1.0] * a + [0.0] * b + alike, [0.0] * a + [1.0] * b + alike)
            ways = math.comb(n, a) * math.comb(n - a, b)
            held += ways * p_a**a * p_b**b * (1 - p_a - p_b) ** (n - a - b) * (low <= p_b - p_a <= high)
    assert 0.93 < held <= 1.0 + 1e-9


def test_interval_of_a_difference_turns_with_its_sides_stays_in_its_range_and_never_closes() -> None:
    a, b = [0.0, 0.25, 0.5, 1.0, 0.75], [1.0, 0.0, 0.5, 0.75, 0.75]
    low, high = difference_interval(a, b)
    assert difference_interval(b, a) == pytest.approx((-high, -low), abs=1e-12)
    assert low < sum(b) / 5 - sum(a) / 5 < high
    low, high = difference_interval([1.0] * 40, [1.0] * 40)
    assert low == pytest.approx(-high)
    assert 0.05 < high < 0.15
    assert difference_interval([0.0] * 2, [1.0] * 2)[1] == pytest.approx(1.0)


def test_interval_of_a_mean_uses_how_alike_the_values_are() -> None:
    def width(values: list[float]) -> float:
        low, high = mean_interval(values)
        assert 0.0 <= low <= sum(values) / len(values) <= high <= 1.0
        return high - low

    apart, alike = width([0.0, 1.0] * 50), width([0.4, 0.6] * 50)
    assert apart == pytest.approx(2 * t_quantile(99.0) * math.sqrt(0.25 / (100 + t_quantile(99.0) ** 2)), rel=1e-9)
    assert 0 < width([0.5] * 100) < alike < 0.4 * apart
    for all_alike in (0.0, 1.0):
        assert width([all_alike] * 100) == pytest.approx(t_quantile(99.0) ** 2 / (100 + t_quantile(99.0) ** 2))


@pytest.mark.parametrize(("values", "words"), [([0.5], "there are 1 values"), ([0.5, 1.5], r"lie in \[0.5, 1.5\]")])
def test_values_that_have_no_interval_are_refused(values: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mean_interval(values)
