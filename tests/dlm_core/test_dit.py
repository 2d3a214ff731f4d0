"""The DiT of MDLM and BD3-LM against a second, naive implementation: knowing time and not, whole and in blocks."""

import dataclasses

import pytest
import torch

from dlm_core import masks
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import ModelConfig
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser
from tests.support import naive_dit

ATOL = 1e-10  # float64 logits of order 1
SEQ_LEN, BLOCK_SIZE = 6, 2


def _model(*, time_conditioning: bool) -> Denoiser:
    config = tiny(PRESETS["mdlm-small"], vocab_size=11)
    architecture = dataclasses.replace(
        config.architecture, d_model=8, num_heads=2, d_ff=12, time_conditioning=time_conditioning
    )
    model = Denoiser(ModelConfig(architecture, 11, 10)).double()
    with torch.no_grad():  # away from the zeros and ones of the first step, so that everything matters
        for index, parameter in enumerate(model.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter.copy_(0.4 * drawn)
    return model


def _rows(seed: int) -> torch.Tensor:
    return torch.randint(11, (2, SEQ_LEN), generator=torch.Generator().manual_seed(seed))


def _assert_equal(model: Denoiser, logits: torch.Tensor, rows: list[torch.Tensor]) -> None:
    real = torch.arange(11) != model.config.mask_token_id
    wanted = torch.cat([row[:SEQ_LEN] for row in rows])
    torch.testing.assert_close(logits[:, real], wanted[:, real], rtol=0, atol=ATOL)


@pytest.mark.parametrize("levels", [None, [[0.3], [2.5]], [[0.0, 0.7, 3.0], [1.0, 0.2, 9.0]]])
def test_masked_diffusion_logits_equal_those_of_the_naive_network(levels):
    model, xt = _model(time_conditioning=levels is not None), _rows(0)
    weights, a = dict(model.named_parameters()), model.config.architecture
    noise_level = None if levels is None else torch.tensor(levels, dtype=torch.float64)
    with torch.no_grad():
        logits = model(xt, noise_level=noise_level)
        rows = []
        for row in range(2):
            of_row = [0.0] if levels is None else levels[row]
            conditions = [naive_dit.condition(weights, of_row[i * len(of_row) // SEQ_LEN]) for i in range(SEQ_LEN)]
            everywhere = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool)
            rows.append(
                naive_dit.logits_of_row(weights, a, xt[row].tolist(), list(range(SEQ_LEN)), conditions, everywhere)
            )
    _assert_equal(model, logits, rows)


@pytest.mark.parametrize("levels", [None, [[0.3], [2.5]], [[0.1, 0.7, 3.0], [1.0, 0.2, 9.0]]])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_block_diffusion_logits_equal_those_of_the_naive_network_on_both_halves(levels, backend):
    model, xt, x0 = _model(time_conditioning=levels is not None), _rows(1), _rows(2)
    weights, a = dict(model.named_parameters()), model.config.architecture
    noise_level = None if levels is None else torch.tensor(levels, dtype=torch.float64)
    predicate = masks.block_diffusion(SEQ_LEN, BLOCK_SIZE)
    table = masks.dense_mask(predicate, 1, 2 * SEQ_LEN)[0]
    mask = AttentionMask("block_diffusion", block_size=BLOCK_SIZE)
    with torch.no_grad():
        logits = model(xt, x0=x0, mask=mask, noise_level=noise_level, backend=backend)
        rows = []
        for row in range(2):
            of_row = [0.0] if levels is None else levels[row]
            noisy = [of_row[i * len(of_row) // SEQ_LEN] for i in range(SEQ_LEN)]
            conditions = [naive_dit.condition(weights, level) for level in [*noisy, *[0.0] * SEQ_LEN]]
            tokens, positions = [*xt[row].tolist(), *x0[row].tolist()], [*range(SEQ_LEN)] * 2
            rows.append(naive_dit.logits_of_row(weights, a, tokens, positions, conditions, table))
    _assert_equal(model, logits, rows)


def test_noise_level_moves_the_logits_only_of_a_model_that_knows_time():
    model, xt = _model(time_conditioning=True), _rows(0)
    near, far = (model(xt, noise_level=torch.full((2, 1), level, dtype=torch.float64)) for level in (0.1, 2.0))
    assert float((near - far)[:, :10].detach().abs().max()) > 1e-3
    with pytest.raises(ValueError, match="noise_level is missing, but time_conditioning is True"):
        model(xt)
    with pytest.raises(ValueError, match="noise_level is given, but time_conditioning is False"):
        _model(time_conditioning=False)(xt, noise_level=torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"noise_level runs from .* to inf; -log alpha_t is at least 0"):
        model(xt, noise_level=torch.tensor([[0.5], [torch.inf]], dtype=torch.float64))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (3, 1), (2,)])
def test_noise_level_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"noise_level is \[.*\]; wanted \[2, K\] with K parts that divide a row of 6"):
        _model(time_conditioning=True)(_rows(0), noise_level=torch.zeros(shape, dtype=torch.float64))
