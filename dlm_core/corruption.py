"""The forward process: sampled times and masks, addressed by (noise_seed, step, sample id, position).

Nothing here holds a random state.  Every random number is a 64-bit hash of its address, computed
in integer arithmetic that wraps alike on CPU and GPU, so a batch is corrupted in the same way for any
number of workers, any micro batch and after any resume.
"""

import enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HASH_BITS = 24
"""A token is masked where its 24-bit hash lies below floor(mask_prob * 2**24)."""

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Stream(enum.IntEnum):
    """Independent families of random numbers; the value is part of the address."""

    MASK = 1
    STRATUM = 2
    OFFSET = 3
    CATEGORICAL = 4
    COUNT = 5
    EXACT_MASK = 6


def _signed(word: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit word."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


def _shift_right(x: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    """Logical right shift of an int64 tensor (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The SplitMix64 finalizer (Steele, Lea, Flood, OOPSLA 2014), a bijection on 64-bit words."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def hash_words(*words: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A 64-bit hash of a sequence of integers; tensors among them broadcast.

    h <- mix((h + golden) xor word), from h = 0: the order of the words matters.
    """
    h = torch.zeros((), dtype=torch.int64)
    for word in words:
        value = torch.tensor(_signed(word)) if isinstance(word, int) else word.to(torch.int64)
        device = value.device if value.device.type != "cpu" else h.device
        h = mix((h.to(device) + _signed(_GOLDEN)) ^ value.to(device))
    return h


def hash_uniform(*words: int | Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Uniform float64 in [0, 1) from the top 53 bits of ``hash_words``."""
    return _shift_right(hash_words(*words), 11).to(torch.float64) * 2.0**-53


def hash_permutation(size: int, *words: int) -> Int[Tensor, " size"]:
    """A permutation of range(size) addressed by ``words``: the order of the hashes of its places."""
    return torch.argsort(hash_words(*words, torch.arange(size)), stable=True)


def stratified_uniform(
    noise_seed: int, step: int, num_places: int, stream: Stream = Stream.STRATUM
) -> Float[Tensor, " n"]:
    """One uniform number a place, one place a stratum of width 1 / num_places.

    u_place = (pi_step(place) + offset_step) / num_places, with the permutation pi and the offset from the
    hash: the shared-offset form of low-discrepancy times (VDM, arXiv 2107.00630, app. I.1), laid over the
    *global* batch.  Each u is uniform on [0, 1) over the steps.
    """
    strata = torch.empty(num_places, dtype=torch.float64)
    order = hash_permutation(num_places, noise_seed, step, stream)
    strata[order] = torch.arange(num_places, dtype=torch.float64)
    offset = hash_uniform(noise_seed, step, Stream.OFFSET, stream)
    return (strata + offset) / num_places


def sample_times(noise_seed: int, step: int, num_places: int, t_min: float) -> Float[Tensor, " n"]:
    """Times t in [t_min, 1) for every place of the global batch:  t_min + (1 - t_min) * u."""
    return t_min + (1.0 - t_min) * stratified_uniform(noise_seed, step, num_places)


def mask_tokens(
    x0: Int[Tensor, "B L"],
    mask_prob: Float[Tensor, " B"],
    sample_ids: Int[Tensor, " B"],
    *,
    noise_seed: int,
    step: int,
    mask_token_id: int,
    maskable: Bool[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw xt ~ q(xt | x0) of the absorbing process: each token masked with probability mask_prob.

    Positions where ``maskable`` is False (prompt, padding) stay as they are.
    """
    positions = torch.arange(x0.shape[1], device=x0.device)
    address = hash_words(noise_seed, step, Stream.MASK, sample_ids.to(x0.device))
    hashes = _shift_right(hash_words(address[:, None], positions[None, :]), 64 - HASH_BITS)
    threshold = torch.floor(mask_prob.to(torch.float64) * 2**HASH_BITS).to(torch.int64)
    is_masked = hashes < threshold.to(x0.device)[:, None]
    if maskable is not None:
        is_masked = is_masked & maskable
    return torch.where(is_masked, mask_token_id, x0)


def mask_exact_count(
    x0: Int[Tensor, "B L"],
    num_masked: Int[Tensor, " B"],
    sample_ids: Int[Tensor, " B"],
    *,
    noise_seed: int,
    step: int,
    mask_token_id: int,
    maskable: Bool[Tensor, "B L"],
) -> Int[Tensor, "B L"]:
    """Mask exactly ``num_masked`` maskable positions of each row, every subset equally likely."""
    positions = torch.arange(x0.shape[1], device=x0.device)
    address = hash_words(noise_seed, step, Stream.EXACT_MASK, sample_ids.to(x0.device))
    hashes = hash_words(address[:, None], positions[None, :])
    last = torch.iinfo(torch.int64).max
    rank = hashes.masked_fill(~maskable, last).argsort(dim=1, stable=True).argsort(dim=1)
    is_masked = (rank < num_masked.to(x0.device)[:, None]) & maskable
    return torch.where(is_masked, mask_token_id, x0)
