"""Classifier-free guidance, against the powers of probabilities that it stands for."""

import math

import pytest
import torch

from dlm_core.samplers.guidance import guided_logits

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
