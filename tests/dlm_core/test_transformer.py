"""The denoiser: selection of rows, the head, attention both ways, what reaches what."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser

ATOL = 1e-5  # float32 logits of order 1, summed over a few hundred products

TINY = ModelConfig(Architecture(d_model=16, num_layers=2, num_heads=2, d_ff=24), vocab_size=13, mask_token_id=12)
CONFIGS = [
    TINY,
    ModelConfig(Architecture(d_model=8, num_layers=1, num_heads=4, d_ff=5), vocab_size=3, mask_token_id=0),
    ModelConfig(Architecture(d_model=64, num_layers=3, num_heads=1, d_ff=128), vocab_size=40, mask_token_id=7),
    ModelConfig(
        Architecture(d_model=12, num_layers=2, num_heads=2, d_ff=9, qk_norm=True), vocab_size=6, mask_token_id=5
    ),
]


def _denoiser(config: ModelConfig = TINY, init_seed: int = 0, init_std: float = 0.3) -> Denoiser:
    """Weights large enough that attention is far from uniform."""
    architecture = dataclasses.replace(config.architecture, init_std=init_std)
    model = Denoiser(dataclasses.replace(config, architecture=architecture))
    model.init_weights(init_seed)
    return model


def _tokens(num_rows: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(13, (num_rows, seq_len), generator=torch.Generator().manual_seed(seed))


# The forward pass


def test_forward_with_select_equals_rows_of_all_logits():
    model, xt = _denoiser(), _tokens(3, 5)
    every, select = model(xt), torch.tensor([14, 0, 7, 7])
    assert every.shape == (15, 13)
    torch.testing.assert_close(model(xt, select), every[select], rtol=0, atol=ATOL)
    assert model(xt, torch.zeros(0, dtype=torch.int64)).shape == (0, 13)


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_with_targets_equals_weighted_cross_entropy_of_the_logits(config):
    model = _denoiser(config).double()
    x0 = torch.randint(config.vocab_size, (2, 5), generator=torch.Generator().manual_seed(3))
    select = (x0.flatten() != config.mask_token_id).nonzero().squeeze(1)[[0, 3, 1]]
    targets, weight = x0.flatten()[select], torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    nats = F.cross_entropy(model(x0, select), targets, reduction="none")
    wanted = torch.autograd.grad((nats * weight).sum(), list(model.parameters()))
    head = model(x0, select, targets, weight)
    torch.testing.assert_close(head.cross_entropy, nats.detach(), rtol=1e-10, atol=1e-12)
    for found, gradient in zip(torch.autograd.grad(head.loss_sum, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("given", [{"targets": torch.tensor([1])}, {"weight": torch.tensor([1.0])}])
def test_forward_with_targets_or_weight_alone_raises(given):
    with pytest.raises(ValueError, match="targets and weight come together"):
        _denoiser()(_tokens(1, 3), torch.tensor([1]), **given)


def test_without_a_mask_token_every_logit_is_that_of_the_head():
    xt, bare = _tokens(2, 6), _denoiser(dataclasses.replace(TINY, mask_token_id=None))
    masked = _denoiser()
    logits, excluded = bare(xt), masked(xt)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[:, :-1], excluded[:, :-1], atol=0, rtol=0)
    targets, weight = xt.flatten(), torch.ones(xt.numel())
    loss = bare(xt, None, targets, weight).cross_entropy
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"), atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", ["full", "block_diffusion"])
def test_noise_on_the_mask_is_another_embedding_of_it_in_the_noisy_half_alone(family):
    config = dataclasses.replace(TINY, architecture=dataclasses.replace(TINY.architecture, tied_head=False))
    model, moved = _denoiser(config), _denoiser(config)
    noise = torch.randn(16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        moved.embedding.weight[12] += noise
    x0 = _tokens(2, 6)
    x0[0, 1] = 12  # a mask in the clean half would have no noise
    xt = torch.where(torch.arange(6) % 2 == 0, 12, x0 % 12)
    clean = {"x0": x0 % 12} if family == "block_diffusion" else {}
    mask = AttentionMask(family, block_size=2 if clean else None)

    def perturb(embeddings):
        assert embeddings.shape == (2, 6, 16)
        return embeddings + noise * (xt == 12)[..., None]

    found, wanted = model(xt, mask=mask, perturb=perturb, **clean), moved(xt, mask=mask, **clean)
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)
    assert not torch.allclose(found, model(xt, mask=mask, **clean), atol=0.1)
    if clean:
        with_mask = {"x0": x0}
        found = model(xt, mask=mask, perturb=perturb, **with_mask)
        assert not torch.allclose(found, moved(xt, mask=mask, **with_mask), atol=0.01)


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_gives_the_mask_token_alone_no_probability(config):
    logits = _denoiser(config)(torch.zeros(1, 4, dtype=torch.int64))
    is_mask = torch.arange(config.vocab_size) == config.mask_token_id
    assert (logits[:, is_mask] == -torch.inf).all()
    assert logits[:, ~is_mask].isfinite().all()


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_forward_with_one_token_changed_changes_logits_at_every_position(changed):
    model, xt = _denoiser(), _tokens(1, 7)
    other = xt.clone()
    other[0, changed] = (other[0, changed] + 1) % 12
    difference = (model(xt)[:, :12] - model(other)[:, :12]).abs().amax(dim=1)
    assert (difference > 100 * ATOL).all()


@pytest.mark.parametrize("name", PRESETS)
def test_forward_on_the_meta_device_has_the_shape_of_the_logits(name):
    config = tiny(PRESETS[name])
    with torch.device("meta"):
        logits = Denoiser(config)(torch.zeros(2, 6, dtype=torch.int64))
    assert (logits.device.type, tuple(logits.shape)) == ("meta", (12, config.vocab_size))


def test_forward_of_a_row_is_independent_of_the_other_rows():
    model, xt = _denoiser(), _tokens(4, 6)
    together = model(xt).reshape(4, 6, 13)
    for row in range(4):
        torch.testing.assert_close(model(xt[row : row + 1]), together[row], rtol=0, atol=ATOL)


def test_forward_of_permuted_tokens_is_not_the_permutation_of_the_logits():
    model, xt = _denoiser(), _tokens(1, 6)
    reversed_logits = model(xt.flip(1)).flip(0)
    assert ((model(xt) - reversed_logits)[:, :12].abs().amax(dim=1) > 100 * ATOL).all()


@pytest.mark.parametrize("name", PRESETS)
def test_backward_reaches_every_parameter_of_every_family_with_finite_gradients(name):
    config = tiny(PRESETS[name])
    model = Denoiser(config)
    with torch.no_grad():  # nothing at the zeros of the first step
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) + 0.05)
    xt = torch.randint(config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    targets = xt.flatten() % (config.vocab_size - 1)
    select = torch.arange(0, 96, 2)
    model(xt, select, targets[select], torch.ones(48)).loss_sum.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", PRESETS)
def test_forward_of_every_family_sees_every_position_and_no_other_row(name):
    config = tiny(PRESETS[name])
    model = Denoiser(config).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) + 0.05)
    xt = torch.randint(config.vocab_size - 1, (3, 5), generator=torch.Generator().manual_seed(0))
    other = xt.clone()
    other[1, 4] = (other[1, 4] + 1) % (config.vocab_size - 1)
    with torch.no_grad():
        moved = (model(xt) - model(other))[:, : config.vocab_size - 1].abs().amax(dim=1).view(3, 5)
    assert (moved[1] > 1e-7).all()
    assert float(moved[[0, 2]].max()) < 1e-12
