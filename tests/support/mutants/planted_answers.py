"""Faults planted in the bound of answers: what would bias it, or make its error a lie."""

from tests.support.mutants.mutant import Planted

ANSWERS: tuple[Planted, ...] = (
    Planted(
        "answer_masks",
        "each half fitted by itself",
        "zip(halves, fits[::-1], strict=True)",
        "zip(halves, fits, strict=True)",
    ),
    Planted("answer_masks", "the fit is not added back", "+ off.sum(dim=1) + fit.total(n) / 2", "+ off.sum(dim=1)"),
    Planted(
        "answer_masks",
        "the fit over k up to n",
        "torch.arange(1, n, dtype=torch.float64) / n).sqrt().sum()",
        "torch.arange(1, n + 1, dtype=torch.float64) / n).sqrt().sum()",
    ),
    Planted(
        "answer_masks",
        "no weight of k",
        "weight = 1 / (2 * num_strata * q[k - 1] * k)",
        "weight = 1 / (2 * num_strata * q[k - 1] * n)",
    ),
    Planted(
        "answer_masks",
        "k drawn evenly, weighed as if not",
        "u, right=True).clamp(max=n - 2)",
        "u, right=True).clamp(max=n - 2) * 0 + torch.floor(u * (n - 1)).long()",
    ),
    Planted(
        "answer_masks",
        "all tokens weigh as one subset",
        "torch.full_like(weight[:, :1], 1 / n)",
        "torch.full_like(weight[:, :1], 1.0)",
    ),
    Planted(
        "answer_masks",
        "both of a stratum alike",
        "address = (mask_ids[:, None], stratum, half)",
        "address = (mask_ids[:, None], stratum, 0 * half)",
    ),
    Planted(
        "answer_masks",
        "masks that ignore the id",
        "address = (mask_ids[:, None], stratum, half)",
        "address = (0 * mask_ids[:, None], stratum, half)",
    ),
    Planted(
        "answer_masks",
        "the smaller of two variances",
        "return bound, (too_much + too_little) / 2",
        "return bound, too_little * 0.7",
    ),
    Planted(
        "answer_masks",
        "the larger of two variances, twice",
        "return bound, (too_much + too_little) / 2",
        "return bound, too_much * 1.5",
    ),
    Planted(
        "answer_masks",
        "subsets weighed as if their sizes were even",
        "weight = [1 / (len(subset) * math.comb(n, len(subset)))",
        "weight = [1 / (n * math.comb(n, len(subset)))",
    ),
    Planted(
        "answers", "the context's place in place of the answer's", "+ a.starts[rows[row]][copy] + place", "+ place"
    ),
    Planted(
        "answers",
        "the mask of another copy",
        "masks.is_masked[row, subset].nonzero",
        "masks.is_masked[row, 0 * subset].nonzero",
    ),
    Planted(
        "answers",
        "losses where the last row's belong",
        "found[row[copy], subset[copy], place] = losses",
        "found[row[copy].max(), subset[copy], place] = losses",
    ),
    Planted(
        "answers",
        "rows in the order of their place, not their length",
        "rows = rows[a.lengths[rows].argsort(stable=True)]",
        "rows = rows",
    ),
    Planted("intervals", "the normal law for every number of degrees", "if dof > 1e6:", "if dof > 1:"),
)
