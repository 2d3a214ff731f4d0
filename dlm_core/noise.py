"""Addressed randomness: every number is a 64-bit hash of where it is used, so nothing holds a random state.

Integer arithmetic wraps alike on CPU and GPU: a batch gets the same noise for any number of workers, any micro batch
and after any resume.

What lives here: the hash, uniforms, permutations, strata.  What must not: what the numbers are used for
(corruption.py).
"""

import enum
import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HASH_BITS = 24
"""An event of probability p happens where a 24-bit hash lies below floor(p * 2**24)."""

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Stream(enum.IntEnum):
    """Independent families of random numbers: every address begins with (noise_seed, stream)."""

    MASK = 1
    STRATUM = 2
    OFFSET = 3
    CATEGORICAL = 4
    COUNT = 5
    EXACT_MASK = 6
    REPLACEMENT = 7
    ATTENTION = 8
    EMBEDDING = 9
    ORDER = 10
    REVEAL = 11
    WITHIN = 12
    ROW_STRATUM = 13
    ROW_COUNT = 14
    REMASK = 15
    ANSWER_COUNT = 16
    ANSWER_SUBSET = 17


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
        h = extend_hash(h, word)
    return h


def extend_hash(h: Int[Tensor, "..."], word: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The hash of one word more: extend_hash(hash_words(a, b), c) = hash_words(a, b, c), and no integer is uploaded."""
    if isinstance(word, int):
        return mix((h + _signed(_GOLDEN)) ^ _signed(word))
    device = word.device if word.device.type != "cpu" else h.device
    return mix((h.to(device) + _signed(_GOLDEN)) ^ word.to(device, torch.int64))


def as_uniform(hashes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Uniform float64 in [0, 1) from the top 53 bits of hashes."""
    return _shift_right(hashes, 11).to(torch.float64) * 2.0**-53


def hash_uniform(*words: int | Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Uniform float64 in [0, 1) from the top 53 bits of ``hash_words``."""
    return as_uniform(hash_words(*words))


def hash_event(prob: Float[Tensor, "..."], *words: int | Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """True with probability floor(prob * 2**24) / 2**24, on the device of the words; prob broadcasts against them.

    The threshold is an integer, so that no rounding on a device can turn an event.
    """
    hashes = _shift_right(hash_words(*words), 64 - HASH_BITS)
    threshold = torch.floor(prob.to(torch.float64) * 2**HASH_BITS).to(torch.int64)
    return hashes < threshold.to(hashes.device)


def hash_integer(high: int, *words: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Uniform integer in 0..high - 1, up to a bias of high / 2**63."""
    return _shift_right(hash_words(*words), 1) % high


def hash_normal(*words: int | Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard normal float64 by the polar formula  sqrt(-2 log(1 - u)) cos(2 pi v)  (Box and Muller, 1958)."""
    radius = torch.sqrt(-2.0 * torch.log1p(-hash_uniform(*words, 0)))
    return radius * torch.cos(2.0 * math.pi * hash_uniform(*words, 1))


def hash_permutation(size: int, *words: int) -> Int[Tensor, " size"]:
    """A permutation of range(size) addressed by ``words``: the order of the hashes of its places."""
    return torch.argsort(hash_words(*words, torch.arange(size)), stable=True)


def stratified_uniform(
    noise_seed: int, step: int, num_places: int, stream: Stream = Stream.STRATUM, *, shared_offset: bool = True
) -> Float[Tensor, " n"]:
    """One uniform number a place of the *global* batch, one place a stratum of width 1 / num_places.

    u_place = (pi_step(place) + offset) / num_places, with the permutation pi and the offset from the hash.  One offset
    shared by all strata: VDM (arXiv 2107.00630) appendix I.1, "antithetic".  One offset a place: MDLM's code and the
    "decoupled" form of RADD's.  Either way each u is uniform on [0, 1) over the steps.
    """
    strata = torch.empty(num_places, dtype=torch.float64)
    order = hash_permutation(num_places, noise_seed, stream, step)
    strata[order] = torch.arange(num_places, dtype=torch.float64)
    address = (noise_seed, Stream.OFFSET, step, stream)
    offset = hash_uniform(*address) if shared_offset else hash_uniform(*address, torch.arange(num_places))
    return (strata + offset) / num_places
