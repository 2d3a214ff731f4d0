"""Evaluation of a corpus: counts to mask, the bound with its two errors, against enumeration and naive formulas."""

import itertools
import math
import statistics

import pytest
import torch

from dlm_core.corpus_bound import (
    BoundEstimate,
    estimate_bound,
    exact_count_weight,
    stratified_counts,
    unigram_entropy,
)
from dlm_core.corruption import exact_count_positions, mask_exact_count
from tests.support import reference
from tests.support.toy_world import ExactDenoiser

RTOL = 1e-12  # a few hundred float64 roundings
SIGMAS = 5.0  # a fair draw leaves this many standard errors once in two million
T_SIGMAS = 6.0  # and this many of those that 60 draws themselves estimate, once in seven million


def _exact_count_losses(joint, denoise, x0, counts, replicate) -> torch.Tensor:
    """One draw of the exact-count estimator for each row of x0, in nats."""
    num_rows, length = x0.shape
    xt = mask_exact_count(
        x0,
        counts[:, None],
        torch.arange(num_rows),
        noise_seed=5,
        step=replicate,
        mask_token_id=joint.mask_token_id,
        maskable=torch.ones_like(x0, dtype=torch.bool),
    )
    select = (xt == joint.mask_token_id).flatten().nonzero().squeeze(1)
    log_probs = denoise(xt, select).log_softmax(dim=-1).gather(1, x0.flatten()[select][:, None]).squeeze(1)
    weight = exact_count_weight(torch.full((num_rows,), length), counts)
    return torch.zeros(num_rows, dtype=torch.float64).index_add_(
        0, select // length, -weight[select // length] * log_probs
    )


# The exact-count estimator


def test_exact_count_weight_is_length_over_count_in_float64():
    weight = exact_count_weight(torch.tensor([1, 4, 4, 7]), torch.tensor([1, 1, 4, 3]))
    assert weight.dtype == torch.float64
    assert weight.tolist() == [1.0, 4.0, 1.0, 7 / 3]


def test_exact_count_weight_of_empty_row_is_zero():
    assert exact_count_weight(torch.tensor([0, 4]), torch.tensor([0, 2])).tolist() == [0.0, 2.0]


def test_estimate_bound_over_drawn_masks_with_exact_conditionals_estimates_nll():
    joint = reference.Joint(num_real=3, length=4, seed=4, sharpness=2.0)
    denoise = ExactDenoiser(joint)
    x0 = torch.tensor(list(joint.sequences()))
    lengths = torch.full((len(x0),), joint.length)
    losses = [
        _exact_count_losses(joint, denoise, x0, stratified_counts(5, replicate, lengths), replicate)
        for replicate in range(60)
    ]
    estimate = estimate_bound(torch.stack(losses), lengths)
    nll = -math.fsum(map(math.log, joint.prob.values())) / (len(x0) * joint.length)
    assert 0 < estimate.mc_se < 0.02 * nll
    assert abs(estimate.nelbo - nll) < T_SIGMAS * estimate.mc_se


# Counts


@pytest.mark.parametrize("multiple", [1, 3])
def test_stratified_counts_of_rows_in_multiples_of_length_are_exactly_uniform(multiple):
    length = 8
    for replicate in range(20):
        counts = stratified_counts(0, replicate, torch.full((multiple * length,), length))
        assert torch.bincount(counts, minlength=length + 1).tolist() == [0] + [multiple] * length


def test_stratified_counts_of_other_numbers_of_rows_are_uniform_up_to_one():
    for num_rows, replicate in itertools.product((1, 5, 13), range(20)):
        counts = stratified_counts(0, replicate, torch.full((num_rows,), 8))
        occurrences = torch.bincount(counts, minlength=9)[1:]
        assert int(occurrences.sum()) == num_rows
        assert int(occurrences.max() - occurrences.min()) <= 1


def test_stratified_counts_of_mixed_lengths_are_uniform_on_each_row():
    lengths = torch.tensor([1, 2, 5, 0, 9])
    num_replicates = 150
    counts = torch.stack([stratified_counts(3, replicate, lengths) for replicate in range(num_replicates)])
    assert (counts[:, 3] == 0).all()
    assert (counts[:, 0] == 1).all()
    for row in (1, 2, 4):
        length = int(lengths[row])
        occurrences = torch.bincount(counts[:, row], minlength=length + 1).tolist()
        assert occurrences[0] == 0
        assert len(occurrences) == length + 1
        statistic = reference.chi_square(occurrences[1:], [num_replicates / length] * length)
        assert statistic < reference.chi_square_bound(length - 1, z=SIGMAS)


def test_stratified_counts_depend_on_seed_and_replicate_alone():
    lengths = torch.full((32,), 32)
    counts = stratified_counts(1, 0, lengths)
    assert torch.equal(counts, stratified_counts(1, 0, lengths))
    assert not torch.equal(counts, stratified_counts(1, 1, lengths))
    assert not torch.equal(counts, stratified_counts(2, 0, lengths))


# The bound and its errors


def test_estimate_bound_of_random_losses_equals_naive_formulas():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(6, 9, generator=generator, dtype=torch.float64) * 50
    tokens = torch.randint(1, 30, (9,), generator=generator)
    estimate = estimate_bound(losses, tokens)

    table, sizes = losses.tolist(), tokens.tolist()
    total = sum(sizes)
    replicates = [math.fsum(row) / total for row in table]
    nelbo = statistics.mean(replicates)
    doc_means = [statistics.mean(row[doc] for row in table) for doc in range(9)]
    squares = [(mean - nelbo * size) ** 2 for mean, size in zip(doc_means, sizes, strict=True)]
    assert estimate.nelbo == pytest.approx(nelbo, rel=RTOL)
    assert estimate.mc_se == pytest.approx(statistics.stdev(replicates) / math.sqrt(6), rel=RTOL)
    assert estimate.doc_se == pytest.approx(math.sqrt(9 / 8 * math.fsum(squares)) / total, rel=RTOL)
    assert (estimate.num_tokens, estimate.num_docs, estimate.num_replicates) == (total, 9, 6)


@pytest.mark.parametrize("doc_losses", [[3.0, 5.0, 4.0, 8.0], [3.0, 8.0]])
def test_estimate_bound_of_documents_of_one_size_has_the_standard_error_of_a_mean(doc_losses):
    estimate = estimate_bound(torch.tensor([doc_losses, doc_losses]), torch.full((len(doc_losses),), 10))
    assert estimate.nelbo == pytest.approx(statistics.mean(doc_losses) / 10, rel=RTOL)
    assert estimate.mc_se == 0.0
    expected = statistics.stdev(loss / 10 for loss in doc_losses) / math.sqrt(len(doc_losses))
    assert estimate.doc_se == pytest.approx(expected, rel=RTOL)


def test_estimate_bound_of_a_single_document_has_no_spread_over_documents():
    estimate = estimate_bound(torch.tensor([[6.0], [10.0]]), torch.tensor([4]))
    assert math.isnan(estimate.doc_se)
    assert estimate.nelbo == pytest.approx(2.0, rel=RTOL)
    assert estimate.mc_se == pytest.approx(0.5, rel=RTOL)


def test_estimate_bound_of_float32_losses_sums_in_float64():
    losses = torch.full((2, 3000), 0.1)
    estimate = estimate_bound(losses, torch.ones(3000, dtype=torch.int64))
    assert estimate.nelbo == pytest.approx(float(losses[0, 0]), rel=RTOL)


@pytest.mark.parametrize(
    ("losses", "tokens", "message"),
    [
        (torch.ones(1, 3), torch.ones(3, dtype=torch.int64), "num_replicates is 1,"),
        (torch.ones(4, 3), torch.zeros(3, dtype=torch.int64), "no tokens"),
        (torch.ones(4, 0), torch.zeros(0, dtype=torch.int64), "no tokens"),
    ],
)
def test_estimate_bound_without_replicates_or_tokens_raises(losses, tokens, message):
    with pytest.raises(ValueError, match=message):
        estimate_bound(losses, tokens)


def test_bound_estimate_converts_nats_to_perplexity():
    estimate = BoundEstimate(math.log(8), 0.0, 0.0, num_tokens=100, num_docs=1, num_replicates=2)
    assert estimate.ppl_bound == pytest.approx(8.0, rel=RTOL)


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [
        ([5], 0.0),
        ([0, 7, 0], 0.0),
        ([3, 3, 3, 3], math.log(4)),
        ([1, 0, 1, 2], 1.5 * math.log(2)),
    ],
)
def test_unigram_entropy_equals_closed_form(counts, entropy):
    assert unigram_entropy(torch.tensor(counts)) == pytest.approx(entropy, rel=RTOL, abs=RTOL)


@pytest.mark.parametrize(("num_replicates", "quantile"), [(2, 12.7062), (8, 2.3646)])
def test_interval_of_few_replicates_is_student_s(num_replicates: int, quantile: float):
    estimate = BoundEstimate(3.0, 0.1, 0.0, num_tokens=10, num_docs=1, num_replicates=num_replicates)
    assert estimate.mc_interval == pytest.approx((3.0 - 0.1 * quantile, 3.0 + 0.1 * quantile), abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_intervals_of_the_fewest_replicates_hold_the_truth_19_times_in_20():
    """Rows of 128 tokens that cost the more the more of them are masked: a closed form; 2,000 estimates."""
    length, num_rows, num_replicates, num_repetitions = 128, 8, 8, 2_000
    own = torch.rand(length, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    cost = own + 3 * (torch.arange(length + 1, dtype=torch.float64)[:, None] / length) ** 2  # [count, place]
    truth = float(cost[1:].mean())
    lengths, places = torch.full((num_rows,), length), torch.ones(num_rows * num_replicates, length, dtype=torch.bool)
    estimates = []
    for repetition in range(num_repetitions):
        steps = range(repetition * num_replicates, (repetition + 1) * num_replicates)
        counts = torch.cat([stratified_counts(3, step, lengths) for step in steps])
        ids = torch.arange(len(counts)) + repetition * len(counts)
        is_masked = exact_count_positions(counts[:, None], ids, places, noise_seed=3, step=0)
        weight = exact_count_weight(torch.full_like(counts, length), counts)
        losses = (cost[counts] * is_masked).sum(dim=1) * weight
        estimates.append(estimate_bound(losses.view(num_replicates, num_rows), lengths))
    held = [low <= truth <= high for low, high in (estimate.mc_interval for estimate in estimates)]
    assert 0.93 <= statistics.mean(held) <= 0.97
    errors = [estimate.nelbo - truth for estimate in estimates]
    assert abs(statistics.mean(errors)) < SIGMAS * statistics.stdev(errors) / math.sqrt(num_repetitions)


@pytest.mark.usefixtures("unchecked")
def test_estimate_bound_of_another_number_of_documents_raises():
    with pytest.raises(ValueError, match=r"doc_tokens has the shape \(1,\) for 3 documents; wanted one each"):
        estimate_bound(torch.ones(2, 3), torch.tensor([3]))


def test_bound_estimate_beyond_float64_is_an_infinite_perplexity():
    estimate = BoundEstimate(1000.0, 0.0, 0.0, num_tokens=1, num_docs=1, num_replicates=2)
    assert estimate.ppl_bound == math.inf
