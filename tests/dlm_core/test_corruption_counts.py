"""Masks of an exact count, of a fraction within bounds, complements: against enumeration and exact fractions."""

import itertools
import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dlm_core.corruption import (
    _truncated_binomial,
    complement_mask,
    exact_count_positions,
    mask_exact_count,
    mask_tokens,
    mask_within,
)
from dlm_core.noise import Stream
from tests.support import reference

MASK = 99
SIGMAS = 5.0  # a fair draw leaves this many standard errors once in two million
NEAR = 1e-9  # beside a step of a distribution function: above the rounding of sums of exp(lgamma)
# the examples are small as they come: to shrink them takes longer than to read them
EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
int64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def _rows(num_rows: int, seq_len: int) -> torch.Tensor:
    return torch.arange(num_rows * seq_len).reshape(num_rows, seq_len) % MASK


@st.composite
def _maskable(draw, max_size=4):
    """Which positions of some rows may be masked, and how many groups a row has."""
    num_rows, num_groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, max_size))
    cells = st.lists(st.booleans(), min_size=num_groups * size, max_size=num_groups * size)
    return torch.tensor(draw(st.lists(cells, min_size=num_rows, max_size=num_rows))), num_groups


def _in_groups(positions: torch.Tensor, num_groups: int) -> torch.Tensor:
    """How many positions of every group are chosen."""
    return torch.stack([group.sum(dim=1) for group in positions.chunk(num_groups, dim=1)], dim=1)


# Exact counts


@EXAMPLES
@given(st.data(), _maskable(), int64, st.integers(0, 10**9))
def test_mask_exact_count_of_any_blocks_masks_that_many_of_the_smallest_hashes(data, grouped, noise_seed, step):
    maskable, num_groups = grouped
    counts = [[data.draw(st.integers(0, most)) for most in row] for row in _in_groups(maskable, num_groups).tolist()]
    ids = data.draw(st.lists(int64, min_size=len(maskable), max_size=len(maskable)))
    x0, address = _rows(*maskable.shape), {"noise_seed": noise_seed, "step": step}
    xt = mask_exact_count(x0, torch.tensor(counts), torch.tensor(ids), mask_token_id=MASK, maskable=maskable, **address)
    is_masked = xt == MASK
    assert _in_groups(is_masked, num_groups).tolist() == counts
    assert torch.equal(xt[~is_masked], x0[~is_masked])
    chosen = exact_count_positions(torch.tensor(counts), torch.tensor(ids), maskable, **address)
    assert torch.equal(chosen, is_masked)
    assert is_masked.tolist() == reference.exact_count_positions(
        maskable.tolist(), counts, ids, stream=Stream.EXACT_MASK, **address
    )


def test_mask_exact_count_draws_every_subset_of_every_block_equally_often():
    num_rows = 20_000
    maskable = torch.tensor([True, True, False, True, True, False, True, True])
    xt = mask_exact_count(
        torch.zeros(num_rows, 8, dtype=torch.int64),
        torch.tensor([2, 1]).expand(num_rows, 2),
        torch.arange(num_rows),
        noise_seed=2,
        step=0,
        mask_token_id=MASK,
        maskable=maskable.expand(num_rows, 8),
    )
    subsets = [a + b for a in itertools.combinations((0, 1, 3), 2) for b in itertools.combinations((4, 6, 7), 1)]
    law = {tuple(place in subset for place in range(8)): 1 / len(subsets) for subset in subsets}
    statistic = reference.law_statistic(map(tuple, (xt == MASK).tolist()), law)
    assert statistic < reference.chi_square_bound(len(law) - 1, SIGMAS)


@pytest.mark.parametrize("counts", [[[1, 2]], [[3, 0]], [[-1, 1]]])
def test_mask_exact_count_of_less_than_none_or_more_than_a_block_has_raises(counts):
    maskable = torch.tensor([[True, True, False, True]])
    with pytest.raises(ValueError, match=re.escape(f"num_masked is {counts}, but [[2, 1]] positions may be masked")):
        mask_exact_count(
            _rows(1, 4),
            torch.tensor(counts),
            torch.tensor([0]),
            noise_seed=0,
            step=0,
            mask_token_id=MASK,
            maskable=maskable,
        )


# Counts of a fraction within bounds


def _drawn_counts(size: int, p: float, low: float, high: float, u: list[float]) -> list[int]:
    shape = (1, len(u))
    sizes, probs = torch.full(shape, size), torch.full(shape, p, dtype=torch.float64)
    return _truncated_binomial(sizes, probs, low, high, torch.tensor([u], dtype=torch.float64))[0].tolist()


@pytest.mark.parametrize(
    ("size", "p", "low", "high"),
    [
        (0, 0.5, 0.4, 0.6),
        (1, 0.5, 0.0, 1.0),
        (4, 0.25, 0.25, 0.75),
        (7, 0.875, 0.5, 1.0),
        (20, 0.5, 0.55, 0.55),
        (20, 0.625, 0.55, 0.9),
        (5, 0.0, 0.0, 0.5),
        (5, 1.0, 0.5, 1.0),
        (64, 0.0625, 0.0, 0.25),
        (1024, 0.5, 0.4, 0.6),
        (1100, 0.0625, 0.9, 1.0),  # the probability of every count inside is below the smallest float64
    ],
)
def test_truncated_binomial_at_any_u_equals_exact_fractions(size, p, low, high):
    law = reference.truncated_binomial(size, Fraction(p), Fraction(str(low)), Fraction(str(high)))
    possible = [count for count, mass in law.items() if mass > 0]
    steps = list(itertools.accumulate(float(mass) for mass in law.values() if mass > 0))
    u = [0.0, 1 - 2.0**-53, *(i / 97 for i in range(97)), *(step + side * NEAR for step in steps for side in (-1, 1))]
    u = [v for v in u if 0 <= v < 1]
    for v, drawn in zip(u, _drawn_counts(size, p, low, high, u), strict=True):
        first, last = (sum(step <= v + side * NEAR / 2 for step in steps) for side in (-1, 1))
        assert drawn in possible[first : last + 1]
        assert v > 0 or drawn == possible[0]


def test_truncated_binomial_where_rounding_passes_the_last_sum_takes_the_last_possible_count():
    for p, low, high, last in ((0.5, 0.0, 1.0, 8), (0.5, 0.25, 0.75, 6), (0.0, 0.0, 1.0, 0)):
        assert _drawn_counts(8, p, low, high, [1.0 + NEAR]) == [last]


@EXAMPLES
@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_truncated_binomial_of_many_groups_treats_each_alone(data, num_rows, num_groups):
    def cells(values: st.SearchStrategy) -> torch.Tensor:
        row = st.lists(values, min_size=num_groups, max_size=num_groups)
        return torch.tensor(data.draw(st.lists(row, min_size=num_rows, max_size=num_rows)))

    sizes, probs, u = (
        cells(st.integers(0, 9)),
        cells(st.floats(0.05, 0.95)).double(),
        cells(st.floats(0, 0.999)).double(),
    )
    drawn = _truncated_binomial(sizes, probs, 0.3, 1.0, u)
    for i, j in itertools.product(range(num_rows), range(num_groups)):
        alone = _drawn_counts(int(sizes[i, j]), float(probs[i, j]), 0.3, 1.0, [float(u[i, j])])
        assert [int(drawn[i, j])] == alone


# Masks of a fraction within bounds

TRUE3, TRUE2 = (True,) * 3, (True, False, True)


@pytest.mark.parametrize(
    ("maskable", "probs", "low", "high"),
    [
        ([(True,) * 4], (0.3,), 0.0, 1.0),
        ([(True,) * 4], (0.3,), 0.25, 1.0),
        ([(True, False, True, True, True)], (0.4,), 0.5, 0.75),
        ([TRUE3, TRUE3], (0.3, 0.6), 0.25, 0.75),
        ([TRUE3, (False,) * 3, TRUE2], (0.7, 0.5, 0.4), 0.3, 0.7),
        ([TRUE2, TRUE3], (0.5, 0.8), 1.0, 1.0),
        ([TRUE2, TRUE3], (0.5, 0.8), 0.0, 0.0),
    ],
)
def test_mask_within_over_many_rows_follows_the_law_of_drawing_again(maskable, probs, low, high):
    num_rows, row = 20_000, sum(maskable, ())
    xt = mask_within(
        torch.zeros(num_rows, len(row), dtype=torch.int64),
        torch.tensor(probs, dtype=torch.float64).expand(num_rows, len(probs)),
        torch.arange(num_rows),
        low=low,
        high=high,
        noise_seed=5,
        step=1,
        mask_token_id=MASK,
        maskable=torch.tensor(row).expand(num_rows, len(row)),
    )
    bounds = Fraction(str(low)), Fraction(str(high))
    laws = [reference.resampled_mask_law(m, Fraction(p), *bounds) for m, p in zip(maskable, probs, strict=True)]
    law = {
        sum(patterns, ()): math.prod(alone[pattern] for alone, pattern in zip(laws, patterns, strict=True))
        for patterns in itertools.product(*laws)
    }
    statistic = reference.law_statistic(map(tuple, (xt == MASK).tolist()), law)
    assert statistic <= (reference.chi_square_bound(len(law) - 1, SIGMAS) if len(law) > 1 else 0)


@EXAMPLES
@given(st.data(), _maskable(max_size=20), st.lists(st.integers(0, 20), min_size=2, max_size=2).map(sorted), int64)
def test_mask_within_of_any_batch_equals_exact_fractions_or_has_no_such_count(data, grouped, twentieths, noise_seed):
    maskable, num_groups = grouped
    bounds = Fraction(twentieths[0], 20), Fraction(twentieths[1], 20)
    probs = st.lists(st.floats(0.05, 0.95), min_size=num_groups, max_size=num_groups)
    prob = data.draw(st.lists(probs, min_size=len(maskable), max_size=len(maskable)))
    ids = data.draw(st.lists(int64, min_size=len(maskable), max_size=len(maskable)))
    x0, address = _rows(*maskable.shape), {"noise_seed": noise_seed, "step": 4}

    def draw() -> torch.Tensor:
        low, high = (part / 20 for part in twentieths)
        return mask_within(
            x0,
            torch.tensor(prob, dtype=torch.float64),
            torch.tensor(ids),
            low=low,
            high=high,
            mask_token_id=MASK,
            maskable=maskable,
            **address,
        )

    sizes = _in_groups(maskable, num_groups).flatten().tolist()
    hopeless = [size for size in sizes if size and math.ceil(bounds[0] * size) > math.floor(bounds[1] * size)]
    if hopeless:
        with pytest.raises(ValueError, match=f"no count of {hopeless[0]} tokens "):
            draw()
        return
    xt = draw()
    is_masked = xt == MASK
    assert torch.equal(xt[~is_masked], x0[~is_masked])
    for size, count in zip(sizes, _in_groups(is_masked, num_groups).flatten().tolist(), strict=True):
        assert count == 0 if size == 0 else bounds[0] <= Fraction(count, size) <= bounds[1]
    counts = reference.within_counts(maskable.tolist(), prob, ids, bounds, stream=Stream.WITHIN, **address)
    assert is_masked.tolist() == reference.exact_count_positions(
        maskable.tolist(), counts, ids, stream=Stream.EXACT_MASK, **address
    )


@pytest.mark.parametrize(
    ("size", "edge", "count"),
    [(20, 0.55, 11), (10, 0.3, 3), (100, 0.29, 29), (50, 0.58, 29), (7, 3 / 7, 3), (4, 1.0, 4)],
)
def test_mask_within_bounds_that_meet_at_a_fraction_masks_exactly_that_many(size, edge, count):
    x0, prob = torch.zeros(20, size, dtype=torch.int64), torch.full((20, 1), 0.5)
    xt = mask_within(
        x0,
        prob,
        torch.arange(20),
        low=edge,
        high=edge,
        noise_seed=0,
        step=0,
        mask_token_id=MASK,
        maskable=torch.ones_like(x0, dtype=torch.bool),
    )
    assert (xt == MASK).sum(dim=1).tolist() == [count] * 20


@pytest.mark.parametrize(
    ("low", "high", "prob", "message"),
    [
        (-0.001, 0.5, 0.5, r"lie in \[-0.001, 0.5\]; wanted 0 <= low <= high <= 1"),
        (0.5, 1.001, 0.5, r"lie in \[0.5, 1.001\]; wanted"),
        (0.6, 0.5, 0.5, r"lie in \[0.6, 0.5\]; wanted"),
        (math.nan, 0.5, 0.5, r"lie in \[nan, 0.5\]; wanted"),
        (0.4, 0.6, 0.5, r"no count of 3 tokens has a masked fraction in \[0.4, 0.6\]"),
        (0.25, 1.0, 0.0, r"mask_prob 0.0 never masks a fraction in \[0.25, 1.0\]"),
        (0.0, 0.75, 1.0, r"mask_prob 1.0 never masks a fraction in \[0.0, 0.75\]"),
    ],
)
def test_mask_within_bounds_that_cannot_hold_raises(low, high, prob, message):
    x0 = _rows(2, 4)
    maskable = torch.tensor([[True] * 4, [True] * 3 + [False]])
    with pytest.raises(ValueError, match=message):
        mask_within(
            x0,
            torch.tensor([[0.5], [prob]]),
            torch.arange(2),
            low=low,
            high=high,
            noise_seed=0,
            step=0,
            mask_token_id=MASK,
            maskable=maskable,
        )


# Complements


@EXAMPLES
@given(_maskable(max_size=9), st.integers(0, 2**31), st.floats(0, 1))
def test_complement_mask_masks_the_maskable_tokens_that_the_other_shows(grouped, noise_seed, prob):
    maskable, _ = grouped
    x0 = _rows(*maskable.shape)
    xt = mask_tokens(
        x0,
        torch.full((len(x0), 1), prob, dtype=torch.float64),
        torch.arange(len(x0)),
        noise_seed=noise_seed,
        step=0,
        mask_token_id=MASK,
        maskable=maskable,
    )
    other = complement_mask(x0, xt, MASK, maskable)
    first, second = xt == MASK, other == MASK
    assert torch.equal(first | second, maskable)
    assert not (first & second).any()
    assert torch.equal(other[~second], x0[~second])
    assert torch.equal(complement_mask(x0, other, MASK, maskable), xt)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("num_ids", [1, 4])
def test_exact_counts_of_another_number_of_sample_ids_than_rows_raise(num_ids):
    maskable, ids = torch.ones(3, 4, dtype=torch.bool), torch.arange(num_ids)
    with pytest.raises(ValueError, match=f"there are {num_ids} sample_ids for 3 rows"):
        exact_count_positions(torch.ones(3, 1, dtype=torch.int64), ids, maskable, noise_seed=0, step=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(3,), (1, 1)])
def test_exact_counts_that_are_not_rows_by_groups_raise(shape):
    maskable, counts = torch.ones(3, 4, dtype=torch.bool), torch.ones(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=re.escape(f"num_masked has the shape {shape}; wanted two axes, 3 rows by")):
        exact_count_positions(counts, torch.arange(3), maskable, noise_seed=0, step=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("changed", ["sample_ids", "mask_prob", "maskable"])
def test_mask_within_of_columns_of_other_rows_raises(changed):
    x0 = torch.zeros(3, 4, dtype=torch.int64)
    columns = {
        "mask_prob": torch.full((3, 1), 0.5),
        "sample_ids": torch.arange(3),
        "maskable": torch.ones(3, 4, dtype=torch.bool),
    }
    columns[changed] = columns[changed][:1]
    options = {"low": 0.0, "high": 1.0, "noise_seed": 0, "step": 0, "mask_token_id": 9}
    with pytest.raises(ValueError, match=changed):
        mask_within(x0, **columns, **options)


def test_mask_within_of_no_rows_is_no_rows():
    x0 = torch.zeros(0, 4, dtype=torch.int64)
    xt = mask_within(
        x0,
        torch.zeros(0, 1),
        torch.zeros(0, dtype=torch.int64),
        low=0.5,
        high=0.5,
        noise_seed=0,
        step=0,
        mask_token_id=9,
        maskable=torch.ones(0, 4, dtype=torch.bool),
    )
    assert xt.shape == (0, 4)
