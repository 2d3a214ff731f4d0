"""The DiT of MDLM and BD3-LM: our denoiser on their weights against their formulas, written a second time."""

import pytest
import torch

from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import Denoiser
from pipeline.hf_config import read_config
from pipeline.hf_names import Family, to_family
from tests.support import their_dit

CONFIG = {
    "vocab_size": 11,
    "model_length": 8,
    "hidden_dim": 8,
    "cond_dim": 4,
    "n_blocks": 2,
    "n_heads": 2,
    "dropout": 0.1,
    "time_conditioning": False,
    "return_dict": False,
    "transformers_version": "4.38.2",
}
MDLM = CONFIG | {"model_type": "mdlm", "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"}}
BD3LM = CONFIG | {
    "model_type": "bd3lm",
    "adaln": True,
    "attn_backend": "sdpa",
    "block_size": 2,
    "causal": False,
    "cross_attn": True,
    "sampling_eps_max": 0.999,
    "sampling_eps_min": 1e-3,
    "var_min": True,
}
TOKENS = [3, 10, 0, 10, 7, 10]
ATOL = 1e-12


def _denoiser(config: dict) -> Denoiser:
    """With weights of float64 that leave nothing at 0 or 1."""
    model = Denoiser(read_config(config).model).double().eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _theirs(family: Family, model: Denoiser) -> dict[str, torch.Tensor]:
    return to_family(family, model.config.architecture, model.state_dict())


def _assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    real = torch.arange(11) != 10  # the mask, whose logit is -inf here
    torch.testing.assert_close(ours[:, real], theirs[:, real], rtol=0, atol=ATOL)
    assert bool(ours[:, 10].isneginf().all())


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_mdlm_logits_are_those_of_its_formulas(sigma):
    model = _denoiser(MDLM | {"time_conditioning": sigma > 0})
    level = torch.tensor([[sigma]], dtype=torch.float64) if sigma else None
    with torch.no_grad():
        ours = model(torch.tensor([TOKENS]), noise_level=level)
    positions, everywhere = list(range(len(TOKENS))), torch.ones(6, 6, dtype=torch.bool)
    theirs = their_dit.logits(_theirs("mdlm", model), TOKENS, positions, everywhere, sigma, 2)
    _assert_same(ours, theirs)


@pytest.mark.parametrize("adaln", [True, False])
def test_bd3lm_logits_of_a_noisy_half_beside_a_clean_one_are_those_of_its_formulas(adaln):
    model = _denoiser(BD3LM | {"adaln": adaln})
    clean = [3, 1, 0, 5, 7, 2]
    with torch.no_grad():
        mask = AttentionMask("block_diffusion", block_size=2)
        ours = model(torch.tensor([TOKENS]), x0=torch.tensor([clean]), mask=mask)
    block = torch.arange(6) // 2
    same, later, earlier = block[:, None] == block, block[:, None] > block, block[:, None] >= block
    may_attend = torch.cat([torch.cat([same, later], 1), torch.cat([torch.zeros_like(same), earlier], 1)])
    both, positions = TOKENS + clean, [*range(6), *range(6)]
    theirs = their_dit.logits(_theirs("bd3lm", model), both, positions, may_attend, 0.0, 2)
    _assert_same(ours, theirs[:6])


def test_mdlm_is_read_with_the_last_id_as_mask_and_bd3lm_with_its_blocks():
    mdlm, bd3lm = read_config(MDLM), read_config(BD3LM)
    assert (mdlm.family, mdlm.objective, mdlm.block_size, mdlm.model.mask_token_id) == ("mdlm", "masked_nelbo", 0, 10)
    assert (bd3lm.family, bd3lm.objective, bd3lm.block_size) == ("bd3lm", "block_nelbo", 2)
    assert (bd3lm.seq_len, bd3lm.target_offset) == (8, 0)
