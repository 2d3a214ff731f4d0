"""Estimators of the likelihood of rows: their noise, what they leave alone, what they must not depend on."""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dlm_core.likelihood import (
    RowEstimate,
    Scoring,
    any_order_bound,
    block_bound,
    block_chain_nll,
    continuous_bound,
    discrete_bound,
    exact_count_bound,
    left_to_right_nll,
    ordered_nll,
)
from dlm_core.noise import Stream
from dlm_core.schedules import ClippedSchedule
from tests.support import reference
from tests.support.block_world import (
    EMPTY,
    HOLED,
    INNER,
    LENGTH,
    MASK,
    MASKED_PROMPT,
    PROMPTED,
    ROWS,
    WHOLE,
    BlockView,
    Recorder,
    Row,
    TableDenoiser,
    V,
    block_nll,
    cut,
    id_of_last_uniform,
    masked_sum,
    ordered_sum,
    scoring,
)

RTOL = 1e-10  # a few hundred float64 roundings
ORDER_RTOL = 1e-12  # a mean over draws is summed in another order where there are other rows
FLOAT32_RTOL = 1e-6  # a handful of float32 roundings
SIGMAS = 5.0  # a fair draw leaves this many standard errors once in two million
CLIPPED = ClippedSchedule(0.1, 0.9)  # all three terms of the bound are there
LATE = 0.25

Denoise = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def wrong() -> TableDenoiser:
    return TableDenoiser(num_real=V, length=LENGTH, seed=1)


def _continuous(denoise: Denoise, s: Scoring) -> RowEstimate:
    return continuous_bound(denoise, s, CLIPPED, t_min=LATE, num_draws=5, num_real_tokens=V)


def _discrete(denoise: Denoise, s: Scoring) -> RowEstimate:
    return discrete_bound(denoise, s, CLIPPED, num_timesteps=3, num_draws=5, num_real_tokens=V)


def _exact_count(denoise: Denoise, s: Scoring) -> RowEstimate:
    return exact_count_bound(denoise, s, num_draws=6)


def _any_order(denoise: Denoise, s: Scoring) -> RowEstimate:
    return any_order_bound(denoise, s, num_orders=3)


def _right_to_left(denoise: Denoise, s: Scoring) -> RowEstimate:
    return ordered_nll(denoise, s, s.scored.flip(1).cumsum(dim=1).flip(1) - 1)


def _blocks(denoise: Denoise, s: Scoring) -> RowEstimate:
    return block_bound(denoise, s, 2, num_draws=3)


def _block_chain(denoise: Denoise, s: Scoring) -> RowEstimate:
    return block_chain_nll(denoise, s, 2)


ALL = {
    "continuous": _continuous,
    "discrete": _discrete,
    "exact_count": _exact_count,
    "blocks": _blocks,
    "any_order": _any_order,
    "left_to_right": left_to_right_nll,
    "right_to_left": _right_to_left,
    "block_chain": _block_chain,
}

of_all = pytest.mark.parametrize("name", ALL)


def _denoiser(name: str, table: TableDenoiser) -> Denoise:
    return BlockView(table, 2, MASK) if name in ("blocks", "block_chain") else table


def _same(one: RowEstimate, other: RowEstimate) -> None:
    torch.testing.assert_close(one.nats, other.nats, rtol=ORDER_RTOL, atol=0)
    torch.testing.assert_close(one.mc_se, other.mc_se, rtol=ORDER_RTOL, atol=0)


def _rows(estimate: RowEstimate, rows: torch.Tensor | slice) -> RowEstimate:
    return replace(estimate, nats=estimate.nats[rows], mc_se=estimate.mc_se[rows])


def _scoring_of(s: Scoring, rows: torch.Tensor) -> Scoring:
    return replace(s, x0=s.x0[rows], scored=s.scored[rows], sample_ids=s.sample_ids[rows])


# The same sums by loops over the addressed noise


def _row_losses(wrong: TableDenoiser, rows, is_masked, weights) -> list[float]:
    return [
        weight * masked_sum(wrong.nll, row, [place for place in row.places if hit[place]], MASK)
        for row, hit, weight in zip(rows, is_masked, weights, strict=True)
    ]


def _bernoulli(s: Scoring, probs: list[float], step: int) -> list[list[bool]]:
    return reference.noise_positions(
        [[p] for p in probs], s.sample_ids.tolist(), LENGTH, noise_seed=s.noise_seed, step=step, stream=Stream.MASK
    )


def _subsets(s: Scoring, counts: list[list[int]], step: int) -> list[list[bool]]:
    return reference.exact_count_positions(
        s.scored.tolist(), counts, s.sample_ids.tolist(), noise_seed=s.noise_seed, step=step, stream=Stream.EXACT_MASK
    )


def _uniforms(s: Scoring, num_draws: int, stream: Stream, group: int = 0) -> list[list[float]]:
    """One uniform a draw and row, each in the draw's stratum."""
    addresses = [reference.hash_words(s.noise_seed, stream, sample) for sample in s.sample_ids.tolist()]
    return [
        [(draw + reference.uniform(address, group, draw)) / num_draws for address in addresses]
        for draw in range(num_draws)
    ]


def _expect_draws(estimate: RowEstimate, *groups: list[list[float]]) -> None:
    """Losses of every draw and row: their means, and errors from neighbours, the first and the last pair twice.

    Of several groups the means and the squares of the errors add.
    """
    nats, squares = [], []
    for losses in groups:
        by_row = list(zip(*losses, strict=True))
        steps = [[(b - a) ** 2 for a, b in itertools.pairwise(row)] for row in by_row]
        nats.append([statistics.mean(row) for row in by_row])
        squares.append([math.fsum([*row, row[0], row[-1]]) / (2 * len(losses) ** 2) for row in steps])
    errors = [math.sqrt(math.fsum(of_row)) for of_row in zip(*squares, strict=True)]
    assert estimate.nats.tolist() == pytest.approx([math.fsum(of_row) for of_row in zip(*nats, strict=True)], rel=RTOL)
    assert estimate.mc_se.tolist() == pytest.approx(errors, rel=RTOL, abs=RTOL)


@pytest.mark.parametrize("name", ["continuous", "discrete"])
def test_time_bounds_equal_naive_loop_over_the_addressed_noise(wrong, name):
    rows, num_draws, losses = ROWS * 2, 5, []
    s = scoring(rows)
    for draw, u in enumerate(_uniforms(s, num_draws, Stream.ROW_STRATUM)):
        if name == "continuous":
            probs = [0.1 + 0.8 * (LATE + (1 - LATE) * v) for v in u]
            weights = [(1 - LATE) * 0.8 / p for p in probs]
            first = 0.1 + 0.8 * LATE
        else:
            probs = [0.1 + 0.8 * (math.floor(3 * v) + 1) / 3 for v in u]
            weights = [0.8 / p for p in probs]
            first = 0.1
        diffusion = _row_losses(wrong, rows, _bernoulli(s, probs, draw), weights)
        starts = _bernoulli(s, [first] * len(rows), num_draws + draw)
        reconstruction = _row_losses(wrong, rows, starts, [1.0] * len(rows))
        prior = [len(row.places) * 0.1 * math.log(V) for row in rows]
        losses.append([math.fsum(terms) for terms in zip(diffusion, reconstruction, prior, strict=True)])
    _expect_draws(ALL[name](wrong, s), losses)


def test_exact_count_bound_equals_naive_loop_over_the_addressed_noise(wrong):
    rows, losses = [WHOLE, PROMPTED, HOLED] * 3, []
    s = scoring(rows)
    for draw, u in enumerate(_uniforms(s, 6, Stream.ROW_COUNT)):
        counts = [1 + math.floor(v * len(row.places)) for v, row in zip(u, rows, strict=True)]
        weights = [len(row.places) / count for row, count in zip(rows, counts, strict=True)]
        losses.append(_row_losses(wrong, rows, _subsets(s, [[count] for count in counts], draw), weights))
    _expect_draws(_exact_count(wrong, s), losses)


def test_block_bound_equals_naive_loop_over_the_addressed_noise(wrong):
    rows, num_draws, losses = ROWS * 2, 3, [[], []]
    s = scoring(rows)
    u = [_uniforms(s, num_draws, Stream.ROW_COUNT, block) for block in range(2)]
    parts = [[cut(row, 0, 2), cut(row, 2, 4)] for row in rows]
    for draw in range(num_draws):
        counts = [
            [min(len(part.places), 1 + math.floor(u[b][draw][i] * len(part.places))) for b, part in enumerate(of_row)]
            for i, of_row in enumerate(parts)
        ]
        subsets = _subsets(s, counts, draw)
        for b in range(2):
            losses[b].append([])
            for i, is_masked in enumerate(subsets):
                part = parts[i][b]
                subset = [place for place in part.places if is_masked[place]]
                seen = block_nll(wrong.nll, part, 2 * b, 2 * b + 2, MASK)
                weight = len(part.places) / max(counts[i][b], 1)
                losses[b][-1].append(weight * masked_sum(seen, part, subset, MASK))
    _expect_draws(_blocks(BlockView(wrong, 2, MASK), s), *losses)


def test_any_order_bound_equals_naive_loop_over_the_addressed_noise(wrong):
    s, losses = scoring(ROWS), []
    for row, sample in zip(ROWS, s.sample_ids.tolist(), strict=True):
        losses.append([])
        for order in range(3):
            address = reference.hash_words(s.noise_seed, Stream.ORDER, order, sample)
            hashes = {place: reference.as_signed(reference.hash_words(address, place)) for place in row.places}
            losses[-1].append(ordered_sum(wrong.nll, row, sorted(row.places, key=hashes.__getitem__), MASK))
    estimate = _any_order(wrong, s)
    errors = [statistics.stdev(row) / math.sqrt(3) for row in losses]
    assert estimate.nats.tolist() == pytest.approx([statistics.mean(row) for row in losses], rel=RTOL)
    assert estimate.mc_se.tolist() == pytest.approx(errors, rel=RTOL, abs=RTOL)


@pytest.mark.parametrize(("name", "stream"), [("discrete", Stream.ROW_STRATUM), ("blocks", Stream.ROW_COUNT)])
def test_a_uniform_that_rounds_to_one_takes_the_last_step_or_count(wrong, name, stream):
    num_draws, group = (5, 0) if name == "discrete" else (3, 1)
    s = scoring([WHOLE])
    s = replace(s, sample_ids=torch.tensor([id_of_last_uniform(s.noise_seed, stream, group, num_draws - 1)]))
    assert _uniforms(s, num_draws, stream, group)[-1] == [1.0]
    recorder = Recorder(_denoiser(name, wrong))
    assert ALL[name](recorder, s).nats.isfinite().all()
    if name == "blocks":
        assert recorder.rows[-1, 2:].tolist() == [MASK, MASK]


# What an estimate does not depend on


@of_all
@pytest.mark.parametrize("batch_rows", [1, 5])
def test_row_estimates_in_batches_of_any_size_are_the_same(wrong, name, batch_rows):
    recorder = Recorder(_denoiser(name, wrong))
    estimate = ALL[name](recorder, scoring(ROWS, batch_rows=batch_rows))
    _same(estimate, ALL[name](_denoiser(name, wrong), scoring(ROWS)))
    assert max(len(xt) for xt, _ in recorder.calls) == batch_rows


@of_all
def test_row_estimates_in_another_order_or_company_are_the_same(wrong, name):
    denoise, s = _denoiser(name, wrong), scoring(ROWS * 2)
    estimate = ALL[name](denoise, s)
    order = torch.tensor([5, 0, 13, 3, 8, 11])
    _same(ALL[name](denoise, _scoring_of(s, order)), _rows(estimate, order))
    for place in range(len(ROWS)):
        alone = torch.tensor([place])
        _same(ALL[name](denoise, _scoring_of(s, alone)), _rows(estimate, alone))


@pytest.mark.parametrize("name", ["continuous", "discrete", "exact_count", "blocks", "any_order"])
def test_drawn_estimates_depend_on_seed_and_sample_ids(wrong, name):
    def nats(first_id: int = 100, noise_seed: int = 11) -> torch.Tensor:
        s = scoring([WHOLE] * 8, first_id=first_id, noise_seed=noise_seed)
        return ALL[name](_denoiser(name, wrong), s).nats

    base = nats()
    assert torch.equal(base, nats())
    assert not torch.isclose(base, nats(noise_seed=12)).all()
    assert not torch.isclose(base, nats(first_id=300)).all()
    assert len(set(base.tolist())) > 2


@of_all
def test_row_estimates_of_float32_logits_are_float64_sums(wrong, name):
    denoise = _denoiser(name, wrong)
    narrow = ALL[name](lambda *args: denoise(*args).float(), scoring(ROWS))
    wide = ALL[name](denoise, scoring(ROWS))
    assert narrow.nats.dtype == narrow.mc_se.dtype == wide.nats.dtype == wide.mc_se.dtype == torch.float64
    torch.testing.assert_close(narrow.nats, wide.nats, rtol=FLOAT32_RTOL, atol=FLOAT32_RTOL)
    assert not torch.equal(narrow.nats, wide.nats)


# What is masked and what is asked for


@of_all
def test_only_scored_tokens_are_masked_and_only_masked_ones_asked_for(wrong, name):
    rows = [Row((0, *x, 2), INNER.scored) for x in itertools.product(range(V), repeat=2)]
    recorder = Recorder(_denoiser(name, wrong))
    ALL[name](recorder, scoring(rows, batch_rows=7))
    masked = set()
    for xt, select in recorder.calls:
        assert (xt[:, 0] == 0).all()
        assert (xt[:, 3] == 2).all()
        assert (xt.flatten()[select] == MASK).all()
        assert len(select) == len(set(select.tolist())) > 0
        masked.update(select.remainder(LENGTH).tolist())
    assert masked == {1, 2}


@of_all
def test_rows_without_scored_tokens_have_no_loss_and_no_noise(wrong, name):
    recorder = Recorder(_denoiser(name, wrong))
    for rows in ([EMPTY], [EMPTY] * 5):
        estimate = ALL[name](recorder, scoring(rows))
        assert estimate.nats.tolist() == estimate.mc_se.tolist() == [0.0] * len(rows)
    assert not recorder.calls
    mixed = ALL[name](_denoiser(name, wrong), scoring([EMPTY, WHOLE, EMPTY]))
    assert mixed.nats[[0, 2]].tolist() == mixed.mc_se[[0, 2]].tolist() == [0.0, 0.0]
    assert float(mixed.nats[1]) > 0


@of_all
def test_jobs_are_sent_only_where_something_is_asked(wrong, name):
    recorder = Recorder(_denoiser(name, wrong))
    ALL[name](recorder, scoring(ROWS * 2, batch_rows=5))
    for xt, select in recorder.calls:
        assert sorted(set((select // LENGTH).tolist())) == list(range(len(xt)))
    assert (recorder.rows == MASK).any()


def test_exact_count_bound_enumerates_all_rows_in_one_batch_of_jobs(wrong):
    recorder = Recorder(wrong)
    exact_count_bound(recorder, scoring(ROWS, batch_rows=20), num_draws=15)
    num_masks = sum(2 ** len(row.places) - 1 for row in ROWS)
    assert [len(xt) for xt, _ in recorder.calls] == [20] * (num_masks // 20) + [num_masks % 20]


def test_time_bounds_send_the_jobs_of_all_draws_in_one_batch(wrong):
    for estimate, num_terms in ((_continuous, 2), (_discrete, 2)):
        recorder = Recorder(wrong)
        estimate(recorder, scoring(ROWS))
        assert len(recorder.calls) == num_terms


@of_all
def test_mask_tokens_of_the_prompt_stay_and_are_not_scored(wrong, name):
    recorder = Recorder(_denoiser(name, wrong))
    ALL[name](recorder, scoring([MASKED_PROMPT] * 3))
    assert (recorder.rows[:, 0] == MASK).all()
    assert all((select % LENGTH % 2 == 1).all() for _, select in recorder.calls)


def test_scored_lengths_are_those_of_the_rows():
    assert scoring(ROWS).lengths.tolist() == [len(row.places) for row in ROWS]


# Counts of the exact-count bound


def _counts(length: int, num_rows: int, num_draws: int) -> list[list[int]]:
    """The sorted numbers of masked tokens of every row; a row's unscored first token tells which row it is."""
    x0 = torch.zeros(num_rows, length + 1, dtype=torch.int64)
    x0[:, 0] = torch.arange(num_rows)
    scored = torch.ones_like(x0, dtype=torch.bool)
    scored[:, 0] = False
    recorder = Recorder(lambda xt, select: torch.zeros(len(select), num_rows + 1))
    exact_count_bound(recorder, Scoring(x0, scored, num_rows, torch.arange(num_rows)), num_draws=num_draws)
    counts: list[list[int]] = [[] for _ in range(num_rows)]
    for xt in recorder.rows:
        counts[int(xt[0])].append(int((xt == num_rows).sum()))
    return [sorted(of_row) for of_row in counts]


@pytest.mark.parametrize("num_draws", [5, 8, 12, 24])
def test_exact_count_bound_draws_one_count_a_stratum(num_draws):
    length = 8
    for counts in _counts(length, 12, num_draws):
        assert len(counts) == num_draws
        for draw, count in enumerate(counts):
            assert draw * length // num_draws + 1 <= count <= -(-(draw + 1) * length // num_draws)
        for k in range(1, length + 1):
            # a count's share of the draws is cut by at most two strata
            assert abs(counts.count(k) - num_draws / length) < 2
            assert num_draws % length or counts.count(k) == num_draws // length


def test_exact_count_bound_draws_within_a_stratum_apart_from_other_strata_and_rows():
    num_draws, width, num_rows = 8, 4, 200
    offsets = [
        [count - 1 - draw * width for draw, count in enumerate(of_row)]
        for of_row in _counts(num_draws * width, num_rows, num_draws)
    ]
    neighbours = [pair for of_row in offsets for pair in zip(of_row[::2], of_row[1::2], strict=True)]
    rows = [pair for even, odd in zip(offsets[::2], offsets[1::2], strict=True) for pair in zip(even, odd, strict=True)]
    for pairs in (neighbours, rows):
        cells = [pairs.count((a, b)) for a in range(width) for b in range(width)]
        statistic = reference.chi_square(cells, [len(pairs) / width**2] * width**2)
        assert statistic < reference.chi_square_bound(width**2 - 1, z=SIGMAS)


def test_scoring_left_at_its_defaults_has_seed_0_and_batches_of_64(wrong):
    s, recorder = scoring([WHOLE] * 70, noise_seed=0), Recorder(wrong)
    _same(_any_order(recorder, Scoring(s.x0, s.scored, MASK, s.sample_ids)), _any_order(wrong, s))
    assert max(len(xt) for xt, _ in recorder.calls) == 64
