"""pass@k against the enumeration of all subsets."""

import math
from fractions import Fraction
from itertools import combinations

import pytest

from pipeline.sandbox.pass_at_k import pass_at_k

ROUNDING = 1e-15


def _by_enumeration(num_samples: int, num_passed: int, k: int) -> Fraction:
    """The share of the subsets of k samples in which one passes, the first ``num_passed`` being those that do."""
    subsets = list(combinations(range(num_samples), k))
    return Fraction(sum(min(subset) < num_passed for subset in subsets), len(subsets))


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(num_samples: int) -> None:
    for num_passed in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            exact = _by_enumeration(num_samples, num_passed, k)
            assert pass_at_k(num_samples, num_passed, k) == pytest.approx(float(exact), abs=ROUNDING)


def test_pass_at_k_is_unbiased() -> None:
    """Its expectation over binomial numbers of successes is 1 - (1 - p)^k."""
    num_samples, k = 7, 3
    for p in (0.1, 0.5, 0.85):
        chances = [math.comb(num_samples, c) * p**c * (1 - p) ** (num_samples - c) for c in range(num_samples + 1)]
        mean = sum(chance * pass_at_k(num_samples, c, k) for c, chance in enumerate(chances))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=10 * ROUNDING)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels() -> None:
    assert pass_at_k(1000, 500, 500) == pytest.approx(1.0, abs=ROUNDING)
    assert pass_at_k(1000, 1, 1) == 0.001
    assert pass_at_k(100_000, 1, 3) == pytest.approx(3e-5, rel=1e-15)
    assert pass_at_k(1000, 0, 1000) == 0.0
    assert pass_at_k(1000, 1, 1000) == 1.0


@pytest.mark.parametrize(("num_samples", "num_passed", "k"), [(5, 1, 6), (5, 1, 0), (5, 1, -1), (0, 0, 1)])
def test_a_k_that_is_no_number_of_samples_is_refused(num_samples: int, num_passed: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, but there are {num_samples} samples of a problem"):
        pass_at_k(num_samples, num_passed, k)


@pytest.mark.parametrize("num_passed", [-1, 6])
def test_more_successes_than_samples_are_refused(num_passed: int) -> None:
    with pytest.raises(ValueError, match=rf"num_passed is {num_passed}; of 5 samples it must lie in \[0, 5\]"):
        pass_at_k(5, num_passed, 1)
