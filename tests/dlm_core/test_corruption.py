"""The forward process as draws: against a naive reference, committed values and the laws it must follow."""

import math
import re

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dlm_core.blocks import per_token
from dlm_core.corruption import (
    check_tokens,
    corrupt_tokens,
    mask_exact_count,
    mask_tokens,
    mask_within,
    maskable_positions,
    noise_positions,
    sample_times,
)
from dlm_core.kernels import Kernel
from dlm_core.noise import Stream, stratified_uniform
from tests.support import reference

MASK = 99
MIXTURE = Kernel(100, MASK, 0.5)
SIGMAS = 5.0  # a fair draw leaves this many standard errors once in two million
# the examples are small as they come: to shrink them takes longer than to read them
EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
int64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)

# Committed from tests/support/reference.py.  A change of these numbers changes every training run.
GOLDEN_TIMES = [0.15217171733203733, 0.4019217173320373, 0.6516717173320373, 0.9014217173320374]
GOLDEN_XT = {
    "mask_tokens": [[0, 1, 2, 3, 4, 99, 99, 99], [99, 9, 99, 11, 12, 13, 14, 15], [99, 99, 99, 99, 99, 99, 99, 99]],
    "corrupt_tokens": [[0, 1, 2, 3, 4, 46, 52, 99], [99, 9, 16, 11, 12, 13, 14, 15], [99, 99, 82, 99, 99, 99, 67, 72]],
    "mask_exact_count": [
        [99, 1, 2, 99, 4, 5, 6, 7],
        [99, 99, 10, 11, 12, 99, 99, 15],
        [99, 99, 99, 99, 99, 99, 99, 23],
    ],
    "mask_within": [[99, 1, 2, 99, 4, 99, 6, 7], [99, 99, 10, 11, 12, 99, 99, 15], [99, 99, 99, 99, 99, 99, 99, 99]],
}


def _mask_tokens(x0, prob, sample_ids, maskable, **address):
    return mask_tokens(x0, prob, sample_ids, mask_token_id=MASK, maskable=maskable, **address)


def _corrupt_tokens(x0, prob, sample_ids, maskable, **address):
    return corrupt_tokens(x0, prob, sample_ids, MIXTURE, maskable=maskable, **address)


def _mask_exact_count(x0, prob, sample_ids, maskable, **address):
    available = [group.sum(dim=1).cpu() for group in maskable.tensor_split(prob.shape[1], dim=1)]
    counts = (prob * torch.stack(available, dim=1)).long()
    return mask_exact_count(x0, counts, sample_ids, mask_token_id=MASK, maskable=maskable, **address)


def _mask_within(x0, prob, sample_ids, maskable, low=0.2, high=1.0, **address):
    return mask_within(x0, prob, sample_ids, low=low, high=high, mask_token_id=MASK, maskable=maskable, **address)


NOISERS = {
    "mask_tokens": _mask_tokens,
    "corrupt_tokens": _corrupt_tokens,
    "mask_exact_count": _mask_exact_count,
    "mask_within": _mask_within,
}
every_noiser = pytest.mark.parametrize("name", NOISERS)


def _rows(num_rows: int, seq_len: int) -> torch.Tensor:
    return torch.arange(num_rows * seq_len).reshape(num_rows, seq_len) % MASK


def _all(x0: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x0, dtype=torch.bool)


def _strata(times: torch.Tensor, t_min: float) -> list[int]:
    return sorted(((times - t_min) / (1 - t_min) * times.numel()).floor().long().flatten().tolist())


def _probs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Times


def test_sample_times_equals_golden():
    assert sample_times(1234, 5, 4, 1e-3).tolist() == GOLDEN_TIMES


@pytest.mark.parametrize("shared_offset", [True, False])
@pytest.mark.parametrize("t_min", [0.0, 1e-3, 0.5])
def test_sample_times_is_stratified_between_t_min_and_one(t_min, shared_offset):
    for step in range(25):
        t = sample_times(9, step, 32, t_min, shared_offset=shared_offset)
        assert t.dtype == torch.float64
        assert ((t >= t_min) & (t < 1)).all()
        assert _strata(t, t_min) == list(range(32))
        u = stratified_uniform(9, step, 32, shared_offset=shared_offset)
        assert torch.equal(t, t_min + (1 - t_min) * u)


@pytest.mark.parametrize("t_min", [-0.001, 1.0, 1.5, math.nan])
def test_sample_times_with_t_min_outside_the_unit_interval_raises(t_min):
    with pytest.raises(ValueError, match=rf"t_min is {t_min}; .* \[0, 1\)"):
        sample_times(0, 0, 4, t_min)


@pytest.mark.parametrize("world_size", [2, 4])
def test_sample_times_over_ranks_has_the_strata_of_the_global_batch_and_not_of_each_rank(world_size):
    num_places, t_min, num_lopsided = 8, 1e-3, 0
    per_rank = num_places // world_size
    for step in range(20):
        times = sample_times(3, step, num_places, t_min)
        assert _strata(times, t_min) == list(range(num_places))
        num_lopsided += any(_strata(rank, t_min) != list(range(per_rank)) for rank in times.split(per_rank))
        # ranks that stratify on their own draw alike: they leave strata of the global batch empty
        alone = sample_times(3, step, per_rank, t_min).repeat(world_size)
        assert _strata(alone, t_min) != list(range(num_places))
    assert num_lopsided > 0


def test_sample_times_of_blocks_is_stratified_over_rows_and_blocks():
    num_rows, num_blocks, seq_len = 3, 4, 8
    t = sample_times(4, 7, num_rows * num_blocks, 1e-3).view(num_rows, num_blocks)
    assert _strata(t, 1e-3) == list(range(num_rows * num_blocks))
    laid = per_token(t, seq_len).view(num_rows, num_blocks, seq_len // num_blocks)
    assert torch.equal(laid, t[..., None].expand_as(laid))


def test_sample_times_of_documents_noises_every_token_with_the_time_of_its_document():
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 2], [2, 2, 2, 3, 4, 4]])  # the third document spans two rows
    times = sample_times(4, 7, 5, 1e-3)
    assert _strata(times, 1e-3) == list(range(5))
    sample_ids = torch.tensor([6, 7])
    noised = noise_positions(times[doc_ids], sample_ids, 6, noise_seed=4, step=7)
    address = {"noise_seed": 4, "step": 7, "stream": Stream.MASK}
    assert noised.tolist() == reference.noise_positions(times[doc_ids].tolist(), [6, 7], 6, **address)
    certain = _probs(0, 1, 0, 1, 0)[doc_ids]
    assert torch.equal(noise_positions(certain, sample_ids, 6, noise_seed=4, step=7), doc_ids % 2 == 1)


# Which positions


@EXAMPLES
@given(st.data(), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_maskable_positions_of_any_batch_are_the_valid_ones_after_the_prompt(data, num_rows, seq_len, keep_first):
    row = st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)
    valid = data.draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    prompts = data.draw(st.lists(st.integers(0, seq_len), min_size=num_rows, max_size=num_rows))
    found = maskable_positions(torch.tensor(valid), torch.tensor(prompts), keep_first=keep_first)
    assert found.tolist() == [
        [ok and place >= prompt and not (keep_first and place == 0) for place, ok in enumerate(oks)]
        for oks, prompt in zip(valid, prompts, strict=True)
    ]


def test_maskable_positions_by_default_are_all_that_are_valid():
    valid = torch.tensor([[True, True, False], [False, True, True]])
    assert torch.equal(maskable_positions(valid), valid)
    assert maskable_positions(valid, keep_first=True).tolist() == [[False, True, False], [False, True, True]]


@pytest.mark.parametrize("length", [-1, 4])
def test_maskable_positions_with_a_prompt_outside_the_row_raises(length):
    with pytest.raises(ValueError, match=rf"prompt_lengths are \[1, {length}\]; .* 0\.\.3"):
        maskable_positions(torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, length]))


@every_noiser
def test_noise_at_any_kernel_leaves_prompt_padding_and_first_token_as_they_are(name):
    x0 = _rows(40, 12)
    valid = torch.arange(12) < torch.arange(1, 13).repeat(4)[:40, None]
    maskable = maskable_positions(valid, torch.arange(40) % 5, keep_first=True)
    xt = NOISERS[name](x0, torch.ones(40, 3, dtype=torch.float64), torch.arange(40), maskable, noise_seed=1, step=1)
    assert torch.equal(xt[~maskable], x0[~maskable])
    changed = (xt != x0)[maskable]
    assert changed.double().mean() > 0.9 if name == "corrupt_tokens" else changed.all()


@every_noiser
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_noise_at_any_kernel_keeps_the_type_of_the_tokens(name, dtype):
    x0 = _rows(2, 4).to(dtype)
    xt = NOISERS[name](x0, torch.full((2, 1), 0.5), torch.arange(2), _all(x0), noise_seed=0, step=0)
    assert xt.dtype == dtype


# The address


@every_noiser
@pytest.mark.parametrize("device", DEVICES)
def test_noise_of_small_batch_equals_golden(name, device):
    x0 = _rows(3, 8).to(device)
    prob = _probs(0.25, 0.5, 0.9)[:, None]
    xt = NOISERS[name](x0, prob, torch.tensor([0, 1, 10**12]), _all(x0), noise_seed=1234, step=5)
    assert xt.device.type == device
    assert xt.tolist() == GOLDEN_XT[name]


@every_noiser
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_seqs", [1, 2])
def test_noise_over_ranks_and_micro_batches_equals_the_whole_batch(name, device, world_size, micro_batch_seqs):
    num_rows, num_blocks, address = 8, 3, {"noise_seed": 1, "step": 2}
    x0, sample_ids = _rows(num_rows, 12), torch.arange(100, 108)
    maskable = maskable_positions(_all(x0), torch.arange(num_rows) % 3)
    prob = sample_times(1, 2, num_rows * num_blocks, 1e-3).view(num_rows, num_blocks)
    whole = NOISERS[name](x0, prob, sample_ids, maskable, **address)
    for rank in range(world_size):
        prob = sample_times(1, 2, num_rows * num_blocks, 1e-3).view(num_rows, num_blocks)  # each rank draws them all
        for part in torch.arange(rank, num_rows, world_size).flip(0).split(micro_batch_seqs):
            x0_part, maskable_part = x0[part].to(device), maskable[part].to(device)
            xt = NOISERS[name](x0_part, prob[part], sample_ids[part], maskable_part, **address)
            assert torch.equal(xt.cpu(), whole[part])


@every_noiser
@pytest.mark.parametrize("change", [{"noise_seed": 2}, {"step": 3}, {"sample_ids": torch.arange(8, 16)}])
def test_noise_of_other_address_is_an_independent_draw(name, change):
    num_rows, seq_len = 8, 512
    address = {"noise_seed": 1, "step": 2, "sample_ids": torch.arange(8)}
    x0, prob = torch.zeros(num_rows, seq_len, dtype=torch.int64), torch.full((num_rows, 1), 0.5, dtype=torch.float64)
    first = NOISERS[name](x0, prob, maskable=_all(x0), **address) == MASK
    second = NOISERS[name](x0, prob, maskable=_all(x0), **(address | change)) == MASK
    share = 0.25 if name == "corrupt_tokens" else 0.5
    agreement = float((first == second).double().mean())
    expected = share**2 + (1 - share) ** 2
    assert abs(agreement - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / (num_rows * seq_len))


# Independent masks


@st.composite
def _batches(draw):
    """Token rows, a probability of every group, sample ids."""
    num_rows, num_groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group = st.lists(st.floats(0, 1), min_size=num_groups, max_size=num_groups)
    prob = draw(st.lists(group, min_size=num_rows, max_size=num_rows))
    sample_ids = draw(st.lists(int64, min_size=num_rows, max_size=num_rows))
    return _rows(num_rows, num_groups * size), torch.tensor(prob, dtype=torch.float64), torch.tensor(sample_ids)


@EXAMPLES
@given(_batches(), int64, st.integers(0, 10**9))
def test_mask_tokens_of_any_address_and_grouping_equals_python_reference(batch, noise_seed, step):
    x0, prob, sample_ids = batch
    address = {"noise_seed": noise_seed, "step": step}
    noised = reference.noise_positions(prob.tolist(), sample_ids.tolist(), x0.shape[1], stream=Stream.MASK, **address)
    assert noise_positions(prob, sample_ids, x0.shape[1], **address).tolist() == noised
    xt = mask_tokens(x0, prob, sample_ids, mask_token_id=MASK, **address)
    assert xt.tolist() == torch.where(torch.tensor(noised), MASK, x0).tolist()


def test_mask_tokens_over_many_rows_masks_each_position_with_the_probability_of_its_block():
    num_rows, probs = 4_000, (0.05, 0.5, 0.9)
    maskable = maskable_positions(torch.ones(num_rows, 12, dtype=torch.bool), torch.full((num_rows,), 2))
    x0 = torch.zeros(num_rows, 12, dtype=torch.int64)
    prob = _probs(*probs).expand(num_rows, 3)
    xt = mask_tokens(x0, prob, torch.arange(num_rows), noise_seed=3, step=0, mask_token_id=MASK, maskable=maskable)
    counts = (xt == MASK).sum(dim=0).tolist()
    assert counts[:2] == [0, 0]
    by_place = [num_rows * probs[place // 4] for place in range(2, 12)]
    cells = [c for count in counts[2:] for c in (count, num_rows - count)]
    expected = [e for mean in by_place for e in (mean, num_rows - mean)]
    assert reference.chi_square(cells, expected) < reference.chi_square_bound(len(by_place), SIGMAS)


def test_mask_tokens_over_many_rows_masks_tokens_independently():
    num_rows, p = 20_000, 0.3
    x0, prob = torch.zeros(num_rows, 4, dtype=torch.int64), torch.full((num_rows, 1), p, dtype=torch.float64)
    xt = mask_tokens(x0, prob, torch.arange(num_rows), noise_seed=3, step=1, mask_token_id=MASK)
    law = {pattern: p ** sum(pattern) * (1 - p) ** (4 - sum(pattern)) for pattern in reference.all_masks(4)}
    statistic = reference.law_statistic(map(tuple, (xt == MASK).tolist()), law)
    assert statistic < reference.chi_square_bound(len(law) - 1, SIGMAS)


def test_mask_tokens_with_probability_zero_or_one_masks_none_or_all_of_a_block():
    x0 = _rows(2, 300)
    prob = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    xt = mask_tokens(x0, prob, torch.arange(2), noise_seed=0, step=0, mask_token_id=MASK)
    assert torch.equal(xt == MASK, per_token(prob, 300) == 1)
    assert torch.equal(xt[xt != MASK], x0[xt != MASK])


def test_mask_tokens_at_the_edge_of_the_hash_masks_strictly_below_the_floor():
    # at h / 2**24 and up to the next multiple the hash h is not below the floor; float32 would round up to it
    address = reference.hash_words(0, Stream.MASK, 0, 5)
    h = reference.hash_words(address, 0) >> 40
    prob = _probs(h / 2**24, (h + 1) / 2**24 - 2.0**-45, (h + 1) / 2**24)[:, None]
    x0, sample_ids = torch.zeros(3, 1, dtype=torch.int64), torch.full((3,), 5)
    xt = mask_tokens(x0, prob, sample_ids, noise_seed=0, step=0, mask_token_id=MASK)
    assert xt.flatten().tolist() == [0, 0, MASK]


def test_mask_tokens_with_maskable_keeps_the_rest_and_the_same_noise():
    x0, prob, sample_ids = _rows(6, 40), torch.full((6, 1), 0.6), torch.arange(6)
    maskable = torch.arange(40)[None, :].expand(6, 40) >= torch.arange(0, 36, 6)[:, None]
    free = mask_tokens(x0, prob, sample_ids, noise_seed=4, step=4, mask_token_id=MASK)
    kept = mask_tokens(x0, prob, sample_ids, noise_seed=4, step=4, mask_token_id=MASK, maskable=maskable)
    assert torch.equal(kept[~maskable], x0[~maskable])
    assert torch.equal(kept[maskable], free[maskable])
    assert (free[~maskable] == MASK).any()


# Any kernel


KERNELS = {
    "absorbing": Kernel.absorbing(7, 3),
    "uniform, mask first": Kernel.uniform(7, 0),
    "uniform, mask in the middle": Kernel.uniform(7, 3),
    "uniform, mask last": Kernel.uniform(7, 6),
    "uniform, no mask": Kernel.uniform(7),
    "mixture": Kernel(7, 3, 0.3),
}


@EXAMPLES
@given(_batches(), st.sampled_from(list(KERNELS.values())), int64, st.integers(0, 10**9))
def test_corrupt_tokens_of_any_kernel_equals_python_reference(batch, kernel, noise_seed, step):
    _, prob, sample_ids = batch
    x0 = torch.full_like(batch[0], 1)
    length, ids, address = x0.shape[1], sample_ids.tolist(), {"noise_seed": noise_seed, "step": step}
    noised = reference.noise_positions(prob.tolist(), ids, length, stream=Stream.MASK, **address)
    drawn = reference.replacements(
        7, kernel.mask_token_id, kernel.mask_share, ids, length, stream=Stream.REPLACEMENT, **address
    )
    xt = corrupt_tokens(x0, prob, sample_ids, kernel, **address)
    assert xt.tolist() == torch.where(torch.tensor(noised), torch.tensor(drawn), x0).tolist()


@EXAMPLES
@given(_batches(), st.integers(0, 2**31), st.data())
def test_corrupt_tokens_of_the_absorbing_kernel_equals_mask_tokens(batch, noise_seed, data):
    x0, prob, sample_ids = batch
    cells = st.lists(st.booleans(), min_size=x0.numel(), max_size=x0.numel())
    address = {"noise_seed": noise_seed, "step": 3, "maskable": torch.tensor(data.draw(cells)).view_as(x0)}
    xt = corrupt_tokens(x0, prob, sample_ids, Kernel.absorbing(100, MASK), **address)
    assert torch.equal(xt, mask_tokens(x0, prob, sample_ids, mask_token_id=MASK, **address))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("noise_prob", [0.4, 1.0])
def test_corrupt_tokens_over_many_tokens_follows_the_marginal(kernel, noise_prob):
    x0 = torch.full((300, 100), 1)
    prob = torch.full((300, 1), noise_prob, dtype=torch.float64)
    xt = corrupt_tokens(x0, prob, torch.arange(300), kernel, noise_seed=6, step=0)
    real = [token for token in range(7) if token != kernel.mask_token_id]
    law = {token: noise_prob * (1 - kernel.mask_share) / len(real) for token in real}
    law[1] += 1 - noise_prob
    if kernel.mask_token_id is not None:
        law[kernel.mask_token_id] = noise_prob * kernel.mask_share
    statistic = reference.law_statistic(xt.flatten().tolist(), law)
    num_possible = sum(p > 0 for p in law.values())
    assert statistic <= (reference.chi_square_bound(num_possible - 1, SIGMAS) if num_possible > 1 else 0)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_corrupt_tokens_noises_the_positions_that_mask_tokens_masks(kernel):
    x0, sample_ids, prob = torch.full((20, 30), 1), torch.arange(20), torch.full((20, 2), 0.5)
    address = {"noise_seed": 2, "step": 8, "maskable": maskable_positions(_all(x0), keep_first=True)}
    masked = mask_tokens(x0, prob, sample_ids, mask_token_id=MASK, **address) == MASK
    redrawn = corrupt_tokens(x0, torch.ones_like(prob), sample_ids, kernel, **address)
    xt = corrupt_tokens(x0, prob, sample_ids, kernel, **address)
    assert torch.equal(xt, torch.where(masked, redrawn, x0))


def test_corrupt_tokens_at_the_edge_of_the_hash_masks_strictly_below_the_floor_of_the_share():
    address = reference.hash_words(0, Stream.REPLACEMENT, 0, 5)
    hashes = [reference.hash_words(address, place, 1) >> 40 for place in range(40)]
    x0, prob = torch.zeros(1, 40, dtype=torch.int64), torch.ones(1, 1)
    for place, h in enumerate(hashes):
        shares = {h / 2**24: False, (h + 0.75) / 2**24: False, (h + 1) / 2**24: True}
        for share, is_masked in shares.items():
            xt = corrupt_tokens(x0, prob, torch.tensor([5]), Kernel(7, 3, share), noise_seed=0, step=0)
            assert bool(xt[0, place] == 3) == is_masked


# Errors


@pytest.mark.parametrize("mask_token_id", [-1, 10])
def test_check_tokens_with_the_mask_outside_the_vocabulary_raises(mask_token_id):
    with pytest.raises(ValueError, match=rf"mask_token_id is {mask_token_id}; .* 0\.\.9"):
        check_tokens(torch.zeros(1, 2, dtype=torch.int64), 10, mask_token_id)


@pytest.mark.parametrize("token", [-1, 10, 12])
def test_check_tokens_outside_the_vocabulary_names_the_first(token):
    x0 = torch.tensor([[0, 1, 9], [2, 3, token], [77, 3, 4]])
    with pytest.raises(ValueError, match=rf"x0\[1, 2\] is {token}; .* 0\.\.9"):
        check_tokens(x0, 10, 4)


def test_check_tokens_with_the_mask_in_the_text_names_the_first():
    with pytest.raises(ValueError, match=r"x0\[1, 0\] is the mask token 4; "):
        check_tokens(torch.tensor([[0, 1, 9], [4, 3, 4]]), 10, 4)


@pytest.mark.parametrize("mask_token_id", [0, 4, 9])
def test_check_tokens_of_every_real_token_passes(mask_token_id):
    check_tokens(torch.tensor([[token for token in range(10) if token != mask_token_id]]), 10, mask_token_id)


@every_noiser
def test_noise_of_text_with_the_mask_in_it_names_row_and_place(name):
    x0 = _rows(2, 4)
    x0[1, 2] = MASK
    with pytest.raises(ValueError, match=rf"x0\[1, 2\] is the mask token {MASK}"):
        NOISERS[name](x0, torch.full((2, 1), 0.5), torch.arange(2), _all(x0), noise_seed=0, step=0)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("token", [-1, 7])
def test_corrupt_tokens_of_text_outside_the_vocabulary_names_row_and_place(kernel, token):
    x0 = torch.tensor([[1, 2], [2, token]])
    with pytest.raises(ValueError, match=rf"x0\[1, 1\] is {token}; .* 0\.\.6"):
        corrupt_tokens(x0, torch.ones(2, 1), torch.arange(2), kernel, noise_seed=0, step=0)


@every_noiser
def test_noise_of_blocks_that_do_not_divide_the_row_raises(name):
    x0 = _rows(2, 8)
    with pytest.raises(ValueError, match=r"^3 blocks .* 8 tokens"):
        NOISERS[name](x0, torch.full((2, 3), 0.5), torch.arange(2), _all(x0), noise_seed=0, step=0)


@pytest.mark.parametrize("prob", [-0.1, 1.5, math.nan])
def test_noise_with_an_impossible_probability_names_it(prob):
    x0, maskable = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    probs, address = torch.tensor([[0.5], [prob]], dtype=torch.float64), {"noise_seed": 0, "step": 0}
    with pytest.raises(ValueError, match=f"a mask probability is {prob}; it must lie in"):
        mask_tokens(x0, probs, torch.arange(2), mask_token_id=MASK, **address)
    with pytest.raises(ValueError, match=f"a mask probability is {prob}; it must lie in"):
        mask_within(x0, probs, torch.arange(2), low=0.0, high=1.0, mask_token_id=MASK, maskable=maskable, **address)


def test_mask_tokens_with_a_negative_mask_id_raises():
    x0 = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask_token_id is -5"):
        mask_tokens(x0, torch.ones(1, 1), torch.arange(1), noise_seed=0, step=0, mask_token_id=-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("num_ids", [1, 4])
def test_noise_of_another_number_of_sample_ids_than_rows_raises(num_ids):
    x0, ids, kernel = _rows(3, 8), torch.arange(num_ids), Kernel.absorbing(200, MASK)
    message = f"there are {num_ids} sample_ids for 3 rows"
    for prob in (torch.full((num_ids, 1), 0.5), torch.full((3, 1), 0.5)):
        with pytest.raises(ValueError, match=message):
            mask_tokens(x0, prob, ids, mask_token_id=MASK, noise_seed=0, step=0)
        with pytest.raises(ValueError, match=message):
            corrupt_tokens(x0, prob, ids, kernel, noise_seed=0, step=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 1), (4, 1)])
def test_noise_of_probabilities_that_are_not_rows_by_groups_raises(shape):
    x0, ids, prob = _rows(3, 8), torch.arange(3), torch.full(shape, 0.5)
    with pytest.raises(ValueError, match=re.escape(f"mask_prob has the shape {shape}; wanted two axes, 3 rows by")):
        mask_tokens(x0, prob, ids, mask_token_id=MASK, noise_seed=0, step=0)


@pytest.mark.usefixtures("unchecked")
def test_noise_of_rows_with_another_number_of_maskable_rows_raises():
    x0, prob = _rows(3, 8), torch.full((3, 1), 0.5)
    with pytest.raises(ValueError, match=r"maskable has the shape \(1, 8\); wanted two axes, 3 rows by"):
        mask_tokens(x0, prob, torch.arange(3), mask_token_id=MASK, maskable=_all(x0)[:1], noise_seed=0, step=0)
