"""Noise addressed by a hash: against Python integers, committed values, and the laws it must follow."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core.corruption import (
    Stream,
    hash_permutation,
    hash_uniform,
    hash_words,
    mask_exact_count,
    mask_tokens,
    mix,
    sample_times,
    stratified_uniform,
)
from tests.support import reference

MASK = 99
SIGMAS = 5.0  # a fair draw leaves this many standard errors once in two million
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
GOLDEN_XT = [[0, 1, 2, 3, 4, 99, 6, 7], [8, 9, 99, 11, 99, 99, 99, 15], [99, 99, 99, 99, 20, 99, 99, 99]]
words = st.integers(min_value=-(2**70), max_value=2**70)
int64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def _rows(num_rows: int, seq_len: int) -> torch.Tensor:
    return torch.arange(num_rows * seq_len).reshape(num_rows, seq_len) % MASK


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


def test_hash_words_with_broadcast_addresses_every_pair():
    rows, places = torch.tensor([5, -3]), torch.arange(4)
    hashed = hash_words(7, rows[:, None], places[None, :])
    for i, j in itertools.product(range(2), range(4)):
        assert int(hashed[i, j]) == reference.as_signed(reference.hash_words(7, int(rows[i]), j))


@EXAMPLES
@given(st.lists(words, min_size=1, max_size=4))
def test_hash_uniform_takes_the_top_53_bits(values):
    u = float(hash_uniform(*values))
    assert 0 <= u < 1
    assert u == (reference.hash_words(*values) >> 11) / 2**53


def test_hash_uniform_over_addresses_is_uniform():
    num_draws, num_bins = 40_000, 50
    u = hash_uniform(3, torch.arange(num_draws))
    counts = torch.bincount((u * num_bins).long(), minlength=num_bins).tolist()
    statistic = reference.chi_square(counts, [num_draws / num_bins] * num_bins)
    assert statistic < reference.chi_square_bound(num_bins - 1)


@EXAMPLES
@given(st.integers(min_value=1, max_value=40), int64)
def test_hash_permutation_is_the_order_of_the_hashes(size, seed):
    permutation = hash_permutation(size, seed, 2).tolist()
    naive = sorted(range(size), key=lambda i: reference.as_signed(reference.hash_words(seed, 2, i)))
    assert permutation == naive


# Times


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 70))
def test_stratified_uniform_has_one_place_in_each_stratum(noise_seed, step, num_places):
    u = stratified_uniform(noise_seed, step, num_places)
    assert sorted((u * num_places).floor().long().tolist()) == list(range(num_places))


def test_stratified_uniform_shares_one_offset_over_the_places():
    u = stratified_uniform(11, 3, 16)
    offsets = (u * 16) % 1.0
    assert float(offsets.max() - offsets.min()) < 1e-12  # rounding of u * 16
    offset = (reference.hash_words(11, 3, Stream.OFFSET, Stream.STRATUM) >> 11) / 2**53
    assert float(offsets[0]) == pytest.approx(offset, abs=1e-12)


def test_stratified_uniform_of_one_place_over_steps_is_uniform():
    num_steps, num_bins, num_places = 600, 10, 8
    draws = torch.stack([stratified_uniform(5, step, num_places) for step in range(num_steps)])
    for place in (0, 7):
        counts = torch.bincount((draws[:, place] * num_bins).long(), minlength=num_bins).tolist()
        statistic = reference.chi_square(counts, [num_steps / num_bins] * num_bins)
        assert statistic < reference.chi_square_bound(num_bins - 1)


def test_stratified_uniform_over_steps_gives_every_place_every_stratum():
    num_steps, num_places = 600, 4
    draws = torch.stack([stratified_uniform(6, step, num_places) for step in range(num_steps)])
    orders = Counter(tuple(row) for row in (draws * num_places).long().tolist())
    counts = [orders[order] for order in itertools.permutations(range(num_places))]
    expected = [num_steps / math.factorial(num_places)] * len(counts)
    assert reference.chi_square(counts, expected) < reference.chi_square_bound(len(counts) - 1)


def test_stratified_uniform_of_other_step_or_seed_differs():
    u = stratified_uniform(5, 0, 16)
    assert torch.equal(u, stratified_uniform(5, 0, 16))
    for other in (stratified_uniform(5, 1, 16), stratified_uniform(6, 0, 16)):
        assert not torch.equal((u * 16).floor(), (other * 16).floor())
        assert float(((u * 16) % 1 - (other * 16) % 1).abs().min()) > 1e-6


@pytest.mark.parametrize("t_min", [0.0, 1e-3, 0.5])
def test_sample_times_is_stratified_between_t_min_and_one(t_min):
    num_places = 32
    for step in range(50):
        t = sample_times(9, step, num_places, t_min)
        assert t.dtype == torch.float64
        assert ((t >= t_min) & (t < 1)).all()
        strata = ((t - t_min) / (1 - t_min) * num_places).floor().long()
        assert sorted(strata.tolist()) == list(range(num_places))


# Independent masks


@pytest.mark.parametrize("device", DEVICES)
def test_mask_tokens_of_small_batch_equals_golden(device):
    xt = mask_tokens(
        _rows(3, 8).to(device),
        torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64),
        torch.tensor([0, 1, 10**12]),
        noise_seed=1234,
        step=5,
        mask_token_id=MASK,
    )
    assert xt.tolist() == GOLDEN_XT


@EXAMPLES
@given(int64, st.integers(0, 10**9), st.lists(st.tuples(int64, st.floats(0, 1)), min_size=1, max_size=4))
def test_mask_tokens_of_any_address_equals_python_reference(noise_seed, step, rows):
    sample_ids, probs = [r[0] for r in rows], [r[1] for r in rows]
    x0 = _rows(len(rows), 6)
    xt = mask_tokens(
        x0,
        torch.tensor(probs, dtype=torch.float64),
        torch.tensor(sample_ids),
        noise_seed=noise_seed,
        step=step,
        mask_token_id=MASK,
    )
    assert xt.tolist() == reference.mask_tokens(
        x0.tolist(),
        probs,
        sample_ids,
        noise_seed=noise_seed,
        step=step,
        stream=Stream.MASK,
        mask_token_id=MASK,
    )


@EXAMPLES
@given(st.permutations(range(8)), st.integers(1, 8))
def test_mask_tokens_of_any_split_and_order_equals_the_whole_batch(order, micro_batch_seqs):
    x0, sample_ids = _rows(8, 12), torch.arange(100, 108)
    mask_prob = sample_times(1, 2, 8, 1e-3)
    address = {"noise_seed": 1, "step": 2, "mask_token_id": MASK}
    whole = mask_tokens(x0, mask_prob, sample_ids, **address)
    parts = torch.tensor(order).split(micro_batch_seqs)
    pieces = [mask_tokens(x0[part], mask_prob[part], sample_ids[part], **address) for part in parts]
    assert torch.equal(torch.cat(pieces), whole[torch.tensor(order)])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_mask_tokens_over_ranks_equals_one_rank(world_size):
    x0, sample_ids, t = _rows(8, 12), torch.arange(8), sample_times(1, 2, 8, 1e-3)
    address = {"noise_seed": 1, "step": 2, "mask_token_id": MASK}
    whole = mask_tokens(x0, t, sample_ids, **address)
    for rank in range(world_size):
        mine = slice(rank, None, world_size)
        assert torch.equal(mask_tokens(x0[mine], t[mine], sample_ids[mine], **address), whole[mine])


@pytest.mark.parametrize("change", [{"noise_seed": 2}, {"step": 3}, {"sample_ids": torch.arange(8, 16)}])
def test_mask_tokens_of_other_address_draws_independent_masks(change):
    num_rows, seq_len = 8, 512
    address = {"noise_seed": 1, "step": 2, "sample_ids": torch.arange(8)}
    x0, mask_prob = _rows(num_rows, seq_len), torch.full((num_rows,), 0.5, dtype=torch.float64)
    first = mask_tokens(x0, mask_prob, mask_token_id=MASK, **address) == MASK
    second = mask_tokens(x0, mask_prob, mask_token_id=MASK, **(address | change)) == MASK
    agreement = float((first == second).double().mean())
    assert abs(agreement - 0.5) < SIGMAS * 0.5 / math.sqrt(num_rows * seq_len)


@pytest.mark.parametrize("mask_prob", [0.01, 0.3, 0.75])
def test_mask_tokens_over_many_tokens_masks_the_given_share(mask_prob):
    num_rows, seq_len = 400, 250
    xt = mask_tokens(
        _rows(num_rows, seq_len),
        torch.full((num_rows,), mask_prob, dtype=torch.float64),
        torch.arange(num_rows),
        noise_seed=3,
        step=0,
        mask_token_id=MASK,
    )
    is_masked = xt == MASK
    sigma = math.sqrt(mask_prob * (1 - mask_prob))
    assert abs(float(is_masked.double().mean()) - mask_prob) < SIGMAS * sigma / math.sqrt(num_rows * seq_len)
    by_position = (is_masked.double().mean(dim=0) - mask_prob).abs()
    assert float(by_position.max()) < SIGMAS * sigma / math.sqrt(num_rows)
    neighbours = float((is_masked[:, 1:] & is_masked[:, :-1]).double().mean())
    assert abs(neighbours - mask_prob**2) < SIGMAS * mask_prob / math.sqrt(num_rows * seq_len)


def test_mask_tokens_with_probability_zero_or_one_masks_none_or_all():
    x0 = _rows(2, 300)
    xt = mask_tokens(x0, torch.tensor([0.0, 1.0]), torch.arange(2), noise_seed=0, step=0, mask_token_id=MASK)
    assert torch.equal(xt[0], x0[0])
    assert (xt[1] == MASK).all()


def test_mask_tokens_at_the_edge_of_the_hash_masks_strictly_below_the_floor():
    # at h / 2**24 and up to the next multiple the hash h is not below the floor; float32 would round up to it
    address = reference.hash_words(0, 0, Stream.MASK, 5)
    h = reference.hash_words(address, 0) >> 40
    mask_prob = torch.tensor([h / 2**24, (h + 1) / 2**24 - 2.0**-45, (h + 1) / 2**24], dtype=torch.float64)
    x0, sample_ids = torch.zeros(3, 1, dtype=torch.int64), torch.full((3,), 5)
    xt = mask_tokens(x0, mask_prob, sample_ids, noise_seed=0, step=0, mask_token_id=MASK)
    assert xt.flatten().tolist() == [0, 0, MASK]


def test_mask_tokens_with_maskable_keeps_the_rest_and_the_same_noise():
    x0, mask_prob, sample_ids = _rows(6, 40), torch.full((6,), 0.6), torch.arange(6)
    maskable = torch.arange(40)[None, :].expand(6, 40) >= torch.arange(0, 36, 6)[:, None]
    address = {"noise_seed": 4, "step": 4, "mask_token_id": MASK}
    free = mask_tokens(x0, mask_prob, sample_ids, **address)
    kept = mask_tokens(x0, mask_prob, sample_ids, maskable=maskable, **address)
    assert torch.equal(kept[~maskable], x0[~maskable])
    assert torch.equal(kept[maskable], free[maskable])
    assert (free[~maskable] == MASK).any()


# Masks of an exact count


@EXAMPLES
@given(st.data())
def test_mask_exact_count_masks_exactly_that_many(data):
    num_rows = data.draw(st.integers(1, 4))
    seq_len = data.draw(st.integers(1, 9))
    cells = st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)
    maskable = torch.tensor(data.draw(st.lists(cells, min_size=num_rows, max_size=num_rows)))
    counts = torch.tensor([data.draw(st.integers(0, int(row.sum()))) for row in maskable])
    x0 = _rows(num_rows, seq_len)
    xt = mask_exact_count(
        x0, counts, torch.arange(num_rows), noise_seed=8, step=1, mask_token_id=MASK, maskable=maskable
    )
    is_masked = xt == MASK
    assert is_masked.sum(dim=1).tolist() == counts.tolist()
    assert not (is_masked & ~maskable).any()
    assert torch.equal(xt[~is_masked], x0[~is_masked])


def test_mask_exact_count_above_the_maskable_masks_those_alone():
    maskable = torch.tensor([[True, False, True, False], [False, False, False, False]])
    x0 = _rows(2, 4)
    address = {"noise_seed": 0, "step": 0, "mask_token_id": MASK}
    xt = mask_exact_count(x0, torch.tensor([4, 1]), torch.arange(2), maskable=maskable, **address)
    assert torch.equal(xt == MASK, maskable)


@pytest.mark.parametrize("places", [(0, 1, 2, 3), (1, 2, 4, 5)])
def test_mask_exact_count_draws_every_subset_equally_often(places):
    num_rows = 12_000
    maskable = torch.zeros(num_rows, 6, dtype=torch.bool)
    maskable[:, list(places)] = True
    xt = mask_exact_count(
        torch.zeros(num_rows, 6, dtype=torch.int64),
        torch.full((num_rows,), 2),
        torch.arange(num_rows),
        noise_seed=2,
        step=0,
        mask_token_id=MASK,
        maskable=maskable,
    )
    drawn = Counter(tuple(row.nonzero().flatten().tolist()) for row in (xt == MASK))
    counts = [drawn[subset] for subset in itertools.combinations(places, 2)]
    assert sum(counts) == num_rows
    assert reference.chi_square(counts, [num_rows / 6] * 6) < reference.chi_square_bound(5)


def test_mask_exact_count_of_any_split_equals_the_whole_batch():
    x0, counts, sample_ids = _rows(6, 10), torch.arange(6), torch.arange(6)
    maskable = torch.ones(6, 10, dtype=torch.bool)
    address = {"noise_seed": 3, "step": 9, "mask_token_id": MASK}
    whole = mask_exact_count(x0, counts, sample_ids, maskable=maskable, **address)
    for part in (torch.tensor([5, 0]), torch.tensor([2, 4, 1]), torch.tensor([3])):
        alone = mask_exact_count(x0[part], counts[part], sample_ids[part], maskable=maskable[part], **address)
        assert torch.equal(alone, whole[part])
