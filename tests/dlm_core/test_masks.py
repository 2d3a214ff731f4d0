"""Who may attend to whom: against naive definitions, the drawings, FlexAttention, and what leaks through layers."""

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from dlm_core import masks
from dlm_core.masks import (
    annealed,
    block_causal,
    block_diffusion,
    both,
    causal,
    dense_mask,
    full,
    on_both_halves,
    same_document,
)
from tests.support import attention
from tests.support.attention import TinyStack

SIGMAS = 5.5  # a fair draw leaves this many standard errors once in 26 million; four in a test: 1.5e-7
ROUNDING = 1e-12  # two small layers in float64, sums in another order
NUM_ROWS, NUM_HEADS = 2, 3
SEED = 2**63 + 11  # beyond int64: seeds are words
LENGTHS = range(1, 8)
CUTS = [(seq_len, size) for seq_len in (*range(1, 13), 24) for size in range(1, seq_len + 1) if seq_len % size == 0]
# Row 1 has a document of one token, one that comes back, and ids that are no counts.
DOCS = [[0, 0, 0, 1, 1, 2], [7, 7, -1, 40, 7, 7]]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _documents(device: str) -> masks.Predicate:
    return same_document(torch.tensor(DOCS, device=device))


# One of each family on a row of 6, or of 6 + 6: what builds the predicate on a device, and the mask of each batch row.
FAMILIES: dict[str, tuple[Callable[[str], masks.Predicate], list[attention.Mask]]] = {
    "full": (lambda device: full(), [[[True] * 6] * 6] * NUM_ROWS),
    "causal": (lambda device: causal(), [attention.causal(6)] * NUM_ROWS),
    "annealed": (
        lambda device: annealed(0.4, SEED, 3),
        [attention.annealed(6, 0.4, noise_seed=SEED, step=3)] * NUM_ROWS,
    ),
    "same_document": (_documents, [attention.same_document(docs) for docs in DOCS]),
    "block_causal": (lambda device: block_causal(2), [attention.block_causal(6, 2)] * NUM_ROWS),
    "block_diffusion": (lambda device: block_diffusion(6, 2), [attention.block_diffusion(6, 2)] * NUM_ROWS),
    "block_diffusion_in_documents": (
        lambda device: both(block_diffusion(6, 3), on_both_halves(_documents(device), 6)),
        [attention.block_diffusion_in_documents(docs, 3) for docs in DOCS],
    ),
}
each_family = pytest.mark.parametrize(("build", "naive"), FAMILIES.values(), ids=FAMILIES)

DRAWN: dict[str, Callable[..., masks.Predicate]] = {
    "causal": causal,
    "same_document": lambda *docs: same_document(torch.tensor([docs])),
    "block_causal": block_causal,
    "block_diffusion": block_diffusion,
}
"""What the integers of a drawing's caption build."""


# The definitions


@pytest.mark.parametrize("length", LENGTHS)
def test_full_allows_everything(length):
    assert dense_mask(full(), 1, length).tolist() == [[[True] * length] * length]


@pytest.mark.parametrize("length", LENGTHS)
def test_causal_equals_naive_definition(length):
    assert dense_mask(causal(), 1, length).tolist() == [attention.causal(length)]


@pytest.mark.parametrize("docs", [[[3]], DOCS, [[0, 1, 2, 3]], [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]])
def test_same_document_equals_naive_definition_row_by_row(docs):
    dense = dense_mask(same_document(torch.tensor(docs)), len(docs), len(docs[0]))
    assert dense.tolist() == [attention.same_document(row) for row in docs]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("length", LENGTHS)
def test_block_causal_of_any_length_equals_naive_definition(length, block_size):
    assert dense_mask(block_causal(block_size), 1, length).tolist() == [attention.block_causal(length, block_size)]


@pytest.mark.parametrize(("seq_len", "block_size"), CUTS)
def test_block_diffusion_equals_naive_definition(seq_len, block_size):
    dense = dense_mask(block_diffusion(seq_len, block_size), 1, 2 * seq_len)
    assert dense.tolist() == [attention.block_diffusion(seq_len, block_size)]


@pytest.mark.parametrize(("seq_len", "block_size"), CUTS)
def test_block_diffusion_counts_edges_and_has_none_from_clean_to_noisy(seq_len, block_size):
    mask = dense_mask(block_diffusion(seq_len, block_size), 1, 2 * seq_len)[0]
    assert int(mask.sum()) == seq_len**2 + seq_len * block_size
    assert not mask[seq_len:, :seq_len].any()
    assert mask.any(dim=1).all()


@pytest.mark.parametrize(("seq_len", "block_size"), CUTS)
def test_block_diffusion_between_clean_tokens_is_block_causal(seq_len, block_size):
    clean = dense_mask(block_diffusion(seq_len, block_size), 1, 2 * seq_len)[:, seq_len:, seq_len:]
    assert torch.equal(clean, dense_mask(block_causal(block_size), 1, seq_len))


def test_block_diffusion_with_one_block_is_full_among_the_noisy():
    noisy = dense_mask(block_diffusion(5, 5), 1, 10)[0, :5]
    assert noisy[:, :5].all()
    assert not noisy[:, 5:].any()


def test_block_diffusion_with_blocks_of_one_sees_itself_and_the_clean_past():
    noisy = dense_mask(block_diffusion(5, 1), 1, 10)[0, :5]
    assert noisy.tolist() == [[q == k for k in range(5)] + [k < q for k in range(5)] for q in range(5)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
def test_block_diffusion_and_same_document_equals_definition_in_documents(block_size):
    predicate = both(block_diffusion(6, block_size), on_both_halves(same_document(torch.tensor(DOCS)), 6))
    naive = [attention.block_diffusion_in_documents(docs, block_size) for docs in DOCS]
    assert dense_mask(predicate, NUM_ROWS, 12).tolist() == naive


def test_block_diffusion_and_same_document_cut_at_blocks_is_the_mask_of_each_document_alone():
    lengths, block_size = (2, 6, 4), 2
    docs = [doc for doc, length in enumerate(lengths) for _ in range(length)]
    predicate = both(block_diffusion(12, block_size), on_both_halves(same_document(torch.tensor([docs])), 12))
    left = dense_mask(predicate, 1, 24)[0].clone()
    for doc, length in enumerate(lengths):
        own = torch.tensor([place for place in range(24) if docs[place % 12] == doc])
        inside = left[own[:, None], own]
        assert inside.tolist() == attention.block_diffusion(length, block_size)
        left[own[:, None], own] = False
    assert not left.any()


def test_on_both_halves_repeats_the_mask_in_every_quarter():
    single = dense_mask(causal(), 1, 3)
    assert torch.equal(dense_mask(on_both_halves(causal(), 3), 1, 6), single.tile(1, 2, 2))


def test_on_both_halves_leaves_row_and_head_alone():
    predicate = on_both_halves(lambda b, h, q, k: (q == k) & (b == 5) & (h == 7), 4)
    same, row, head = torch.tensor([1, 5, 6]), torch.tensor(5), torch.tensor(7)
    assert predicate(row, head, same, torch.tensor(1)).tolist() == [True, True, False]
    assert not predicate(head, row, same, same).any()


def test_both_is_true_only_where_the_two_are():
    def listed(*entries: bool) -> masks.Predicate:
        return lambda b, h, q, k: torch.tensor(entries)[q + k]

    answers = dense_mask(both(listed(True, True, False, False), listed(True, False, True, False)), 1, 2)
    assert answers.tolist() == [[[True, False], [False, False]]]
    answers = dense_mask(both(listed(False, False, True), listed(True, True, True)), 1, 2)
    assert answers.tolist() == [[[False, False], [False, True]]]


# The drawings


def test_drawings_are_all_compared():
    drawn = [name for name, thing in vars(masks).items() if inspect.isfunction(thing) and "::" in (thing.__doc__ or "")]
    assert sorted(drawn) == sorted(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_drawing_equals_the_mask_that_its_caption_names(name):
    drawn, caption, columns, rows = attention.parse_drawing(getattr(masks, name).__doc__)
    assert drawn == dense_mask(DRAWN[name](*caption), 1, len(drawn))[0].tolist()
    assert columns == rows == ([len(drawn) // 2] if name == "block_diffusion" else [])


# Predicates at indices of any shape


@pytest.mark.parametrize("device", DEVICES)
@each_family
def test_dense_mask_equals_naive_definition_on_the_device(build, naive, device):
    dense = dense_mask(build(device), NUM_ROWS, len(naive[0]), device)
    assert dense.device.type == device
    assert dense.dtype == torch.bool
    assert dense.tolist() == naive


@each_family
def test_predicate_at_single_indices_equals_naive_definition(build, naive):
    predicate, length = build("cpu"), len(naive[0])
    for b, q, k in itertools.product(range(NUM_ROWS), range(length), range(length)):
        answer = predicate(*(torch.tensor(index) for index in (b, NUM_HEADS, q, k)))
        assert answer.shape == ()
        assert bool(answer) == naive[b][q][k]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@each_family
def test_predicate_broadcasts_and_is_shared_by_the_heads(build, naive, dtype):
    predicate, length = build("cpu"), len(naive[0])
    b, h, q, k = (torch.arange(size, dtype=dtype) for size in (NUM_ROWS, NUM_HEADS, length, length))
    answers = predicate(b[:, None, None, None], h[:, None, None], q[:, None], k)
    assert answers.shape[-2:] == (length, length)
    expected = torch.tensor(naive)[:, None].expand(NUM_ROWS, NUM_HEADS, length, length)
    assert torch.equal(answers.expand_as(expected), expected)
    transposed = predicate(b[:, None, None, None], h[:, None, None], q, k[:, None])
    assert torch.equal(transposed.expand_as(expected), expected.mT)


@each_family
def test_predicate_as_mask_mod_of_flex_attention_gives_the_same_mask(build, naive):
    predicate, sizes = build("cpu"), (NUM_ROWS, NUM_HEADS, len(naive[0]), len(naive[0]))
    expected = torch.tensor(naive)[:, None].expand(sizes)
    assert torch.equal(create_mask(predicate, *sizes, device="cpu"), expected)
    blocks = create_block_mask(predicate, *sizes, device="cpu", BLOCK_SIZE=1).to_dense()
    assert torch.equal(blocks.bool(), expected)


def test_dense_mask_asks_for_every_row_at_head_zero():
    dense = dense_mask(lambda b, h, q, k: (h == 0) & (q == b + 1) & (k == 2 * b), 2, 3)
    assert dense.nonzero().tolist() == [[0, 1, 0], [1, 2, 2]]


def test_dense_mask_is_made_on_the_device_asked_for():
    assert dense_mask(block_diffusion(4, 2), 2, 8, "meta").device.type == "meta"
    assert dense_mask(causal(), 2, 8, torch.device("meta")).device.type == "meta"


# Annealing


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (SEED, 10**6), (-3, 1)])
@pytest.mark.parametrize("ratio", [0.0, 1e-7, 0.05, 0.5, 0.95, 1.0])
def test_annealed_equals_naive_hash_of_its_address(ratio, seed, step):
    dense = dense_mask(annealed(ratio, seed, step), 1, 9)
    assert dense.tolist() == [attention.annealed(9, ratio, noise_seed=seed, step=step)]


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_annealed_at_any_ratio_contains_causal(ratio):
    for step in range(5):
        assert dense_mask(annealed(ratio, 7, step), 1, 32)[dense_mask(causal(), 1, 32)].all()


def test_annealed_at_ratio_zero_is_causal_and_at_one_full():
    for step in range(5):
        assert torch.equal(dense_mask(annealed(0.0, 7, step), 1, 32), dense_mask(causal(), 1, 32))
        assert dense_mask(annealed(1.0, 7, step), 1, 32).all()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_annealed_over_steps_has_density_linear_in_ratio(ratio):
    length, num_steps = 48, 30
    num_future = num_steps * length * (length - 1) // 2
    drawn = sum(
        int(dense_mask(annealed(ratio, 21, step), 1, length)[0].triu(diagonal=1).sum()) for step in range(num_steps)
    )
    assert abs(drawn - ratio * num_future) < SIGMAS * math.sqrt(num_future * ratio * (1 - ratio))


def test_annealed_entries_are_uncorrelated_with_their_neighbours_and_with_other_draws():
    length, ratio, num_steps = 40, 0.3, 20
    future = torch.ones(length, length, dtype=torch.bool).triu(diagonal=3)  # so that a neighbour is future too
    products = {"next row": 0.0, "next column": 0.0, "next step": 0.0, "next seed": 0.0}
    for step in range(num_steps):
        here, later, other = (
            dense_mask(annealed(ratio, seed, at), 1, length)[0].double() - ratio
            for seed, at in ((5, step), (5, step + 1), (6, step))
        )
        for name, neighbour in {
            "next row": here.roll(-1, dims=0),
            "next column": here.roll(1, dims=1),
            "next step": later,
            "next seed": other,
        }.items():
            products[name] += float((here * neighbour)[future].sum())
    # products of centred draws have variance (r (1 - r))^2 and, sharing at most one draw, are uncorrelated
    bound = SIGMAS * ratio * (1 - ratio) * math.sqrt(num_steps * int(future.sum()))
    assert {name: total for name, total in products.items() if abs(total) > bound} == {}


def test_annealed_with_growing_ratio_only_adds_entries():
    drawn = [dense_mask(annealed(ratio / 16, 3, 8), 1, 32) for ratio in range(17)]
    for few, more in itertools.pairwise(drawn):
        assert more[few].all()
        assert more.sum() > few.sum()


def test_annealed_at_the_same_address_draws_the_same_mask():
    drawn = dense_mask(annealed(0.5, 3, 8), 1, 16)
    assert torch.equal(dense_mask(annealed(0.5, 3, 8), 1, 16), drawn)
    assert not torch.equal(dense_mask(annealed(0.5, 3, 9), 1, 16), drawn)
    assert not torch.equal(dense_mask(annealed(0.5, 4, 8), 1, 16), drawn)


def test_annealed_of_any_length_and_batch_is_a_corner_of_one_mask():
    large = dense_mask(annealed(0.5, 3, 8), 4, 24)
    assert torch.equal(large, large[:1].expand_as(large))
    for length in (1, 5, 23):
        assert torch.equal(dense_mask(annealed(0.5, 3, 8), 1, length), large[:1, :length, :length])


# Leakage through layers


def _influence(stack: TinyStack, tokens: Tensor, attn_mask: Tensor, positions: Tensor) -> Tensor:
    """Which outputs (rows) change at all when one input (column) does."""
    length = len(tokens)
    before = tokens.repeat(length, 1)  # the same shapes: the kernels then sum in the same order
    after = torch.where(torch.eye(length, dtype=torch.bool), (before + 1) % stack.vocab_size, before)
    moved = stack(after, attn_mask, positions) != stack(before, attn_mask, positions)
    return moved.any(dim=-1).T


@each_family
def test_influence_through_two_layers_is_what_the_mask_lets_reach(build, naive):
    length = len(naive[0])
    stack, positions = TinyStack(5), torch.arange(length) % 6
    tokens = torch.tensor([1, 4, 0, 2, 3, 3, 1, 0, 4, 4, 2, 0])[:length]
    for attn_mask, expected in zip(dense_mask(build("cpu"), NUM_ROWS, length), naive, strict=True):
        reached = attention.reach(expected, stack.num_layers)
        assert _influence(stack, tokens, attn_mask[None], positions).tolist() == reached


@pytest.mark.parametrize(("seq_len", "block_size"), [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_block_diffusion_noisy_block_knows_only_itself_and_the_clean_past(seq_len, block_size):
    stack, positions = TinyStack(5), torch.arange(seq_len).repeat(2)
    attn_mask = dense_mask(block_diffusion(seq_len, block_size), 1, 2 * seq_len)
    draw = torch.Generator().manual_seed(4)
    x0 = torch.randint(0, 4, (1, seq_len), generator=draw)
    xt = torch.where(torch.rand(1, seq_len, generator=draw) < 0.5, 4, x0)
    other_x0, other_xt = (x0 + 1) % 4, (xt + 1) % 5

    def noisy(xt: Tensor, x0: Tensor) -> Tensor:
        return stack(torch.cat([xt, x0], dim=1), attn_mask, positions)[:, :seq_len]

    before, place = noisy(xt, x0), torch.arange(seq_len)
    for start in range(0, seq_len, block_size):
        own = (place >= start) & (place < start + block_size)
        future_changed = noisy(torch.where(own, xt, other_xt), torch.where(place >= start, other_x0, x0))
        assert torch.equal(future_changed[:, own], before[:, own])
        own_changed = noisy(torch.where(own, other_xt, xt), x0)
        assert (own_changed != before).any(dim=-1).squeeze(0).tolist() == own.tolist()
        past_changed = noisy(xt, torch.where(place < start, other_x0, x0))
        assert (past_changed != before)[:, own].any(dim=-1).all() == (start > 0)


def test_block_diffusion_with_one_block_gives_the_noisy_what_full_gives_xt_alone():
    stack, positions = TinyStack(5), torch.arange(6)
    xt, x0 = torch.tensor([[4, 1, 4, 4, 2, 0]]), torch.tensor([[3, 1, 2, 0, 2, 0]])
    pair = stack(torch.cat([xt, x0], dim=1), dense_mask(block_diffusion(6, 6), 1, 12), positions.repeat(2))
    alone = stack(xt, dense_mask(full(), 1, 6), positions)
    torch.testing.assert_close(pair[:, :6], alone, rtol=0, atol=ROUNDING)


def test_packed_documents_under_the_joint_mask_equal_separate_runs():
    lengths, block_size, seq_len = (4, 2, 6), 2, 12
    stack, draw = TinyStack(5), torch.Generator().manual_seed(9)
    xt, x0 = torch.randint(0, 5, (2, 1, seq_len), generator=draw)
    docs = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    joint = both(block_diffusion(seq_len, block_size), on_both_halves(same_document(docs[None]), seq_len))
    packed = stack(torch.cat([xt, x0], dim=1), dense_mask(joint, 1, 2 * seq_len), torch.arange(seq_len).repeat(2))
    for doc, length in enumerate(lengths):
        own = (docs == doc).nonzero().flatten()
        tokens = torch.cat([xt[:, own], x0[:, own]], dim=1)
        alone = stack(tokens, dense_mask(block_diffusion(length, block_size), 1, 2 * length), own.repeat(2))
        torch.testing.assert_close(packed[:, torch.cat([own, own + seq_len])], alone, rtol=0, atol=ROUNDING)


# What is refused


@pytest.mark.parametrize(
    ("build", "settings", "named"),
    [
        (annealed, (-0.01, 0, 0), "ratio is -0.01"),
        (annealed, (1.01, 0, 0), "ratio is 1.01"),
        (annealed, (math.nan, 0, 0), "ratio is nan"),
        (block_causal, (0,), "block_size is 0"),
        (block_causal, (-2,), "block_size is -2"),
        (block_diffusion, (4, 0), "block_size is 0; it must divide the row of 4"),
        (block_diffusion, (4, -2), "block_size is -2; it must divide the row of 4"),
        (block_diffusion, (4, 3), "block_size is 3; it must divide the row of 4"),
        (block_diffusion, (4, 8), "block_size is 8; it must divide the row of 4"),
    ],
)
def test_mask_with_impossible_setting_names_it(build, settings, named):
    with pytest.raises(ValueError, match=named):
        build(*settings)
