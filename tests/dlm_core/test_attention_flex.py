"""FlexAttention on CUDA against the dense mask there: every family that has blocks to skip, outputs and gradients."""

import pytest
import torch
from torch import Tensor

from dlm_core.models.attention import AttentionMask, plan_attention
from tests.support import naive_attention

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # kernels are compiled

# Half precision: both round scores, weights and sums of order 1 to eight bits, at other places.
BFLOAT16 = 0.05
NUM_ROWS, SEQ_LEN, HEAD_DIM = 2, 320, 64  # no multiple of a kernel's tile of 128
FAMILIES = {"full": None, "causal": None, "block_causal": 16, "block_diffusion": 16}
CASES = [
    (family, has_docs, heads, halves)
    for family in FAMILIES
    for has_docs in (False, True)
    for heads in ((4, 4), (4, 2))
    for halves in ((1, 2) if family == "block_diffusion" else (1,))
]


def _mask(family: str, *, has_docs: bool) -> AttentionMask:
    row = torch.arange(SEQ_LEN, device="cuda")
    docs = torch.stack([row // 100, row // 170]) if has_docs else None
    return AttentionMask(family, block_size=FAMILIES[family], doc_ids=docs)


def _draw(heads: tuple[int, int], num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(2)
    sizes = (heads[0], num_queries), (heads[1], num_keys), (heads[1], num_keys)
    return tuple(
        torch.randn(NUM_ROWS, *size, HEAD_DIM, generator=draw).to("cuda", torch.bfloat16).requires_grad_()
        for size in sizes
    )


@pytest.mark.parametrize(("family", "has_docs", "heads", "halves"), CASES)
def test_flex_equals_the_dense_mask(family, has_docs, heads, halves):
    mask = _mask(family, has_docs=has_docs)
    num_queries = halves * SEQ_LEN
    flex, dense = (
        plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cuda", backend=backend, num_queries=num_queries)
        for backend in ("flex", "dense")
    )
    inputs = _draw(heads, num_queries, flex.num_keys)
    out, expected = flex(*inputs), dense(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=BFLOAT16)
    found, wanted = (naive_attention.gradients(y, inputs) for y in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=BFLOAT16)


@pytest.mark.parametrize("has_docs", [False, True])
def test_flex_narrowed_is_the_plan_of_fewer_queries(has_docs):
    plan = plan_attention(_mask("block_diffusion", has_docs=has_docs), NUM_ROWS, SEQ_LEN, device="cuda")
    assert plan.backend == "flex"
    q, k, v = _draw((4, 2), 2 * SEQ_LEN, 2 * SEQ_LEN)
    half = plan.narrowed(SEQ_LEN)
    assert half.num_queries == SEQ_LEN
    torch.testing.assert_close(half(q[:, :, :SEQ_LEN], k, v), plan(q, k, v)[:, :, :SEQ_LEN], rtol=0, atol=BFLOAT16)


def test_flex_skips_blocks_of_block_diffusion():
    plan = plan_attention(AttentionMask("block_diffusion", block_size=16), 1, 1024, device="cuda")
    assert plan.block_mask is not None
    assert plan.block_mask.sparsity() > 50
    assert plan.block_mask.shape == (1, 1, 2048, 2048)
