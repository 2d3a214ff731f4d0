"""One pass over [xt ; x0] against what it stands for: loops over blocks, a cache, and the two ends of block size."""

import pytest
import torch
import torch.nn.functional as F

from dlm_core.models.attention import AttentionMask, plan_attention
from dlm_core.models.config import ModelConfig
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser

ATOL = 1e-10  # float64 logits of order 1
V, MASK, SEQ_LEN = 13, 12, 8
NAMES = ["mdlm-small", "llada-8b", "llama3.1-8b", "qwen3-0.6b", "llada-moe-7b-a1b", "llada2-mini"]
"""One of each kind: DiT, dense, grouped and stretched, normalised heads, experts of both routers."""


def _model(name: str) -> Denoiser:
    config = tiny(PRESETS[name], vocab_size=V)
    model = Denoiser(config).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) + 0.05)
    return model.eval()


def _rows(num_rows: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(xt, x0): about half of the tokens masked, the first and the last among both kinds."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(MASK, (num_rows, SEQ_LEN), generator=generator)
    is_masked = torch.rand(num_rows, SEQ_LEN, generator=generator) < 0.5
    is_masked[0, 0], is_masked[0, -1] = True, False
    return torch.where(is_masked, MASK, x0), x0


def _real(logits: torch.Tensor) -> torch.Tensor:
    return logits.view(-1, SEQ_LEN, V)[..., :MASK]


def _vectorised(model: Denoiser, xt, x0, block_size: int, **options) -> torch.Tensor:
    mask = AttentionMask("block_diffusion", block_size=block_size, doc_ids=options.pop("doc_ids", None))
    with torch.no_grad():
        return _real(model(xt, x0=x0, mask=mask, **options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_one_pass_equals_loop_over_blocks_with_clean_prefix(name, block_size, backend):
    model, (xt, x0) = _model(name), _rows()
    found = _vectorised(model, xt, x0, block_size, backend=backend)
    mask = AttentionMask("block_causal", block_size=block_size)
    for start in range(0, SEQ_LEN, block_size):
        stop = start + block_size
        with torch.no_grad():
            logits = model(torch.cat([x0[:, :start], xt[:, start:stop]], dim=1), mask=mask)
        wanted = logits.view(2, stop, V)[:, start:, :MASK]
        torch.testing.assert_close(found[:, start:stop], wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("prompt_blocks", [0, 1, 2])
def test_one_pass_equals_decoding_with_a_cache(name, block_size, prompt_blocks):
    model, (xt, x0) = _model(name), _rows()
    found = _vectorised(model, xt, x0, block_size)
    mask = AttentionMask("block_causal", block_size=block_size)
    cache = model.make_cache(2, SEQ_LEN)
    nothing = torch.zeros(0, dtype=torch.int64)
    start = prompt_blocks * block_size
    with torch.no_grad():
        if start:
            model(x0[:, :start], nothing, mask=mask, cache=cache)
            cache.advance(start)
        for place in range(start, SEQ_LEN, block_size):
            block = slice(place, place + block_size)
            for _ in range(2):  # a noisy block leaves nothing behind
                logits = model(xt[:, block], mask=mask, cache=cache).view(2, block_size, V)[..., :MASK]
                torch.testing.assert_close(logits, found[:, block], rtol=0, atol=ATOL)
            model(x0[:, block], nothing, mask=mask, cache=cache)
            cache.advance(block_size)
    assert cache.length == SEQ_LEN


@pytest.mark.parametrize("name", NAMES)
def test_clean_tokens_of_own_and_later_blocks_and_noise_of_others_reach_no_logit(name):
    model, (xt, x0) = _model(name), _rows()
    before = _vectorised(model, xt, x0, 2)
    for block in range(4):
        own = slice(2 * block, 2 * block + 2)
        later_x0, other_xt = x0.clone(), (xt + 1) % V
        later_x0[:, 2 * block :] = (later_x0[:, 2 * block :] + 1) % MASK
        other_xt[:, own] = xt[:, own]
        torch.testing.assert_close(_vectorised(model, other_xt, later_x0, 2)[:, own], before[:, own], rtol=0, atol=ATOL)
        if block:  # and what should reach it does
            earlier = x0.clone()
            earlier[:, 0] = (earlier[:, 0] + 1) % MASK
            moved = (_vectorised(model, xt, earlier, 2) - before)[:, own].abs().amax(dim=-1)
            assert (moved > 1e-8).all()
        inside = xt.clone()
        inside[:, 2 * block] = (inside[:, 2 * block] + 1) % V
        moved = (_vectorised(model, inside, x0, 2) - before)[:, own].abs().amax(dim=-1)
        assert (moved > 1e-8).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_block_of_the_whole_row_is_masked_diffusion(name):
    model, (xt, x0) = _model(name), _rows()
    with torch.no_grad():
        wanted = _real(model(xt))
    for clean in (x0, (x0 + 5) % MASK):
        torch.testing.assert_close(_vectorised(model, xt, clean, SEQ_LEN), wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_one_masked_token_are_a_chain_from_left_to_right(name):
    model, (_, x0) = _model(name), _rows()
    found = _vectorised(model, torch.full_like(x0, MASK), x0, 1)
    nats = F.cross_entropy(found.flatten(0, 1), x0.flatten(), reduction="none").view(2, SEQ_LEN)
    for place in range(SEQ_LEN):
        row = torch.cat([x0[:, :place], torch.full_like(x0[:, :1], MASK)], dim=1)
        with torch.no_grad():
            logits = model(row, mask=AttentionMask("causal")).view(2, place + 1, V)[:, -1, :MASK]
        wanted = F.cross_entropy(logits, x0[:, place], reduction="none")
        torch.testing.assert_close(nats[:, place], wanted, rtol=0, atol=ATOL)


DOCS = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_document", [False, True])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_packed_documents_equal_their_separate_runs(name, per_document, backend):
    model, (xt, x0) = _model(name), _rows()
    doc_ids = torch.tensor(DOCS)
    restarted = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 0, 1]])
    positions = restarted if per_document else None
    in_blocks = _vectorised(model, xt, x0, 2, doc_ids=doc_ids, positions=positions, backend=backend)
    with torch.no_grad():
        whole = _real(model(xt, mask=AttentionMask(doc_ids=doc_ids), positions=positions, backend=backend))
    for row in range(2):
        for doc in doc_ids[row].unique().tolist():
            part = doc_ids[row] == doc
            noisy, clean = xt[row, part][None], x0[row, part][None]
            mask = AttentionMask("block_diffusion", block_size=2)
            with torch.no_grad():
                alone = model(noisy)[:, :MASK]
                alone_in_blocks = model(noisy, x0=clean, mask=mask)[:, :MASK]
            torch.testing.assert_close(whole[row, part], alone, rtol=0, atol=ATOL)
            torch.testing.assert_close(in_blocks[row, part], alone_in_blocks, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "llada2-mini"])
def test_documents_in_another_order_have_their_logits_in_that_order(name):
    model, (xt, x0) = _model(name), _rows(1)
    doc_ids, order = torch.tensor([DOCS[0]]), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    there = _vectorised(model, xt, x0, 2, doc_ids=doc_ids)
    swapped = _vectorised(model, xt[:, order], x0[:, order], 2, doc_ids=doc_ids[:, order])
    torch.testing.assert_close(swapped, there[:, order], rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("x0", "mask", "message"),
    [
        (
            None,
            AttentionMask("block_diffusion", block_size=2),
            'x0 is missing, but the mask family is "block_diffusion"',
        ),
        (torch.zeros(2, 8, dtype=torch.int64), AttentionMask(), 'x0 is given, but the mask family is "full"'),
    ],
)
def test_clean_rows_go_with_block_diffusion_alone(x0, mask, message):
    with pytest.raises(ValueError, match=message):
        _model("llada-8b")(_rows()[0], x0=x0, mask=mask)


def test_cache_of_one_pass_over_both_halves_is_refused():
    model, (xt, x0) = _model("llada-8b"), _rows()
    cache = model.make_cache(2, 2 * SEQ_LEN)
    with pytest.raises(ValueError, match='cache is given, but the mask family is "block_diffusion"'):
        model(xt, x0=x0, mask=AttentionMask("block_diffusion", block_size=2), cache=cache)


@pytest.mark.parametrize("name", ["mdlm-small", "llada2-mini"])
@pytest.mark.parametrize("backend", ["structured", "dense"])
def test_plan_made_beforehand_serves_many_passes(name, backend):
    model, mask = _model(name), AttentionMask("block_diffusion", block_size=2)
    plan = plan_attention(mask, 2, SEQ_LEN, device="cpu", backend=backend)
    for seed in (0, 1):
        xt, x0 = _rows(seed=seed)
        with torch.no_grad():
            assert torch.equal(model(xt, x0=x0, mask=plan), model(xt, x0=x0, mask=mask, backend=backend))


def test_plan_beside_a_backend_or_for_another_batch_is_refused():
    model, (xt, x0) = _model("llada-8b"), _rows()
    plan = plan_attention(AttentionMask("block_diffusion", block_size=2), 2, SEQ_LEN, device="cpu")
    with pytest.raises(ValueError, match='backend is "dense", but mask is a plan, for "structured"; leave backend out'):
        model(xt, x0=x0, mask=plan, backend="dense")
    with pytest.raises(ValueError, match='x0 is missing, but the mask family is "block_diffusion"'):
        model(xt, mask=plan)
    with pytest.raises(ValueError, match=r"q has 1 row\(s\) of 16; attention was planned for 2 of 16"):
        model(xt[:1], x0=x0[:1], mask=plan)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("xt", "x0", "mask", "message"),
    [
        ((8,), None, AttentionMask(), r"xt is \[8\]; wanted \[B, L\]$"),
        (
            (2, 8),
            (2, 4),
            AttentionMask("block_diffusion", block_size=2),
            r"xt is \[2, 8\] and x0 \[2, 4\]; wanted .* both",
        ),
        (
            (2, 8),
            None,
            "causal",
            "mask is 'causal'; wanted an AttentionMask, as AttentionMask\\('causal'\\), or a plan",
        ),
    ],
)
def test_tokens_or_a_mask_of_another_kind_are_refused(xt, x0, mask, message):
    rows = None if x0 is None else torch.zeros(x0, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        _model("llada-8b")(torch.zeros(xt, dtype=torch.int64), x0=rows, mask=mask)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(2, 1), (2, 4), (3, 8), (8,)])
def test_positions_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"positions are \[{', '.join(map(str, shape))}\]; wanted one a token of xt"):
        _model("llada-8b")(_rows()[0], positions=torch.zeros(shape, dtype=torch.int64))


def test_config_is_kept_by_the_model():
    config = tiny(PRESETS["llada-8b"])
    assert isinstance(Denoiser(config).config, ModelConfig)
    assert Denoiser(config).config == config
