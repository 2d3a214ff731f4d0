"""Trainings of every kind of state go on to the same bits, and by other ranks on the same curve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.phases import Phase
from tests.support.resuming import (
    AVERAGES,
    EXPERTS,
    MUON,
    SEARCH,
    Inputs,
    assert_close,
    differences,
    kinds_of_weights,
    train_in_parts,
)
from tests.support.tiny_run import Artifacts, losses, metrics, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
TWELVE = tiny(num_steps=12, workers=2)
SHARED = replace(TWELVE, architecture=EXPERTS, ep_size=2, optimizer=AVERAGES)
BLOCKS: dict[str, Any] = {
    "objective": SEARCH,
    "phases": {"rows": Phase(), "blocks": Phase(2.0, block_size=4)},
    "validation": ValidationConfig(every_steps=3, num_rows=11),
}
"""With the last search before the kill, in phase blocks, whose rates are used after it."""
AFTER_CHANGE = 1e-4
"""Bar for each of 50 losses after a change, nats a token."""
FLIP = 1e-6
"""Beyond which the balance of the routers tells that a token has gone to another expert; 1e-7 is found without."""
AT_FLIP = 1e-3
"""Bar for a step in which one token had two experts that were equal to it but for the last bits; 1.6e-4 is found."""
BF16_FACTOR = 2.0
"""How much farther bf16 losses may go apart over another number of ranks than over another micro batch."""


@pytest.fixture
def inputs(made: Artifacts) -> Inputs:
    """Of a training that validates."""
    return made.inputs_with_held_out()


def straight_and_cut(configs: list[PretrainConfig], inputs: Inputs, root: Path, stops: list[int]) -> tuple[Path, Path]:
    """A training by the first configuration, and one that is killed and goes on by the next, and so on."""
    straight = train_in_parts(configs[:1], inputs, root / "straight" / "out", [])
    return straight, train_in_parts(configs, inputs, root / "cut" / "out", stops)


def changed(config: PretrainConfig, *hops: dict[str, Any]) -> list[PretrainConfig]:
    """A configuration and what becomes of it."""
    return [config, *(replace(config, **hop) for hop in hops)]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            replace(SHARED, **BLOCKS),
            id="experts shared, averages, blocks of searched mask rates",
            marks=pytest.mark.slow,
        ),
        pytest.param(replace(TWELVE, optimizer=MUON, zero_stage=2), id="Muon with averages, ZeRO 2"),
        *(
            pytest.param(replace(SHARED, zero_stage=stage, micro_batch_seqs=2), id=f"ZeRO {stage}", marks=slow)
            for slow in [pytest.mark.slow]
            for stage in (1, 2, 3)
        ),
        *(
            pytest.param(replace(TWELVE, optimizer=MUON, zero_stage=stage), id=f"Muon, ZeRO {stage}", marks=slow)
            for slow in [pytest.mark.slow]
            for stage in (0, 1, 3)
        ),
        pytest.param(
            replace(SHARED, optimizer=MUON, precision="bf16", zero_stage=2),
            id="experts shared, Muon, bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resume_by_the_same_ranks_is_bitwise(config: PretrainConfig, inputs: Inputs, tmp_path: Path) -> None:
    straight, found = straight_and_cut([config, config], inputs, tmp_path, [10])
    assert differences(config, found, straight) == []
    searched = [line["mask_rate_low"] for line in metrics(found) if "mask_rate_low" in line]
    assert len(searched) == (3 if config.objective.search_mask_rates else 0)


@pytest.mark.parametrize(
    ("hops", "stops"),
    [
        pytest.param([{"ep_size": 1}, {"ep_size": 0}], [5, 9], id="ep_size 2, 1, 0"),
        pytest.param([{"workers": 1, "ep_size": 1}, {}], [5, 9], id="2 workers, 1, 2"),
        pytest.param(
            [{"zero_stage": 2}, {"zero_stage": 3}, {"workers": 1, "ep_size": 0, "zero_stage": 0}, {}],
            [3, 5, 7, 9],
            id="ZeRO 1, 2, 3, plain, 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_experts_shared_by_other_ranks_go_on_with_the_same_curve(
    hops: list[dict[str, Any]], stops: list[int], inputs: Inputs, tmp_path: Path
) -> None:
    config = replace(SHARED, checkpoint_every_steps=stops[1] - stops[0])
    straight, found = straight_and_cut(changed(config, *hops), inputs, tmp_path, stops)
    for kind in kinds_of_weights(config):
        assert_close(found, straight, kind=kind)


@pytest.mark.parametrize(
    ("hops", "stops"),
    [
        pytest.param([{"workers": 1, "zero_stage": 2}, {"zero_stage": 3}], [5, 9], id="2 workers, 1, 2; ZeRO 1, 2, 3"),
        pytest.param([{"workers": 1}, {}], [5, 9], id="2 workers, 1, 2", marks=pytest.mark.slow),
        pytest.param([{"zero_stage": 2}, {"zero_stage": 3}], [5, 9], id="ZeRO 1, 2, 3", marks=pytest.mark.slow),
    ],
)
def test_muon_and_averages_go_on_by_other_ranks_with_the_same_curve(
    hops: list[dict[str, Any]], stops: list[int], inputs: Inputs, tmp_path: Path
) -> None:
    config = replace(TWELVE, optimizer=MUON)
    straight, found = straight_and_cut(changed(config, *hops), inputs, tmp_path, stops)
    for kind in kinds_of_weights(config):
        assert_close(found, straight, kind=kind)


def farthest(found: Path, straight: Path, first_step: int) -> float:
    """Largest difference of the losses of a step from ``first_step`` on; before it there must be none."""
    apart = [abs(a - b) for a, b in zip(losses(found), losses(straight), strict=True)]
    assert apart[:first_step] == [0.0] * first_step
    return max(apart[first_step:])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("change", [{"workers": 1}, {"workers": 1, "zero_stage": 2}], ids=str)
def test_bf16_by_other_ranks_goes_no_farther_apart_than_by_another_micro_batch(
    change: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    config = replace(TWELVE, num_steps=54, precision="bf16")
    straight, found = straight_and_cut(changed(config, change), inputs, tmp_path, [5])
    other = train_in_parts(changed(config, {"micro_batch_seqs": 2}), inputs, tmp_path / "micro" / "out", [5])
    by_micro_batch, by_ranks = (farthest(out, straight, 4) for out in (other, found))
    assert 0.0 < by_micro_batch < 0.1
    assert by_ranks <= BF16_FACTOR * by_micro_batch


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("config", "change"),
    [
        pytest.param(TWELVE, {"workers": 1, "zero_stage": 2}, id="dense"),
        pytest.param(replace(TWELVE, optimizer=MUON), {"workers": 1, "zero_stage": 3}, id="Muon"),
        pytest.param(SHARED, {"ep_size": 1}, id="experts of each rank"),
    ],
)
def test_fifty_steps_after_a_change_every_loss_is_within_the_bar(
    config: PretrainConfig, change: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    config = replace(config, num_steps=54)
    straight, found = straight_and_cut(changed(config, change), inputs, tmp_path, [5])
    assert len(losses(found)) - 4 == 50
    assert 0.0 < farthest(found, straight, 4) <= AFTER_CHANGE


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_steps_after_a_change_experts_differ_only_where_a_router_was_undecided(
    inputs: Inputs, tmp_path: Path
) -> None:
    config = replace(SHARED, num_steps=54)
    by_one = {"workers": 1, "ep_size": 0}
    straight, found = straight_and_cut(changed(config, by_one), inputs, tmp_path, [5])
    pairs = list(zip(metrics(found), metrics(straight), strict=True))
    flips = [a["step"] for a, b in pairs if abs(a["router_balance"] - b["router_balance"]) > FLIP]
    assert len(flips) <= 2
    for a, b in pairs:
        assert abs(a["loss"] - b["loss"]) <= (AT_FLIP if a["step"] in flips else AFTER_CHANGE), a["step"]
