"""Trainings that are killed and go on: where they stand, and whether they came to the same end."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dlm_core.models.config import MoE
from pipeline.pretrain.config import STAGE, PretrainConfig
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from tests.support.tiny_run import TINY, Gang, convert, losses, metrics, sha256, start_gang

WEIGHTS = "model.safetensors"
EXPERTS = replace(TINY.architecture, d_ff=None, moe=MoE(4, 2, 16))
SEARCH = ObjectiveConfig(weighting="inverse_mask_prob", search_mask_rates=True)
AVERAGES = replace(TINY.optimizer, ema_decay=0.9)
MUON = OptimizerConfig(kind="muon", lr=3e-3, lr_schedule=TINY.optimizer.lr_schedule, ema_decay=0.9)

Inputs = Mapping[str, Path]


def kill_paused(gang: Gang, step: int) -> None:
    """Kill all ranks when they have come to a step, and nothing is being saved."""
    gang.wait_for(lambda: gang.log().count(f"paused in step {step}") == len(gang.ranks), "pause")
    gang.kill()
    assert len(metrics(gang.state)) == step


def steps_of(state: Path) -> list[str]:
    """Published checkpoints."""
    return sorted(path.name for path in state.glob("step-*"))


def weights_of(out: Path, weights: str = "last") -> Path:
    """The file of weights of a finished training, made at the first call."""
    converted = out.with_name(f"{out.name}.{weights}")
    return (converted if converted.exists() else convert(out, converted, weights)) / WEIGHTS


def kinds_of_weights(config: PretrainConfig) -> list[str]:
    """What can be exported of a training."""
    return ["last", "ema"] if config.optimizer.ema_decay else ["last"]


def assert_same(found: Path, straight: Path) -> None:
    """Same metrics, digit for digit."""
    assert metrics(found) == metrics(straight)


def differences(config: PretrainConfig, found: Path, straight: Path) -> list[str]:
    """Where two finished trainings are not the same to the last bit, in metrics and exported weights."""
    lines = zip(metrics(found), metrics(straight), strict=True)
    steps = [a["step"] for a, b in lines if a != b]
    return [f"metrics of steps {steps}"] * bool(steps) + [
        f"weights ({kind})"
        for kind in kinds_of_weights(config)
        if sha256(weights_of(found, kind)) != sha256(weights_of(straight, kind))
    ]


def assert_close(found: Path, straight: Path, loss: float = 1e-6, weights: float = 1e-5, kind: str = "last") -> None:
    """Losses, and weights in shares of the largest, of a training whose work was shared otherwise meanwhile."""
    from safetensors.torch import load_file

    assert losses(found) == pytest.approx(losses(straight), rel=loss)
    got, wanted = (load_file(weights_of(out, kind)) for out in (found, straight))
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((got[name] - tensor).abs().max()) <= weights * float(tensor.abs().max()), name


def train_in_parts(configs: Sequence[PretrainConfig], inputs: Inputs, out: Path, stops: Sequence[int]) -> Path:
    """Train by one configuration after another, each going on from the last checkpoint of the one before.

    All but the last are killed in the given step.
    """
    saved = 0
    for config, stop in zip(configs, [*stops, None], strict=True):
        fault = {} if stop is None else {"fault": "pause_at_step", "step": stop}
        gang = start_gang(STAGE, config, inputs, out, workers=config.workers, **fault)
        if stop is None:
            assert gang.wait() == [0] * config.workers, gang.log()
        else:
            kill_paused(gang, stop)
        assert not saved or f"continuing from checkpoint step-{saved:08d}: {saved} of" in gang.log(), gang.log()
        if stop is not None:
            saved = stop - stop % config.checkpoint_every_steps
    return out
