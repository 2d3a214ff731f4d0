"""Keys and values kept while decoding: block by block as in one pass, apart by layer and place, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch

from dlm_core.models.attention import AttentionMask, KVCache, plan_attention
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser

ROUNDING = 1e-10  # dozens of terms of order 1 in float64, summed in another order
NUM_ROWS, SEQ_LEN, HEAD_DIM = 2, 6, 4


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
def test_cache_block_by_block_equals_one_pass_over_both_halves(block_size):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(NUM_ROWS, heads, 2 * SEQ_LEN, HEAD_DIM, generator=draw, dtype=torch.float64) for heads in (4, 2, 2)
    )
    mask = AttentionMask("block_diffusion", block_size=block_size)
    expected = plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cpu", backend="dense")(q, k, v)
    cache = KVCache(1, NUM_ROWS, 2, SEQ_LEN, HEAD_DIM, dtype=torch.float64)
    own = AttentionMask("block_causal", block_size=block_size)
    for start in range(0, SEQ_LEN, block_size):
        assert cache.length == start
        attend = plan_attention(own, NUM_ROWS, block_size, device="cpu", num_past=cache.length)
        for offset in (0, SEQ_LEN):  # the noisy block is seen by itself alone: the clean one takes its place
            place = slice(offset + start, offset + start + block_size)
            keys, values = cache.append(0, k[:, :, place], v[:, :, place])
            out = attend(q[:, :, place], keys, values)
            torch.testing.assert_close(out, expected[:, :, place], rtol=0, atol=ROUNDING)
        cache.advance(block_size)


@pytest.mark.parametrize("num_past", [1, 2, 4])
@pytest.mark.parametrize(
    "mask",
    [AttentionMask(), AttentionMask("causal"), AttentionMask("block_causal", block_size=2)],
    ids=lambda m: m.family,
)
def test_documents_reach_over_the_keys_before_the_queries(mask, num_past):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, NUM_ROWS, 2, SEQ_LEN, HEAD_DIM, generator=draw, dtype=torch.float64)
    mask = replace(mask, doc_ids=torch.tensor([[1, 1, 0, 0, 0, 1], [0, 2, 0, 0, 2, 2]]))
    whole = plan_attention(mask, NUM_ROWS, SEQ_LEN, device="cpu")(q, k, v)
    rest = plan_attention(mask, NUM_ROWS, SEQ_LEN - num_past, device="cpu", num_past=num_past)(q[:, :, num_past:], k, v)
    torch.testing.assert_close(rest, whole[:, :, num_past:], rtol=0, atol=ROUNDING)


def test_cache_keeps_layers_and_positions_apart():
    cache = KVCache(2, NUM_ROWS, 3, 5, 4, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 2, NUM_ROWS, 3, 4, 4, generator=draw, dtype=torch.float64)  # [layer, B, G, L, C] each
    for layer in (0, 1):
        cache.append(layer, k[layer, :, :, :3], v[layer, :, :, :3])
    cache.advance(2)  # the third position is given up
    for layer in (1, 0):
        keys, values = cache.append(layer, k[layer, :, :, 2:], v[layer, :, :, 2:])
        torch.testing.assert_close(keys, k[layer], rtol=0, atol=0)
        torch.testing.assert_close(values, v[layer], rtol=0, atol=0)
    cache.advance(0)
    assert cache.length == 2
    cache.advance(1)
    cache.advance(1)
    assert cache.length == 4
    keys, values = cache.append(0, k[0, :, :, :1], v[0, :, :, :1])
    torch.testing.assert_close(keys, torch.cat([k[0], k[0, :, :, :1]], dim=2), rtol=0, atol=0)
    torch.testing.assert_close(values, torch.cat([v[0], v[0, :, :, :1]], dim=2), rtol=0, atol=0)


def test_cache_lies_where_it_was_asked_for():
    for device, dtype in itertools.product(("cpu", "meta"), (torch.float32, torch.bfloat16)):
        cache = KVCache(1, 2, 1, 3, 4, dtype=dtype, device=device)
        x = torch.zeros(2, 1, 2, 4, device=device, dtype=dtype)
        for held in cache.append(0, x, x):
            assert (held.device.type, held.dtype, tuple(held.shape)) == (device, dtype, (2, 1, 2, 4))
    assert KVCache(1, 2, 1, 3, 4).append(0, torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))[0].dtype == torch.float32


def test_cache_of_a_model_has_its_sizes_and_dtype():
    config = tiny(PRESETS["qwen3-0.6b"])
    model = Denoiser(config).double()
    model.init_weights(0)
    tokens = torch.arange(10).view(2, 5)
    cache = model.make_cache(num_rows=2, max_len=5)
    mask = AttentionMask("block_causal", block_size=1)
    with torch.no_grad():
        whole = model(tokens, mask=mask)
        model(tokens[:, :3], mask=mask, cache=cache)
        cache.advance(3)
        rest = model(tokens[:, 3:], mask=mask, cache=cache)
    torch.testing.assert_close(rest.view(2, 2, -1), whole.view(2, 5, -1)[:, 3:], rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match="the cache holds 3 of 5 positions"):
        model(tokens[:, :3], mask=mask, cache=cache)


def test_cache_made_under_autocast_takes_what_autocast_makes():
    model = Denoiser(tiny(PRESETS["llada-8b"]))
    model.init_weights(0)
    assert model.make_cache(1, 4).append(0, *torch.zeros(2, 1, 4, 1, 8))[0].dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.make_cache(num_rows=1, max_len=4)
        model(torch.zeros(1, 4, dtype=torch.int64), mask=AttentionMask("block_causal", block_size=4), cache=cache)
    cache.advance(4)


def test_cache_that_is_full_says_what_it_holds():
    cache, x = KVCache(1, 1, 1, 4, 2), torch.zeros(1, 1, 3, 2)
    cache.append(0, x, x)
    cache.advance(3)
    with pytest.raises(ValueError, match="the cache holds 3 of 4 positions; 2 more don't fit"):
        cache.append(0, x[:, :, :2], x[:, :, :2])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("k", "v", "named"),
    [
        (
            (1, 1, 2, 2),
            (2, 1, 2, 2),
            r"k is torch.float32 \[1, 1, 2, 2\]; the cache takes torch.float32 \[2, 1, 2, 2\] here",
        ),
        (
            (2, 1, 2, 2),
            (2, 3, 2, 2),
            r"v is torch.float32 \[2, 3, 2, 2\]; the cache takes torch.float32 \[2, 1, 2, 2\] here",
        ),
        (
            (2, 1, 2, 3),
            (2, 1, 2, 2),
            r"k is torch.float32 \[2, 1, 2, 3\]; the cache takes torch.float32 \[2, 1, 2, 2\] here",
        ),
        (
            (2, 1, 2, 2),
            (2, 1, 1, 2),
            r"v is torch.float32 \[2, 1, 1, 2\]; the cache takes torch.float32 \[2, 1, 2, 2\] here",
        ),
    ],
)
def test_cache_with_keys_or_values_of_other_sizes_names_them(k, v, named):
    with pytest.raises(ValueError, match=named):
        KVCache(1, 2, 1, 4, 2).append(0, torch.zeros(k), torch.zeros(v))


def test_cache_of_another_dtype_a_missing_layer_or_with_gradients_is_refused():
    cache, x = KVCache(2, 1, 1, 4, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"k is torch.float32 \[1, 1, 2, 2\]; the cache takes torch.bfloat16"):
        cache.append(0, x, x)
    with pytest.raises(ValueError, match=r"layer is 2; the cache has the layers 0\.\.1"):
        cache.append(2, x.bfloat16(), x.bfloat16())
    with pytest.raises(ValueError, match=r"v requires a gradient, .* decode under torch.no_grad\(\)"):
        cache.append(0, x.bfloat16(), x.bfloat16().requires_grad_())


@pytest.mark.parametrize(
    ("appended", "n", "named"),
    [
        ((2, 2), 3, r"n is 3; the last pass appended 2 position\(s\)"),
        ((2, 1), 2, r"n is 2; the last pass appended 1 position\(s\)"),
        ((1, 0), 1, r"n is 1; the last pass appended 0 position\(s\)"),
        ((2, 2), -1, "n is -1"),
    ],
)
def test_cache_advanced_past_what_every_layer_appended_is_refused(appended, n, named):
    cache = KVCache(2, 1, 1, 4, 2)
    for layer, length in enumerate(appended):
        cache.append(layer, *torch.zeros(2, 1, 1, length, 2))
    with pytest.raises(ValueError, match=named):
        cache.advance(n)
    assert cache.length == 0
