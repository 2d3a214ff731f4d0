"""A training that was killed, at any moment, goes on to the bits of one that was not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import MANIFEST
from pipeline.pretrain.config import STAGE
from tests.support.tiny_run import (
    TINY,
    Artifacts,
    Gang,
    Payload,
    convert,
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
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, made: Artifacts) -> Path:
    """12 steps by two ranks that nothing disturbed."""
    return pretrain(TWELVE, made, tmp_path_factory.mktemp("straight") / "out")


@pytest.fixture(scope="module")
def straight_weights(tmp_path_factory: pytest.TempPathFactory, straight: Path) -> str:
    """SHA-256 of its float32 masters."""
    return sha256(convert(straight, tmp_path_factory.mktemp("straight_weights") / "out") / WEIGHTS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, made: Artifacts) -> Path:
    """State of a training whose ranks were both killed in step 10, with checkpoints of steps 4 and 8."""
    out = tmp_path_factory.mktemp("killed") / "out"
    gang = start_gang(STAGE, TWELVE, made.inputs(), out, workers=2, fault="pause_at_step", step=10)
    gang.wait_for(lambda: len(metrics(gang.state)) == 10, "line of step 9")
    gang.kill()
    assert not (out / MANIFEST).exists()
    return gang.state


def steps_of(state: Path) -> list[str]:
    """Published checkpoints."""
    return sorted(path.name for path in state.glob("step-*"))


def assert_same(found: Path, straight: Path) -> None:
    """Same metrics, digit for digit."""
    assert metrics(found) == metrics(straight)


def weights_of(out: Path) -> str:
    """SHA-256 of the float32 masters of a finished training."""
    return sha256(convert(out, out.with_name("weights")) / WEIGHTS)


def test_resume_after_sigkill_is_bitwise(
    made: Artifacts, straight: Path, straight_weights: str, tmp_path: Path
) -> None:
    gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2, fault="pause_at_step", step=6)
    gang.wait_for(lambda: len(metrics(gang.state)) == 6, "line of step 5")
    gang.kill()
    assert steps_of(gang.state) == ["step-00000004"]
    again = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
    assert again.wait() == [0, 0]
    assert "continuing after step 4 from step-00000004" in again.log()
    assert_same(tmp_path / "out", straight)
    assert weights_of(tmp_path / "out") == straight_weights


def test_a_rank_killed_in_the_middle_of_a_file_ends_the_gang_and_costs_nothing(
    made: Artifacts, straight: Path, tmp_path: Path
) -> None:
    gang = start_gang(
        STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2, fault="kill_while_writing", step=8, rank=1
    )
    assert gang.wait() == [3, -9]  # the survivor notices by itself
    assert steps_of(gang.state) == ["step-00000004"]
    assert list(gang.state.glob("staging-*"))
    assert_same(run_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2), straight)
    assert not list(gang.state.glob("staging-*"))


def test_a_kill_between_the_files_and_the_manifest_publishes_nothing(
    made: Artifacts, straight: Path, straight_weights: str, tmp_path: Path
) -> None:
    gang = start_gang(
        STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2, fault="pause_before_publishing", step=8
    )
    written = "ds/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    gang.wait_for(lambda: any(gang.state.glob(f"staging-00000008-*/{written}")), "file of rank 1")
    gang.kill()
    assert steps_of(gang.state) == ["step-00000004"]
    assert_same(run_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2), straight)
    assert weights_of(tmp_path / "out") == straight_weights


def flip_byte(checkpoint: Path) -> None:
    """Change one byte in the middle of a shard."""
    path = checkpoint / "ds" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_shard(checkpoint: Path) -> None:
    """Lose a shard."""
    (checkpoint / "ds" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()


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
    assert "continuing after step 4" in gang.log()
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


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_pickle_that_runs_code_is_refused_although_its_hash_is_right(
    made: Artifacts, killed: Path, tmp_path: Path, name: str
) -> None:
    import torch

    state, marker = copy_state(killed, tmp_path / "out"), tmp_path / "marker"
    path = state / "step-00000008" / "ds" / name
    value = torch.load(path, weights_only=False)
    torch.save({**value, "extra": Payload(marker)}, path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload does not work: a weak test"
    marker.unlink()
    forge(state / "step-00000008", f"ds/{name}")
    gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
    assert 0 not in gang.wait()
    assert "UnpicklingError" in gang.log()
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": 1}, "workers 2 -> 1"),
        ({"zero_stage": 2}, "zero_stage 1 -> 2"),
        ({"micro_batch_seqs": 2}, ""),
    ],
)
def test_another_topology_is_refused_with_the_field_and_another_micro_batch_is_not(
    made: Artifacts, killed: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    state = copy_state(killed, tmp_path / "out")
    config = replace(TWELVE, **change)
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out", workers=config.workers)
    assert gang.wait() == [2 if words else 0] * config.workers, gang.log()
    assert words in gang.log()
    if words:
        assert steps_of(state) == ["step-00000004", "step-00000008"]


def test_a_checkpoint_of_another_training_is_refused(made: Artifacts, killed: Path, tmp_path: Path) -> None:
    state = copy_state(killed, tmp_path / "out")
    config = replace(TWELVE, optimizer=replace(TINY.optimizer, lr=1e-3))
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out", workers=2)
    assert gang.wait() == [2, 2]
    assert "belongs to another training" in gang.log()
    assert len(metrics(state)) == 10
    assert steps_of(state) == ["step-00000004", "step-00000008"]


def test_a_training_killed_after_its_last_step_only_writes_its_artifact(
    made: Artifacts, straight: Path, tmp_path: Path
) -> None:
    copy_state(straight.with_name("out.state"), tmp_path / "out")
    gang = start_gang(STAGE, TWELVE, made.inputs(), tmp_path / "out", workers=2)
    assert gang.wait() == [0, 0]
    assert "continuing after step 12" in gang.log()
    assert "checkpoint of step 12 in" not in gang.log()
    assert_same(tmp_path / "out", straight)
    for path in sorted(straight.rglob("*.pt")):
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
    gang.wait_for(lambda: len(metrics(gang.state)) == 6, "line of step 5")
    gang.kill()
    found = run_gang(STAGE, config, made.inputs(), tmp_path / "cut" / "out", workers=2)
    assert_same(found, wanted)
    assert weights_of(found) == weights_of(wanted)
