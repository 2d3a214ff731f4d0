"""Limits of the training configuration, and what is identity and what is execution."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from dlm_core.models.config import MoE
from pipeline.config import from_json, identity
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig, ValidationConfig, check_upstream
from pipeline.pretrain.engine import deepspeed_config, loss_scale
from pipeline.pretrain.objective import ObjectiveConfig, RouterLossConfig, has_count_within
from pipeline.pretrain.phases import Phase, Span
from pipeline.pretrain.watchdog import WatchdogLimits
from tests.pipeline.conftest import python
from tests.support.tiny_run import tiny


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0), ("global_batch_seqs", 0), ("workers", 0), ("threads_per_worker", 0),
        ("checkpoint_every_steps", 0), ("max_skipped_steps", 0), ("spike_sigmas", -1.0), ("spike_window_steps", 3),
        ("replica_check_every_steps", -1), ("keep_checkpoints", 1), ("workers", 3),
        ("micro_batch_seqs", -1), ("micro_batch_seqs", 3),
        ("short_step_share", -0.1), ("short_step_share", 1.1), ("short_step_min", 0), ("short_step_min", 8),
        ("log_norms_every_steps", -1), ("peak_tflops_per_worker", -1.0), ("peak_tflops_per_worker", math.inf),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_names_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}.* {value}"):
        tiny(**{field: value})


@pytest.mark.parametrize(("workers", "micro", "passes"), [(1, 0, 1), (2, 0, 1), (2, 2, 2), (2, 1, 4), (1, 2, 4)])
def test_accumulation_follows_from_the_batch(workers: int, micro: int, passes: int) -> None:
    config = tiny(workers=workers, micro_batch_seqs=micro)
    assert config.grad_accum_steps == passes
    generated = deepspeed_config(config)
    product = generated["train_micro_batch_size_per_gpu"] * generated["gradient_accumulation_steps"] * workers
    assert product == generated["train_batch_size"] == config.global_batch_seqs
    assert loss_scale(config, 100) == pytest.approx(workers * passes / 100)


def test_execution_settings_are_no_part_of_the_identity() -> None:
    base = PretrainConfig()
    execution = {
        "workers": 4, "zero_stage": 3, "micro_batch_seqs": 2, "threads_per_worker": 2, "checkpoint_every_steps": 7,
        "keep_checkpoints": 5, "max_skipped_steps": 9, "track": False, "log_norms_every_steps": 3,
        "peak_tflops_per_worker": 312.0, "replica_check_every_steps": 3, "watchdog": WatchdogLimits(step_s=9.0),
    }  # fmt: skip
    assert identity(replace(base, **execution)) == identity(base)
    for change in ({"num_steps": 7}, {"noise_seed": 1}, {"global_batch_seqs": 8}, {"precision": "bf16"}):
        assert identity(replace(base, **change)) != identity(base)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"t_min": 0.0}, r"t_min is 0\.0; it must lie between 0 and 1"),
        ({"t_min": 1.0}, r"t_min is 1\.0"),
        ({"kind": "gaussian"}, r"kind is 'gaussian'; it must be one of diffusion, autoregressive"),
        ({"block_size": -4}, "block_size is -4; it must be at least 1, or 0 for whole rows"),
        ({"target_offset": 2}, "target_offset is 2; it must be 0, or 1"),
        ({"weighting": "cart"}, r"cart_p is 0\.0; it must lie in \(0, 1\]"),
        ({"cart_p": 0.3}, r"cart_p is 0\.3"),
        ({"weighting": "cart", "cart_p": 1.5}, r"cart_p is 1\.5"),
        ({"kind": "autoregressive", "block_size": 4}, "block_size is 4, which kind autoregressive ignores"),
        ({"kind": "autoregressive", "weighting": "uniform"}, "weighting is uniform, which kind autoregressive"),
        ({"masking": "exact_count", "schedule": "cosine"}, "schedule is cosine, which masking exact_count ignores"),
        ({"block_size": 4, "target_offset": 1}, "target_offset is 1 with a block_size"),
        ({"block_size": 4, "weighting": "cart", "cart_p": 0.3}, 'weighting is "cart" with a block_size'),
        ({"mask_rates": (0.5, 0.2)}, r"mask_rates are 0\.5, 0\.2; wanted 0 <= lowest"),
        ({"mask_rates": (0.0, 0.0)}, r"mask_rates are 0\.0, 0\.0; .* nothing would be masked"),
        ({"mask_rates": (0.2, 0.8)}, "defined for schedule linear and weighting inverse_mask_prob; found linear and"),
        ({"search_mask_rates": True}, "found linear and nelbo"),
    ],
)  # fmt: skip
def test_an_objective_that_means_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**given)


SEARCH = ObjectiveConfig(weighting="inverse_mask_prob", search_mask_rates=True, block_size=4)
ONE_OF_FIVE = {"rows": Phase(0.75, block_size=0), "blocks": Phase(0.25)}
MOE = replace(tiny().architecture, d_ff=None, moe=MoE(4, 2, 8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"phases": {"a": Phase(share=0.001), "b": Phase()}}, r"phase a has 0\.001 of 1\.001 shares of 20 steps"),
        ({"phases": {"a": Phase(block_size=4)}, "objective": ObjectiveConfig(target_offset=1)}, "phase a has bloc"),
        ({"router_loss": RouterLossConfig(balance=0.1)}, "router_loss is set, but the architecture has no experts"),
        ({"ep_size": 2, "workers": 2}, "ep_size is 2, but the architecture has no experts"),
        ({"ep_size": 3, "workers": 2, "architecture": MOE}, "ep_size is 3; it must divide moe.num_experts 4 and work"),
        ({"ep_size": 4, "workers": 2, "architecture": MOE}, "ep_size is 4; it must divide"),
        ({"ep_size": 1, "zero_stage": 0, "architecture": MOE}, "ep_size is given with zero_stage 0"),
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer is true with zero_stage 0"),
        (
            {"architecture": MOE, "router_loss": RouterLossConfig(group_seqs=3)},
            "router_loss.group_seqs is 3; it must divide the 8 rows",
        ),
        (
            {"objective": ObjectiveConfig(weighting="inverse_mask_prob", search_mask_rates=True)},
            "search_mask_rates is true, but no phase has blocks",
        ),
        (
            {"objective": ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(0.45, 0.55), block_size=3)},
            r"mask_rates are 0\.45, 0\.55, but no number of masks of the 3 tokens of a block in phase all",
        ),
        (
            {
                "objective": ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(0.45, 0.55), block_size=2),
                "phases": {"pairs": Phase(), "fives": Phase(block_size=5)},
            },
            r"of the 5 tokens of a block in phase fives",
        ),
        ({"objective": SEARCH, "validation": ValidationConfig(20)}, "every_steps is 20, so that no validation is fol"),
        (
            {"objective": SEARCH, "validation": ValidationConfig(5), "phases": ONE_OF_FIVE},
            r"every_steps is 5, .* in 20 steps\. Lower",
        ),
    ],
)  # fmt: skip
def test_a_training_that_means_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**given)


@pytest.mark.parametrize(
    ("every", "phases"),
    [(19, {}), (4, ONE_OF_FIVE), (10, {"first": Phase(), "second": Phase(rope_base=7.0)})],
)
def test_a_search_that_a_step_on_the_same_blocks_follows_is_taken(every: int, phases: dict[str, Phase]) -> None:
    assert tiny(objective=SEARCH, validation=ValidationConfig(every), phases=phases).num_steps == 20


@pytest.mark.parametrize("given", [{"num_rows": 7}, {"num_replicates": 9}, {"noise_seed": 1}])
def test_how_to_validate_is_refused_where_nothing_is_validated(given: dict[str, int]) -> None:
    ((name, value),) = given.items()
    assert ValidationConfig(every_steps=1, **given)
    with pytest.raises(ValueError, match=f"{name} is {value}, but every_steps is 0"):
        ValidationConfig(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"phases": {"a": Phase(seq_len=48)}}, "seq_len is 48 in phase a of pretrain; it must divide rows of 128"),
        ({"objective": ObjectiveConfig(block_size=7)}, "block_size is 7 in phase all of pretrain; .* rows of 128"),
        ({"phases": {"a": Phase(seq_len=32, block_size=64)}}, "block_size is 64 in phase a .* rows of 32 tokens"),
        ({"short_step_share": 0.1, "short_step_min": 128}, r"pretrain.short_step_min is 128, but rows have 128 tokens"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused_with_the_plan(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_upstream(tiny(**given), {"rows": {"seq_len": 128}}, "pretrain")


def test_mask_rates_from_the_lowest_time_allow_blocks_without_a_mask() -> None:
    objective = ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(1e-3, 0.3), block_size=2, t_min=1e-3)
    assert tiny(objective=objective).spans[0].block_size == 2
    with pytest.raises(ValueError, match="no number of masks of the 2 tokens"):
        tiny(objective=replace(objective, t_min=1e-2))


@drawn(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 40))
def test_a_count_is_found_where_there_is_one(a: int, b: int, of_a: int, of_b: int, size: int) -> None:
    low, high = sorted((min(1.0, a / of_a), min(1.0, b / of_b)))
    found = has_count_within(size, (low, high))
    assert found == (not size or any(low <= count / size <= high for count in range(size + 1)))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Phase, {"share": 0.0}), (Phase, {"block_size": -1}), (Phase, {"seq_len": 0}), (Phase, {"rope_base": 0.0}),
        (RouterLossConfig, {"balance": -0.1}), (RouterLossConfig, {"z": -1.0}), (RouterLossConfig, {"group_seqs": 0}),
    ],
)  # fmt: skip
def test_a_phase_or_router_loss_out_of_range_names_the_field_and_the_value(kind: Any, given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        kind(**given)


def test_phases_share_the_steps_and_take_what_they_leave_out_from_the_training() -> None:
    phases = {"whole": Phase(0.85), "blocks": Phase(0.15, block_size=4, rope_base=7.0, mixture={"text": 1.0})}
    config = tiny(phases=phases)
    assert config.spans == (
        Span("whole", 0, 17, 0, 0, 100.0, {}),
        Span("blocks", 17, 20, 4, 0, 7.0, {"text": 1.0}),
    )
    assert [config.span_at(step).name for step in (0, 16, 17, 19)] == ["whole", "whole", "blocks", "blocks"]
    assert tiny().spans == (Span("all", 0, 20, 0, 0, 100.0, {}),)


@pytest.mark.parametrize("precision", ["fp16", "bfloat16"])
def test_a_precision_that_is_not_offered_is_refused(precision: str) -> None:
    with pytest.raises(UserError, match="precision") as raised:
        from_json(PretrainConfig, {"precision": precision})
    assert "fp32" in str(raised.value)
    assert "bf16" in str(raised.value)


def test_a_search_that_comes_too_late_is_refused_with_how_to_have_it_in_time() -> None:
    late: dict[str, Any] = {"objective": replace(SEARCH, block_size=0), "validation": ValidationConfig(every_steps=10)}
    phases = {"rows": Phase(4.0), "blocks": Phase(1.0, block_size=4)}
    with pytest.raises(ValueError, match=r"in 20 steps\. Lower validation\.every_steps, as to 9$"):
        tiny(**late, phases=phases, num_steps=20)
    assert tiny(**{**late, "validation": ValidationConfig(every_steps=9)}, phases=phases, num_steps=20)
    with pytest.raises(ValueError, match=r"in 5 steps\. Raise num_steps$"):
        tiny(**late, phases=phases, num_steps=5)


def test_a_worker_without_a_gpu_does_not_train_where_gpus_are_required() -> None:
    code = """
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.run import run
run(PretrainConfig(requires_gpus=True), {}, None)
"""
    done = python("-c", code, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR=None)
    assert "UserError: pretrain.requires_gpus is true, and this worker has no GPU" in done.stderr
