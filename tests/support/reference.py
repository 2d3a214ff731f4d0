"""Naive references: independent of dlm_core, plain Python, loops allowed, cleverness not.

A sequence is a tuple of ids.  In the toy world the real tokens are 0..V-1 and the mask token is V.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

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


def uniform(*words: int) -> float:
    """The top 53 bits of the hash, as a fraction of one."""
    return (hash_words(*words) >> 11) / 2**53


def event(p: float, *words: int) -> bool:
    """Whether the top 24 bits of the hash lie below floor(p * 2**24)."""
    return hash_words(*words) >> 40 < math.floor(p * 2**24)


def integer(high: int, *words: int) -> int:
    """The hash without its last bit, modulo ``high``."""
    return (hash_words(*words) >> 1) % high


def normal(*words: int) -> float:
    """Box and Muller's cosine branch of two uniforms, at the address and 0 and at the address and 1."""
    return math.sqrt(-2 * math.log(1 - uniform(*words, 0))) * math.cos(2 * math.pi * uniform(*words, 1))


def permutation(size: int, *words: int) -> list[int]:
    """The places in the order of their hashes, read as signed."""
    return sorted(range(size), key=lambda place: as_signed(hash_words(*words, place)))


def stratified_uniform(
    noise_seed: int, step: int, num_places: int, *, stream: int, offset_stream: int, shared_offset: bool
) -> list[float]:
    """(stratum + offset) / num_places, where the k-th place of the permutation has the stratum k."""
    order = permutation(num_places, noise_seed, stream, step)
    address = (noise_seed, offset_stream, step, stream)
    offsets = [uniform(*address) if shared_offset else uniform(*address, place) for place in range(num_places)]
    return [(order.index(place) + offsets[place]) / num_places for place in range(num_places)]


def noise_positions(
    noise_prob: Sequence[Sequence[float]],
    sample_ids: Sequence[int],
    length: int,
    *,
    noise_seed: int,
    step: int,
    stream: int,
) -> list[list[bool]]:
    """Which tokens are noised, where a row of K probabilities cuts it into K blocks."""
    chosen = []
    for probs, sample_id in zip(noise_prob, sample_ids, strict=True):
        address = hash_words(noise_seed, stream, step, sample_id)
        chosen.append([event(probs[place * len(probs) // length], address, place) for place in range(length)])
    return chosen


def replacements(
    vocab_size: int,
    mask_token_id: int | None,
    mask_share: float,
    sample_ids: Sequence[int],
    length: int,
    *,
    noise_seed: int,
    step: int,
    stream: int,
) -> list[list[int]]:
    """What a noised token becomes: the mask with ``mask_share``, else one of the real tokens, in the order of ids."""
    real = [token for token in range(vocab_size) if token != mask_token_id]
    rows = []
    for sample_id in sample_ids:
        row, base = [], hash_words(noise_seed, stream, step, sample_id)
        for place in range(length):
            token = real[integer(len(real), base, place, 0)]
            is_mask = mask_token_id is not None and event(mask_share, base, place, 1)
            row.append(mask_token_id if is_mask else token)
        rows.append(row)
    return rows


def exact_count_positions(
    maskable: Sequence[Sequence[bool]],
    num_masked: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    *,
    noise_seed: int,
    step: int,
    stream: int,
) -> list[list[bool]]:
    """In each block the maskable places of the smallest hashes, as many as asked for."""
    masked = []
    for row, counts, sample_id in zip(maskable, num_masked, sample_ids, strict=True):
        address, size = hash_words(noise_seed, stream, step, sample_id), len(row) // len(counts)
        chosen: list[int] = []
        for block, count in enumerate(counts):
            places = [place for place in range(block * size, (block + 1) * size) if row[place]]
            chosen += sorted(places, key=lambda place: as_signed(hash_words(address, place)))[:count]
        masked.append([place in chosen for place in range(len(row))])
    return masked


def truncated_binomial(size: int, p: Fraction, low: Fraction, high: Fraction) -> dict[int, Fraction]:
    """Law of a binomial count given that count / size lies in [low, high]; no condition if size is 0."""
    law = {
        count: math.comb(size, count) * p**count * (1 - p) ** (size - count)
        for count in range(size + 1)
        if size == 0 or low <= Fraction(count, size) <= high
    }
    total = sum(law.values())
    return {count: mass / total for count, mass in law.items()}


def within_counts(
    maskable: Sequence[Sequence[bool]],
    prob: Sequence[Sequence[float]],
    sample_ids: Sequence[int],
    bounds: tuple[Fraction, Fraction],
    *,
    noise_seed: int,
    step: int,
    stream: int,
) -> list[list[int]]:
    """A count of every block: the first whose cumulative probability, given the bounds, exceeds the uniform number."""
    counts = []
    for row, probs, sample_id in zip(maskable, prob, sample_ids, strict=True):
        address, size = hash_words(noise_seed, stream, step, sample_id), len(row) // len(probs)
        counts.append([])
        for block, p in enumerate(probs):
            law = truncated_binomial(sum(row[block * size : (block + 1) * size]), Fraction(p), *bounds)
            totals = zip(law, itertools.accumulate(law.values()), strict=True)
            counts[-1].append(next(count for count, total in totals if total > uniform(address, block)))
    return counts


def resampled_mask_law(
    maskable: Sequence[bool], p: Fraction, low: Fraction, high: Fraction
) -> dict[tuple[bool, ...], Fraction]:
    """Law of independent masks that are all drawn again until their share of the maskable places is in [low, high]."""
    law = {}
    for pattern in itertools.product((False, True), repeat=len(maskable)):
        if any(hit and not may for hit, may in zip(pattern, maskable, strict=True)):
            continue
        if sum(maskable) == 0 or low <= Fraction(sum(pattern), sum(maskable)) <= high:
            law[pattern] = p ** sum(pattern) * (1 - p) ** (sum(maskable) - sum(pattern))
    total = sum(law.values())
    return {pattern: mass / total for pattern, mass in law.items()}


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


def law_statistic(outcomes: Iterable[Hashable], law: Mapping[Any, float | Fraction]) -> float:
    """Pearson's statistic of outcomes against their probabilities; infinite if an impossible one came up."""
    counts = Counter(outcomes)
    possible = {outcome: float(p) for outcome, p in law.items() if p > 0}
    if not counts.keys() <= possible.keys():
        return math.inf
    return chi_square([counts[x] for x in possible], [counts.total() * p for p in possible.values()])


def chi_square_bound(degrees: int, z: float = 5.0) -> float:
    """What a chi-square variable stays below but for a probability of 3e-7 (Wilson-Hilferty, at z sigmas)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
