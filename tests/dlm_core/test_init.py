"""Initial weights: what each init draws, from what, and the loss that a model begins with."""

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.init import expected_initial_loss
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser

SIGMAS = 5.6  # a fair draw leaves this many standard errors once in 47 million; some 200 in a test: 5e-6 of 1

D, FF, LAYERS = 64, 96, 3
MOE = MoE(num_experts=4, top_k=2, d_ff_expert=48, num_shared_experts=1, first_k_dense=1)
WRITES = ("attention.out.weight", "feed_forward.down.weight", "experts.down_proj", "shared_experts.down.weight")
# E[x^2] of a standard normal cut off at 3:  1 - 6 phi(3) / (2 Phi(3) - 1)
CUT_VARIANCE = 1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2))


def _config(init: str, **values) -> ModelConfig:
    std = 0.05 if init in ("normal", "scaled_normal") else None
    sizes = {"d_model": D, "num_layers": LAYERS, "num_heads": 4, "d_ff": FF, "tied_head": False, "qk_norm": True}
    return ModelConfig(Architecture(**(sizes | {"init": init, "init_std": std} | values)), 101, 100)


def _model(config: ModelConfig, init_seed: int = 0) -> Denoiser:
    model = Denoiser(config)
    model.init_weights(init_seed)
    return model


def _std(init: str, name: str, shape: torch.Size) -> float:
    writes, layer = name.endswith(WRITES), int(name.split(".")[1]) if name.startswith("blocks") else 0
    return {
        "normal": 0.05,
        "scaled_normal": 0.05 / math.sqrt(2 * LAYERS) if writes else 0.05,
        "small": 1 / (LAYERS * math.sqrt(D)) if writes else math.sqrt(2 / (5 * D)),
        "mitchell": math.sqrt(CUT_VARIANCE / (2 * shape[-1] * (layer + 1) if writes else D)),
        "mdlm": math.sqrt(1 / (3 * shape[-1])),
    }[init]


@pytest.mark.parametrize("init", ["normal", "scaled_normal", "small", "mitchell", "mdlm"])
@pytest.mark.parametrize("moe", [None, MOE])
def test_init_weights_has_the_documented_standard_deviations(init, moe):
    for name, parameter in _model(_config(init, moe=moe)).state_dict().items():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        if init == "mdlm" and name.startswith("head"):
            assert (parameter == 0).all(), name
            continue
        std, count = _std(init, name, parameter.shape), parameter.numel()
        assert float(parameter.std()) == pytest.approx(std, rel=SIGMAS / math.sqrt(2 * count)), name
        assert abs(float(parameter.mean())) < SIGMAS * std / math.sqrt(count), name
        if init == "mdlm":
            assert float(parameter.abs().max()) <= 1 / math.sqrt(parameter.shape[-1]), name
        if init == "mitchell":
            assert float(parameter.abs().max()) <= 3 * std / math.sqrt(CUT_VARIANCE) * (1 + 1e-6), name


def test_init_weights_of_biases_are_zero_but_uniform_in_mdlm():
    plain = _model(_config("normal", qkv_bias=True, head_bias=True)).state_dict()
    biases = [name for name in plain if name.endswith("bias")]
    assert len(biases) == LAYERS + 1
    assert all((plain[name] == 0).all() for name in biases)
    dit = _model(tiny(PRESETS["mdlm-small"])).state_dict()
    for name, parameter in dit.items():
        if name.endswith(("up.bias", "down.bias", "out.bias")):
            bound = 1 / math.sqrt(dit[name.replace("bias", "weight")].shape[-1])
            assert 0.3 * bound < float(parameter.abs().mean()) < 0.7 * bound, name
            assert float(parameter.abs().max()) <= bound, name


def test_init_weights_sets_the_selection_bias_of_every_router_to_zero():
    with torch.device("meta"):
        model = Denoiser(tiny(PRESETS["llada2-mini"]))
    model.to_empty(device="cpu")
    biases = dict(model.named_buffers())
    assert [name.rpartition(".")[2] for name in biases] == ["e_score_correction_bias"]
    for bias in biases.values():
        bias.fill_(3.0)
    model.init_weights(0)
    assert all((bias == 0).all() for bias in model.buffers())


def test_init_weights_of_modulations_and_the_head_of_mdlm_are_zero():
    zero = [name for name, p in _model(tiny(PRESETS["mdlm-small"])).named_parameters() if (p == 0).all()]
    names = [f"{place}modulation.{kind}" for place in ("blocks.0.", "blocks.1.", "") for kind in ("weight", "bias")]
    assert sorted(zero) == sorted([*names, "head.weight", "head.bias"])


@pytest.mark.parametrize("name", PRESETS)
def test_init_weights_is_a_function_of_init_seed_alone(name):
    config = tiny(PRESETS[name])
    torch.manual_seed(1)
    first = _model(config, 5).state_dict()
    torch.manual_seed(2)
    model = Denoiser(config)
    state = torch.get_rng_state()
    model.init_weights(5)
    assert torch.equal(torch.get_rng_state(), state)
    other = _model(config, 6).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[key]), key
        drawn = tensor.ndim > 1 and bool((tensor != 0).any())
        assert not drawn or not torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(
    ("init", "tied_head"),
    [*itertools.product(["normal", "scaled_normal", "small", "mitchell"], [False, True]), ("mdlm", False)],
)
def test_loss_of_untrained_model_is_the_expected_one(init, tied_head):
    config = dataclasses.replace(_config(init, tied_head=tied_head), vocab_size=1500, mask_token_id=1499)
    losses = []
    for seed in range(8):
        x0 = torch.randint(1499, (8, 16), generator=torch.Generator().manual_seed(seed))
        xt = torch.where(torch.rand(8, 16, generator=torch.Generator().manual_seed(seed)) < 0.5, 1499, x0)
        masked = (xt == 1499).flatten()
        with torch.no_grad():
            logits = _model(config, seed)(xt)[masked]
        losses.append(float(F.cross_entropy(logits, x0.flatten()[masked])))
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    expected = expected_initial_loss(config)
    # 7 degrees of freedom: 12 standard errors of Student's t once in 150,000; and 1 % for what log of a mean leaves out
    assert abs(statistics.mean(losses) - expected) < 12 * error + 0.01 * expected
    assert (expected > math.log(1499) + 0.05) == (init != "mdlm")


def test_loss_of_untrained_head_of_zeros_is_exactly_the_logarithm():
    config = tiny(PRESETS["mdlm-small"])
    logits = _model(config)(torch.arange(10)[None])
    nats = F.cross_entropy(logits.double(), torch.arange(10), reduction="none")
    assert nats.tolist() == pytest.approx([math.log(config.vocab_size - 1)] * 10, abs=1e-12)
    assert expected_initial_loss(config) == math.log(config.vocab_size - 1)
