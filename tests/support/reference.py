"""Naive references: independent of dlm_core, plain Python, loops allowed, cleverness not.

A sequence is a tuple of ids.  In the toy world the real tokens are 0..V-1 and the mask token is V.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15

Tokens = tuple[int, ...]


def splitmix_finalizer(word: int) -> int:
    """The output function of SplitMix64 on an unsigned 64-bit word."""
    z = word & (WORD - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (WORD - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (WORD - 1)
    return z ^ (z >> 31)


def hash_words(*words: int) -> int:
    """The chained hash as an unsigned 64-bit integer; words of any size and sign are taken modulo 2**64."""
    h = 0
    for word in words:
        h = splitmix_finalizer(((h + GOLDEN) & (WORD - 1)) ^ (word & (WORD - 1)))
    return h


def as_signed(word: int) -> int:
    """Read an unsigned 64-bit word as two's complement."""
    return word - WORD if word & (1 << 63) else word


def mask_tokens(
    x0: Sequence[Sequence[int]],
    mask_prob: Sequence[float],
    sample_ids: Sequence[int],
    *,
    noise_seed: int,
    step: int,
    stream: int,
    mask_token_id: int,
) -> list[list[int]]:
    """Mask a token where the top 24 bits of the hash of its address lie below floor(mask_prob * 2**24)."""
    xt = []
    for row, p, sample_id in zip(x0, mask_prob, sample_ids, strict=True):
        address = hash_words(noise_seed, step, stream, sample_id)
        below = [hash_words(address, place) >> 40 < math.floor(p * 2**24) for place in range(len(row))]
        xt.append([mask_token_id if hit else token for token, hit in zip(row, below, strict=True)])
    return xt


class Joint:
    """A random distribution over all sequences of length L of V real tokens, kept as a table."""

    def __init__(self, num_real: int, length: int, seed: int, sharpness: float = 1.0) -> None:
        draw = random.Random(seed)
        self.num_real, self.length, self.mask_token_id = num_real, length, num_real
        weights = {x: draw.expovariate(1.0) ** sharpness for x in self.sequences()}
        total = math.fsum(weights.values())
        self.prob: dict[Tokens, float] = {x: w / total for x, w in weights.items()}

    def sequences(self) -> Iterator[Tokens]:
        """Every sequence without a mask."""
        return itertools.product(range(self.num_real), repeat=self.length)

    def noised_sequences(self) -> Iterator[Tokens]:
        """Every sequence with any number of masks."""
        return itertools.product(range(self.num_real + 1), repeat=self.length)

    def conditional(self, xt: Tokens, place: int) -> list[float]:
        """p(x0 at place = v | the unmasked tokens of xt), for every real v."""
        mass = [0.0] * self.num_real
        for x, p in self.prob.items():
            if all(b in (a, self.mask_token_id) for a, b in zip(x, xt, strict=True)):
                mass[x[place]] += p
        total = math.fsum(mass)
        return [m / total for m in mass]

    def logits(self, xt: Tokens, place: int) -> list[float]:
        """Log of the exact conditional, with the mask token as a last column that is impossible."""
        return [math.log(p) if p > 0 else -math.inf for p in self.conditional(xt, place)] + [-math.inf]

    def product_of_marginals(self) -> dict[Tokens, float]:
        """What one parallel step from all masks draws from."""
        blank = (self.mask_token_id,) * self.length
        marginals = [self.conditional(blank, place) for place in range(self.length)]
        return {x: math.prod(m[v] for m, v in zip(marginals, x, strict=True)) for x in self.sequences()}

    def ancestral_distribution(self, num_steps: int) -> dict[Tokens, float]:
        """Exact law of ancestral sampling from all masks: num_steps equal steps of the linear schedule."""
        law = {(self.mask_token_id,) * self.length: 1.0}
        for step in range(num_steps):
            t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
            reveal = 1.0 if step + 1 == num_steps else (t - s) / t
            after: dict[Tokens, float] = {}
            for xt, p_xt in law.items():
                choices = []
                for place, token in enumerate(xt):
                    if token != self.mask_token_id:
                        choices.append([(token, 1.0)])
                        continue
                    shown = [(v, reveal * p) for v, p in enumerate(self.conditional(xt, place))]
                    choices.append([*shown, (self.mask_token_id, 1 - reveal)])
                for picks in itertools.product(*choices):
                    p = p_xt * math.prod(q for _, q in picks)
                    if p > 0:
                        xs = tuple(v for v, _ in picks)
                        after[xs] = after.get(xs, 0.0) + p
            law = after
        return law


def all_masks(length: int) -> list[tuple[bool, ...]]:
    """Every subset of positions, True where masked."""
    return list(itertools.product((False, True), repeat=length))


def apply_mask(x: Tokens, is_masked: Sequence[bool], mask_token_id: int) -> Tokens:
    """The sequence with the chosen positions masked."""
    return tuple(mask_token_id if hit else v for v, hit in zip(x, is_masked, strict=True))


def cross_entropy(logits: Sequence[float], target: int) -> float:
    """-log softmax(logits)[target]."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(z - top) for z in logits)) - logits[target]


def inverse_cdf(probs: Sequence[float], u: float) -> int:
    """The first id whose cumulative probability exceeds u."""
    total = 0.0
    for index, p in enumerate(probs):
        total += p
        if u < total:
            return index
    return max(index for index, p in enumerate(probs) if p > 0)


def chi_square(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's statistic."""
    return math.fsum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def chi_square_bound(degrees: int, z: float = 4.0) -> float:
    """What a chi-square variable stays below but for a probability of 3e-5 (Wilson-Hilferty, at z sigmas)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
