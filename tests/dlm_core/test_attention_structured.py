"""Block diffusion in stripes: the dense mask's outputs and gradients at any size, and what stripes compute at all."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlm_core.models.attention import NUM_STRIPES, Attend, AttentionMask, plan_attention
from tests.support import attention, naive_attention

ROUNDING = 1e-10  # float64: sums of a few hundred terms of order 1, in another order
FLOAT32 = 1e-5  # the same in float32
BFLOAT16 = 0.06  # eight bits of mantissa: 2^-8 of scores and sums up to 4, over a few roundings
HEAD_DIM = 4


def _draw(num_rows: int, heads: tuple[int, int], length: int, seed: int = 0, head_dim: int = HEAD_DIM) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_rows, size, length, head_dim, generator=draw, dtype=torch.float64, requires_grad=True)
        for size in (heads[0], heads[1], heads[1])
    ]


def _plans(mask: AttentionMask, num_rows: int, seq_len: int, num_queries: int | None = None) -> tuple[Attend, Attend]:
    structured, dense = (
        plan_attention(mask, num_rows, seq_len, device="cpu", backend=backend, num_queries=num_queries)
        for backend in ("structured", "dense")
    )
    return structured, dense


def _gap(found: Attend, expected: Attend, inputs: list[Tensor], dtype: torch.dtype = torch.float64) -> float:
    """Largest difference of outputs and gradients, the expected ones in float64."""
    cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, target = found(*cast), expected(*inputs)
    assert y.dtype == dtype
    pairs = [(y, target)]
    pairs += zip(
        naive_attention.gradients(y, tuple(cast)), naive_attention.gradients(target, tuple(inputs)), strict=True
    )
    return max(float((a.double() - b).detach().abs().max()) for a, b in pairs)


# Equal to the dense mask


@settings(max_examples=40, deadline=None)
@given(
    num_blocks=st.integers(1, 2 * NUM_STRIPES + 3),
    block_size=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    has_docs=st.booleans(),
    is_noisy_only=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_stripes_of_any_number_of_blocks_equal_the_dense_mask(
    num_blocks, block_size, heads, has_docs, is_noisy_only, seed
):
    num_rows, seq_len = 2, num_blocks * block_size
    docs = torch.randint(0, 3, (num_rows, seq_len), generator=torch.Generator().manual_seed(seed)) if has_docs else None
    mask = AttentionMask("block_diffusion", block_size=block_size, doc_ids=docs)
    num_queries = seq_len if is_noisy_only else 2 * seq_len
    structured, dense = _plans(mask, num_rows, seq_len, num_queries)
    q, k, v = _draw(num_rows, heads, 2 * seq_len, seed)
    q = q[:, :, :num_queries].detach().requires_grad_()
    assert _gap(structured, dense, [q, k, v]) < ROUNDING
    cut = _plans(mask, num_rows, seq_len)[0].narrowed(num_queries)
    assert torch.equal(cut(q, k, v), structured(q, k, v))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, ROUNDING), (torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)]
)
@pytest.mark.parametrize("has_docs", [False, True])
def test_stripes_in_each_precision_equal_the_dense_mask_in_float64(dtype, tolerance, has_docs):
    docs = (torch.arange(128) // 50).repeat(2, 1) if has_docs else None
    structured, dense = _plans(AttentionMask("block_diffusion", block_size=8, doc_ids=docs), 2, 128)
    assert _gap(structured, dense, _draw(2, (4, 2), 256, head_dim=16), dtype) < tolerance


def test_stripes_under_autocast_give_the_dtype_of_autocast():
    structured, dense = _plans(AttentionMask("block_diffusion", block_size=4), 1, 32)
    inputs = _draw(1, (2, 1), 64)
    cast = [x.detach().float().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = structured(*cast)
    assert out.dtype == torch.bfloat16
    assert float((out.double() - dense(*inputs)).detach().abs().max()) < BFLOAT16
    found_all = naive_attention.gradients(out.float(), tuple(cast))
    expected_all = naive_attention.gradients(dense(*inputs), tuple(inputs))
    for found, expected in zip(found_all, expected_all, strict=True):
        assert found.dtype == torch.float32
        assert float((found.double() - expected).abs().max()) < BFLOAT16


@pytest.mark.slow
def test_stripes_traced_as_one_graph_give_the_same_for_every_plan():
    # in a process of its own: what checks shapes here cannot be traced
    code = """
import torch
from dlm_core.models.attention import AttentionMask, plan_attention

graphs = []

def backend(graph, example_inputs):
    graphs.append(graph)
    return graph.forward

@torch.compile(backend=backend, fullgraph=True)
def layer(attend, q, k, v):
    return attend(q, k, v)

draw = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, heads, 20, 4, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
for documents in (3, 7):
    docs = (torch.arange(10) // documents).repeat(2, 1)
    attend = plan_attention(AttentionMask("block_diffusion", block_size=2, doc_ids=docs), 2, 10, device="cpu")
    assert torch.equal(layer(attend, q, k, v), attend(q, k, v))
assert len(graphs) == 1, graphs
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# What stripes compute


@pytest.mark.parametrize(("num_blocks", "num_stripes"), [(1, 1), (2, 2), (8, 8), (9, 5), (16, 8), (17, 6), (32, 8)])
@pytest.mark.parametrize("block_size", [1, 3])
def test_stripes_hold_every_visible_entry_once_and_few_hidden_ones(num_blocks, num_stripes, block_size):
    seq_len = num_blocks * block_size
    structured, dense = _plans(AttentionMask("block_diffusion", block_size=block_size), 1, seq_len)
    assert len(structured.tables) == num_stripes <= NUM_STRIPES
    assert sum(int(table.sum()) for table in structured.tables) == int(dense.tables[0].sum())
    width = -(-num_blocks // NUM_STRIPES) * block_size
    ends = [min(start + width, seq_len) for start in range(0, seq_len, width)]
    widths = [end - start for start, end in itertools.pairwise([0, *ends])]
    expected = [(1, 2 * own, end + own) for own, end in zip(widths, ends, strict=True)]
    assert [tuple(table.shape) for table in structured.tables] == expected
    noisy = structured.narrowed(seq_len).tables
    assert [tuple(table.shape) for table in noisy] == [
        (1, own, keys) for (_, two, keys) in expected for own in [two // 2]
    ]


def test_stripes_of_the_benchmark_compute_little_more_than_a_third_of_the_square():
    structured, _ = _plans(AttentionMask("block_diffusion", block_size=16), 1, 512)
    computed = sum(table.numel() for table in structured.tables)
    assert computed / (4 * 512**2) == pytest.approx(0.34375)  # (9/16 + 1/8) / 2: eight stripes and their own keys


# What block diffusion promises


def test_noisy_block_moves_with_itself_and_the_clean_past_alone():
    seq_len, block_size = 12, 2
    structured, _ = _plans(AttentionMask("block_diffusion", block_size=block_size), 1, seq_len)
    q, k, v = (x.detach() for x in _draw(1, (2, 1), 2 * seq_len))
    before = structured(q, k, v)
    seen = attention.block_diffusion(seq_len, block_size)
    for key in range(2 * seq_len):
        other = torch.zeros_like(k)
        other[:, :, key] = 2.0
        moved = (structured(q, k + other, v + other) != before).any(dim=3).all(dim=1)[0]
        assert moved.tolist() == [row[key] for row in seen]


def test_one_block_gives_the_noisy_half_what_full_attention_gives_it_alone():
    structured, _ = _plans(AttentionMask("block_diffusion", block_size=7), 2, 7, 7)
    q, k, v = (x.detach() for x in _draw(2, (4, 2), 14))
    alone = plan_attention(AttentionMask(), 2, 7, device="cpu")
    noisy = [x[:, :, :7] for x in (q, k, v)]
    torch.testing.assert_close(structured(noisy[0], k, v), alone(*noisy), rtol=0, atol=ROUNDING)


def test_clean_half_is_block_causal_attention_of_the_clean_tokens_alone():
    structured, _ = _plans(AttentionMask("block_diffusion", block_size=3), 2, 27)
    alone = plan_attention(AttentionMask("block_causal", block_size=3), 2, 27, device="cpu")
    q, k, v = (x.detach() for x in _draw(2, (4, 2), 54))
    clean = alone(*(x[:, :, 27:] for x in (q, k, v)))
    torch.testing.assert_close(structured(q, k, v)[:, :, 27:], clean, rtol=0, atol=ROUNDING)


def test_documents_cut_at_blocks_equal_separate_runs():
    lengths, block_size, seq_len = (8, 2, 10), 2, 20
    docs = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    packed, _ = _plans(AttentionMask("block_diffusion", block_size=block_size, doc_ids=docs[None]), 1, seq_len)
    q, k, v = (x.detach() for x in _draw(1, (2, 1), 2 * seq_len))
    out = packed(q, k, v)
    for doc, length in enumerate(lengths):
        own = (docs == doc).nonzero().flatten()
        places = torch.cat([own, own + seq_len])
        alone, _ = _plans(AttentionMask("block_diffusion", block_size=block_size), 1, length)
        expected = alone(*(x[:, :, places] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, places], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("has_autocast", [False, True])
def test_stripes_in_bf16_take_the_softmax_of_large_scores_in_float32(has_autocast):
    mask = AttentionMask("block_diffusion", block_size=16)
    structured, dense = _plans(mask, 1, 128)
    q, k, v = (x.detach() for x in _draw(1, (2, 2), 256, head_dim=64))
    narrow = [(4 * x if number < 2 else x).bfloat16() for number, x in enumerate((q, k, v))]
    exact = dense(*(x.double() for x in narrow))
    with torch.autocast("cpu", torch.bfloat16, enabled=has_autocast):
        error = float((structured(*narrow).double() - exact).abs().max())
    # scores of some hundreds: rounded to bf16 they would be off by ones.  Weights and outputs are rounded, to 2^-8 of 4
    assert error < 4 * 2.0**-8 * 2
