"""Operations and hours of a training, from its phases; GPUs by name."""

from dataclasses import replace

import pytest

from dlm_core.models.config import ModelConfig
from dlm_core.models.presets import PRESETS, tiny
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.cost import layout, parameter_shapes, training_cost, training_memory
from pipeline.pretrain.gpus import MEMORY_GB, PEAK_TFLOPS, find_gpu
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.pretrain.phases import Phase

MODEL = tiny(PRESETS["llada-8b"])
SEQ_LEN = 64
CONFIG = PretrainConfig(architecture=MODEL.architecture, num_steps=100, global_batch_seqs=8, precision="bf16")
H100 = find_gpu("h100")
TOKENS = 100 * 8 * SEQ_LEN


def flops(config: PretrainConfig, model: ModelConfig = MODEL) -> float:
    return training_cost(model, config, SEQ_LEN, H100, 0.5).flops


def test_cost_of_whole_rows_is_tokens_times_that_of_one_with_half_of_the_head():
    cost = training_cost(MODEL, CONFIG, SEQ_LEN, H100, 0.5)
    assert cost.tokens == TOKENS
    assert cost.flops == TOKENS * MODEL.flops_per_token(SEQ_LEN, 0.5)
    assert cost.gpu_hours == pytest.approx(cost.flops / (0.5 * 989.5e12) / 3600)
    assert cost.hours == pytest.approx(cost.gpu_hours / 2)


def test_hours_in_float32_are_told_of_a_configured_peak_alone():
    config = replace(CONFIG, precision="fp32")
    cost = training_cost(MODEL, config, SEQ_LEN, H100, 0.5)
    assert (cost.gpu_hours, cost.hours) == (None, None)
    assert cost.flops == flops(CONFIG)
    configured = training_cost(MODEL, replace(config, peak_tflops_per_worker=10.0), SEQ_LEN, H100, 0.5)
    assert configured.gpu_hours == pytest.approx(cost.flops / (0.5 * 10e12) / 3600)
    assert configured.hours == pytest.approx(configured.gpu_hours / 2)


def test_cost_of_blocks_is_that_of_both_halves():
    config = replace(CONFIG, objective=ObjectiveConfig(block_size=16))
    expected = MODEL.flops_per_token(SEQ_LEN, 0.5, family="block_diffusion", block_size=16)
    assert flops(config) == TOKENS * expected > flops(CONFIG)


def test_cost_of_next_tokens_takes_the_whole_head_and_half_of_the_pairs():
    config = replace(CONFIG, objective=ObjectiveConfig(kind="autoregressive"))
    assert flops(config) == TOKENS * MODEL.flops_per_token(SEQ_LEN, 1.0, family="causal")


def test_cost_of_clipped_mask_rates_takes_the_head_for_their_mean():
    clipped = ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(0.5, 1.0))
    assert flops(replace(CONFIG, objective=clipped)) == TOKENS * MODEL.flops_per_token(SEQ_LEN, 0.75)


def test_cost_of_phases_is_the_sum_of_theirs():
    phases = {"rows": Phase(3), "pieces": Phase(1, seq_len=16), "blocks": Phase(1, block_size=4)}
    expected = (
        60 * MODEL.flops_per_token(SEQ_LEN, 0.5)
        + 20 * MODEL.flops_per_token(16, 0.5)
        + 20 * MODEL.flops_per_token(SEQ_LEN, 0.5, family="block_diffusion", block_size=4)
    )
    assert flops(replace(CONFIG, phases=phases)) == TOKENS // 100 * expected


def test_short_steps_train_on_fewer_tokens():
    config = replace(CONFIG, short_step_share=0.5, short_step_min=32)
    assert training_cost(MODEL, config, SEQ_LEN, H100, 0.5).tokens == TOKENS - TOKENS // 2 // 4


def test_cost_of_llada_is_near_its_published_gpu_hours():
    # 0.13 million H800 hours (arXiv 2502.09992), whose products are as fast as an H100's, for 2.3e12 tokens
    preset = PRESETS["llada-8b"]
    config = PretrainConfig(
        architecture=preset.model.architecture, num_steps=438_690, global_batch_seqs=1280, workers=64, precision="bf16"
    )
    cost = training_cost(preset.model, config, 4096, H100, 0.25)
    assert cost.tokens == pytest.approx(2.3e12, rel=1e-3)
    assert cost.gpu_hours == pytest.approx(130_000, rel=0.05)


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.01, float("nan")])
def test_mfu_out_of_range_is_refused(mfu):
    with pytest.raises(ValueError, match="mfu is"):
        training_cost(MODEL, CONFIG, SEQ_LEN, H100, mfu)


# --- layouts of phases ----------------------------------------------------------------------------------------------


def test_layout_is_that_of_the_configuration():
    config = replace(CONFIG, zero_stage=2, precision="bf16", micro_batch_seqs=2, activation_checkpointing=True)
    found = layout(config, config.spans[0], SEQ_LEN)
    assert (found.workers, found.zero_stage, found.precision, found.micro_batch_seqs) == (2, 2, "bf16", 2)
    assert (found.grad_accum_steps, found.activation_checkpointing, found.block_diffusion) == (2, True, False)


def test_layout_has_what_the_optimizer_keeps():
    optimizer = OptimizerConfig(kind="muon", ema_decay=0.99)
    found, plain = (layout(c, c.spans[0], SEQ_LEN) for c in (replace(CONFIG, optimizer=optimizer), CONFIG))
    assert (found.muon, found.ema) == (True, True)
    assert (plain.muon, plain.ema) == (False, False)


def test_layout_of_shorter_rows_has_as_many_tokens():
    config = replace(CONFIG, phases={"pieces": Phase(1, seq_len=16)})
    found = layout(config, config.spans[0], SEQ_LEN)
    assert (found.micro_batch_seqs, found.seq_len) == (4 * 4, 16)


def test_layout_of_rows_that_cannot_be_cut_is_refused():
    config = replace(CONFIG, phases={"pieces": Phase(1, seq_len=24)})
    with pytest.raises(ValueError, match="phase pieces cuts rows of 64 tokens into pieces of 24"):
        training_memory(MODEL, config, SEQ_LEN)


def test_phase_that_needs_most_memory_comes_first():
    config = replace(CONFIG, phases={"rows": Phase(1), "blocks": Phase(1, block_size=4)})
    memory = training_memory(MODEL, config, SEQ_LEN)
    assert list(memory) == ["blocks", "rows"]
    assert memory["blocks"].activations > 1.5 * memory["rows"].activations


# --- the model, and GPUs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llada-moe-7b-a1b", "llada2-mini", "mdlm-small"])
def test_shapes_are_those_of_the_model_without_its_numbers(name):
    shapes = parameter_shapes(PRESETS[name].model)
    a = PRESETS[name].model.architecture
    assert shapes["embedding.weight"] == [PRESETS[name].model.vocab_size, a.d_model]
    assert len([key for key in shapes if key.endswith("attention.out.weight")]) == a.num_layers


@pytest.mark.parametrize("name", ["H100", "h100", "H100-pcie", "h100 NVL"])
def test_gpu_is_found_in_any_case(name):
    gpu = find_gpu(name)
    assert gpu.peak_flops == PEAK_TFLOPS[gpu.name] * 1e12
    assert gpu.memory_bytes == MEMORY_GB[gpu.name] * 10**9


def test_gpu_has_a_peak_and_a_memory():
    assert PEAK_TFLOPS.keys() == MEMORY_GB.keys()


def test_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"GPU 'v100' is not known; take one of a100, h100"):
        find_gpu("v100")
