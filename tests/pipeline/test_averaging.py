"""Checkpoints kept to be averaged: the last ones or the best, over kills and resumes, and their mean exported."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from pipeline import training_state
from pipeline.artifact import MANIFEST, load_manifest
from pipeline.convert.config import STAGE as CONVERT
from pipeline.convert.config import ConvertConfig
from pipeline.errors import CorruptionError
from pipeline.pretrain.averaging import AverageConfig
from pipeline.pretrain.checkpoint import verify_kept
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.phases import Phase
from pipeline.training_state import (
    MASTER,
    StateFiles,
    checkpoint_name,
    file_name,
    list_checkpoints,
    read_manifest,
)
from pipeline.weights import WEIGHTS_FILE
from tests.pipeline.conftest import flip_bit
from tests.support.hand_checkpoints import published
from tests.support.hand_state import together
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
        one, other = (torch.from_numpy(part.whole(MASTER, name)) for part in files)
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


@pytest.mark.distributed
def test_a_kept_checkpoint_that_was_damaged_is_not_exported_and_can_be_made_again(
    made: Artifacts, tmp_path: Path
) -> None:
    config, out, rank = replace(LAST, workers=2), tmp_path / "out", 1
    gang = start_gang(PRETRAIN, config, inputs(made), out, workers=2, fault="pause_at_step", step=7)
    gang.wait_for(lambda: gang.log().count("paused in step 7") == 2, "seventh step")
    gang.kill()
    damaged = gang.state / checkpoint_name(3) / file_name(rank)
    right = damaged.read_bytes()
    flip_bit(damaged)
    gang = start_gang(PRETRAIN, config, inputs(made), out, workers=2)
    assert gang.wait() == [2, 2], gang.log()
    words = f"{damaged} is damaged: its SHA-256 differs from the manifest. step-00000003 was kept to be averaged"
    assert gang.log().count(words) == 2
    assert "Delete" in gang.log()
    assert not (out / "checkpoints").exists()
    for newer in list_checkpoints(gang.state):
        shutil.rmtree(newer)
    run_gang(PRETRAIN, config, inputs(made), out, workers=2)
    assert (out / "checkpoints" / checkpoint_name(3) / file_name(rank)).read_bytes() == right


def test_a_kept_checkpoint_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "_PATIENCE_S", (0.001,))
    for error in together(lambda ranks: verify_kept(tmp_path / checkpoint_name(3), cast("Any", ranks), lambda: None)):
        assert isinstance(error, CorruptionError)
        assert f"{tmp_path / checkpoint_name(3) / MANIFEST} is missing. step-00000003 was kept" in str(error)


def test_every_file_of_a_kept_checkpoint_is_a_sign_of_progress(tmp_path: Path) -> None:
    signs: list[int] = []
    checkpoint = published(tmp_path, 3)
    together(lambda ranks: verify_kept(checkpoint, cast("Any", ranks), lambda: signs.append(ranks.rank)))
    assert sorted(signs) == [0, 1]


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
    with pytest.raises(ValueError, match=r"average.count is 3, but only 2 validation.* \(its last 4 steps\)"):
        tiny(average=AverageConfig("best", 3), validation=VALIDATION, phases=phases)
    averaged = replace(TINY.optimizer, ema_decay=0.9)
    with pytest.raises(ValueError, match=r'"best" with an optimizer\.ema_decay'):
        tiny(average=AverageConfig("best", 2), validation=VALIDATION, optimizer=averaged)
    with pytest.raises(ValueError, match=r"average\.count is 4, but only 3 step\(s\) are multiples of .*every_steps 6"):
        tiny(average=AverageConfig("last", 4, 6))
    with pytest.raises(ValueError, match=r"only 2 step\(s\) are multiples of .*every_steps 2 .* \(its last 4 steps\)"):
        tiny(average=AverageConfig("last", 3, 2), phases=phases)
    assert tiny(average=AverageConfig("last", 2, 2), phases=phases).average.count == 2


def test_of_equal_losses_the_earlier_checkpoint_is_kept() -> None:
    average = AverageConfig("best", 2)
    assert average.steps_to_keep(9, {2: 1.0, 4: 0.5, 6: 1.0, 8: 1.0}) == [2, 4]
    assert average.steps_to_keep(9, {}) == []
    assert average.steps_to_keep(9, {8: 3.0}) == [8]
