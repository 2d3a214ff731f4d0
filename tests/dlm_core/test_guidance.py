"""Classifier-free guidance, against the powers of probabilities that it stands for."""

import math

import pytest
import torch

from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.contexts import Whole
from dlm_core.samplers.guidance import Guided, guided_logits
from dlm_core.samplers.loop import without_pass
from dlm_core.samplers.planned import FirstHitting
from dlm_core.samplers.proposal import Proposal
from tests.support.sampling import tiny_model

EXACT = 1e-12  # a few float64 operations
FLOAT32 = 1e-6  # one rounding of a subtraction and its reverse, of numbers of size one


def _pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64).to(dtype)
    return conditional, unconditional


@pytest.mark.parametrize("w", [-1.0, -0.5, 0.0, 0.5, 3.0])
def test_guided_logits_follow_the_powers_of_both_distributions(w):
    conditional, unconditional = _pair()
    found = guided_logits(conditional, unconditional, w).softmax(dim=1).tolist()
    for row, (c, u) in enumerate(
        zip(conditional.softmax(dim=1).tolist(), unconditional.softmax(dim=1).tolist(), strict=True)
    ):
        weights = [p_c ** (1 + w) / p_u**w for p_c, p_u in zip(c, u, strict=True)]
        assert found[row] == pytest.approx([weight / math.fsum(weights) for weight in weights], rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_guided_logits_with_w_zero_are_exactly_the_conditional_ones(dtype):
    conditional, unconditional = _pair(dtype)
    assert torch.equal(guided_logits(conditional, 300 * unconditional, 0.0), conditional)


def test_guided_logits_with_w_minus_one_are_the_unconditional_ones():
    conditional, unconditional = _pair()
    found = guided_logits(conditional, unconditional, -1.0)
    torch.testing.assert_close(found, unconditional, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("tutorial_w", [0.0, 1.0, 2.5])
def test_guided_logits_take_a_w_one_less_than_tutorials(tutorial_w):
    conditional, unconditional = _pair()
    theirs = unconditional + tutorial_w * (conditional - unconditional)
    torch.testing.assert_close(
        guided_logits(conditional, unconditional, tutorial_w - 1), theirs, rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize("w", [-1.0, 0.0, 2.0])
def test_guided_logits_of_an_id_excluded_on_either_side_stay_excluded(w):
    conditional, unconditional = _pair()
    allowed = guided_logits(conditional, unconditional, w)
    conditional[:, 1] = unconditional[:, 1] = conditional[:, 2] = -torch.inf
    unconditional[:, 4] = -torch.inf
    found = guided_logits(conditional, unconditional, w)
    assert (found[:, [1, 2, 4]] == -torch.inf).all()
    assert torch.equal(found[:, [0, 3]], allowed[:, [0, 3]])


def test_guided_logits_keep_their_dtype():
    conditional, unconditional = _pair(torch.float32)
    found = guided_logits(conditional, unconditional, 1.5)
    assert found.dtype == torch.float32
    wide = guided_logits(conditional.double(), unconditional.double(), 1.5)
    torch.testing.assert_close(found.double(), wide, rtol=FLOAT32, atol=FLOAT32)


# Sampling under guidance


def _rows() -> torch.Tensor:
    """Two rows with prompts of their own, one with a given token behind masks."""
    mask = tiny_model().config.mask_token_id
    return torch.tensor([[3, 5, 7, mask, mask, mask, mask, mask], [9, 2, mask, mask, 4, mask, mask, mask]])


def _guided(w: float, num_given: int = 0, block_size: int = 8, xt: torch.Tensor | None = None):
    mask = tiny_model().config.mask_token_id
    context = Guided(without_pass(tiny_model()), w, mask, num_given)
    with torch.no_grad():
        return sample_blocks(
            context, _rows() if xt is None else xt, FirstHitting(), Proposal(0.0), block_size=block_size,
            mask_token_id=mask, noise_seed=1, keep_frames=True,
        )  # fmt: skip


@pytest.mark.parametrize(("num_given", "block_size"), [(0, 8), (1, 8), (0, 4)])
def test_each_token_is_the_best_of_the_guided_logits_of_its_pass(num_given, block_size):
    """What was filled before a pass is no prompt, in whichever window."""
    mask, done = tiny_model().config.mask_token_id, _guided(2.0, num_given, block_size)
    is_prompt = _rows() != mask
    is_prompt[:, :num_given] = False
    num_tokens = 0
    for before, after in zip(done.frames, done.frames[1:], strict=False):
        for row, place in (before != after).nonzero().tolist():
            with torch.no_grad():
                c = tiny_model()(before[row : row + 1])[place]
                u = tiny_model()(before[row : row + 1].masked_fill(is_prompt[row : row + 1], mask))[place]
            logits = torch.where(torch.arange(len(c)) == mask, -torch.inf, 3 * c - 2 * u)
            assert after[row, place] == logits.argmax()
            num_tokens += 1
    assert num_tokens == int((_rows() == mask).sum())
    assert done.nfe.tolist() == [2 * 5, 2 * 5]


def test_guidance_of_zero_in_both_branches_fills_the_rows_as_one_branch_does():
    mask = tiny_model().config.mask_token_id
    with torch.no_grad():
        plain = sample_blocks(
            Whole(without_pass(tiny_model())), _rows(), FirstHitting(), Proposal(0.0), block_size=8, mask_token_id=mask,
            noise_seed=1,
        )  # fmt: skip
    zero = _guided(0.0)
    assert torch.equal(plain.x0, zero.x0)
    assert torch.equal(2 * plain.nfe, zero.nfe)
    assert not torch.equal(plain.x0, _guided(2.0).x0)


@pytest.mark.parametrize("w", [-1.0, math.inf, math.nan])
def test_guidance_out_of_range_is_refused(w):
    with pytest.raises(ValueError, match=r"w is .*; it must be 0 or more, and finite"):
        Guided(without_pass(tiny_model()), w, 0)
