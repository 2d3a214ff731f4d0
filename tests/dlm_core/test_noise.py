"""Noise addressed by a hash: against Python integers, committed values, and the laws it must follow."""

import itertools
import math
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core.noise import (
    Stream,
    hash_event,
    hash_integer,
    hash_normal,
    hash_permutation,
    hash_uniform,
    hash_words,
    mix,
    stratified_uniform,
)
from tests.support import reference

SIGMAS = 5.5  # a fair draw leaves this many standard errors once in 26 million; seven in a test: 2.5e-7
ROUNDING = 1e-12  # u * num_places and back, and a few libm functions of numbers of order ten
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Committed from tests/support/reference.py.  A change of these numbers changes every training run.
GOLDEN_HASHES = {
    (): 0,
    (0,): -2152535657050944081,
    (1, 2): 5886236958684341581,
    (2, 1): -5380434492612050522,
    (-1, 2**63, 7): 5696460491437646989,
    (1234, 10**6, 1, 10**12): -426325271015280579,
}
GOLDEN_STREAMS = {
    "MASK": 1,
    "STRATUM": 2,
    "OFFSET": 3,
    "CATEGORICAL": 4,
    "COUNT": 5,
    "EXACT_MASK": 6,
    "REPLACEMENT": 7,
    "ATTENTION": 8,
    "EMBEDDING": 9,
    "ORDER": 10,
    "REVEAL": 11,
    "WITHIN": 12,
    "ROW_STRATUM": 13,
    "ROW_COUNT": 14,
    "REMASK": 15,
    "ANSWER_COUNT": 16,
    "ANSWER_SUBSET": 17,
}
STRATUM, OFFSET = GOLDEN_STREAMS["STRATUM"], GOLDEN_STREAMS["OFFSET"]
GOLDEN_STRATA = {
    True: [0.1513230404, 0.4013230404, 0.6513230404, 0.9013230404],
    False: [0.0159298292, 0.2748431930, 0.7269218542, 0.8861368303],
}
words = st.integers(min_value=-(2**70), max_value=2**70)
int64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


# The hash


@EXAMPLES
@given(st.lists(words, max_size=5))
def test_hash_words_of_any_integers_equals_python_reference(values):
    assert int(hash_words(*values)) == reference.as_signed(reference.hash_words(*values))


@EXAMPLES
@given(st.lists(int64, min_size=1, max_size=5), words)
def test_hash_words_of_tensors_equals_python_reference(values, first):
    hashed = hash_words(first, torch.tensor(values), 3)
    assert hashed.tolist() == [reference.as_signed(reference.hash_words(first, v, 3)) for v in values]


@EXAMPLES
@given(int64)
def test_mix_of_any_word_equals_python_reference(value):
    assert int(mix(torch.tensor(value))) == reference.as_signed(reference.splitmix_finalizer(value))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("address", "golden"), GOLDEN_HASHES.items())
def test_hash_words_equals_golden(address, golden, device):
    assert int(hash_words(*(torch.tensor(reference.as_signed(w % 2**64)).to(device) for w in address))) == golden
    assert int(hash_words(*address)) == golden


@pytest.mark.parametrize("device", DEVICES)
def test_hash_words_with_broadcast_addresses_every_pair(device):
    rows, places = torch.tensor([5, -3]), torch.arange(4, device=device)
    hashed = hash_words(7, rows[:, None], places[None, :], rows[:, None])
    assert hashed.device == places.device
    for i, j in itertools.product(range(2), range(4)):
        row = int(rows[i])
        assert int(hashed[i, j]) == reference.as_signed(reference.hash_words(7, row, j, row))


def test_hash_words_with_one_word_on_another_device_are_made_there():
    other = torch.arange(4, device="meta")  # a device without data stands in for a GPU
    assert hash_words(1, other).device == other.device
    assert hash_words(torch.tensor(1), other, torch.tensor(2), 3).device == other.device
    assert hash_event(torch.tensor(0.5), other, torch.tensor(2)).device == other.device


def test_hash_words_of_narrow_integers_equals_that_of_wide_ones():
    values = torch.tensor([3, -200])
    assert torch.equal(hash_words(values.to(torch.int32)), hash_words(values))


def test_addresses_of_other_streams_never_meet():
    # beginning with the stream, they differ where they begin: a bijection of it, whatever follows
    starts = hash_words(7, torch.tensor(list(Stream)))
    assert len(set(starts.tolist())) == len(Stream)
    steps, ids = torch.arange(40), torch.arange(3)
    addresses = hash_words(7, torch.tensor(list(Stream))[:, None, None], steps[:, None], ids)
    assert addresses.unique().numel() == addresses.numel()


def test_streams_keep_the_numbers_that_are_part_of_every_address():
    assert {stream.name: int(stream) for stream in Stream} == GOLDEN_STREAMS


@EXAMPLES
@given(st.lists(words, min_size=1, max_size=4))
def test_hash_uniform_takes_the_top_53_bits(values):
    u = float(hash_uniform(*values))
    assert 0 <= u < 1
    assert u == reference.uniform(*values)


def test_hash_uniform_over_addresses_is_uniform():
    num_draws, num_bins = 40_000, 50
    u = hash_uniform(3, torch.arange(num_draws))
    counts = torch.bincount((u * num_bins).long(), minlength=num_bins).tolist()
    statistic = reference.chi_square(counts, [num_draws / num_bins] * num_bins)
    assert statistic < reference.chi_square_bound(num_bins - 1, SIGMAS)


@pytest.mark.parametrize(
    "change", [lambda i: (4, i, 0), lambda i: (3, i + 1, 0), lambda i: (3, i, 1)], ids=["first", "middle", "last"]
)
def test_hash_uniform_of_addresses_that_differ_in_one_word_is_independent(change):
    num_draws, num_bins = 20_000, 6
    places = torch.arange(num_draws)
    pairs = zip(hash_uniform(3, places, 0).tolist(), hash_uniform(*change(places)).tolist(), strict=True)
    counts = Counter(int(u * num_bins) * num_bins + int(v * num_bins) for u, v in pairs)
    cells = [counts[cell] for cell in range(num_bins**2)]
    statistic = reference.chi_square(cells, [num_draws / len(cells)] * len(cells))
    assert statistic < reference.chi_square_bound(len(cells) - 1, SIGMAS)


# Events


@EXAMPLES
@given(st.floats(0, 1), st.lists(int64, min_size=1, max_size=4))
def test_hash_event_of_any_probability_equals_python_reference(prob, values):
    assert bool(hash_event(torch.tensor(prob, dtype=torch.float64), *values)) == reference.event(prob, *values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", range(4))
def test_hash_event_at_the_edge_of_the_hash_happens_strictly_below_the_floor(place, device):
    # from h / 2**24 up to the next multiple the hash h is not below the floor; float32 would round up to it
    h = reference.hash_words(0, 5, place) >> 40
    prob = torch.tensor([h / 2**24, (h + 1) / 2**24 - 2.0**-45, (h + 1) / 2**24], dtype=torch.float64)
    happened = hash_event(prob, 0, torch.full((3,), 5, device=device), place)
    assert happened.device.type == device
    assert happened.tolist() == [False, False, True]


def test_hash_event_with_probability_zero_or_one_happens_never_or_always():
    places = torch.arange(2_000)
    assert not hash_event(torch.tensor(0.0), places).any()
    assert hash_event(torch.tensor(1.0), places).all()


def test_hash_event_with_broadcast_probabilities_is_the_same_draw_for_each():
    probs, places = torch.tensor([[0.2], [0.2], [0.7]]), torch.arange(300)
    happened = hash_event(probs, 1, places)
    assert torch.equal(happened[0], happened[1])
    assert not (happened[0] & ~happened[2]).any()
    assert happened[2].sum() > happened[0].sum()


@pytest.mark.parametrize("prob", [0.01, 0.5, 0.93])
def test_hash_event_over_addresses_happens_with_the_probability(prob):
    num_draws = 40_000
    share = float(hash_event(torch.tensor(prob), 2, torch.arange(num_draws)).double().mean())
    assert abs(share - prob) < SIGMAS * math.sqrt(prob * (1 - prob) / num_draws)


# Integers and normals


@EXAMPLES
@given(st.integers(1, 2**40), st.lists(int64, min_size=1, max_size=4))
def test_hash_integer_of_any_range_equals_python_reference(high, values):
    drawn = int(hash_integer(high, *values))
    assert 0 <= drawn < high
    assert drawn == reference.integer(high, *values)


@pytest.mark.parametrize("high", [1, 2, 7, 64])
def test_hash_integer_over_addresses_is_uniform(high):
    num_draws = 20_000
    counts = torch.bincount(hash_integer(high, 8, torch.arange(num_draws))).tolist()
    assert len(counts) == high
    statistic = reference.chi_square(counts, [num_draws / high] * high)
    assert statistic <= (reference.chi_square_bound(high - 1, SIGMAS) if high > 1 else 0)


@EXAMPLES
@given(st.lists(int64, max_size=4))
def test_hash_normal_of_any_address_equals_python_reference(values):
    assert float(hash_normal(*values)) == pytest.approx(reference.normal(*values), abs=ROUNDING)


def test_hash_normal_over_addresses_has_mean_zero_and_variance_one():
    num_draws = 40_000
    draws = hash_normal(4, torch.arange(num_draws))
    assert draws.dtype == torch.float64
    assert abs(float(draws.mean())) < SIGMAS / math.sqrt(num_draws)
    assert abs(float((draws**2).mean()) - 1) < SIGMAS * math.sqrt(2 / num_draws)
    assert abs(float((draws[1:] * draws[:-1]).mean())) < SIGMAS / math.sqrt(num_draws)


def test_hash_normal_over_addresses_fills_the_quantiles_evenly():
    num_draws, num_bins = 40_000, 40
    edges = [statistics.NormalDist().inv_cdf(k / num_bins) for k in range(1, num_bins)]
    places = torch.bucketize(hash_normal(5, torch.arange(num_draws)), torch.tensor(edges, dtype=torch.float64))
    counts = torch.bincount(places, minlength=num_bins).tolist()
    statistic = reference.chi_square(counts, [num_draws / num_bins] * num_bins)
    assert statistic < reference.chi_square_bound(num_bins - 1, SIGMAS)


# Permutations


@EXAMPLES
@given(st.integers(1, 40), int64)
def test_hash_permutation_is_the_order_of_the_hashes(size, seed):
    assert hash_permutation(size, seed, 2).tolist() == reference.permutation(size, seed, 2)


# Strata

NUM_PLACES, NUM_STEPS = 4, 600


@pytest.fixture(scope="module")
def draws() -> dict[bool, torch.Tensor]:
    """The strata of many steps, with a shared offset and with one a place."""
    return {
        shared: torch.stack(
            [stratified_uniform(6, step, NUM_PLACES, shared_offset=shared) for step in range(NUM_STEPS)]
        )
        for shared in (True, False)
    }


@pytest.mark.parametrize("shared_offset", [True, False])
def test_stratified_uniform_equals_golden(shared_offset):
    u = stratified_uniform(1234, 5, 4, shared_offset=shared_offset)
    assert u.tolist() == pytest.approx(GOLDEN_STRATA[shared_offset], abs=1e-10)  # ten digits are committed


def test_stratified_uniform_by_default_shares_the_offset():
    assert torch.equal(stratified_uniform(1, 2, 8), stratified_uniform(1, 2, 8, Stream.STRATUM, shared_offset=True))


@EXAMPLES
@given(int64, st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(Stream), st.booleans())
def test_stratified_uniform_of_any_address_equals_python_reference(noise_seed, step, num_places, stream, shared_offset):
    u = stratified_uniform(noise_seed, step, num_places, stream, shared_offset=shared_offset)
    assert u.dtype == torch.float64
    assert u.tolist() == reference.stratified_uniform(
        noise_seed, step, num_places, stream=stream, offset_stream=OFFSET, shared_offset=shared_offset
    )


@EXAMPLES
@given(int64, st.integers(0, 10**6), st.integers(1, 70), st.booleans())
def test_stratified_uniform_has_one_place_in_each_stratum(noise_seed, step, num_places, shared_offset):
    u = stratified_uniform(noise_seed, step, num_places, shared_offset=shared_offset)
    assert sorted((u * num_places).floor().long().tolist()) == list(range(num_places))


def test_stratified_uniform_shares_one_offset_over_the_places():
    u = stratified_uniform(11, 3, 16)
    offsets = (u * 16) % 1.0
    assert float(offsets.max() - offsets.min()) < ROUNDING
    assert float(offsets[0]) == pytest.approx(reference.uniform(11, 3, OFFSET, STRATUM), abs=ROUNDING)


def test_stratified_uniform_with_own_offsets_spreads_them_evenly_in_every_stratum(draws):
    num_bins = 5
    scaled = draws[False] * NUM_PLACES
    cells = scaled.long() * num_bins + ((scaled % 1.0) * num_bins).long()
    counts = torch.bincount(cells.flatten(), minlength=NUM_PLACES * num_bins).tolist()
    # every stratum is filled once a step, which takes one degree of freedom from each
    statistic = reference.chi_square(counts, [NUM_STEPS / num_bins] * len(counts))
    assert statistic < reference.chi_square_bound(NUM_PLACES * (num_bins - 1), SIGMAS)
    offsets = scaled % 1.0 - 0.5
    for a, b in itertools.combinations(range(NUM_PLACES), 2):
        correlation = 12 * float((offsets[:, a] * offsets[:, b]).mean())  # a uniform number has variance 1 / 12
        assert abs(correlation) < SIGMAS / math.sqrt(NUM_STEPS)


@pytest.mark.parametrize("shared_offset", [True, False])
def test_stratified_uniform_of_one_place_over_steps_is_uniform(draws, shared_offset):
    num_bins = 10
    for place in range(NUM_PLACES):
        bins = (draws[shared_offset][:, place] * num_bins).long()
        statistic = reference.chi_square(bins.bincount(minlength=num_bins).tolist(), [NUM_STEPS / num_bins] * num_bins)
        assert statistic < reference.chi_square_bound(num_bins - 1, SIGMAS)


@pytest.mark.parametrize("shared_offset", [True, False])
def test_stratified_uniform_over_steps_gives_every_place_every_stratum(draws, shared_offset):
    orders = Counter(tuple(row) for row in (draws[shared_offset] * NUM_PLACES).long().tolist())
    counts = [orders[order] for order in itertools.permutations(range(NUM_PLACES))]
    statistic = reference.chi_square(counts, [NUM_STEPS / len(counts)] * len(counts))
    assert statistic < reference.chi_square_bound(len(counts) - 1, SIGMAS)


@pytest.mark.parametrize("shared_offset", [True, False])
def test_stratified_uniform_over_steps_has_mean_one_half_closer_than_free_draws(draws, shared_offset):
    # the strata add up to their mean exactly; what is left is the offset, a uniform number divided by the places
    num_offsets = NUM_STEPS if shared_offset else NUM_STEPS * NUM_PLACES
    sigma = 1 / NUM_PLACES / math.sqrt(12 * num_offsets)
    assert abs(float(draws[shared_offset].mean()) - 0.5) < SIGMAS * sigma


@pytest.mark.parametrize("shared_offset", [True, False])
def test_stratified_uniform_of_other_step_seed_or_stream_differs(shared_offset):
    u = stratified_uniform(5, 0, 16, shared_offset=shared_offset)
    for seed, step, stream in ((5, 1, Stream.STRATUM), (6, 0, Stream.STRATUM), (5, 0, Stream.COUNT)):
        other = stratified_uniform(seed, step, 16, stream, shared_offset=shared_offset)
        assert not torch.equal((u * 16).floor(), (other * 16).floor())
        assert float(((u * 16) % 1 - (other * 16) % 1).abs().min()) > 1e-6
