"""Faults planted in the bound of answers: what would bias it, or make its error a lie."""

from tests.support.mutants.mutant import Planted

ANSWERS: tuple[Planted, ...] = (
    Planted(
        "answer_masks",
        "each stratum fitted by its own losses too",
        "return of_strata.sum(dim=1, keepdim=True) - of_strata",
        "return of_strata.sum(dim=1, keepdim=True) + 0 * of_strata",
    ),
    Planted(
        "answer_masks",
        "the fit is not added back",
        "(off.sum(dim=2) + fit.mean_over(n)).sum(dim=1)",
        "off.sum(dim=2).sum(dim=1)",
    ),
    Planted(
        "answer_masks",
        "the fit over k up to n",
        "edges, k = _edges(n, self.token.shape[1]), torch.arange(1, n, dtype=torch.float64)",
        "edges, k = _edges(n, self.token.shape[1]), torch.arange(2, n + 1, dtype=torch.float64)",
    ),
    Planted(
        "answer_masks",
        "no weight of k",
        "weight = width / (2 * k)",
        "weight = width / (2 * n)",
    ),
    Planted(
        "answer_masks",
        "strata as wide as each other, weighed as if not",
        "k = 1 + (edges[stratum] + width * ",
        "k = 1 + ((n - 1) / num_strata * stratum + (n - 1) / num_strata * ",
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
        "hash_words(address, Stream.ANSWER_SUBSET, stratum, half)",
        "hash_words(address, Stream.ANSWER_SUBSET, stratum, 0 * half)",
    ),
    Planted(
        "answer_masks",
        "masks that ignore the id",
        "address = hash_words(noise_seed, mask_ids, part)",
        "address = hash_words(noise_seed, 0 * mask_ids, part)",
    ),
    Planted(
        "answer_masks",
        "the variance of one draw of two",
        "return bound, off[..., 0] - off[..., 1]",
        "return bound, (off[..., 0] - off[..., 1]) / 2**0.5",
    ),
    Planted("answer_masks", "no mirror image", "torch.where(half == 0, u, 1 - u)", "u"),
    Planted("answers", "blocks that share their masks", "a.noise_seed, part.block)", "a.noise_seed, 0)"),
    Planted(
        "answers", "the part of the last block alone", "nats.index_add_(0, part.row, bound)", "nats[part.row] = bound"
    ),
    Planted(
        "answers",
        "a part that begins with its block",
        "start = torch.maximum(block * size, self.starts[row])",
        "start = block * size",
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
        "is_masked[row, number].nonzero",
        "is_masked[row, 0 * number].nonzero",
    ),
    Planted(
        "answers",
        "losses where the last row's belong",
        "found[row[copy], number[copy], place] = losses",
        "found[row[copy].max(), number[copy], place] = losses",
    ),
    Planted(
        "answers",
        "rows in the order of their place, not their length",
        "rows = rows[a.lengths[rows].argsort(stable=True)]",
        "rows = rows",
    ),
    Planted("answer_masks", "strata by rounding alone", "if 2 * num_strata >= 3 * (n - 1):", "if n < 1:"),
    Planted("intervals", "degrees as if all deviated alike", "return min(found, float(", "return max(found, float("),
    Planted(
        "answers",
        "a loss that is no number blamed on another row",
        "check_losses(losses, rows[row][copy])",
        "check_losses(losses, copy)",
    ),
    Planted("intervals", "the normal law for every number of degrees", "if dof > 1e6:", "if dof > 1:"),
)
