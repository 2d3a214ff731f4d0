"""A mixture keeps to its shares at every prefix, and knows any sample's source without a history."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import MAX_PERIOD, MixtureSchedule, whole_weights

COUNTS = st.lists(st.integers(1, 40), min_size=2, max_size=12).map(tuple)


@given(counts=COUNTS)
def test_every_source_stays_within_one_sample_of_its_share_at_every_prefix(counts: tuple[int, ...]) -> None:
    schedule = MixtureSchedule(counts)
    seen = [0] * len(counts)
    for n, source in enumerate(schedule.source_of.tolist(), start=1):
        seen[source] += 1
        for found, count in zip(seen, counts, strict=True):
            assert abs(found - Fraction(n * count, schedule.period)) < 1
    assert tuple(seen) == counts


@settings(deadline=None)
@given(counts=st.sampled_from([(50_000, 30_000, 19_999), (1, 99_999), (99_989, 7, 4), (1,) * 12, (7,)]))
def test_extreme_weights_keep_to_their_shares(counts: tuple[int, ...]) -> None:
    schedule = MixtureSchedule(counts)
    n = np.arange(1, schedule.period + 1)
    for source, count in enumerate(counts):
        off = np.cumsum(schedule.source_of == source) * schedule.period - n * count
        assert np.abs(off).max() < schedule.period


@given(counts=COUNTS, ids=st.lists(st.integers(0, 10**15), min_size=1, max_size=5))
def test_locate_numbers_the_samples_of_each_source_one_by_one(counts: tuple[int, ...], ids: list[int]) -> None:
    schedule = MixtureSchedule(counts)
    many = np.arange(3 * schedule.period)
    source, index = schedule.locate(many)
    seen = [0] * len(counts)
    for s, i in zip(source.tolist(), index.tolist(), strict=True):
        assert i == seen[s]
        seen[s] += 1
    for sample_id in ids:
        (s,), (i,) = (part.tolist() for part in schedule.locate(np.array([sample_id])))
        before, after = schedule.num_before(sample_id), schedule.num_before(sample_id + 1)
        assert (before[s], after[s]) == (i, i + 1)
        assert sum(before) == sample_id
        assert [b for k, b in enumerate(before) if k != s] == [a for k, a in enumerate(after) if k != s]


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 7, "b": 2, "c": 1}),
        ({"a": 2, "b": 1.5}, {"a": 4, "b": 3}),
        ({"a": 30, "b": 10}, {"a": 3, "b": 1}),
        ({"a": 1e-5, "b": 0.99999}, {"a": 1, "b": 99_999}),
        ({"only": 0.3}, {"only": 1}),
    ],
)
def test_weights_become_the_smallest_whole_numbers(weights: dict[str, float], wanted: dict[str, int]) -> None:
    assert whole_weights(weights) == wanted


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused_by_name(weight: float) -> None:
    with pytest.raises(ValueError, match=f"weight of books is {weight}; it must be positive"):
        whole_weights({"code": 1.0, "books": weight})


def test_weights_that_never_repeat_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=rf"more than {MAX_PERIOD}; round them, or give whole numbers"):
        whole_weights({"a": 0.1234567, "b": 1})


def test_no_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="the mixture is empty"):
        whole_weights({})
