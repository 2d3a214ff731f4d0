import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import MANIFEST, record_files
from pipeline.errors import CorruptionError, UserError
from pipeline.pretrain.checkpoint import (
    DEEPSPEED_TAG,
    Topology,
    check_topology,
    checkpoint_name,
    clear_staging,
    expected_files,
    list_checkpoints,
    load_checkpoint_manifest,
    newest_valid,
    publish,
    retain,
)
from tests.pipeline.conftest import cut_end, damage, flip_bit

TOPOLOGY = Topology(workers=2, zero_stage=1, precision="fp32")


def _write_staging(directory: Path, step: int, topology: Topology = TOPOLOGY, without: str = "") -> Path:
    staging = directory / f"staging-{step}"
    (staging / DEEPSPEED_TAG).mkdir(parents=True)
    for name in expected_files(topology) - {without}:
        (staging / DEEPSPEED_TAG / name).write_bytes(f"{step} {name} ".encode() * 50)
    return staging


def _publish(directory: Path, step: int, topology: Topology = TOPOLOGY) -> Path:
    staging, final = _write_staging(directory, step, topology), directory / checkpoint_name(step)
    publish(staging, final, step, "f" * 64, topology, record_files(staging), {"torch": "2"})
    return final


def _some_file(checkpoint: Path) -> Path:
    return checkpoint / DEEPSPEED_TAG / "mp_rank_00_model_states.pt"


def _edit_manifest(checkpoint: Path, **changes: Any) -> None:
    value = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**value, **changes}))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_publish_of_a_complete_set_is_found_and_loaded(
    tmp_path: Path, workers: int, precision: str, zero_stage: int
) -> None:
    topology = Topology(workers, zero_stage, precision)
    final = _publish(tmp_path, 7, topology)
    found = newest_valid(tmp_path, pytest.fail)
    assert found is not None
    checkpoint, manifest = found
    assert checkpoint == final == tmp_path / "step-00000007"
    assert (manifest.step, manifest.fingerprint, manifest.topology) == (7, "f" * 64, topology)
    assert len(manifest.files) == workers * (2 if zero_stage == 3 else 1) + (zero_stage != 3)
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_publish_of_an_incomplete_set_names_the_file_and_publishes_nothing(tmp_path: Path, zero_stage: int) -> None:
    topology = Topology(2, zero_stage, "bf16")
    for name in expected_files(topology):
        directory = tmp_path / name
        staging, final = _write_staging(directory, 3, topology, without=name), directory / checkpoint_name(3)
        with pytest.raises(CorruptionError) as error:
            publish(staging, final, 3, "f" * 64, topology, record_files(staging), {})
        assert name in str(error.value)
        assert not final.exists()
        assert newest_valid(directory, pytest.fail) is None


def test_publish_over_a_leftover_of_the_same_step_replaces_it(tmp_path: Path) -> None:
    leftover = tmp_path / checkpoint_name(4)
    (leftover / DEEPSPEED_TAG).mkdir(parents=True)
    (leftover / DEEPSPEED_TAG / "stray").write_text("old")
    final = _publish(tmp_path, 4)
    assert final == leftover
    assert load_checkpoint_manifest(final).step == 4
    assert not (final / DEEPSPEED_TAG / "stray").exists()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated file": lambda c: cut_end(_some_file(c)),
    "emptied file": lambda c: damage(_some_file(c), lambda data: data.clear()),
    "longer file": lambda c: damage(_some_file(c), lambda data: data.append(0)),
    "flipped bit": lambda c: flip_bit(_some_file(c), 10),
    "missing model": lambda c: _some_file(c).unlink(),
    "missing optimizer shard": lambda c: (c / DEEPSPEED_TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
    "missing manifest": lambda c: (c / MANIFEST).unlink(),
    "empty manifest": lambda c: (c / MANIFEST).write_text(""),
    "half a manifest": lambda c: cut_end(c / MANIFEST, 100),
    "manifest of zeros": lambda c: (c / MANIFEST).write_bytes(bytes(400)),
    "manifest that is a list": lambda c: (c / MANIFEST).write_text("[]"),
    "manifest of another kind": lambda c: (c / MANIFEST).write_text('{"stage": "corpus"}'),
    "manifest without a shard": lambda c: _edit_manifest(
        c, files=[r for r in json.loads((c / MANIFEST).read_text())["files"] if "rank_1" not in r["path"]]
    ),
    "manifest of more workers": lambda c: _edit_manifest(
        c, topology={"workers": 3, "zero_stage": 1, "precision": "fp32"}
    ),
    "manifest that leads outside": lambda c: _edit_manifest(
        c,
        files=[{**r, "path": f"../{c.name}/{r['path']}"} for r in json.loads((c / MANIFEST).read_text())["files"]],
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_newest_valid_falls_back_past_a_damaged_checkpoint_and_sets_it_aside(tmp_path: Path, kind: str) -> None:
    older, newer = _publish(tmp_path, 10), _publish(tmp_path, 20)
    DAMAGES[kind](newer)
    warnings: list[str] = []
    found = newest_valid(tmp_path, warnings.append)
    assert found is not None
    assert (found[0], found[1].step) == (older, 10)
    assert len(warnings) == 1
    assert str(newer) in warnings[0]
    assert not newer.exists()
    (aside,) = tmp_path.glob("corrupt-step-00000020-*")
    assert aside.name in warnings[0]
    assert newest_valid(tmp_path, pytest.fail) == found


@pytest.mark.parametrize("kind", DAMAGES)
def test_newest_valid_with_every_checkpoint_damaged_refuses_to_start_over(tmp_path: Path, kind: str) -> None:
    for step in (1, 2, 3):
        DAMAGES[kind](_publish(tmp_path, step))
    warnings: list[str] = []
    with pytest.raises(CorruptionError, match=r"all checkpoints .* are damaged"):
        newest_valid(tmp_path, warnings.append)
    assert len(warnings) == 3
    with pytest.raises(CorruptionError, match=r"all checkpoints .* are damaged"):
        newest_valid(tmp_path, pytest.fail)


def test_newest_valid_without_any_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path, pytest.fail) is None
    _write_staging(tmp_path, 5)
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    assert newest_valid(tmp_path, pytest.fail) is None
    assert list_checkpoints(tmp_path) == []


def test_staging_beside_a_checkpoint_is_ignored_and_cleared(tmp_path: Path) -> None:
    final = _publish(tmp_path, 5)
    staging = _write_staging(tmp_path, 6)
    found = newest_valid(tmp_path, pytest.fail)
    assert found is not None
    assert found[0] == final
    clear_staging(tmp_path)
    assert not staging.exists()
    assert final.exists()


def test_list_checkpoints_is_newest_first(tmp_path: Path) -> None:
    for step in (9, 100, 11, 2):
        _publish(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(s) for s in (100, 11, 9, 2)]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_retain_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    steps = [5, 10, 15, 20]
    for step in steps:
        _publish(tmp_path, step)
    retain(tmp_path, keep)
    kept = list_checkpoints(tmp_path)
    assert [path.name for path in kept] == [checkpoint_name(step) for step in steps[::-1][:keep]]
    for path in kept:
        load_checkpoint_manifest(path)


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        (Topology(4, 1, "fp32"), "workers 2 -> 4"),
        (Topology(2, 3, "fp32"), "zero_stage 1 -> 3"),
        (Topology(2, 1, "bf16"), "precision fp32 -> bf16"),
    ],
)
def test_check_topology_names_the_field_and_both_values(wanted: Topology, change: str) -> None:
    with pytest.raises(UserError) as error:
        check_topology(TOPOLOGY, wanted)
    assert f"({change})" in str(error.value)


def test_check_topology_of_the_same_is_accepted() -> None:
    check_topology(TOPOLOGY, Topology(2, 1, "fp32"))
