"""How likely one of k completions passes, from n of them."""

import math


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), the unbiased estimate of Chen et al., arXiv 2107.03374, eq. (1).

    In whole numbers up to the last division, so that nothing overflows or cancels.
    """
    if not 0 <= num_passed <= num_samples:
        raise ValueError(f"num_passed is {num_passed}; of {num_samples} samples it must lie in [0, {num_samples}]")
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k is {k}, but there are {num_samples} samples of a problem; it must lie in [1, {num_samples}]: "
            "draw more samples or lower k"
        )
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_passed, k)) / subsets
