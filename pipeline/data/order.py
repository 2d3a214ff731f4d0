"""Data order as a pure function of (data_seed, stream, index): nothing to store, nothing to replay."""

import hashlib

import numpy as np

_ROUNDS = 3
"""Pairs of Feistel rounds."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = (np.uint64(bits) for bits in (30, 27, 31))

Words = np.ndarray
"""uint64, of any shape."""


def _mix(x: Words) -> Words:
    """The SplitMix64 finalizer (Steele, Lea, Flood, OOPSLA 2014); products wrap."""
    x = (x ^ (x >> _S30)) * _MIX_1
    x = (x ^ (x >> _S27)) * _MIX_2
    return x ^ (x >> _S31)


def hash_words(*words: Words | int) -> Words:
    """A 64-bit hash of each tuple of words; integers stand for arrays of the same number."""
    h = np.zeros(1, dtype=np.uint64)
    for word in words:
        value = word if isinstance(word, np.ndarray) else np.array([word % (1 << 64)], dtype=np.uint64)
        h = _mix((h + _GOLDEN) ^ value)
    return h


def stream_number(name: str) -> int:
    """A 64-bit number of a name, so that the order of one source does not depend on which others there are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def permute(index: np.ndarray, size: int, key: Words) -> np.ndarray:
    """Image of each index under the keyed bijection of range(size) that belongs to its key.

    A Feistel network on the next power of two, walked until it lands inside the range: less than twice as large, so
    fewer than two steps on average.  ``index`` is int64 [n], ``key`` uint64 [n] of hashes.  Raises IndexError for an
    index outside range(size).
    """
    if len(index) and not 0 <= index.min() <= index.max() < size:
        raise IndexError(f"index {index.min()} to {index.max()} is outside range({size})")
    num_bits = max(2, (size - 1).bit_length())
    low_bits, high_bits = np.uint64(num_bits // 2), np.uint64(num_bits - num_bits // 2)
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    image = index.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        own = key[walking]
        high, low = image[walking] >> low_bits, image[walking] & low_mask
        for _ in range(_ROUNDS):  # an even number of halves: the wide one is on the left again
            own = own + _GOLDEN
            high = high ^ (_mix(own ^ low) & high_mask)
            own = own + _GOLDEN
            low = low ^ (_mix(own ^ high) & low_mask)
        image[walking] = (high << low_bits) | low
        walking = walking[image[walking] >= size]
    return image.astype(np.int64)


def row_at(data_seed: int, stream: int, num_rows: int, index: np.ndarray) -> np.ndarray:
    """Row that a source shows as its ``index``-th sample: each epoch is a fresh permutation of all its rows."""
    epoch, place = np.divmod(index, num_rows)
    return permute(place, num_rows, hash_words(data_seed, stream, epoch.astype(np.uint64)))
