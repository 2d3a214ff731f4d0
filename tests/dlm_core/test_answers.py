"""Bounds of answers in rows of any lengths: what a naive loop says, whatever the batch, the order and the company."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import pytest
import torch

from dlm_core.answer_masks import bound_of_losses, draw_masks
from dlm_core.answers import AnswerEstimate, Answers, answer_bound
from dlm_core.cross_entropy import LossError

MASK, NUM_MASKS = 99, 24


class Asked(NamedTuple):
    """One row: its tokens, where its answer is, and what addresses its masks."""

    tokens: tuple[int, ...]
    start: int
    size: int
    mask_id: int


ROWS = [
    Asked((1, 2, 3, 4), 1, 3, 0),
    Asked((5,), 0, 1, 1),
    Asked(tuple(range(10, 30)), 8, 9, 2),
    Asked(tuple(range(12, 20)), 0, 8, 2),
    Asked((7, 7, 7, 8, 9), 2, 2, 3),
    Asked((4, 3), 1, 0, 4),
    Asked(tuple(range(30, 60)), 21, 9, 5),
]


def answers(rows: Sequence[Asked], **changes: int) -> Answers:
    columns = [torch.tensor(column) for column in zip(*((len(r.tokens), *r[1:]) for r in rows), strict=True)]
    tokens = torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64)
    return Answers(tokens, *columns, MASK, **changes)


def loss_of(row: Sequence[int], place: int, token: int) -> float:
    """Any number that depends on the whole row, the place and the token."""
    return 1 + (4 * crc32(repr((token, place, list(row))).encode()) + 2 * crc32(repr((token, place)).encode())) / 2**32


class Naive:
    """Such losses for a batch; it sees to it that nothing is asked of padding and what is asked is masked."""

    def __init__(self, asked: Answers) -> None:
        self.asked, self.widths = asked, []

    def __call__(self, xt: torch.Tensor, rows: torch.Tensor, select: torch.Tensor, targets: torch.Tensor):
        self.widths.append(tuple(xt.shape))
        found = []
        for at, target in zip(select.tolist(), targets.tolist(), strict=True):
            copy, place = divmod(at, xt.shape[1])
            length = int(self.asked.lengths[rows[copy]])
            assert place < length
            assert int(xt[copy, place]) == MASK
            assert xt[copy, length:].tolist() == [0] * (xt.shape[1] - length)
            found.append(loss_of(xt[copy, :length].tolist(), place, target))
        return torch.tensor(found, dtype=torch.float64)


def bounds(rows: Sequence[Asked], num_masks: int = NUM_MASKS, batch_rows: int = 64, **changes: int) -> AnswerEstimate:
    asked = answers(rows, **changes)
    return answer_bound(Naive(asked), asked, num_masks=num_masks, batch_rows=batch_rows)


def naive_losses(row: Asked, subset: Sequence[int]) -> list[float]:
    """Of the answer's tokens, 0 where shown; ``subset`` counts from the answer's start."""
    xt = [MASK if place - row.start in subset else token for place, token in enumerate(row.tokens)]
    return [loss_of(xt, row.start + i, row.tokens[row.start + i]) if i in subset else 0.0 for i in range(row.size)]


@pytest.mark.parametrize("row", [row for row in ROWS if row.size <= 3], ids=lambda row: str(row.size))
def test_short_answers_take_every_subset(row: Asked) -> None:
    found = bounds([row])
    wanted = 0.0
    for k in range(1, row.size + 1):
        subsets = list(itertools.combinations(range(row.size), k))
        wanted += math.fsum(math.fsum(naive_losses(row, subset)) for subset in subsets) / len(subsets) / k
    assert float(found.nats[0]) == pytest.approx(wanted, rel=1e-12)
    assert float(found.mc_se[0]) == 0.0
    assert int(found.num_passes[0]) == 2**row.size - 1


def test_long_answers_are_bounded_by_the_subsets_that_are_drawn_for_them() -> None:
    found = bounds(ROWS)
    for number, row in enumerate(ROWS):
        if row.size < 5:
            continue
        masks = draw_masks(row.size, NUM_MASKS, torch.tensor([row.mask_id]), 0)
        subsets = [[i for i, held in enumerate(subset) if held] for subset in masks.is_masked[0].tolist()]
        losses = torch.tensor([[naive_losses(row, subset) for subset in subsets]], dtype=torch.float64)
        bound, deviations = bound_of_losses(masks, losses)
        assert float(found.nats[number]) == pytest.approx(float(bound), rel=1e-12)
        assert float(found.mc_se[number]) == pytest.approx(float(deviations.norm()), rel=1e-9)
        assert int(found.num_passes[number]) == 23


@pytest.mark.parametrize("batch_rows", [1, 7, 32])
def test_estimates_depend_on_their_row_and_mask_id_alone(batch_rows: int) -> None:
    whole = bounds(ROWS)
    reverse = bounds(ROWS[::-1], batch_rows=batch_rows)
    alone = [bounds([row], batch_rows=batch_rows) for row in ROWS]
    for name in ("nats", "mc_se", "num_passes"):
        column = getattr(whole, name).tolist()
        assert getattr(reverse, name).tolist()[::-1] == pytest.approx(column, rel=1e-12)
        assert [getattr(one, name).item() for one in alone] == pytest.approx(column, rel=1e-12)


def test_other_seeds_and_ids_draw_other_masks() -> None:
    row = ROWS[2]
    numbers = {float(bounds([r], noise_seed=seed).nats[0]) for r in (row, row._replace(mask_id=9)) for seed in (0, 1)}
    assert len(numbers) == 4


def test_batches_are_full_and_hold_rows_of_like_length() -> None:
    rows = [Asked(tuple(range(10, 10 + length)), 0, 1, length) for length in (9, 2, 30, 3, 8, 31)]
    asked = answers(rows)
    naive = Naive(asked)
    answer_bound(naive, asked, num_masks=1, batch_rows=2)
    assert naive.widths == [(2, 3), (2, 9), (2, 31)]


def test_an_answer_without_tokens_costs_nothing() -> None:
    found = bounds([ROWS[5]])
    assert [float(column[0]) for column in (found.nats, found.mc_se, found.num_passes)] == [
        0.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_refused_and_tell_their_row(loss: float) -> None:
    def cross_entropy(xt: torch.Tensor, rows: torch.Tensor, select: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.where(rows[select // xt.shape[1]] == 2, loss, 1.0)

    with pytest.raises(LossError, match=f"a token of row 2 costs {loss} nats") as refused:
        answer_bound(cross_entropy, answers(ROWS), num_masks=8)
    assert refused.value.row == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "there is no row"),
        ([Asked((1, 2), 1, 2, 0)], "the answer of row 0 has 2 tokens from 1 on, but the row has 2"),
        ([ROWS[0], Asked((1, 2), -1, 1, 0)], "the answer of row 1 has 1 tokens from -1 on"),
        ([Asked((1, MASK), 0, 2, 0)], "an answer holds the mask token 99; its likelihood is 0"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(rows: list[Asked], words: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        answers(rows) if rows else Answers(none, none, none, none, none, MASK)


@pytest.mark.usefixtures("unchecked")
def test_columns_that_do_not_fit_are_refused() -> None:
    good = answers(ROWS[:2])
    with pytest.raises(ValueError, match="starts has 1 entries for 2 rows; wanted one each"):
        _with(good, starts=good.starts[:1])
    with pytest.raises(ValueError, match="the lengths add up to 5 for 4 tokens"):
        _with(good, tokens=good.tokens[:4])


def _with(asked: Answers, **changes: torch.Tensor) -> Answers:
    columns = {name: getattr(asked, name) for name in ("tokens", "lengths", "starts", "sizes", "mask_ids")} | changes
    return Answers(**columns, mask_token_id=MASK)


def test_a_mask_token_of_the_context_stays_and_is_not_scored() -> None:
    row = Asked((MASK, 2, 3, MASK), 1, 2, 0)
    assert float(bounds([row]).nats[0]) > 0


def test_less_than_one_row_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_rows is 0; it must be at least 1"):
        bounds(ROWS, batch_rows=0)


class NaiveBlocks(Naive):
    """A model of blocks: what is masked in a block is told from the clean blocks before it and the block itself."""

    def __call__(self, xt: torch.Tensor, rows: torch.Tensor, select: torch.Tensor, targets: torch.Tensor):
        size, found = self.asked.block_size, []
        for at, target in zip(select.tolist(), targets.tolist(), strict=True):
            copy, place = divmod(at, xt.shape[1])
            first = place // size * size
            clean = self.asked.padded(rows[copy : copy + 1])[0, :first]
            seen = [*clean.tolist(), *xt[copy, first : min(first + size, int(self.asked.lengths[rows[copy]]))].tolist()]
            found.append(loss_of(seen, place, target))
        return torch.tensor(found, dtype=torch.float64)


def block_bounds(rows: Sequence[Asked], block_size: int, num_masks: int = NUM_MASKS) -> AnswerEstimate:
    asked = answers(rows, block_size=block_size)
    return answer_bound(NaiveBlocks(asked), asked, num_masks=num_masks)


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_blocks_of_few_tokens_take_every_subset_of_each(block_size: int) -> None:
    """The chain over blocks: each given those before it, whatever is masked elsewhere."""
    found = block_bounds(ROWS, block_size)
    for number, row in enumerate(ROWS):
        expected = 0.0
        for first in range(0, len(row.tokens), block_size):
            places = [i for i in range(first, first + block_size) if row.start <= i < row.start + row.size]
            for k in range(1, len(places) + 1):
                for subset in itertools.combinations(places, k):
                    seen = [MASK if i in subset else token for i, token in enumerate(row.tokens[: first + block_size])]
                    losses = sum(loss_of(seen, i, row.tokens[i]) for i in subset)
                    expected += losses / (k * math.comb(len(places), k))
        assert float(found.nats[number]) == pytest.approx(expected, rel=1e-12)
        most = max(
            (min(row.start + row.size, first + block_size) - max(row.start, first))
            for first in range(0, len(row.tokens), block_size)
        )
        assert int(found.num_passes[number]) == 2 ** max(0, most) - 1
    assert found.mc_se.tolist() == [0.0] * len(ROWS)


def test_parts_in_blocks_of_many_tokens_are_masked_each_by_itself() -> None:
    """Ten tokens from the second block on: 6 there, 4 in the third, which take every subset of 15."""
    row = Asked(tuple(range(10, 30)), 10, 10, 2)
    found = block_bounds([row], 8)
    masks = draw_masks(6, NUM_MASKS, torch.tensor([2]), 0, torch.tensor([1]))
    losses = torch.zeros(masks.is_masked.shape, dtype=torch.float64)
    for copy, subset in enumerate(masks.is_masked[0]):
        places = [10 + i for i in subset.nonzero().flatten().tolist()]
        seen = [MASK if i in places else token for i, token in enumerate(row.tokens[:16])]
        for i in places:
            losses[0, copy, i - 10] = loss_of(seen, i, row.tokens[i])
    bound, deviations = bound_of_losses(masks, losses)
    last = block_bounds([row._replace(start=16, size=4)], 8)
    assert float(found.nats[0]) == pytest.approx(float(bound[0] + last.nats[0]), rel=1e-12)
    assert float(found.mc_se[0]) == pytest.approx(float(deviations.norm()), rel=1e-12)
    assert int(found.num_passes[0]) == masks.is_masked.shape[1]
    assert float(last.mc_se[0]) == 0.0


def test_blocks_of_one_row_draw_masks_of_their_own() -> None:
    one, other = (draw_masks(20, NUM_MASKS, torch.tensor([2]), 0, part).is_masked for part in (0, 1))
    assert not torch.equal(one, other)


def test_blocks_of_negative_size_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size is -1; it must be at least 1, or 0"):
        answers(ROWS, block_size=-1)
