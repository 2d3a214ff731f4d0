"""Rows of each policy: every token of every document in exactly one row, and what each policy promises beyond."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.packing import PADDING, PackingPolicy, RowPlan, plan_rows

POLICIES: tuple[PackingPolicy, ...] = ("concatenate", "best_fit", "document")

LENGTHS = st.lists(st.integers(0, 40), max_size=14)
BLOCKS = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda pair: (pair[0] * pair[1], pair[1]))
"""(seq_len, block_size)"""

Piece = tuple[int, int, int]
"""(length, document, offset); document is PADDING for padding."""


def rows_of(plan: RowPlan) -> list[list[Piece]]:
    """The rows of a plan, piece by piece."""
    pieces = list(zip(np.abs(plan.length).tolist(), plan.document.tolist(), plan.offset.tolist(), strict=True))
    return [pieces[a:b] for a, b in itertools.pairwise(plan.row_starts.tolist())]


@pytest.mark.parametrize("policy", POLICIES)
@given(lengths=LENGTHS, sizes=BLOCKS)
def test_every_token_stands_in_exactly_one_row(
    policy: PackingPolicy, lengths: list[int], sizes: tuple[int, int]
) -> None:
    seq_len, block_size = sizes
    plan = plan_rows(np.array(lengths, dtype=np.int64), seq_len, policy, block_size)
    rows = rows_of(plan)
    assert all(sum(length for length, *_ in row) == seq_len for row in rows)
    found = [(d, o + k) for row in rows for n, d, o in row if d != PADDING for k in range(n)]
    assert sorted(found) == [(d, k) for d, length in enumerate(lengths) for k in range(length)]
    assert ((plan.length < 0) == (plan.document == PADDING)).all()
    assert (plan.length != 0).all()
    assert plan.num_rows == len(rows)


@pytest.mark.parametrize("policy", POLICIES)
@given(lengths=LENGTHS, sizes=BLOCKS)
def test_no_block_holds_parts_of_two_documents_or_begins_with_padding_before_text(
    policy: PackingPolicy, lengths: list[int], sizes: tuple[int, int]
) -> None:
    seq_len, block_size = sizes
    for row in rows_of(plan_rows(np.array(lengths, dtype=np.int64), seq_len, policy, block_size)):
        owner = [document for length, document, _ in row for _ in range(length)]
        for start in range(0, seq_len, block_size):
            block = owner[start : start + block_size]
            assert len(set(block) - {PADDING}) <= 1
            assert block == sorted(block, key=lambda document: document == PADDING)


@given(lengths=LENGTHS, seq_len=st.integers(1, 20))
def test_concatenate_is_the_stream_cut_every_seq_len(lengths: list[int], seq_len: int) -> None:
    stream = [(d, k) for d, length in enumerate(lengths) for k in range(length)]
    rows = rows_of(plan_rows(np.array(lengths, dtype=np.int64), seq_len, "concatenate"))
    found = [[(d, o + k) for n, d, o in row if d != PADDING for k in range(n)] for row in rows]
    assert found == [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]


@pytest.mark.parametrize("policy", ["best_fit", "document"])
@given(lengths=LENGTHS, seq_len=st.integers(1, 20))
def test_a_document_that_fits_is_not_cut_and_a_longer_one_only_into_whole_rows_and_a_rest(
    policy: PackingPolicy, lengths: list[int], seq_len: int
) -> None:
    rows = rows_of(plan_rows(np.array(lengths, dtype=np.int64), seq_len, policy))
    pieces = [piece for row in rows for piece in row if piece[1] != PADDING]
    for document, length in enumerate(lengths):
        own = sorted((offset, n) for n, d, offset in pieces if d == document)
        assert own == [(o, min(seq_len, length - o)) for o in range(0, length, seq_len)]


@given(lengths=LENGTHS, seq_len=st.integers(1, 20))
def test_document_policy_puts_one_piece_into_a_row(lengths: list[int], seq_len: int) -> None:
    for row in rows_of(plan_rows(np.array(lengths, dtype=np.int64), seq_len, "document")):
        assert [document == PADDING for _, document, _ in row] in ([False], [False, True])


def naive_best_fit(sizes: list[int], seq_len: int) -> list[list[int]]:
    """Longest first, each into the row with the least room that is enough; among such the one last put there."""
    rooms: list[int] = []
    touched: list[int] = []
    rows: list[list[int]] = []
    for clock, size in enumerate(sorted(sizes, reverse=True)):
        fitting = [r for r, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(seq_len)
            touched.append(clock)
            rows.append([])
            fitting = [len(rows) - 1]
        best = min(fitting, key=lambda r: (rooms[r], -touched[r]))
        rooms[best] -= size
        touched[best] = clock
        rows[best].append(size)
    return rows


@given(lengths=st.lists(st.integers(1, 20), max_size=25))
def test_best_fit_fills_rows_as_the_naive_search_does(lengths: list[int]) -> None:
    found = rows_of(plan_rows(np.array(lengths, dtype=np.int64), 20, "best_fit"))
    filled = sorted(sorted((n for n, d, _ in row if d != PADDING), reverse=True) for row in found)
    assert filled == sorted(naive_best_fit(lengths, 20))


def test_best_fit_of_many_documents_wastes_less_than_one_in_a_thousand() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 300, size=20_000)
    plan = plan_rows(lengths, 1024, "best_fit")
    assert 1 - lengths.sum() / (plan.num_rows * 1024) < 1e-3


def test_rows_of_best_fit_begin_with_the_documents_in_order() -> None:
    rows = rows_of(plan_rows(np.array([3, 9, 2, 8, 5, 1]), 10, "best_fit"))
    firsts = [min(d for _, d, _ in row if d != PADDING) for row in rows]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_documents_give_no_rows(policy: PackingPolicy) -> None:
    for lengths in ([], [0, 0]):
        plan = plan_rows(np.array(lengths, dtype=np.int64), 8, policy)
        assert (plan.num_rows, plan.row_starts.tolist(), len(plan.length)) == (0, [0], 0)


@pytest.mark.parametrize(("seq_len", "block_size"), [(10, 4), (0, 1), (4, 0), (3, 4)])
def test_a_row_that_is_no_multiple_of_the_block_is_refused(seq_len: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"seq_len is {seq_len} and block_size {block_size}"):
        plan_rows(np.array([1]), seq_len, "concatenate", block_size)
