"""The denoiser: sizes, selection of rows, attention both ways, rotary positions, initial weights."""

import cmath
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser, apply_rope, rope_tables

ATOL = 1e-5  # float32 logits of order 1, summed over a few hundred products
SIGMAS = 5.6  # a fair draw leaves this many standard errors once in 47 million; 26 in a test: 5.6e-7

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


# Sizes


@pytest.mark.parametrize("config", [*CONFIGS, ModelConfig(Architecture(), 8192, 8191)])
def test_num_params_equals_real_parameter_count(config):
    with torch.device("meta"):
        model = Denoiser(config)
    assert config.num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("selected", [None, 3])
def test_flops_per_token_is_three_times_the_counted_forward_pass(config, selected):
    num_rows, seq_len = 2, 6
    xt = torch.zeros(num_rows, seq_len, dtype=torch.int64)
    model = _denoiser(config)
    # The counter sees the products of attention only where they are products: not in a fused CPU kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(xt, None if selected is None else torch.arange(selected))
    head_fraction = 1.0 if selected is None else selected / xt.numel()
    assert config.flops_per_token(seq_len, head_fraction) == pytest.approx(
        3 * counter.get_total_flops() / xt.numel(), abs=1
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"d_ff": -1}, "d_ff is -1"),
        ({"d_model": 10, "num_heads": 4}, "multiple of num_heads 4"),
        ({"d_model": 12, "num_heads": 4}, "even"),
        ({"rope_base": 0.0}, "rope_base is 0.0"),
        ({"norm_eps": -1e-6}, "norm_eps is -1e-06"),
        ({"init_std": 0.0}, "init_std is 0.0"),
    ],
)
def test_architecture_with_impossible_size_raises(values, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**values)


@pytest.mark.parametrize("mask_token_id", [-1, 10, 11])
def test_model_config_with_mask_outside_the_vocabulary_raises(mask_token_id):
    with pytest.raises(ValueError, match=f"mask_token_id {mask_token_id}"):
        ModelConfig(Architecture(), vocab_size=10, mask_token_id=mask_token_id)


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


def test_forward_of_a_row_is_independent_of_the_other_rows():
    model, xt = _denoiser(), _tokens(4, 6)
    together = model(xt).reshape(4, 6, 13)
    for row in range(4):
        torch.testing.assert_close(model(xt[row : row + 1]), together[row], rtol=0, atol=ATOL)


def test_forward_of_permuted_tokens_is_not_the_permutation_of_the_logits():
    model, xt = _denoiser(), _tokens(1, 6)
    reversed_logits = model(xt.flip(1)).flip(0)
    assert ((model(xt) - reversed_logits)[:, :12].abs().amax(dim=1) > 100 * ATOL).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_backward_reaches_every_parameter_with_finite_gradients(qk_norm):
    architecture = dataclasses.replace(TINY.architecture, qk_norm=qk_norm)
    model, xt = _denoiser(dataclasses.replace(TINY, architecture=architecture)), _tokens(2, 5)
    torch.nn.functional.cross_entropy(model(xt), _tokens(2, 5, seed=1).flatten() % 12).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# Rotary positions


@pytest.mark.parametrize(("head_dim", "base"), [(2, 10_000.0), (8, 10_000.0), (8, 50.0)])
def test_apply_rope_equals_complex_rotation(head_dim, base):
    seq_len = 5
    x = torch.randn(1, 1, seq_len, head_dim, generator=torch.Generator().manual_seed(0))
    rotated = apply_rope(x, *rope_tables(seq_len, head_dim, base))[0, 0]
    half = head_dim // 2
    for place in range(seq_len):
        for i in range(half):
            pair = complex(float(x[0, 0, place, i]), float(x[0, 0, place, i + half]))
            turned = pair * cmath.exp(1j * place * base ** (-2 * i / head_dim))
            assert float(rotated[place, i]) == pytest.approx(turned.real, abs=ATOL)
            assert float(rotated[place, i + half]) == pytest.approx(turned.imag, abs=ATOL)


def test_apply_rope_makes_scores_depend_on_the_distance_alone():
    seq_len, head_dim = 9, 8
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(head_dim, generator=generator).expand(1, 1, seq_len, head_dim) for _ in range(2))
    tables = rope_tables(seq_len, head_dim, 100.0)
    scores = (apply_rope(q, *tables) @ apply_rope(k, *tables).transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=ATOL)
    distances = torch.stack([scores[i, 0] for i in range(seq_len)] + [scores[0, j] for j in range(1, seq_len)])
    assert len(set(distances.round(decimals=3).tolist())) == 2 * seq_len - 1


# Initial weights


def test_init_weights_is_a_function_of_init_seed_alone():
    torch.manual_seed(1)
    first = _denoiser(init_seed=5).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    model = Denoiser(TINY)
    after_construction = torch.get_rng_state()
    model.init_weights(5)
    assert torch.equal(torch.get_rng_state(), after_construction)
    again, other = _denoiser(init_seed=5).state_dict(), _denoiser(init_seed=6).state_dict()
    assert not torch.equal(state, after_construction)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, other[name]) == (tensor.ndim == 1), name


def test_init_weights_has_the_documented_standard_deviations():
    model = _denoiser(CONFIGS[2], init_std=0.02)
    for name, parameter in model.state_dict().items():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
        count = parameter.numel()
        assert float(parameter.std()) == pytest.approx(std, rel=SIGMAS / math.sqrt(2 * count)), name
        assert abs(float(parameter.mean())) < SIGMAS * std / math.sqrt(count), name
