"""Checkpoints kept to be averaged: the last ones or the best, over kills and resumes, and their mean exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifact import load_manifest
from pipeline.convert.config import STAGE as CONVERT
from pipeline.convert.config import ConvertConfig
from pipeline.pretrain.averaging import AverageConfig
from pipeline.pretrain.checkpoint import checkpoint_name
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.phases import Phase
from pipeline.training_state import MASTER, StateFiles, read_manifest
from pipeline.weights import WEIGHTS_FILE
from tests.support.tiny_run import TINY, Artifacts, metrics, run_gang, start_gang, tiny

VALIDATION = ValidationConfig(every_steps=2, num_rows=4)
LAST = tiny(num_steps=8, average=AverageConfig("last", 2, 3))
BEST = tiny(num_steps=8, average=AverageConfig("best", 2), validation=VALIDATION)


def inputs(made: Artifacts) -> dict[str, Path]:
    """Of pretrain, with held-out tokens."""
    return {**made.inputs(), "tokens": made.tokens}


def average_steps(trained: Path) -> list[int]:
    """What a training says it has kept."""
    return load_manifest(trained).stats["average_steps"]


@pytest.mark.parametrize("config", [LAST, BEST], ids=["last", "best"])
def test_the_exported_average_is_the_mean_of_the_kept_masters(
    config: PretrainConfig, made: Artifacts, tmp_path: Path
) -> None:
    trained = run_gang(PRETRAIN, config, inputs(made), tmp_path / "pretrain")
    steps = average_steps(trained)
    if config is LAST:
        assert steps == [3, 6]
    else:
        scores = {line["step"] + 1: line["val_nelbo"] for line in metrics(trained) if "val_nelbo" in line}
        assert sorted(scores) == [2, 4, 6, 8]
        assert steps == sorted(sorted(scores, key=scores.__getitem__)[:2])
    out = run_gang(CONVERT, ConvertConfig("average"), {"pretrain": trained}, tmp_path / "weights")
    kept = [trained / "checkpoints" / checkpoint_name(step) for step in steps]
    files = [StateFiles(path, read_manifest(path)) for path in kept]
    for name, tensor in load_file(out / WEIGHTS_FILE).items():
        one, other = (part.whole(MASTER, name) for part in files)
        assert not torch.equal(one, other), f"{name} did not move: a weak test"
        torch.testing.assert_close(tensor, (one + other) / 2, rtol=1e-6, atol=1e-8)
    assert load_manifest(out).stats["steps"] == steps


@pytest.mark.parametrize("config", [LAST, BEST], ids=["last", "best"])
def test_a_kill_does_not_change_what_is_kept(config: PretrainConfig, made: Artifacts, tmp_path: Path) -> None:
    whole = run_gang(PRETRAIN, config, inputs(made), tmp_path / "whole")
    out = tmp_path / "killed"
    gang = start_gang(PRETRAIN, config, inputs(made), out, fault="pause_at_step", step=6)
    gang.wait_for(lambda: len(metrics(gang.state)) >= 6, "sixth step")
    gang.kill()
    run_gang(PRETRAIN, config, inputs(made), out)
    assert average_steps(out) == average_steps(whole)
    for step in average_steps(whole):
        files = [root / "checkpoints" / checkpoint_name(step) / "rank-00000.safetensors" for root in (whole, out)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_best_are_of_the_blocks_that_the_training_ends_with(made: Artifacts, tmp_path: Path) -> None:
    phases = {"rows": Phase(18.0, block_size=0), "blocks": Phase(block_size=16), "more": Phase(block_size=16)}
    rising = replace(
        TINY.optimizer, lr=1e-2, lr_schedule=LRSchedule("constant", warmup_steps=50)
    )  # too high in the end
    config = replace(BEST, num_steps=40, phases=phases, optimizer=rising)
    trained = run_gang(PRETRAIN, config, inputs(made), tmp_path / "out")
    scores = {line["step"] + 1: line["val_nelbo"] for line in metrics(trained) if "val_nelbo" in line}
    ends_with = {step: score for step, score in scores.items() if step > 36}
    assert average_steps(trained) == sorted(ends_with) == [38, 40]
    assert min(scores[step] for step in scores if step <= 36) < max(ends_with.values()), "a weak test"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("none", 2, 0), r'count is 2 with keep "none"; wanted at least 2, and 0 with "none"'),
        (("best", 1, 0), r'count is 1 with keep "best"'),
        (("best", 0, 0), "count is 0"),
        (("last", -1, 5), "count is -1"),
        (("last", 2, 0), r'every_steps is 0 with keep "last"; wanted at least 1'),
        (("best", 2, 5), r'every_steps is 5 with keep "best"'),
    ],
)
def test_an_average_of_nothing_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AverageConfig(*given)


def test_an_average_that_the_training_can_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r'average\.keep is "best", but nothing is validated'):
        tiny(average=AverageConfig("best", 2))
    phases = {"rows": Phase(4.0, block_size=0), "blocks": Phase(block_size=8)}
    with pytest.raises(ValueError, match=r"average.count is 3, but only 2 validation.* \(from step 16 on\)"):
        tiny(average=AverageConfig("best", 3), validation=VALIDATION, phases=phases)
    averaged = replace(TINY.optimizer, ema_decay=0.9)
    with pytest.raises(ValueError, match=r'"best" with an optimizer\.ema_decay'):
        tiny(average=AverageConfig("best", 2), validation=VALIDATION, optimizer=averaged)
    with pytest.raises(ValueError, match=r"average\.count 4 times every_steps 6 is more than num_steps 20"):
        tiny(average=AverageConfig("last", 4, 6))


def test_of_equal_losses_the_earlier_checkpoint_is_kept() -> None:
    average = AverageConfig("best", 2)
    assert average.steps_to_keep(9, {2: 1.0, 4: 0.5, 6: 1.0, 8: 1.0}) == [2, 4]
    assert average.steps_to_keep(9, {}) == []
    assert average.steps_to_keep(9, {8: 3.0}) == [8]
