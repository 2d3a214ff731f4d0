"""Subsets of an answer's tokens: their law, and a bound without bias whose standard error can be believed."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dlm_core.answer_masks import AnswerMasks, bound_of_losses, draw_masks
from dlm_core.intervals import effective_dof, t_quantile

NUM_REPETITIONS = 2_000
COVERS = (0.93, 0.97)
"""Share of 95 % intervals that hold the truth; over 2,000 of them its own spread is 0.005."""
SIGMAS = 5.0
MAX_RATIO, MAX_RATIO_OF_FEW = 0.25, 0.5
"""Of the variance to that of subsets drawn one by one, in a world where tokens differ as much as they do in text."""


def losses_of(is_masked: torch.Tensor, sharpness: float = 1.0) -> torch.Tensor:
    """Losses that differ from token to token and, in ways of their own, with what else is masked; 0 where shown."""
    n = is_masked.shape[-1]
    generator = torch.Generator().manual_seed(n)
    own = 5 * torch.rand(n, generator=generator, dtype=torch.float64) + 1.2
    help_of = (torch.rand(n, n, generator=generator, dtype=torch.float64) - 0.2) * 2.5 / math.sqrt(n)
    helped = (~is_masked).double() @ help_of.T
    return torch.nn.functional.softplus(own - sharpness * (helped + 0.5 * (7 * helped).sin())) * is_masked


def enumerated(n: int) -> float:
    """(1 / n) sum_k mean over subsets of k of (n / k) times the sum of their losses."""
    total = 0.0
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        is_masked = torch.zeros(len(subsets), n, dtype=torch.bool)
        for place, subset in enumerate(subsets):
            is_masked[place, list(subset)] = True
        total += float(losses_of(is_masked).sum()) / len(subsets) / k
    return total


def drawn(n: int, num_masks: int, num: int = NUM_REPETITIONS, seed: int = 0) -> AnswerMasks:
    return draw_masks(n, num_masks, torch.arange(num), seed)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_as_many_masks_as_subsets_take_every_subset_once(n: int) -> None:
    masks = drawn(n, 2**n - 1, num=2)
    assert masks.num_strata == 0
    assert sorted(map(tuple, masks.is_masked[0].tolist())) == sorted(
        s for s in itertools.product((False, True), repeat=n) if any(s)
    )
    bound, deviations = bound_of_losses(masks, losses_of(masks.is_masked))
    assert bound.tolist() == pytest.approx([enumerated(n)] * 2, rel=1e-12)
    assert deviations.shape == (2, 0)
    if n > 2:
        assert drawn(n, 2**n - 2).num_strata > 0


@pytest.mark.parametrize(("n", "num_masks"), [(4, 9), (5, 16), (6, 24), (7, 64), (12, 64), (20, 64), (40, 33)])
def test_subsets_hold_all_tokens_once_and_then_as_many_as_their_strata_say(n: int, num_masks: int) -> None:
    masks = drawn(n, num_masks, num=200)
    assert masks.is_masked.shape == (200, 1 + 2 * masks.num_strata, n)
    assert 1 + 2 * masks.num_strata in (num_masks, num_masks - 1)
    assert masks.is_masked[:, 0].all()
    k = masks.is_masked[:, 1:].sum(dim=2).view(200, -1, 2)
    assert 1 <= int(k.min()) <= int(k.max()) <= n - 1
    share = masks.weight[:, 1:].view(200, -1, 2) * k
    if masks.num_strata < n - 1:
        edges = (n - 1) * (torch.arange(masks.num_strata + 1, dtype=torch.float64) / masks.num_strata) ** 1.5
        assert (k >= edges[:-1, None] - 1e-9).all()
        assert (k - 1 <= edges[1:, None] + 1e-9).all()
        torch.testing.assert_close(share, (edges.diff()[:, None] / 2).expand_as(share))
    else:
        of_k = k[0, :, 0]
        assert (k == of_k[:, None]).all()
        assert torch.equal(of_k.unique(), torch.arange(1, n))
        assert (of_k.bincount()[1:].diff() <= 0).all()  # the fewer tokens, the more strata
        torch.testing.assert_close(
            torch.zeros(n).double().index_add_(0, of_k, share[0].sum(dim=1))[1:], torch.ones(n - 1).double()
        )


@pytest.mark.parametrize("num_masks", [8, 33])
def test_counts_of_a_stratum_are_as_often_too_high_as_too_low(num_masks: int) -> None:
    """Mirror images: the two of a stratum lie around its middle, up to the rounding of either."""
    n = 40
    masks = drawn(n, num_masks, num=200)
    k = masks.is_masked[:, 1:].sum(dim=2).view(200, -1, 2)
    edges = (n - 1) * (torch.arange(masks.num_strata + 1, dtype=torch.float64) / masks.num_strata) ** 1.5
    assert ((k - 0.5).sum(dim=2) - (edges[1:] + edges[:-1])).abs().max() <= 1


def test_every_subset_of_a_size_is_as_likely() -> None:
    masks = drawn(4, 9, num=20_000)
    subsets = masks.is_masked[:, 1:].reshape(-1, 4)
    for k in (1, 2, 3):
        code = (subsets[subsets.sum(dim=1) == k] * torch.tensor([1, 2, 4, 8])).sum(dim=1)
        counts = torch.bincount(code, minlength=16)
        counts = counts[counts > 0].double()
        assert len(counts) == math.comb(4, k)
        expected = counts.sum() / len(counts)
        chi_square = float(((counts - expected).square() / expected).sum())
        dof = len(counts) - 1
        assert chi_square < dof + 6 * math.sqrt(2 * dof) + 12


@pytest.mark.parametrize(("n", "num_masks"), [(4, 3), (4, 10), (7, 8), (8, 64), (10, 32), (12, 128)])
def test_bound_has_the_mean_of_enumeration(n: int, num_masks: int) -> None:
    masks = drawn(n, num_masks)
    bound, _ = bound_of_losses(masks, losses_of(masks.is_masked))
    error = float(bound.std()) / math.sqrt(len(bound))
    assert abs(float(bound.mean()) - enumerated(n)) < SIGMAS * error


class Drawn(NamedTuple):
    """Many estimates of one bound."""

    bound: torch.Tensor
    deviations: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        """As told."""
        return self.deviations.square().sum(dim=1)

    def covered(self, truth: float, quantile: float | None = None) -> float:
        """Share of intervals that hold the truth: by Student's t of the degrees of each, or by a quantile for all."""
        quantiles = quantiles_of(self.deviations) if quantile is None else torch.tensor(quantile)
        return float(((self.bound - truth).abs() < quantiles * self.variance.sqrt()).double().mean())

    def variance_ratio(self) -> float:
        """Of what is told to what is so."""
        return float(self.variance.mean() / self.bound.var())


GRID = (1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0)


def quantiles_of(deviations: torch.Tensor) -> torch.Tensor:
    """Student's t of each row, between those of a grid: a quantile takes too long for thousands."""
    dof = [effective_dof(row) for row in deviations.tolist()]
    inverse, quantiles = ([f(d) for d in reversed(GRID)] for f in (lambda d: 1 / d, t_quantile))
    return torch.from_numpy(np.interp([1 / d for d in dof], inverse, quantiles))


def estimates(n: int, num_masks: int, num: int = NUM_REPETITIONS, sharpness: float = 1.0, seed: int = 0) -> Drawn:
    masks = drawn(n, num_masks, num, seed)
    bound, deviations = bound_of_losses(masks, losses_of(masks.is_masked, sharpness))
    return Drawn(bound, deviations)


@pytest.mark.parametrize(
    ("n", "num_masks"),
    [
        *((4, 8), (5, 8), (5, 16), (6, 24), (7, 32), (8, 32), (10, 16), (12, 16)),
        *((7, 64), (8, 64), (10, 64), (12, 64), (14, 64), (12, 128), (14, 256)),
    ],
)
def test_95_percent_intervals_hold_the_truth_19_times_in_20(n: int, num_masks: int) -> None:
    """By Student's t; of 64 masks and more by the normal law as well."""
    found, truth = estimates(n, num_masks, NUM_REPETITIONS * (3 if num_masks <= 64 else 1)), enumerated(n)
    assert COVERS[0] <= found.covered(truth) <= COVERS[1]
    if num_masks >= 64:
        assert COVERS[0] <= found.covered(truth, 1.96) <= COVERS[1]
    assert found.variance_ratio() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("n", [12, 20])
def test_so_do_those_of_losses_that_jump_from_one_count_to_the_next(n: int) -> None:
    """Where there is a stratum for each count, no count is noise."""
    masks = drawn(n, 64)
    k = masks.is_masked.sum(dim=2, keepdim=True)
    losses = (losses_of(masks.is_masked, 0.3) + 3.0 * (k >= n - 1)) * masks.is_masked
    bound, deviations = bound_of_losses(masks, losses)
    far = drawn(n, 256, num=500, seed=1)
    jump = 3.0 * (far.is_masked.sum(dim=2, keepdim=True) >= n - 1)
    truth = bound_of_losses(far, (losses_of(far.is_masked, 0.3) + jump) * far.is_masked)[0].mean()
    assert COVERS[0] <= Drawn(bound, deviations).covered(float(truth)) <= COVERS[1]


@pytest.mark.parametrize("num_masks", [8, 16, 64])
def test_so_do_those_of_answers_of_which_one_token_decides_over_all_others(num_masks: int) -> None:
    """Few strata deviate much, and how many is told by the degrees of freedom."""
    masks = drawn(12, num_masks)
    losses = (0.1 + 6.0 * masks.is_masked[..., :1]) * masks.is_masked
    truth = sum((0.1 * 12 + 6.0 * k) for k in range(1, 13)) / 12  # k / 12 of the subsets hold it
    assert COVERS[0] <= Drawn(*bound_of_losses(masks, losses)).covered(truth) <= COVERS[1]


@pytest.mark.parametrize(("n", "num_masks"), [(20, 64), (24, 64), (30, 64), (32, 64)])
def test_so_do_intervals_of_answers_that_nobody_can_enumerate(n: int, num_masks: int) -> None:
    found = estimates(n, num_masks)
    truth = float(estimates(n, 128, num=1_000, seed=1).bound.mean())
    assert COVERS[0] <= found.covered(truth) <= COVERS[1]
    assert found.variance_ratio() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("n", "num_masks"),
    [*((n, 8) for n in (6, 7, 8, 10, 14, 30, 128)), (30, 16), (40, 64), (128, 16), (128, 64)],
)
def test_standard_errors_of_few_masks_and_long_answers_are_rather_too_large(n: int, num_masks: int) -> None:
    sharpness = min(1.0, 30 / n)  # else a few shown tokens tell all of a long row, as they do in no text
    found = estimates(n, num_masks, num=500, sharpness=sharpness)
    truth = float(estimates(n, 128, num=100, sharpness=sharpness, seed=1).bound.mean())
    assert found.covered(truth) >= COVERS[0]
    assert found.variance_ratio() > 0.95


@pytest.mark.parametrize(("n", "num_masks"), [(8, 64), (12, 64), (20, 64), (30, 128)])
def test_spread_is_a_fraction_of_that_of_subsets_drawn_one_by_one(n: int, num_masks: int) -> None:
    assert spread_ratio(n, num_masks) < MAX_RATIO


@pytest.mark.parametrize(("n", "num_masks"), [(10, 8), (30, 8), (30, 16), (128, 8), (128, 16), (128, 64)])
def test_so_is_that_of_few_masks_and_of_long_answers(n: int, num_masks: int) -> None:
    assert spread_ratio(n, num_masks, min(1.0, 30 / n)) < MAX_RATIO_OF_FEW


def spread_ratio(n: int, num_masks: int, sharpness: float = 1.0) -> float:
    """Of variances, to k evenly from 1 to n, one subset each, stratified as LLaDA's code does within a batch."""
    masks = drawn(n, num_masks, num=300)
    num_masks = masks.is_masked.shape[1]
    bound, _ = bound_of_losses(masks, losses_of(masks.is_masked, sharpness))
    generator = torch.Generator().manual_seed(0)
    u = (torch.arange(num_masks) + torch.rand(300, num_masks, generator=generator, dtype=torch.float64)) / num_masks
    k = 1 + torch.floor(u * n).long().clamp(max=n - 1)
    is_masked = torch.rand(300, num_masks, n, generator=generator).argsort(-1).argsort(-1) < k[..., None]
    one_by_one = (losses_of(is_masked, sharpness).sum(dim=2) * n / k).mean(dim=1)
    return float(bound.var()) / float(one_by_one.var())


def test_losses_that_depend_on_nothing_but_the_token_have_next_to_no_variance() -> None:
    masks = drawn(12, 64, num=50)
    losses = torch.arange(1.0, 13.0, dtype=torch.float64) * masks.is_masked
    bound, deviations = bound_of_losses(masks, losses)
    assert bound.tolist() == pytest.approx([78.0] * 50, rel=0.02)
    plain = (losses.sum(dim=2) * masks.weight).sum(dim=1)
    assert float(bound.var()) < 0.02 * float(plain.var())
    assert float(deviations.square().sum(dim=1).mean()) < 0.05 * float(plain.var())


@pytest.mark.parametrize("n", [7, 20])
def test_answers_of_the_same_id_lose_the_same_tokens_and_others_other_ones(n: int) -> None:
    ids = torch.tensor([3, 8, 3])
    one, other, same = draw_masks(n, 33, ids, 5).is_masked
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(draw_masks(n, 33, ids[1:2], 5).is_masked[0], other)
    assert not torch.equal(draw_masks(n, 33, ids, 6).is_masked[0], one)


def test_common_masks_take_noise_from_the_difference_of_choices() -> None:
    """Two choices, the second a little harder: differences of shared masks are less noisy than of masks apart."""
    masks, apart = drawn(12, 64, num=500), draw_masks(12, 64, torch.arange(1000, 1500), 0)
    first, of_first = bound_of_losses(masks, losses_of(masks.is_masked))
    shared, of_shared = bound_of_losses(masks, losses_of(masks.is_masked, sharpness=0.9))
    alone, of_alone = bound_of_losses(apart, losses_of(apart.is_masked, sharpness=0.9))
    assert float((shared - first).var()) < 0.25 * float((alone - first).var())
    for difference, deviations in ((shared - first, of_shared - of_first), (alone - first, of_alone - of_first)):
        told = deviations.square().sum(dim=1).mean()
        assert float(told / difference.var()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("n", "num_masks", "words"),
    [
        (0, 8, "num_tokens is 0; an answer has at least 1"),
        (1, 0, "num_masks is 0; for an answer of 1 tokens it must be at least 1"),
        (5, 2, "num_masks is 2; for an answer of 5 tokens it must be at least 3"),
    ],
)
def test_too_few_tokens_or_masks_are_refused(n: int, num_masks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_masks(n, num_masks, torch.arange(2), 0)


@pytest.mark.parametrize(("n", "num_masks"), [(1, 1), (2, 3), (3, 3), (500, 3)])
def test_the_least_masks_give_a_number_and_an_error(n: int, num_masks: int) -> None:
    masks = drawn(n, num_masks, num=4)
    bound, deviations = bound_of_losses(masks, losses_of(masks.is_masked))
    assert bound.isfinite().all()
    assert (deviations.square().sum(dim=1) > 0).all() == (n > 2)
