"""From autoregressive to diffusion: the shift, the ratio of annealing, block sizes by step, noise on the mask."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from dlm_core.ar_init import (
    BlockSizeSchedule,
    add_mask_noise,
    anneal_ratio,
    mask_noise_std,
    shift_left,
    shift_right,
    shifted,
)
from dlm_core.masks import annealed, causal, dense_mask
from tests.support import reference
from tests.support.attention import TinyStack

SIGMAS = 5.5  # a fair draw leaves this many standard errors once in 26 million; ten in a test: 4e-7
FLOAT64_RTOL = 1e-15  # a few roundings: ratios are quotients of small integers
NORMAL_ATOL = 1e-13  # log, sqrt and cos of two libraries, times at most 6
EMBEDDING_STREAM = 9  # the word of dlm_core.noise.Stream.EMBEDDING: a change of it changes every run
SEED = 2**63 + 5  # beyond int64: seeds are words
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# The shift


def _logits(num_rows: int, seq_len: int, vocab_size: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, seq_len, vocab_size, generator=torch.Generator().manual_seed(seq_len))


@pytest.mark.parametrize("seq_len", [1, 2, 5])
def test_shift_right_reads_the_position_before(seq_len):
    logits = _logits(2, seq_len)
    shifted = shift_right(logits)
    assert shifted.shape == logits.shape
    for row, place in itertools.product(range(2), range(seq_len)):
        assert shifted[row, place].tolist() == logits[row, max(place - 1, 0)].tolist()


@pytest.mark.parametrize("seq_len", [1, 2, 5])
def test_shift_left_reads_the_position_after(seq_len):
    logits = _logits(2, seq_len)
    shifted = shift_left(logits)
    assert shifted.shape == logits.shape
    for row, place in itertools.product(range(2), range(seq_len)):
        assert shifted[row, place].tolist() == logits[row, min(place + 1, seq_len - 1)].tolist()


@pytest.mark.parametrize("seq_len", [2, 3, 8])
def test_shift_then_unshift_is_the_identity_but_at_the_end(seq_len):
    logits = _logits(3, seq_len)
    assert torch.equal(shift_left(shift_right(logits))[:, :-1], logits[:, :-1])
    assert torch.equal(shift_right(shift_left(logits))[:, 1:], logits[:, 1:])


def _converted(ratio: float, xt: torch.Tensor, stack: TinyStack) -> torch.Tensor:
    attn_mask = dense_mask(annealed(ratio, SEED, 0), 1, xt.shape[1])
    return shift_right(stack(xt, attn_mask, torch.arange(xt.shape[1])))


def test_shifted_logits_under_the_first_annealed_mask_are_the_autoregressive_ones():
    seq_len, mask_token_id = 6, 4
    stack = TinyStack(5)
    x0 = torch.tensor([[2, 0, 3, 3, 1, 0], [1, 1, 0, 2, 3, 2]])
    ar = stack(x0, dense_mask(causal(), 1, seq_len), torch.arange(seq_len))
    for place in range(1, seq_len):
        xt = torch.where(torch.arange(seq_len) >= place, mask_token_id, x0)
        assert torch.equal(_converted(0.0, xt, stack)[:, place], ar[:, place - 1])
        assert not torch.equal(_converted(1.0, xt, stack)[:, place], ar[:, place - 1])


def test_later_token_changes_earlier_logits_only_once_annealed():
    stack, x0 = TinyStack(5), torch.tensor([[2, 0, 3, 3, 1, 0]])
    other = x0.clone()
    other[0, -1] = 2
    assert torch.equal(
        _converted(0.0, x0, stack), _converted(0.0, other, stack)
    )  # the last one's output is shifted out
    assert (_converted(1.0, x0, stack) != _converted(1.0, other, stack)).any(dim=-1).all()


# The ratio of annealing


def test_shifted_denoiser_asks_for_the_position_before():
    xt, select = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([1, 3, 6])
    asked: list[torch.Tensor] = []

    def denoise(xt: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
        asked.append(select)
        return torch.zeros(len(select), 5)

    assert shifted(denoise)(xt, select).shape == (3, 5)
    assert asked[0].tolist() == [0, 2, 5]
    with pytest.raises(ValueError, match="position 0 of a row is asked for"):
        shifted(denoise)(xt, torch.tensor([1, 4]))


@pytest.mark.parametrize("num_anneal_steps", [1, 2, 7, 10_000])
def test_anneal_ratio_grows_linearly_to_one(num_anneal_steps):
    for step in (0, 1, 2, 5, 6, 7, 4_999, 9_998, 9_999, 10_000, 10**7):
        exact = min(Fraction(1), Fraction(step + 1, num_anneal_steps))
        assert anneal_ratio(step, num_anneal_steps) == pytest.approx(float(exact), rel=FLOAT64_RTOL)


def test_anneal_ratio_at_its_ends():
    assert anneal_ratio(0, 4) == 0.25
    assert anneal_ratio(2, 4) == 0.75
    assert anneal_ratio(3, 4) == anneal_ratio(4, 4) == 1.0


@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_anneal_ratio_without_steps_is_one(step):
    assert anneal_ratio(step, 0) == 1.0


@pytest.mark.parametrize(
    ("step", "num_anneal_steps", "named"),
    [(-1, 10, "step is -1"), (3, -2, "num_anneal_steps -2"), (-1, 0, "step is -1"), (0, -1, "num_anneal_steps -1")],
)
def test_anneal_ratio_of_a_negative_number_names_it(step, num_anneal_steps, named):
    with pytest.raises(ValueError, match=named):
        anneal_ratio(step, num_anneal_steps)


# Block sizes


@pytest.mark.parametrize(
    "phases", [((8, 1),), ((1, 2), (4, 3), (16, 5)), ((1, 1), (2, 1), (1, 1)), ((4, 10), (4, 1), (2, 7))]
)
def test_block_size_at_every_step_is_that_of_its_phase_and_the_last_never_ends(phases):
    listed = [size for size, num_steps in phases for _ in range(num_steps)]
    schedule = BlockSizeSchedule(phases)
    assert [schedule.block_size_at(step) for step in range(len(listed))] == listed
    for late in (0, 1, 2, 1000):
        assert schedule.block_size_at(len(listed) + late) == phases[-1][0]


def test_warmup_stable_decay_of_the_paper_lists_its_phases():
    schedule = BlockSizeSchedule.warmup_stable_decay(
        (1, 4, 32, 64),
        (2048, 1024, 512, 256, 128, 64, 32),
        seq_len=4096,
        num_stage_steps=3,
        num_stable_steps=10,
    )
    rising, falling = [(1, 3), (4, 3), (32, 3), (64, 3)], [(4096 >> halving, 3) for halving in range(1, 8)]
    assert schedule == BlockSizeSchedule((*rising, (4096, 10), *falling))
    assert [schedule.block_size_at(step) for step in (0, 2, 3, 11, 12, 21, 22, 24, 25, 39, 40, 10**9)] == [
        *(1, 1, 4, 64, 4096, 4096, 2048, 2048, 1024, 64, 32, 32)
    ]


@pytest.mark.parametrize(
    ("warmup", "decay", "phases"), [((), (16,), ((64, 9), (16, 3))), ((1, 4), (), ((1, 3), (4, 3), (64, 9)))]
)
def test_warmup_stable_decay_without_one_side_lists_the_other(warmup, decay, phases):
    schedule = BlockSizeSchedule.warmup_stable_decay(warmup, decay, seq_len=64, num_stage_steps=3, num_stable_steps=9)
    assert schedule.phases == phases


def test_warmup_stable_decay_takes_the_smallest_settings():
    schedule = BlockSizeSchedule.warmup_stable_decay((1,), (1,), seq_len=2, num_stage_steps=1, num_stable_steps=1)
    assert schedule.phases == ((1, 1), (2, 1), (1, 1))


@pytest.mark.parametrize(
    ("phases", "named"),
    [
        ((), "phases is empty"),
        (((0, 5),), "phase 0 is 5 steps at block_size 0"),
        (((1, 5), (-4, 5)), "phase 1 is 5 steps at block_size -4"),
        (((1, 5), (2, 5), (4, 0)), "phase 2 is 0 steps at block_size 4"),
        (((1, -5),), "phase 0 is -5 steps at block_size 1"),
    ],
)
def test_block_size_schedule_with_impossible_phase_names_it(phases, named):
    with pytest.raises(ValueError, match=named):
        BlockSizeSchedule(phases)


def test_block_size_of_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step is -1"):
        BlockSizeSchedule(((4, 2),)).block_size_at(-1)


@pytest.mark.parametrize(
    ("warmup", "decay", "named"),
    [
        ((4, 4), (2,), r"\(4, 4\) must grow to 64"),
        ((8, 4), (2,), r"\(8, 4\) must grow to 64"),
        ((1, 64), (2,), r"\(1, 64\) must grow to 64"),
        ((1, 128), (2,), r"\(1, 128\) must grow to 64"),
        ((1,), (64, 32), r"\(64, 32\) must shrink"),
        ((1,), (128,), r"\(128,\) must shrink"),
        ((1,), (16, 16), r"\(16, 16\) must shrink"),
        ((1,), (16, 32), r"\(16, 32\) must shrink"),
        ((1, 3), (2,), "block_size is 3; it must divide the row of 64"),
        ((1,), (32, 24), "block_size is 24; it must divide the row of 64"),
        ((0, 4), (2,), "block_size is 0; it must divide the row of 64"),
        ((-4, 4), (2,), "block_size is -4; it must divide the row of 64"),
        ((1,), (2, -2), "block_size is -2; it must divide the row of 64"),
    ],
)
def test_warmup_stable_decay_with_impossible_sizes_names_them(warmup, decay, named):
    with pytest.raises(ValueError, match=named):
        BlockSizeSchedule.warmup_stable_decay(warmup, decay, seq_len=64, num_stage_steps=1, num_stable_steps=1)


@pytest.mark.parametrize(
    ("num_stage_steps", "num_stable_steps", "named"),
    [(0, 5, "phase 0 is 0 steps at block_size 1"), (5, 0, "phase 1 is 0 steps at block_size 8")],
)
def test_warmup_stable_decay_without_steps_names_the_phase(num_stage_steps, num_stable_steps, named):
    with pytest.raises(ValueError, match=named):
        BlockSizeSchedule.warmup_stable_decay(
            (1,), (2,), seq_len=8, num_stage_steps=num_stage_steps, num_stable_steps=num_stable_steps
        )


# Noise on the mask


def _naive_normal(*address: int) -> float:
    """Box and Muller over the hash, one address a channel: (seed, step, sample id, position), then the channel."""
    seed, step, sample_id, position, channel = address
    token = reference.hash_words(seed, EMBEDDING_STREAM, step, sample_id, position)
    u, v = ((reference.hash_words(token, channel, word) >> 11) / 2**53 for word in (0, 1))
    return math.sqrt(-2 * math.log1p(-u)) * math.cos(2 * math.pi * v)


def _noise(
    shape: tuple[int, int, int], *, std: float = 1.0, noise_seed: int = 1, step: int = 0, first_id: int = 0
) -> torch.Tensor:
    """Of zeros, all masked: the noise itself, in float64."""
    ids = torch.arange(first_id, first_id + shape[0])
    masked = torch.ones(shape[:2], dtype=torch.bool)
    zeros = torch.zeros(shape, dtype=torch.float64)
    return add_mask_noise(zeros, masked, ids, std=std, noise_seed=noise_seed, step=step)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("noise_seed", "step", "std"), [(0, 0, 1.0), (SEED, 10**6, 0.25), (-3, 7, 6.0)])
def test_mask_noise_equals_naive_normal_of_its_address(noise_seed, step, std, device):
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64).to(device)
    is_masked = torch.rand(3, 4, generator=draw) < 0.5
    ids = [0, 10**12, 17]
    noised = add_mask_noise(
        embeddings, is_masked.to(device), torch.tensor(ids), std=std, noise_seed=noise_seed, step=step
    )
    expected = embeddings.cpu().clone()
    for row, place, channel in itertools.product(range(3), range(4), range(5)):
        if is_masked[row, place]:
            expected[row, place, channel] += std * _naive_normal(noise_seed, step, ids[row], place, channel)
    assert noised.device == embeddings.device
    torch.testing.assert_close(noised.cpu(), expected, rtol=0, atol=std * NORMAL_ATOL)


def test_mask_noise_changes_every_masked_position_and_no_other():
    draw = torch.Generator().manual_seed(1)
    embeddings, is_masked = torch.randn(4, 16, 8, generator=draw), torch.rand(4, 16, generator=draw) < 0.5
    before = embeddings.clone()
    noised = add_mask_noise(embeddings, is_masked, torch.arange(4), std=0.5, noise_seed=2, step=3)
    assert torch.equal(embeddings, before)
    assert torch.equal((noised != before).all(dim=-1), is_masked)
    assert torch.equal((noised != before).any(dim=-1), is_masked)


def test_mask_noise_in_any_micro_batches_and_order_is_the_same():
    draw = torch.Generator().manual_seed(1)
    embeddings, is_masked = torch.randn(6, 8, 4, generator=draw), torch.rand(6, 8, generator=draw) < 0.5
    ids = torch.tensor([40, 41, 42, 7, 3, 10**12])
    whole = add_mask_noise(embeddings, is_masked, ids, std=0.5, noise_seed=2, step=3)
    for order, sizes in (([0, 1, 2, 3, 4, 5], [1, 2, 3]), ([5, 3, 0, 1, 4, 2], [4, 2]), ([2, 1, 0, 5, 4, 3], [6])):
        parts = [
            add_mask_noise(embeddings[rows], is_masked[rows], ids[rows], std=0.5, noise_seed=2, step=3)
            for rows in torch.tensor(order).split(sizes)
        ]
        assert torch.equal(torch.cat(parts), whole[order])


def test_mask_noise_of_a_position_does_not_depend_on_what_else_is_masked_or_on_the_length():
    every, embeddings = _noise((2, 8, 4)), torch.zeros(2, 5, 4, dtype=torch.float64)
    is_masked = torch.tensor([[True, False, True, False, False], [False, False, False, False, True]])
    some = add_mask_noise(embeddings, is_masked, torch.arange(2), std=1.0, noise_seed=1, step=0)
    assert torch.equal(some[is_masked], every[:, :5][is_masked])


def test_mask_noise_at_any_other_address_differs():
    drawn = torch.stack([_noise((4, 5, 6), noise_seed=seed, step=step) for seed in (1, 2) for step in (0, 1, 2)])
    assert len(set(drawn.flatten().tolist())) == drawn.numel()


def test_mask_noise_scales_with_std():
    assert torch.equal(_noise((2, 3, 4), std=8.0), 8.0 * _noise((2, 3, 4)))


def test_mask_noise_without_std_changes_nothing():
    embeddings = _logits(2, 5, 4)
    same = add_mask_noise(
        embeddings, torch.ones(2, 5, dtype=torch.bool), torch.arange(2), std=0.0, noise_seed=0, step=0
    )
    assert torch.equal(same, embeddings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mask_noise_keeps_the_dtype_and_is_rounded_to_it(dtype):
    embeddings = _logits(2, 5, 4).to(dtype)
    masked = torch.ones(2, 5, dtype=torch.bool)
    noised = add_mask_noise(embeddings, masked, torch.arange(2), std=0.5, noise_seed=1, step=0)
    assert noised.dtype == dtype
    assert torch.equal(noised, embeddings + _noise((2, 5, 4), std=0.5).to(dtype))


def test_mask_noise_lets_the_gradient_through_unchanged():
    embeddings = _logits(2, 5, 4).requires_grad_()
    is_masked = torch.tensor([[True, False, True, True, False]] * 2)
    noised = add_mask_noise(embeddings, is_masked, torch.arange(2), std=0.5, noise_seed=1, step=0)
    (gradient,) = torch.autograd.grad((noised * 3).sum(), embeddings)
    assert torch.equal(gradient, torch.full_like(gradient, 3.0))


def test_mask_noise_follows_the_normal_law():
    std, num_bins = 0.3, 64
    drawn = torch.cat([_noise((8, 32, 64), std=std, step=step).flatten() for step in range(4)])
    z, num_draws = drawn / std, drawn.numel()
    # E z^n and Var z^n of a standard normal
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = float((z**power).mean()) - mean
        assert abs(error) < SIGMAS * math.sqrt(variance / num_draws), f"moment {power}"
    quantiles = (0.5 * (1 + torch.erf(z / math.sqrt(2))) * num_bins).long().clamp(max=num_bins - 1)
    counts = torch.bincount(quantiles, minlength=num_bins).tolist()
    statistic = reference.chi_square(counts, [num_draws / num_bins] * num_bins)
    assert statistic < reference.chi_square_bound(num_bins - 1, z=SIGMAS)


def test_mask_noise_is_uncorrelated_between_neighbouring_addresses():
    here = _noise((16, 32, 32))
    pairs = {
        "sample": (here[:-1], here[1:]),
        "position": (here[:, :-1], here[:, 1:]),
        "channel": (here[..., :-1], here[..., 1:]),
        "step": (here, _noise((16, 32, 32), step=1)),
        "seed": (here, _noise((16, 32, 32), noise_seed=2)),
    }
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).sum())) < SIGMAS * math.sqrt(a.numel()), name


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf])
def test_mask_noise_with_impossible_std_names_it(std):
    with pytest.raises(ValueError, match=f"std is {std}"):
        _noise((1, 1, 1), std=std)


# The fading of that noise


@pytest.mark.parametrize("num_steps", [1, 3, 1000])
def test_mask_noise_std_fades_linearly_to_zero(num_steps):
    for step in (0, 1, 2, 3, 4, 500, 999, 1000, 1001):
        exact = 0.3 * float(max(Fraction(0), 1 - Fraction(step, num_steps)))
        # 1 - step / num_steps rounds at the scale of 1
        assert mask_noise_std(step, 0.3, num_steps) == pytest.approx(exact, rel=0, abs=FLOAT64_RTOL)


def test_mask_noise_std_at_its_ends():
    assert mask_noise_std(0, 0.3, 10) == 0.3
    assert mask_noise_std(5, 0.5, 10) == 0.25
    assert mask_noise_std(10, 0.3, 10) == mask_noise_std(11, 0.3, 10) == 0.0


@pytest.mark.parametrize(("step", "num_steps"), [(0, 0), (5, 0), (0, 10), (20, 10)])
def test_mask_noise_std_of_zero_stays_zero(step, num_steps):
    assert mask_noise_std(step, 0.0, num_steps) == 0.0


@pytest.mark.parametrize(
    ("step", "std", "num_steps"),
    [
        (-1, 0.1, 10),
        (0, -0.1, 10),
        (0, 0.1, -1),
        (0, 0.1, 0),
        (-1, 0.0, 0),
        (0, 0.0, -1),
        (0, math.nan, 10),
        (20, math.inf, 10),
    ],
)
def test_mask_noise_std_with_impossible_settings_names_them(step, std, num_steps):
    with pytest.raises(ValueError, match=f"step {step}, std {std}, num_steps {num_steps}"):
        mask_noise_std(step, std, num_steps)
