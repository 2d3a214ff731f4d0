"""Every tiny recipe, killed in each phase and at each boundary, is the training that nothing disturbed."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from tests.support.resuming import differences, train_in_parts
from tests.support.tiny_run import Artifacts, make_artifacts, metrics
from workflows.recipes import RECIPES, load_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]
TINY = [name for name in RECIPES if name.endswith("_tiny")]
PHASE_STEPS = 3
"""Odd, so that every other boundary lies between two checkpoints, and every other one at a checkpoint."""


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """What comes before training, with the rows of the recipes."""
    return make_artifacts(tmp_path_factory.mktemp("long_rows"), seq_len=128)


def shortened(recipe: str) -> PretrainConfig:
    """The training of a recipe with its objective, phases and rates, of a few steps of a smaller model."""
    (config,) = (step.config for step in load_recipe(recipe).steps if step.name == "pretrain")
    a, optimizer = config.architecture, config.optimizer
    return replace(
        config,
        architecture=replace(
            a,
            d_model=32,
            num_layers=2,
            num_heads=2,
            d_ff=None if a.d_ff is None else 64,
            moe=None if a.moe is None else replace(a.moe, d_ff_expert=16),
        ),
        optimizer=replace(optimizer, lr_schedule=replace(optimizer.lr_schedule, warmup_steps=2)),
        phases={name: replace(phase, share=1.0) for name, phase in config.phases.items()},
        num_steps=PHASE_STEPS * max(2, len(config.phases)),
        global_batch_seqs=8,
        short_step_share=0.3 if config.short_step_share else 0.0,
        validation=ValidationConfig(every_steps=2, num_rows=4),
        workers=2,
        checkpoint_every_steps=2,
        track=False,
    )


def kills(config: PretrainConfig) -> list[int]:
    """A step in each phase, and the first step of each but the first."""
    return sorted({span.first_step for span in config.spans[1:]} | {span.first_step + 2 for span in config.spans})


@pytest.mark.parametrize("recipe", TINY)
def test_recipe_killed_in_each_phase_and_at_each_boundary_is_the_undisturbed_one(
    recipe: str, long_rows: Artifacts, tmp_path: Path
) -> None:
    config = shortened(recipe)
    inputs, stops = long_rows.inputs_with_held_out(), kills(config)
    straight = train_in_parts([config], inputs, tmp_path / "straight" / "out", [])
    found = train_in_parts([config] * (len(stops) + 1), inputs, tmp_path / "killed" / "out", stops)
    assert differences(config, found, straight) == []
    lines = metrics(found)
    names = list(config.phases) or ["all"]
    assert list(dict.fromkeys(line["phase"] for line in lines)) == names
    validated = "val_nll" if config.objective.kind == "autoregressive" else "val_nelbo"
    assert [line["step"] for line in lines if validated in line] == list(range(1, config.num_steps, 2))
    lengths = {line["tokens"] - before["tokens"] for before, line in itertools.pairwise(lines)}
    assert len(lengths) > 1 or not config.short_step_share, "no step was short: a weak test"
    assert ("mask_rate_low" in lines[3]) == config.objective.search_mask_rates


def test_there_is_a_tiny_recipe_of_each_system() -> None:
    assert set(TINY) == {"ar_tiny", "mdlm_tiny", "bd3lm_tiny", "llada_tiny", "llada_moe_tiny", "llada2_tiny"}
