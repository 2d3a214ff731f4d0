"""Limits of the training configuration, the learning rate, and what is identity and what is execution."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from pipeline.config import identity
from pipeline.pretrain.config import OptimizerConfig, PretrainConfig
from pipeline.pretrain.engine import deepspeed_config, loss_scale
from tests.support.tiny_run import tiny


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0), ("global_batch_seqs", 0), ("workers", 0), ("threads_per_worker", 0),
        ("checkpoint_every_steps", 0), ("max_skipped_steps", 0), ("keep_checkpoints", 1), ("t_min", 0.0),
        ("t_min", 1.0), ("workers", 3), ("micro_batch_seqs", -1), ("micro_batch_seqs", 3),
        ("short_step_share", -0.1), ("short_step_share", 1.1), ("short_step_min", 0), ("short_step_min", 8),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_names_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}.* {value}"):
        tiny(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0), ("eps", 0.0), ("max_grad_norm", 0.0), ("beta1", 1.0), ("beta2", -0.1), ("warmup_steps", -1),
        ("weight_decay", -0.1),
    ],
)  # fmt: skip
def test_an_optimizer_setting_out_of_range_names_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize(("workers", "micro", "passes"), [(1, 0, 1), (2, 0, 1), (2, 2, 2), (2, 1, 4), (1, 2, 4)])
def test_accumulation_follows_from_the_batch(workers: int, micro: int, passes: int) -> None:
    config = tiny(workers=workers, micro_batch_seqs=micro)
    assert config.grad_accum_steps == passes
    generated = deepspeed_config(config)
    product = generated["train_micro_batch_size_per_gpu"] * generated["gradient_accumulation_steps"] * workers
    assert product == generated["train_batch_size"] == config.global_batch_seqs
    assert loss_scale(config, 100) == pytest.approx(workers * passes / 100)


def test_lr_rises_over_the_warm_up_and_falls_to_almost_zero() -> None:
    rates = [OptimizerConfig(lr=1.0, warmup_steps=4).lr_at(step, 20) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(1 / 16)


@pytest.mark.parametrize("num_steps", [1, 3, 4, 5])
def test_lr_with_a_warm_up_as_long_as_the_training_stays_in_range(num_steps: int) -> None:
    rates = [OptimizerConfig(lr=1.0, warmup_steps=4).lr_at(step, num_steps) for step in range(num_steps)]
    assert all(0.0 < rate <= 1.0 for rate in rates)


def test_execution_settings_are_no_part_of_the_identity() -> None:
    base = PretrainConfig()
    execution = {
        "workers": 4, "zero_stage": 3, "micro_batch_seqs": 2, "threads_per_worker": 2, "checkpoint_every_steps": 7,
        "keep_checkpoints": 5, "max_skipped_steps": 9, "track": False,
    }  # fmt: skip
    assert identity(replace(base, **execution)) == identity(base)
    for change in ({"num_steps": 7}, {"noise_seed": 1}, {"global_batch_seqs": 8}, {"precision": "bf16"}):
        assert identity(replace(base, **change)) != identity(base)
