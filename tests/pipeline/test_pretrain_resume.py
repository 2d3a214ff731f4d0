"""A training that was killed, at any moment, goes on to the bits of one that was not."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import MANIFEST
from pipeline.pretrain.config import STAGE, PretrainConfig
from pipeline.training_state import checkpoint_name, file_name, read_manifest
from tests.support.resuming import assert_close, assert_same, differences, kill_paused, steps_of, train_in_parts
from tests.support.tiny_run import (
    TINY,
    Artifacts,
    Gang,
    Payload,
    copy_state,
    forge,
    losses,
    metrics,
    pretrain,
    run_gang,
    sha256,
    start_gang,
    tiny,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
TWELVE = tiny(num_steps=12, workers=2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, made: Artifacts) -> Path:
    """12 steps by two ranks that nothing disturbed."""
    return pretrain(TWELVE, made, tmp_path_factory.mktemp("straight") / "out")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, made: Artifacts) -> Path:
    """State of a training whose ranks were both killed in step 10, with checkpoints of steps 4 and 8."""
    out = tmp_path_factory.mktemp("killed") / "out"
    gang = start_gang(STAGE, TWELVE, made.inputs(), out, workers=2, fault="pause_at_step", step=10)
    kill_paused(gang, 10)
    assert not (out / MANIFEST).exists()
    return gang.state


def test_a_slow_copy_is_of_the_step_that_was_saved(made: Artifacts, straight: Path, tmp_path: Path) -> None:
    out = run_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2, fault="copy_slowly", seconds=0.3)
    for rank in range(2):
        name = f"{checkpoint_name(8)}/{file_name(rank)}"
        assert sha256(out.with_name("out.state") / name) == sha256(straight.with_name("out.state") / name)
    assert_same(out, straight)


def test_resume_after_sigkill_is_bitwise(made: Artifacts, straight: Path, tmp_path: Path) -> None:
    gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2, fault="pause_at_step", step=6)
    kill_paused(gang, 6)
    assert steps_of(gang.state) == ["step-00000004"]
    again = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
    assert again.wait() == [0, 0]
    assert again.log().count("continuing from checkpoint step-00000004: 4 of 12 steps are done") == 1
    assert [again.log().count(f"checkpoint {checkpoint_name(step)} in ") for step in (8, 12)] == [1, 1]
    assert differences(TWELVE, tmp_path / "out", straight) == []


@pytest.mark.parametrize(
    ("phase", "rank", "step", "left"),
    [
        ("copying", 1, 8, [4]),
        ("writing", 1, 8, [4]),
        ("written", 1, 8, [4]),
        ("publishing", 0, 8, [4]),
        ("renaming", 0, 8, [4]),
        ("published", 0, 8, [4, 8]),
        ("deleting", 0, 12, [4, 8, 12]),
    ],
)
def test_a_rank_killed_in_any_phase_of_a_save_ends_the_gang_and_costs_nothing(
    made: Artifacts, straight: Path, tmp_path: Path, phase: str, rank: int, step: int, left: list[int]
) -> None:
    out = tmp_path / "out"
    gang = start_gang(
        STAGE, TWELVE, made.inputs(), out, workers=2, fault="die_in_save", step=step, rank=rank, phase=phase
    )
    codes = gang.wait()
    assert codes[rank] == -9, gang.log()
    assert codes[1 - rank] == 3, "the survivor did not notice by itself"
    assert steps_of(gang.state) == [checkpoint_name(number) for number in left]
    again = start_gang(STAGE, TWELVE, made.inputs(), out, workers=2)
    assert again.wait() == [0, 0], again.log()
    assert f"continuing from checkpoint {checkpoint_name(left[-1])}: {left[-1]} of" in again.log()
    assert_same(out, straight)
    assert not list(gang.state.glob("staging-*"))
    assert steps_of(gang.state)[-2:] == steps_of(straight.with_name("out.state"))


def flip_byte(checkpoint: Path) -> None:
    """Change one byte in the middle of a shard."""
    path = checkpoint / file_name(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_shard(checkpoint: Path) -> None:
    """Lose a shard."""
    (checkpoint / file_name(0)).unlink()


def cut_manifest(checkpoint: Path) -> None:
    """Lose the end of the manifest."""
    path = checkpoint / MANIFEST
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [flip_byte, drop_shard, cut_manifest])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    made: Artifacts, killed: Path, straight: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    state = copy_state(killed, tmp_path / "out")
    assert steps_of(state) == ["step-00000004", "step-00000008"]
    damage(state / "step-00000008")
    gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
    assert gang.wait() == [0, 0]
    assert "continuing from checkpoint step-00000004: 4 of" in gang.log()
    assert list(state.glob("corrupt-step-00000008-*"))
    assert_same(tmp_path / "out", straight)


def test_all_checkpoints_damaged_is_refused_again_and_again(made: Artifacts, killed: Path, tmp_path: Path) -> None:
    state = copy_state(killed, tmp_path / "out")
    flip_byte(state / "step-00000004")
    cut_manifest(state / "step-00000008")
    for _ in range(2):
        gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
        assert gang.wait() == [2, 2]
        assert f"all checkpoints in {state} are damaged. To train again from step 0" in gang.log()
        assert len(metrics(state)) == 10, "the metrics of the lost run were overwritten"


def test_a_pickle_that_runs_code_is_set_aside_unread_although_its_hash_is_right(
    made: Artifacts, killed: Path, straight: Path, tmp_path: Path
) -> None:
    state, marker = copy_state(killed, tmp_path / "out"), tmp_path / "marker"
    path = state / "step-00000008" / file_name(1)
    path.write_bytes(pickle.dumps({"master": Payload(marker)}))
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the payload does not work: a weak test"
    marker.unlink()
    forge(state / "step-00000008", path.name)
    gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
    assert gang.wait() == [0, 0]
    assert f"{path} is not a file of training state" in gang.log()
    assert "continuing from checkpoint step-00000004: 4 of" in gang.log()
    assert_same(tmp_path / "out", straight)
    assert not marker.exists()


def test_another_micro_batch_goes_on_with_the_same_rows_and_noise(
    made: Artifacts, killed: Path, straight: Path, tmp_path: Path
) -> None:
    copy_state(killed, tmp_path / "out")
    run_gang(STAGE, replace(TWELVE, micro_batch_seqs=2), made.inputs(), tmp_path / "out", workers=2)
    assert_close(tmp_path / "out", straight)


def by(workers: int, zero_stage: Any, every: int) -> PretrainConfig:
    """TWELVE by other ranks."""
    return replace(TWELVE, workers=workers, zero_stage=zero_stage, checkpoint_every_steps=every)


def test_two_ranks_one_and_two_again_with_other_zero_stages_go_on_with_the_same_curve(
    made: Artifacts, straight: Path, tmp_path: Path
) -> None:
    configs = [by(2, 1, 4), by(1, 2, 4), by(2, 3, 4)]
    train_in_parts(configs, made.inputs(), tmp_path / "out", [5, 9])
    assert_close(tmp_path / "out", straight)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_change_of_zero_stage_goes_on_with_the_same_curve(
    made: Artifacts, straight: Path, tmp_path: Path
) -> None:
    hops = [(2, 1), (2, 2), (1, 3), (2, 0), (1, 1), (2, 1)]
    train_in_parts([by(*hop, 2) for hop in hops], made.inputs(), tmp_path / "out", [3, 5, 7, 9, 11])
    assert_close(tmp_path / "out", straight)


def test_a_checkpoint_of_another_training_is_refused_field_by_field(
    made: Artifacts, killed: Path, tmp_path: Path
) -> None:
    state = copy_state(killed, tmp_path / "out")
    config = replace(TWELVE, optimizer=replace(TINY.optimizer, lr=1e-3), precision="bf16")
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out", workers=2)
    assert gang.wait() == [2, 2]
    assert "belongs to another training" in gang.log()
    assert "differs in: config.optimizer.lr 0.003 -> 0.001, config.precision 'fp32' -> 'bf16'. Set" in gang.log()
    assert len(metrics(state)) == 10
    assert steps_of(state) == ["step-00000004", "step-00000008"]


def test_a_change_that_was_accepted_goes_on_and_is_recorded(made: Artifacts, killed: Path, tmp_path: Path) -> None:
    copy_state(killed, tmp_path / "out")
    optimizer = replace(TINY.optimizer, lr=1e-3)
    config = replace(TWELVE, optimizer=optimizer, accept_changed_identity=True)
    run_gang(STAGE, config, made.inputs(), tmp_path / "out", workers=2)
    (entry,) = read_manifest(tmp_path / "out" / "checkpoints" / "step-00000012").lineage
    assert (entry["step"], entry["changed"]) == (8, {"config.optimizer.lr": [0.003, 0.001]})


def test_a_model_of_another_shape_is_refused_by_parameter(made: Artifacts, killed: Path, tmp_path: Path) -> None:
    copy_state(killed, tmp_path / "out")
    config = replace(TWELVE, architecture=replace(TINY.architecture, d_ff=32), accept_changed_identity=True)
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out", workers=2)
    assert gang.wait() == [2, 2]
    assert "config.architecture.d_ff 64 -> 32" in gang.log()
    assert "blocks.0.feed_forward.down.weight [32, 64] -> [32, 32]" in gang.log()


def test_a_training_killed_after_its_last_step_only_writes_its_artifact(
    made: Artifacts, straight: Path, tmp_path: Path
) -> None:
    copy_state(straight.with_name("out.state"), tmp_path / "out")
    gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
    assert gang.wait() == [0, 0]
    assert "continuing from checkpoint step-00000012: 12 of" in gang.log()
    assert "checkpoint step-00000012 in" not in gang.log()
    assert_same(tmp_path / "out", straight)
    for path in sorted(straight.rglob("*.safetensors")):
        assert sha256(tmp_path / "out" / path.relative_to(straight)) == sha256(path)


def test_retention_leaves_the_newest_two_and_no_script_to_run(straight: Path) -> None:
    state = straight.with_name("out.state")
    assert steps_of(state) == ["step-00000008", "step-00000012"]
    assert not [path for path in state.rglob("*") if path.suffix == ".py"]
    assert len(losses(straight)) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 1, "precision": "bf16"},
        {"zero_stage": 3, "precision": "bf16"},
    ],
    ids=str,
)
def test_resume_is_bitwise_for_every_kind_of_state(made: Artifacts, tmp_path: Path, change: dict[str, Any]) -> None:
    config = replace(TWELVE, micro_batch_seqs=2, **change)
    wanted = pretrain(config, made, tmp_path / "straight" / "out")
    gang: Gang = start_gang(
        STAGE, config, made.inputs(), tmp_path / "cut" / "out", workers=2, fault="pause_at_step", step=6
    )
    kill_paused(gang, 6)
    found = run_gang(STAGE, config, made.inputs(), tmp_path / "cut" / "out", workers=2)
    assert differences(config, found, wanted) == []
