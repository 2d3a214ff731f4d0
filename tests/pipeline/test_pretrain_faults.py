"""Full disks, failing writes, lost leases, and the wrong tokenizer."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import MANIFEST, read_json
from pipeline.errors import classify
from pipeline.pretrain.checkpoint import load_checkpoint_manifest
from pipeline.pretrain.config import STAGE, ValidationConfig
from pipeline.pretrain.run import write_metrics
from tests.support.tiny_run import Artifacts, copy_state, make_artifacts, metrics, pretrain, start_gang, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
EIGHT = tiny(num_steps=8, workers=2)


def checkpoints(state: Path) -> list[str]:
    """Names of what a dead attempt left in its state, but logs and the record of verified files."""
    return sorted(path.name for path in state.iterdir() if path.is_dir() and path.name not in ("attempt", "verified"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_that_fails_on_one_rank_fails_on_all_and_training_goes_on_to_its_end(
    made: Artifacts, tmp_path: Path, rank: int
) -> None:
    gang = start_gang(STAGE, EIGHT, made.inputs(), tmp_path / "out", workers=2, fault="fail_to_write", rank=rank)
    assert gang.wait() == [3, 3]
    assert "warning: checkpoint step-00000004 failed ([Errno 5] Input/output error" in gang.log()
    assert len(metrics(gang.state)) == 8, "the save on the way stopped the training"
    assert checkpoints(gang.state) == []
    assert not (tmp_path / "out" / MANIFEST).exists()


def disk_full(log: str, step: int, last: int) -> bool:
    """Whether a log holds the message of a full disk."""
    return f"[Errno {errno.ENOSPC}] checkpoint step-{step:08d} does not fit on the disk of" in log and (
        f"free some space and resume: training goes on after {last} steps" in log
    )


def test_the_message_of_a_full_disk_is_of_the_memory_class() -> None:
    assert classify(OSError(errno.ENOSPC, "checkpoint step-00000004 does not fit")) == "memory"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(directory)], capture_output=True)
    if done.returncode:
        pytest.skip("no small file system can be mounted here")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_resumes_from_it(
    made: Artifacts, small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "out"
    gang = start_gang(STAGE, EIGHT, made.inputs(), out, workers=2, fault="fill_disk", step=8, leave_bytes=60_000)
    assert gang.wait() == [3, 3]
    assert disk_full(gang.log(), step=8, last=4)
    assert checkpoints(gang.state) == ["step-00000004"]
    assert load_checkpoint_manifest(gang.state / "step-00000004").step == 4
    copy_state(gang.state, tmp_path / "elsewhere")
    again = start_gang(STAGE, EIGHT, made.inputs(), tmp_path / "elsewhere", workers=2)
    assert again.wait() == [0, 0]
    assert "continuing from checkpoint step-00000004: 4 of 8 steps are done" in again.log()


def test_too_little_space_is_noticed_before_a_byte_is_written(made: Artifacts, small_disk: Path) -> None:
    gang = start_gang(
        STAGE, EIGHT, made.inputs(), small_disk / "out", workers=2, fault="fill_disk", step=3, leave_bytes=60_000
    )
    assert gang.wait() == [3, 3]
    assert gang.log().count("warning: checkpoint step-00000004 failed ([Errno 28] 0.1 MB are free") == 1
    assert len(metrics(gang.state)) == 8, "a save before the last one stopped the training"
    assert disk_full(gang.log(), step=8, last=0)
    assert checkpoints(gang.state) == []


def test_training_goes_on_while_a_slow_disk_takes_its_time(made: Artifacts, tmp_path: Path) -> None:
    config = tiny(num_steps=150, workers=2, checkpoint_every_steps=50)
    gang = start_gang(
        STAGE, config, made.inputs(), tmp_path / "out", workers=2, fault="write_slowly", rank=1, until_step=60
    )
    assert gang.wait() == [0, 0], "the disk waits for training, and training for the disk"
    lines = list(map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()))
    told = [line for line in lines if "checkpoint_s" in line]
    assert told[0]["step"] >= 60
    assert 0 < sum(line["checkpoint_stall_s"] for line in lines[50:60]) < told[0]["checkpoint_s"]


def test_metrics_that_others_have_cut_are_told_of_at_the_resume_and_cost_nothing_else(
    made: Artifacts, tmp_path: Path
) -> None:
    out, fault = tmp_path / "out", {"step": 6, "rank": 1}
    died = start_gang(STAGE, EIGHT, made.inputs(), out, workers=2, fault="raise_in_step", **fault)
    assert died.wait() != [0, 0]
    path = died.state / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[3])
    gang = start_gang(STAGE, EIGHT, made.inputs(), out, workers=2)
    assert gang.wait() == [0, 0], gang.log()
    told = f"warning: {path} has no line of 2 of the 4 steps before the one to go on with (steps 1 to 2)"
    assert gang.log().count(told) == 1
    left = metrics(out)
    assert [line["step"] for line in left] == [0, 3, 4, 5, 6, 7]
    stats = read_json(out / MANIFEST)["stats"]
    assert stats["missing_metrics"] == 2
    assert stats["final_loss"] == pytest.approx(sum(line["loss"] for line in left) / 6)
    assert stats["tokens"] == left[-1]["tokens"]
    assert stats["tokens_per_s"] > 0


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_text("")], ids=["gone", "empty"])
def test_metrics_lost_while_training_leave_an_artifact_without_their_figures(
    tmp_path: Path, lose: Callable[[Path], object]
) -> None:
    source, target = tmp_path / "metrics.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"step": step, "loss": 2.0, "step_s": 0.5}) + "\n" for step in range(4)))
    whole = {"final_loss": 2.0, "tokens_per_s": 200.0, "missing_metrics": 0}
    assert write_metrics(source, target, num_steps=4, tokens=400) == whole
    assert target.read_text() == source.read_text()
    lose(source)
    none = {"final_loss": None, "tokens_per_s": None, "missing_metrics": 4}
    assert write_metrics(source, target, num_steps=4, tokens=400) == none
    assert target.read_text() == ""


def test_a_lost_lease_stops_all_ranks_before_anything_is_published(made: Artifacts, tmp_path: Path) -> None:
    gang = start_gang(STAGE, EIGHT, made.inputs(), tmp_path / "out", workers=2, fault="lose_lease", step=4)
    assert gang.wait() == [3, 3]
    assert gang.log().count("LeaseLostError: attempt 2 has taken over") == 2
    assert 4 <= len(metrics(gang.state)) < 8
    assert checkpoints(gang.state) == []


def test_the_tokenizer_of_another_run_is_refused_even_of_the_same_size(made: Artifacts, tmp_path: Path) -> None:
    other = make_artifacts(tmp_path, seed=1)
    inputs = {"rows": made.rows, "tokenizer": other.tokenizer}
    gang = start_gang(STAGE, tiny(), inputs, tmp_path / "out")
    assert gang.wait() == [2]
    assert "were made with another tokenizer" in gang.log()
    validated = tiny(validation=ValidationConfig(every_steps=5, num_rows=4))
    gang = start_gang(STAGE, validated, {**made.inputs(), "tokens": other.tokens}, tmp_path / "validated")
    assert gang.wait() == [2]
    assert f"the tokens in {other.tokens} were made with another tokenizer than the rows" in gang.log()


def test_a_finished_training_is_not_repeated(made: Artifacts, tmp_path: Path) -> None:
    out = pretrain(tiny(num_steps=2), made, tmp_path / "out")
    before = (out / MANIFEST).stat().st_mtime_ns
    gang = start_gang(STAGE, tiny(num_steps=2), made.inputs(), out)
    assert gang.wait() == [0]
    assert "is already complete" in gang.log()
    assert (out / MANIFEST).stat().st_mtime_ns == before


def test_training_from_weights_drawn_too_large_stops_after_its_first_step(made: Artifacts, tmp_path: Path) -> None:
    gang = start_gang(
        STAGE, tiny(num_steps=3), made.inputs(), tmp_path / "out", fault="scale_initial_weights", factor=30.0
    )
    codes = gang.wait()
    assert codes != [0], gang.log()
    assert "nats a masked token; an untrained model of this configuration has" in gang.log()
    assert metrics(gang.state) == []


NAN = float("nan")


def test_a_first_loss_that_is_not_finite_is_skipped_and_training_goes_on(made: Artifacts, tmp_path: Path) -> None:
    fault: dict[str, Any] = {"fault": "multiply_losses", "first": 0, "last": 1, "by": NAN}
    gang = start_gang(STAGE, EIGHT, made.inputs(), tmp_path / "out", workers=2, **fault)
    assert gang.wait() == [0, 0], gang.log()
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines if line["loss"] is None] == [0, 1]
    assert [line["skipped"] for line in lines] == [1, 2, 2, 2, 2, 2, 2, 2]


def test_first_losses_that_are_never_finite_stop_at_the_limit_of_skipped_steps(made: Artifacts, tmp_path: Path) -> None:
    config, fault = tiny(num_steps=8, max_skipped_steps=3), {"first": 0, "last": 99, "by": NAN}
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out", fault="multiply_losses", **fault)
    assert gang.wait() == [3], gang.log()
    assert "NumericsError: 3 steps in a row up to step 2 had a non-finite loss or gradient" in gang.log()
    assert len(metrics(gang.state)) == 2


def test_the_first_finite_loss_is_held_against_that_of_an_untrained_model(made: Artifacts, tmp_path: Path) -> None:
    fault = {"first": 0, "last": 1, "by": NAN, "weights_by": 30.0}
    gang = start_gang(STAGE, tiny(num_steps=8), made.inputs(), tmp_path / "out", fault="multiply_losses", **fault)
    assert gang.wait() == [3], gang.log()
    assert "nats a masked token; an untrained model of this configuration has" in gang.log()
    assert [line["loss"] for line in metrics(gang.state)] == [None, None]


def test_a_loss_after_the_first_update_may_be_anything(made: Artifacts, tmp_path: Path) -> None:
    fault = {"first": 1, "last": 2, "by": 3.0}
    gang = start_gang(STAGE, tiny(num_steps=3), made.inputs(), tmp_path / "out", fault="multiply_losses", **fault)
    assert gang.wait() == [0], gang.log()
    assert metrics(gang.state)[1]["loss"] > 12


def test_short_steps_that_could_not_be_short_are_exit_2(made: Artifacts, tmp_path: Path) -> None:
    config = tiny(num_steps=2, short_step_share=0.5, short_step_min=32)
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out")
    assert gang.wait() == [2]
    assert "pretrain.short_step_min is 32, but rows have 32 tokens" in gang.log()
