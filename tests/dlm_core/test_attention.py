"""Attention under every mask by every backend against sums over listed keys; the cache; what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlm_core import masks
from dlm_core.models.attention import AttentionMask, able_backends, plan_attention
from tests.support import attention, naive_attention

ROUNDING = 1e-10  # dozens of terms of order 1 in float64, summed in another order
NUM_ROWS, SEQ_LEN, HEAD_DIM = 2, 6, 5
SEED = 2**63 + 11  # beyond int64: seeds are words
# Row 1 has a document of one token, one that comes back, and ids that are no counts.
DOCS = [[0, 0, 0, 1, 1, 2], [7, 7, -1, 40, 7, 7]]
HEADS = [(3, 3), (6, 2), (3, 1)]

ANNEALED = {"ratio": 0.4, "noise_seed": SEED, "step": 3}
# The fields of a mask on a row of 6, or of 6 + 6, and what it is entry by entry.
FAMILIES = {
    "full": ({}, [[True] * 6] * 6),
    "causal": ({}, attention.causal(6)),
    "annealed": (ANNEALED, attention.annealed(6, 0.4, noise_seed=SEED, step=3)),
    "block_causal": ({"block_size": 2}, attention.block_causal(6, 2)),
    "block_diffusion": ({"block_size": 2}, attention.block_diffusion(6, 2)),
}
CASES = [
    ("full", "sdpa"),
    ("full", "dense"),
    ("causal", "sdpa"),
    ("causal", "dense"),
    ("annealed", "dense"),
    ("block_causal", "dense"),
    ("block_diffusion", "structured"),
    ("block_diffusion", "dense"),
]
IN_DOCUMENTS = [(family, backend) for family, backend in CASES if backend != "sdpa"]
FIRST_QUERIES = [
    (family, backend, num_queries, has_docs)
    for family, backend in CASES
    for num_queries in ((6, 12) if backend == "structured" else (1, 4, 6, 7, 12))
    for has_docs in (False, True)
    if num_queries <= len(FAMILIES[family][1]) and not (has_docs and backend == "sdpa")
]
each_case = pytest.mark.parametrize(("family", "backend"), CASES)


def _mask(family: str, doc_ids: Tensor | None = None) -> AttentionMask:
    return AttentionMask(family, doc_ids=doc_ids, **FAMILIES[family][0])


def _naive(family: str, docs: list[list[int]] | None = None) -> list[attention.Mask]:
    """The mask of each row, within documents if given."""
    mask = FAMILIES[family][1]
    if docs is None:
        return [mask] * NUM_ROWS
    halves = len(mask) // SEQ_LEN
    inside = [attention.same_document(row * halves) for row in docs]
    return [[[a and b for a, b in zip(*rows, strict=True)] for rows in zip(mask, same, strict=True)] for same in inside]


def _draw(num_queries: int, num_keys: int, heads: tuple[int, int] = (4, 2), seed: int = 0) -> tuple[Tensor, ...]:
    """q, k and v in float64 that want gradients."""
    draw = torch.Generator().manual_seed(seed)
    sizes = (heads[0], num_queries), (heads[1], num_keys), (heads[1], num_keys)
    return tuple(
        torch.randn(NUM_ROWS, *size, HEAD_DIM, generator=draw, dtype=torch.float64, requires_grad=True)
        for size in sizes
    )


def _assert_equal(attend, inputs: tuple[Tensor, ...], naive: list[attention.Mask], scale: float | None = None) -> None:
    """Outputs and gradients of a plan are those of the sums over listed keys."""
    out = attend(*inputs) if scale is None else attend(*inputs, scale=scale)
    expected = naive_attention.attend(*inputs, naive, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=ROUNDING)
    found, wanted = (naive_attention.gradients(y, inputs) for y in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING)


# Every mask by every backend


@each_case
def test_attention_of_each_backend_equals_sums_over_listed_keys(family, backend):
    naive = _naive(family)
    attend = plan_attention(_mask(family), NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
    length = len(naive[0])
    assert (attend.num_queries, attend.num_keys) == (length, length)
    _assert_equal(attend, _draw(length, length), naive)


@pytest.mark.parametrize(("family", "backend"), IN_DOCUMENTS)
def test_attention_in_documents_equals_sums_over_keys_of_the_own_document(family, backend):
    naive = _naive(family, DOCS)
    mask = _mask(family, torch.tensor(DOCS))
    attend = plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
    _assert_equal(attend, _draw(len(naive[0]), len(naive[0])), naive)


@pytest.mark.parametrize("heads", HEADS)
@each_case
def test_attention_of_grouped_heads_shares_keys_among_neighbours(family, backend, heads):
    naive = _naive(family)
    attend = plan_attention(_mask(family), NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
    inputs = _draw(len(naive[0]), len(naive[0]), heads)
    expected = naive_attention.attend(*inputs, naive)
    torch.testing.assert_close(attend(*inputs), expected, rtol=0, atol=ROUNDING)


@each_case
def test_attention_with_a_scale_uses_it(family, backend):
    naive = _naive(family)
    attend = plan_attention(_mask(family), NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
    _assert_equal(attend, _draw(len(naive[0]), len(naive[0]), (2, 1)), naive, scale=0.7)


@pytest.mark.parametrize(("family", "backend", "num_queries", "has_docs"), FIRST_QUERIES)
def test_attention_of_the_first_queries_is_the_first_part_of_all(family, backend, num_queries, has_docs):
    mask, length = _mask(family, torch.tensor(DOCS) if has_docs else None), len(FAMILIES[family][1])
    whole = plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
    part = plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cpu", backend=backend, num_queries=num_queries)
    q, k, v = _draw(length, length)
    expected = whole(q, k, v)[:, :, :num_queries]
    for plan in (part, whole.narrowed(num_queries)):
        assert (plan.num_queries, plan.num_keys, plan.block_mask) == (num_queries, length, None)
        torch.testing.assert_close(plan(q[:, :, :num_queries], k, v), expected, rtol=0, atol=ROUNDING)


@each_case
def test_narrowed_to_the_same_queries_is_the_plan_itself_and_further_cuts_go_on(family, backend):
    naive = _naive(family)
    whole = plan_attention(_mask(family), NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
    assert whole.narrowed(len(naive[0])) is whole
    half = whole.narrowed(SEQ_LEN)
    assert half.narrowed(SEQ_LEN) is half
    q, k, v = _draw(SEQ_LEN, len(naive[0]))
    _assert_equal(half, (q, k, v), [mask[:SEQ_LEN] for mask in naive])
    if half.backend != "structured":
        _assert_equal(half.narrowed(2), (q[:, :, :2], k, v), [mask[:2] for mask in naive])


@pytest.mark.parametrize(("family", "backend"), IN_DOCUMENTS)
def test_attention_moves_with_no_key_or_value_that_the_mask_hides(family, backend):
    naive = _naive(family, DOCS)
    attend = plan_attention(_mask(family, torch.tensor(DOCS)), NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
    q, k, v = (x.detach() for x in _draw(len(naive[0]), len(naive[0])))
    before = attend(q, k, v)
    for key in range(len(naive[0])):
        other = torch.zeros_like(k)
        other[:, :, key] = 3.0
        moved = (attend(q, k + other, v + other) != before).flatten(3).any(dim=3).all(dim=1)
        assert moved.tolist() == [[row[key] for row in mask] for mask in naive]


# Keys of the past

PASTS = [
    ("full", None),
    ("causal", None),
    *(("block_causal", size) for size in (1, 2, 3)),
]


@pytest.mark.parametrize(("num_past", "seq_len"), [(1, 1), (1, 3), (3, 3), (4, 2), (7, 1), (0, 4)])
@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize(("family", "block_size"), PASTS)
def test_attention_after_a_past_is_the_last_part_of_the_whole_row(family, block_size, backend, num_past, seq_len):
    length = num_past + seq_len
    whole = {
        "full": lambda: [[True] * length] * length,
        "causal": lambda: attention.causal(length),
        "block_causal": lambda: attention.block_causal(length, block_size),
    }[family]()
    mask = AttentionMask(family, block_size=block_size)
    attend = plan_attention(mask, NUM_ROWS, seq_len, device="cpu", backend=backend, num_past=num_past)
    q, k, v = _draw(seq_len, length)
    expected = naive_attention.attend(q, k, v, [whole[num_past:]] * NUM_ROWS)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=0, atol=ROUNDING)
    first = plan_attention(mask, NUM_ROWS, seq_len, device="cpu", backend=backend, num_past=num_past, num_queries=1)
    torch.testing.assert_close(first(q[:, :, :1], k, v), expected[:, :, :1], rtol=0, atol=ROUNDING)


@given(block_size=st.integers(1, 5), num_past=st.integers(0, 12), seq_len=st.integers(1, 7))
def test_block_causal_needs_no_table_only_where_it_hides_nothing(block_size, num_past, seq_len):
    whole = attention.block_causal(num_past + seq_len, block_size)
    hides_nothing = all(all(row) for row in whole[num_past:])
    mask = AttentionMask("block_causal", block_size=block_size)
    assert ("sdpa" in able_backends(mask, seq_len, num_past, torch.device("cpu"))) == hides_nothing


# Which backend


@pytest.mark.parametrize(
    ("mask", "seq_len", "num_past", "cpu", "cuda"),
    [
        (AttentionMask(), 6, 0, ("sdpa", "dense"), ("sdpa", "flex", "dense")),
        (AttentionMask(), 6, 3, ("sdpa", "dense"), ("sdpa", "dense")),
        (AttentionMask("causal"), 6, 0, ("sdpa", "dense"), ("sdpa", "flex", "dense")),
        (AttentionMask("causal"), 6, 3, ("dense",), ("dense",)),
        (AttentionMask("causal"), 1, 3, ("sdpa", "dense"), ("sdpa", "dense")),
        (AttentionMask("annealed", **ANNEALED), 6, 0, ("dense",), ("dense",)),
        (AttentionMask("annealed", **ANNEALED), 1, 0, ("dense",), ("dense",)),
        (AttentionMask("block_causal", block_size=2), 6, 0, ("dense",), ("flex", "dense")),
        (AttentionMask("block_causal", block_size=2), 2, 4, ("sdpa", "dense"), ("sdpa", "dense")),
        (
            AttentionMask("block_diffusion", block_size=2),
            6,
            0,
            ("structured", "dense"),
            ("flex", "structured", "dense"),
        ),
        (
            AttentionMask("block_diffusion", block_size=1),
            1,
            0,
            ("structured", "dense"),
            ("flex", "structured", "dense"),
        ),
        (AttentionMask(doc_ids=torch.tensor(DOCS)), 6, 0, ("dense",), ("flex", "dense")),
        (AttentionMask("causal", doc_ids=torch.tensor(DOCS)), 6, 0, ("dense",), ("flex", "dense")),
        (AttentionMask("causal", doc_ids=torch.tensor([[1], [2]])), 1, 0, ("dense",), ("flex", "dense")),
    ],
)
def test_able_backends_are_those_that_can_do_the_mask_best_first(mask, seq_len, num_past, cpu, cuda):
    assert able_backends(mask, seq_len, num_past, torch.device("cpu")) == cpu
    assert able_backends(mask, seq_len, num_past, torch.device("cuda", 0)) == cuda
    plan = plan_attention(mask, NUM_ROWS, seq_len, device="cpu", num_past=num_past)
    assert plan.backend == cpu[0]
    for backend in cpu:
        assert (
            plan_attention(mask, NUM_ROWS, seq_len, device="cpu", num_past=num_past, backend=backend).backend == backend
        )


@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.bfloat16), (64, torch.float64)])
def test_heads_without_a_flex_kernel_take_the_next_backend(head_dim, dtype):
    cuda, mask = torch.device("cuda"), AttentionMask("block_diffusion", block_size=2)
    assert able_backends(mask, 6, 0, cuda, 16, torch.bfloat16) == ("flex", "structured", "dense")
    assert able_backends(mask, 6, 0, cuda, head_dim, dtype) == ("structured", "dense")
    with pytest.raises(ValueError, match=rf"with num_past 0 and heads of {head_dim} {dtype}, on meta, it can be auto"):
        plan_attention(mask, 1, 6, device="meta", backend="flex", head_dim=head_dim, dtype=dtype)


def test_plan_of_the_noisy_half_is_made_once():
    plan = plan_attention(AttentionMask("block_diffusion", block_size=2), NUM_ROWS, SEQ_LEN, device="cpu")
    assert plan.noisy_half.num_queries == SEQ_LEN
    assert plan.noisy_half is plan.noisy_half


@pytest.mark.parametrize(
    ("num_queries", "backend"), [(1, "dense"), (6, "structured"), (7, "dense"), (12, "structured")]
)
def test_auto_leaves_the_stripes_for_a_number_of_queries_that_they_lack(num_queries, backend):
    mask = AttentionMask("block_diffusion", block_size=2)
    assert plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cpu", num_queries=num_queries).backend == backend


@pytest.mark.parametrize("backend", ["structured", "dense"])
def test_tables_are_held_once_unless_documents_differ(backend):
    for doc_ids, num_tables in ((None, 1), (torch.tensor(DOCS), NUM_ROWS)):
        mask = AttentionMask("block_diffusion", block_size=2, doc_ids=doc_ids)
        plan = plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cpu", backend=backend)
        assert {table.shape[0] for table in plan.tables} == {num_tables}


@pytest.mark.parametrize(
    ("family", "backend", "has_docs"), [(*case, False) for case in CASES] + [(*case, True) for case in IN_DOCUMENTS]
)
def test_plan_lies_on_the_device_asked_for_wherever_the_documents_are(family, backend, has_docs):
    mask = _mask(family, torch.tensor(DOCS) if has_docs else None)
    plan = plan_attention(mask, NUM_ROWS, SEQ_LEN, device="meta", backend=backend)
    assert plan.device.type == "meta"
    assert [table.device.type for table in plan.tables] == ["meta"] * {"sdpa": 0, "dense": 1, "structured": 3}[backend]


# The mask


@pytest.mark.parametrize("family", FAMILIES)
def test_predicate_of_a_family_equals_naive_definition(family):
    length = len(FAMILIES[family][1])
    for docs in (None, DOCS):
        predicate = _mask(family, None if docs is None else torch.tensor(docs)).predicate(SEQ_LEN)
        assert masks.dense_mask(predicate, NUM_ROWS, length).tolist() == _naive(family, docs)


def test_mask_with_documents_can_be_compared_and_hashed():
    first, second = (AttentionMask(doc_ids=torch.tensor(DOCS)) for _ in range(2))
    assert first != second
    assert len({first, second, first}) == 2


# What is refused


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"family": "sliding"}, 'mask family is "sliding"; it must be one of full, causal, annealed, block_causal'),
        ({"family": "block_causal"}, 'block_size is None; mask family "block_causal" needs it'),
        ({"family": "block_diffusion"}, 'block_size is None; mask family "block_diffusion" needs it'),
        ({"family": "full", "block_size": 4}, 'block_size is 4, which mask family "full" ignores; leave it out'),
        ({"family": "causal", "block_size": 4}, 'block_size is 4, which mask family "causal" ignores'),
        ({"family": "annealed", **ANNEALED, "block_size": 4}, 'block_size is 4, which mask family "annealed" ignores'),
        *(
            ({"family": "annealed", **ANNEALED, name: None}, f'{name} is None; mask family "annealed" needs it')
            for name in ANNEALED
        ),
        *(
            ({"family": family, **FAMILIES[family][0], name: 0}, f'{name} is 0, which mask family "{family}" ignores')
            for family in FAMILIES
            for name in ANNEALED
            if family != "annealed"
        ),
    ],
)
def test_mask_with_a_field_missing_or_ignored_names_it(fields, named):
    with pytest.raises(ValueError, match=named):
        AttentionMask(**fields)


BLOCKS = AttentionMask("block_diffusion", block_size=2)


@pytest.mark.parametrize(
    ("mask", "sizes", "settings", "named"),
    [
        (AttentionMask(), (0, 6), {}, "num_rows is 0; it must be at least 1"),
        (AttentionMask(), (2, 0), {}, "seq_len is 0; it must be at least 1"),
        (AttentionMask(), (2, 6), {"num_past": -1}, "num_past is -1; it must be at least 0"),
        (BLOCKS, (2, 5), {}, "block_size is 2; it must divide the row of 5"),
        (AttentionMask("block_causal", block_size=0), (2, 6), {}, "block_size is 0; it must be at least 1"),
        (AttentionMask("annealed", ratio=1.5, noise_seed=0, step=0), (2, 6), {}, "ratio is 1.5"),
        (AttentionMask(doc_ids=torch.tensor(DOCS)), (3, 6), {}, r"doc_ids are \[2, 6\]; the batch is \[3, 6\]"),
        (AttentionMask(doc_ids=torch.tensor(DOCS)), (2, 12), {}, r"doc_ids are \[2, 6\]; the batch is \[2, 12\]"),
        (BLOCKS, (2, 6), {"num_past": 4}, 'num_past is 4 for mask family "block_diffusion"; it goes with full, causal'),
        (AttentionMask("annealed", **ANNEALED), (2, 6), {"num_past": 1}, 'num_past is 1 for mask family "annealed"'),
        (
            AttentionMask(doc_ids=torch.tensor(DOCS)),
            (2, 6),
            {"num_past": 4},
            r"doc_ids are \[2, 6\]; the batch is \[2, 6\] behind 4 keys, which have documents too",
        ),
        (BLOCKS, (2, 6), {"num_queries": 0}, "num_queries is 0; it must lie in 1..12"),
        (BLOCKS, (2, 6), {"num_queries": 13}, "num_queries is 13; it must lie in 1..12"),
        (AttentionMask(), (2, 6), {"num_queries": 7, "num_past": 3}, "num_queries is 7; it must lie in 1..6"),
        (
            BLOCKS,
            (2, 6),
            {"num_queries": 4, "backend": "structured"},
            'num_queries is 4; backend "structured" has whole halves of 6; "dense" has any number',
        ),
        (
            BLOCKS,
            (2, 6),
            {"backend": "sdpa"},
            'backend is "sdpa"; for mask family "block_diffusion" without doc_ids, with num_past 0 and heads of '
            "16 torch.float32, on cpu, it can be auto, structured, dense",
        ),
        (AttentionMask(), (2, 6), {"backend": "flex"}, "on cpu, it can be auto, sdpa, dense"),
        (AttentionMask(), (2, 6), {"backend": "structured"}, 'backend is "structured"; for mask family "full" without'),
        (
            AttentionMask("causal", doc_ids=torch.tensor(DOCS)),
            (2, 6),
            {"backend": "sdpa"},
            'backend is "sdpa"; for mask family "causal" with doc_ids, .* can be auto, dense',
        ),
        (
            AttentionMask("causal"),
            (2, 6),
            {"backend": "sdpa", "num_past": 2},
            "with num_past 2 and heads of 16 torch.float32, on cpu, it can be auto",
        ),
    ],
)
def test_plan_that_cannot_be_says_what_is_wrong(mask, sizes, settings, named):
    with pytest.raises(ValueError, match=named):
        plan_attention(mask, *sizes, device="cpu", **settings)


def test_narrowed_to_what_the_plan_lacks_is_refused():
    half = plan_attention(BLOCKS, 2, 6, device="cpu", num_queries=6)
    for num_queries in (0, 7):
        with pytest.raises(ValueError, match=rf"num_queries is {num_queries}; it must lie in 1\.\.6"):
            half.narrowed(num_queries)
    with pytest.raises(ValueError, match='num_queries is 3; backend "structured" has whole halves of 6'):
        half.narrowed(3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("q", "k", "v", "named"),
    [
        ((3, 4, 6), (2, 2, 8), (2, 2, 8), r"q has 3 row\(s\) of 6; attention was planned for 2 of 6"),
        ((2, 4, 5), (2, 2, 8), (2, 2, 8), r"q has 2 row\(s\) of 5; attention was planned for 2 of 6"),
        ((2, 4, 6), (2, 2, 6), (2, 2, 8), r"k has 2 row\(s\) of 6; attention was planned for 2 of 8"),
        ((2, 4, 6), (1, 2, 8), (2, 2, 8), r"k has 1 row\(s\) of 8; attention was planned for 2 of 8"),
        ((2, 4, 6), (2, 2, 8), (2, 2, 9), r"v has 2 row\(s\) of 9; attention was planned for 2 of 8"),
        ((2, 4, 6), (2, 3, 8), (2, 3, 8), "q, k and v have 4, 3 and 3 heads"),
        ((2, 4, 6), (2, 2, 8), (2, 4, 8), "q, k and v have 4, 2 and 4 heads"),
        ((2, 2, 6), (2, 4, 8), (2, 4, 8), "q, k and v have 2, 4 and 4 heads"),
    ],
)
def test_attention_of_other_sizes_than_planned_names_them(q, k, v, named):
    attend = plan_attention(AttentionMask(), 2, 6, device="cpu", num_past=2)
    with pytest.raises(ValueError, match=named):
        attend(*(torch.zeros(*shape, HEAD_DIM) for shape in (q, k, v)))
