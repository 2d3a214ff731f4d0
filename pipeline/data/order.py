"""Data order as a pure function of (data_seed, global sample index): nothing to store, nothing to replay."""

from dataclasses import dataclass

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64 finalizer on Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _key(*words: int) -> int:
    h = 0
    for word in words:
        h = _mix(((h + 0x9E3779B97F4A7C15) & _MASK_64) ^ (word & _MASK_64))
    return h


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of range(size), evaluated at one point in constant memory.

    A Feistel network on the next even power of two, walked until it lands inside the range (at most four times
    as large, so fewer than four steps on average).
    """

    size: int
    key: int

    def __call__(self, index: int) -> int:
        """Image of ``index``; IndexError outside range(size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside range({self.size})")
        half_bits = max(1, ((self.size - 1).bit_length() + 1) // 2)
        half_mask = (1 << half_bits) - 1
        while True:
            left, right = index >> half_bits, index & half_mask
            for number in range(_ROUNDS):
                left, right = right, left ^ (_key(self.key, number, right) & half_mask)
            index = (left << half_bits) | right
            if index < self.size:
                return index


def row_at(data_seed: int, num_rows: int, sample_index: int) -> int:
    """Row shown as the given global sample: each epoch is a fresh permutation of all rows."""
    epoch, place = divmod(sample_index, num_rows)
    return Permutation(num_rows, _key(data_seed, epoch))(place)
