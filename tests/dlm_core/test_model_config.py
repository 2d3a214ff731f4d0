"""Sizes of a denoiser: what is refused, what the published models count, what a pass costs."""

import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlm_core.masks import block_causal, block_diffusion, causal, dense_mask, full
from dlm_core.models.config import Architecture, ModelConfig, MoE, RopeScaling
from dlm_core.models.moe import Experts
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser

SPARSE = {"num_experts": 8, "top_k": 2, "d_ff_expert": 4}
YARN = {"kind": "yarn", "factor": 2.0, "original_seq_len": 64, "low_factor": 1.0, "high_factor": 32.0}


def _architecture(**values) -> Architecture:
    return Architecture(**({"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24} | values))


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model is 0; it must be at least 1"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"d_ff": -1}, "d_ff is -1"),
        ({"cond_dim": 0}, "cond_dim is 0"),
        ({"d_model": 10, "num_heads": 4}, "d_model 10 must be a multiple of num_heads 4, or head_dim be given"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads is 3; it must divide num_heads 4"),
        ({"d_model": 12, "num_heads": 4}, r"head_dim \* rope_fraction is 3 \* 1\.0 = 3; .*even"),
        ({"head_dim": 6, "rope_fraction": 0.5}, r"is 6 \* 0\.5 = 3; .*even"),
        ({"head_dim": 8, "rope_fraction": 0.3}, r"is 8 \* 0\.3 = 2\.4; .*even"),
        ({"rope_fraction": 0.0}, r"rope_fraction is 0\.0; it must lie in \(0, 1\]"),
        ({"rope_fraction": 1.5}, r"rope_fraction is 1\.5"),
        ({"rope_base": 0.0}, r"rope_base is 0\.0; it must be above 1 and finite"),
        ({"rope_base": 1.0}, r"rope_base is 1\.0"),
        ({"rope_base": math.inf}, "rope_base is inf"),
        ({"norm_eps": math.inf}, "norm_eps is inf; it must be positive and finite"),
        ({"init_std": math.inf}, 'init_std is inf; init "scaled_normal" needs a positive one'),
        ({"norm_eps": -1e-6}, "norm_eps is -1e-06"),
        ({"rope_base": float("nan")}, "rope_base is nan"),
        ({"d_ff": None}, "d_ff is None, but layer 0 has no experts"),
        ({"moe": MoE(**SPARSE)}, "d_ff is 24, but every layer has experts"),
        ({"moe": MoE(**SPARSE, first_k_dense=1), "d_ff": None}, "d_ff is None, but layer 0 has no experts"),
        ({"moe": MoE(**SPARSE, layer_frequency=2), "d_ff": None}, "d_ff is None, but layer 1 has no experts"),
        (
            {"moe": MoE(**SPARSE, first_k_dense=1, layer_frequency=3), "num_layers": 3},
            "moe.layer_frequency is 3, more than the 3 layers have after first_k_dense 1",
        ),
        ({"moe": MoE(**SPARSE, first_k_dense=2)}, "first_k_dense is 2, so none of the 2 layers has experts"),
        ({"moe": MoE(**SPARSE), "d_ff": None, "activation": "gelu"}, 'activation is "gelu"; experts are "swiglu"'),
        ({"time_conditioning": True}, "time_conditioning is true without a cond_dim"),
        ({"head_bias": True}, "head_bias is true, but a head that is the embedding has none"),
        ({"init": "mdlm", "init_std": None}, 'init "mdlm" begins with a head of zeros, so it needs tied_head false'),
        ({"init_std": 0.0}, r'init_std is 0\.0; init "scaled_normal" needs a positive one'),
        ({"init_std": None, "init": "normal"}, 'init_std is None; init "normal" needs a positive one'),
        ({"init": "small"}, r'init_std is 0\.02, which init "small" ignores'),
    ],
)
def test_architecture_that_cannot_be_raises(values, message):
    with pytest.raises(ValueError, match=message):
        _architecture(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "moe.num_experts is 0; it must be at least 1"),
        ({"top_k": 0}, "moe.top_k is 0"),
        ({"d_ff_expert": 0}, "moe.d_ff_expert is 0"),
        ({"num_groups": 0}, "moe.num_groups is 0"),
        ({"top_groups": 0}, "moe.top_groups is 0"),
        ({"layer_frequency": 0}, "moe.layer_frequency is 0"),
        ({"num_shared_experts": -1}, "moe.num_shared_experts is -1; it must not be negative"),
        ({"first_k_dense": -1}, "moe.first_k_dense is -1"),
        ({"routed_scale": 0.0}, r"moe.routed_scale is 0\.0; it must be positive and finite"),
        ({"routed_scale": math.inf}, "moe.routed_scale is inf"),
        ({"top_k": 8}, "moe.renormalise is true, but a softmax over all 8 experts sums to 1; set it to false"),
        ({"top_k": 9}, "moe.top_k is 9; there are only 8 experts"),
        ({"num_groups": 3}, "moe.num_groups is 3; it must divide num_experts 8"),
        ({"top_groups": 2}, "moe.top_groups is 2; there are only 1 groups"),
        ({"num_groups": 8}, "moe.num_groups is 8 for 8 experts; .* needs at least 2"),
        ({"num_groups": 2, "top_groups": 2}, "moe.top_groups is 2 of 2 groups, which limits nothing"),
        ({"top_k": 1}, "moe.renormalise is true with top_k 1: .* the router learn nothing"),
        (
            {"top_k": 8, "selection_bias": True, "router_score": "sigmoid"},
            "moe.selection_bias is true, but top_k 8 takes every expert",
        ),
        ({"num_groups": 4, "top_k": 3}, r"moe.top_k is 3, but 1 group\(s\) of 2 experts hold only 2"),
    ],
)
def test_experts_that_cannot_be_raise(values, message):
    with pytest.raises(ValueError, match=message):
        MoE(**SPARSE | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0.5}, r"rope_scaling.factor is 0\.5; it must be above 1, or rope_scaling None"),
        ({"factor": 1.0}, r"rope_scaling.factor is 1\.0"),
        ({"factor": math.inf}, "rope_scaling.factor is inf"),
        ({"factor": float("nan")}, "rope_scaling.factor is nan"),
        ({"kind": "linear"}, "rope_scaling.original_seq_len is 64, which linear scaling ignores"),
        ({"original_seq_len": None}, "rope_scaling.original_seq_len is None; yarn scaling needs a number above 0"),
        ({"low_factor": 0.0}, r"rope_scaling.low_factor is 0\.0"),
        ({"high_factor": None, "kind": "llama3"}, "rope_scaling.high_factor is None; llama3 scaling needs"),
        ({"low_factor": 32.0}, r"from low_factor 32\.0 to high_factor 32\.0; low_factor must be the smaller"),
    ],
)
def test_rope_scaling_that_makes_no_ramp_raises(values, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**YARN | values)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (_architecture, {"norm": "batch"}, 'norm is "batch"; it must be one of rms, layer'),
        (_architecture, {"activation": "relu"}, 'activation is "relu"; it must be one of swiglu, gelu'),
        (_architecture, {"init": "zeros"}, 'init is "zeros"; it must be one of normal, scaled_normal, small'),
        (MoE, SPARSE | {"router_score": "tanh"}, 'moe.router_score is "tanh"; it must be one of softmax, sigmoid'),
        (RopeScaling, YARN | {"kind": "dynamic"}, 'rope_scaling.kind is "dynamic"; it must be one of linear, llama3'),
    ],
)
def test_choice_that_does_not_exist_raises_and_lists_those_that_do(make, values, message):
    with pytest.raises(ValueError, match=message):
        make(**values)


@pytest.mark.parametrize("mask_token_id", [-1, 10, 11])
def test_model_config_with_mask_outside_the_vocabulary_raises(mask_token_id):
    with pytest.raises(ValueError, match=f"mask_token_id {mask_token_id} is outside the vocabulary of 10"):
        ModelConfig(Architecture(), vocab_size=10, mask_token_id=mask_token_id)


def test_model_config_without_room_for_a_real_token_raises():
    with pytest.raises(ValueError, match="vocab_size is 1; there must be room for the mask and a real token"):
        ModelConfig(Architecture(), vocab_size=1, mask_token_id=0)


def test_least_sizes_make_a_model():
    moe = MoE(num_experts=1, top_k=1, d_ff_expert=1, renormalise=False)
    least = Architecture(d_model=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, d_ff=None, moe=moe)
    model = Denoiser(ModelConfig(least, vocab_size=2, mask_token_id=0))
    model.init_weights(0)
    assert model(torch.tensor([[1]])).tolist()[0][0] == -torch.inf


def test_layers_with_experts_are_those_that_the_fields_say():
    moe = MoE(**SPARSE, first_k_dense=1, layer_frequency=2)
    assert [moe.is_sparse(layer) for layer in range(6)] == [False, True, False, True, False, True]


# What the published models count


@pytest.mark.parametrize(
    ("name", "count", "published"),
    [
        ("llada-moe-7b-a1b", ModelConfig.num_params, 7_356_880_896),
        ("llada-moe-7b-a1b", ModelConfig.num_active_params, 1_397_823_488),
        ("llada-8b", ModelConfig.num_params, 8_015_581_184),
        ("dream-7b", ModelConfig.num_params, 7_615_616_512),
        ("qwen2.5-7b", ModelConfig.num_params, 7_615_616_512),
        ("smdm-6", ModelConfig.num_non_embedding_params, 6_294_784),
        ("llama3.1-8b", ModelConfig.num_params, 8_030_261_248),
        ("qwen3-0.6b", ModelConfig.num_params, 596_049_920),
        ("qwen3-30b-a3b", ModelConfig.num_params, 30_532_122_624),
    ],
)
def test_count_of_published_model_is_the_published_one(name, count, published):
    assert count(PRESETS[name].model) == published


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_preset_equal_those_of_the_real_module(name):
    for config in (PRESETS[name].model, tiny(PRESETS[name])):
        with torch.device("meta"):
            model = Denoiser(config)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        tables = sum(size for name, size in sizes.items() if name.startswith(("embedding.", "head.")))
        assert config.num_params() == sum(sizes.values())
        assert config.num_non_embedding_params() == sum(sizes.values()) - tables
        moe = config.architecture.moe
        idle = 0 if moe is None else 1 - moe.top_k / moe.num_experts
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        looked_up = 0 if config.architecture.tied_head else sizes["embedding.weight"]
        assert config.num_active_params() == sum(sizes.values()) - looked_up - idle * experts


@pytest.mark.parametrize("name", PRESETS)
def test_tiny_preset_keeps_every_option_of_its_family(name):
    sizes = {"d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "cond_dim", "moe"}
    whole, small = PRESETS[name].model.architecture, tiny(PRESETS[name]).architecture
    for field in dataclasses.fields(Architecture):
        ours, theirs = getattr(small, field.name), getattr(whole, field.name)
        assert (ours is None) == (theirs is None) if field.name in sizes else ours == theirs
    if whole.moe is not None and small.moe is not None:
        for field in {"router_score", "renormalise", "routed_scale", "selection_bias", "num_shared_experts"}:
            assert getattr(small.moe, field) == getattr(whole.moe, field)
        assert (small.moe.num_groups > 1) == (whole.moe.num_groups > 1)
        assert small.moe.top_groups < small.moe.num_groups or whole.moe.num_groups == 1
    assert tiny(PRESETS[name]).num_params() < 50_000


# What a pass costs


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("selected", [None, 3])
def test_flops_per_token_are_those_counted_in_a_forward_pass(name, selected):
    config, xt = tiny(PRESETS[name]), torch.zeros(2, 6, dtype=torch.int64)
    config = dataclasses.replace(config, architecture=dataclasses.replace(config.architecture, cond_dim=None))
    model = Denoiser(config)
    model.init_weights(0)
    for module in model.modules():
        if isinstance(module, Experts):
            module.implementation = "loop"  # grouped products are not counted
    head_fraction = 1.0 if selected is None else selected / xt.numel()
    # The counter sees the products of attention only where they are products: not in a fused CPU kernel
    with sdpa_kernel(SDPBackend.MATH):
        some, every = (_counted(model, xt, select) for select in (selected, None))
    assert config.flops_per_token(6, head_fraction, training=False) == pytest.approx(some, abs=1)
    of_head = 2 * (1 - head_fraction) * config.vocab_size * config.architecture.d_model
    assert config.flops_per_token(6, head_fraction) == pytest.approx(3 * (every - of_head), abs=3)


def _counted(model: Denoiser, xt: torch.Tensor, selected: int | None) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(xt, None if selected is None else torch.arange(selected))
    return counter.get_total_flops() / xt.numel()


def test_conditioned_models_count_their_last_layer_whole():
    name, whole = "mdlm-small", 4
    config = tiny(PRESETS[name])
    assert config.architecture.cond_dim is not None
    free = dataclasses.replace(config, architecture=dataclasses.replace(config.architecture, cond_dim=None))
    few, all_of_them = (config.flops_per_token(whole, share, training=False) for share in (0.25, 1.0))
    assert all_of_them - few == pytest.approx(2 * 0.75 * config.vocab_size * config.architecture.d_model, abs=1)
    assert free.flops_per_token(whole, 0.25, training=False) < few


@pytest.mark.parametrize("family", ["full", "causal", "block_causal", "block_diffusion"])
def test_flops_of_a_mask_family_count_the_pairs_of_its_predicate(family):
    seq_len, block_size = 12, 3
    config = ModelConfig(_architecture(num_layers=3), 7, 6)
    sizes = {} if family in ("full", "causal") else {"block_size": block_size}
    predicates = {
        "full": full(),
        "causal": causal(),
        "block_causal": block_causal(block_size),
        "block_diffusion": block_diffusion(seq_len, block_size),
    }
    halves = 2 if family == "block_diffusion" else 1
    table = dense_mask(predicates[family], 1, halves * seq_len)[0]
    # queries of the last layer are those of the first half alone
    pairs = 2 * int(table.sum()) + int(table[:seq_len].sum())
    a = config.architecture
    kv, rest = 2 * a.d_model**2, 2 * a.d_model**2 + 3 * a.d_model * 24
    products = seq_len * (halves * 3 * kv + (2 * halves + 1) * rest + a.d_model * config.vocab_size)
    wanted = (2 * products + 4 * a.d_model * pairs) / seq_len
    assert config.flops_per_token(seq_len, family=family, training=False, **sizes) == int(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 4}, 'block_size is 4, which the family "full" ignores'),
        ({"family": "causal", "block_size": 4}, 'block_size is 4, which the family "causal" ignores'),
        ({"family": "block_causal"}, 'block_size is None; "block_causal" needs one that divides seq_len 12'),
        ({"family": "block_diffusion", "block_size": 5}, "block_size is 5; .* divides seq_len 12"),
        ({"family": "block_diffusion", "block_size": 0}, "block_size is 0"),
        ({"family": "sliding"}, 'family is "sliding"; it must be one of full, causal, annealed, block_causal'),
        ({"seq_len": 0}, "seq_len is 0; it must be at least 1"),
        ({"head_fraction": 1.5}, r"head_fraction is 1\.5; it must lie in \[0, 1\]"),
        ({"head_fraction": -0.5}, r"head_fraction is -0\.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_flops_of_what_has_no_meaning_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(_architecture(), 7, 6).flops_per_token(**({"seq_len": 12} | options))


def test_architecture_without_arguments_is_the_one_that_settings_leave_out():
    wanted = {
        "d_model": 256, "num_layers": 6, "num_heads": 4, "d_ff": 704, "norm_eps": 1e-6, "rope_base": 10_000.0,
        "rope_fraction": 1.0, "init_std": 0.02, "num_kv_heads": None, "head_dim": None,
    }  # fmt: skip
    assert {name: getattr(Architecture(), name) for name in wanted} == wanted


@pytest.mark.parametrize(("head_dim", "fraction", "rotated"), [(100, 0.58, 58), (100, 0.14, 14), (128, 0.5, 64)])
def test_rotary_dimensions_are_not_those_that_rounding_makes_of_them(head_dim, fraction, rotated):
    assert _architecture(head_dim=head_dim, rope_fraction=fraction).rotary_dim == rotated


def test_flops_of_a_single_token_attend_to_it_alone():
    config = ModelConfig(_architecture(num_layers=1), 7, 6)
    a = config.architecture
    weights = 4 * a.d_model**2 + 3 * a.d_model * 24 + 7 * a.d_model
    assert config.flops_per_token(1, training=False) == 2 * weights + 4 * a.d_model


def test_flops_of_an_annealed_mask_are_those_of_a_full_one():
    config = ModelConfig(_architecture(), 7, 6)
    assert config.flops_per_token(12, family="annealed") == config.flops_per_token(12)
