"""Weights & Biases itself, offline or with a server of our own: what is sent, and that no failure reaches training."""

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.conftest import python
from tests.support.wandb_file import all_rows, read_records, run_files
from tests.support.wandb_server import Server, serving

KEY = "0123456789" * 4
LIMIT_S = 45.0
"""Start of an interpreter and of wandb, and the time-outs of start and finish, which the script sets to 6 s each."""


@dataclass(frozen=True)
class Tracked:
    """What a process said that tracked some steps."""

    returncode: int
    warnings: list[str]
    next_step: int
    wall_s: float


def _track(root: Path, first: int, end: int, ending: str = "finish", **env: str | None) -> Tracked:
    """Track steps first..end-1 in a process of its own; the local log must hold all steps to the end."""
    settings = {"HOME": str(root), "NETRC": str(root / "none"), "WANDB_API_KEY": None, "WANDB_MODE": None, **env}
    start_s = time.monotonic()
    process = python("-m", "tests.support.track", str(root), str(first), str(end), ending, **settings)
    wall_s = time.monotonic() - start_s
    assert process.returncode == (-signal.SIGKILL if ending == "kill" else 0), process.stderr
    said = [line.split(" ", 1) for line in process.stdout.splitlines() if " " in line]
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(end)), process.stderr
    warnings = [text for word, text in said if word == "WARNED"]
    assert not any(KEY in text for text in (process.stdout, process.stderr))
    return Tracked(process.returncode, warnings, next(int(text) for word, text in said if word == "NEXT"), wall_s)


def _assert_without_key(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_wandb_offline_run_killed_twice_has_every_step_once_in_order(tmp_path: Path) -> None:
    first = _track(tmp_path, 0, 230, "kill", WANDB_API_KEY=KEY, WANDB_MODE="offline")
    assert first.next_step == 0
    sent = [row["train/step"] for row in all_rows(tmp_path / "wandb")]
    assert 60 < len(sent) < 230, "a kill loses what was not yet in the file, or this test shows nothing"
    second = _track(tmp_path, 60, 400, "kill", WANDB_API_KEY=KEY, WANDB_MODE="offline")
    third = _track(tmp_path, 399, 410, WANDB_API_KEY=KEY, WANDB_MODE="offline")
    assert second.next_step == len(sent) > 60
    assert second.next_step < third.next_step < 399

    rows = all_rows(tmp_path / "wandb")
    assert [row["train/step"] for row in rows] == list(range(410))
    assert [row["_step"] for row in rows] == list(range(410))
    assert [row["train/loss"] for row in rows] == pytest.approx([1 / (step + 1) for step in range(410)])
    records = [record for path in run_files(tmp_path / "wandb") for record in read_records(path)]
    runs = [record.run for record in records if record.HasField("run")]
    assert len(runs) == 3
    assert {(run.run_id, run.run_group) for run in runs} == {("abcdef", "group")}
    axes = {record.metric.step_metric for record in records if record.HasField("metric") and record.metric.step_metric}
    assert axes == {"train/step"}
    assert first.warnings + second.warnings + third.warnings == []
    _assert_without_key(tmp_path)


def test_wandb_online_resume_sends_what_the_server_lacks_and_no_more(tmp_path: Path) -> None:
    with serving(Server()) as server:
        online = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        _track(tmp_path, 0, 20, **online)
        assert [row["train/step"] for row in server.rows] == list(range(20))
        server.rows.clear()
        server.known_rows = 13  # the rest was lost on the way
        resumed = _track(tmp_path, 10, 25, **online)
        assert resumed.next_step == 13
        assert [row["train/step"] for row in server.rows] == list(range(13, 25))
        assert [row["_step"] for row in server.rows] == list(range(13, 25))
    assert resumed.warnings == []
    _assert_without_key(tmp_path)


def test_wandb_that_goes_away_during_training_ends_in_bounded_time(tmp_path: Path) -> None:
    with serving(Server(stops_after_init=True)) as server:
        tracked = _track(tmp_path, 0, 50, WANDB_MODE="online", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    (warning,) = tracked.warnings
    assert "wandb sync" in warning
    assert tracked.wall_s < LIMIT_S
    assert [row["train/step"] for row in all_rows(tmp_path / "wandb")] == list(range(50))
    _assert_without_key(tmp_path)


@pytest.mark.parametrize("key", [KEY, "too short"])
def test_wandb_with_a_bad_key_goes_on_offline(tmp_path: Path, key: str) -> None:
    with serving(Server(status=401)) as server:
        tracked = _track(tmp_path, 0, 3, WANDB_MODE="online", WANDB_BASE_URL=server.url, WANDB_API_KEY=key)
    (warning,) = tracked.warnings
    assert "continuing offline" in warning
    assert [row["train/step"] for row in all_rows(tmp_path / "wandb")] == [0, 1, 2]
    _assert_without_key(tmp_path)


def test_wandb_online_that_cannot_be_reached_goes_on_offline_in_bounded_time(tmp_path: Path) -> None:
    tracked = _track(tmp_path, 0, 3, WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    (warning,) = tracked.warnings
    assert "continuing offline" in warning
    assert tracked.wall_s < LIMIT_S
    assert [row["train/step"] for row in all_rows(tmp_path / "wandb")] == [0, 1, 2]
    _assert_without_key(tmp_path)


def test_wandb_on_a_full_disk_loses_nothing_that_the_next_attempt_cannot_send(tmp_path: Path) -> None:
    full = _track(tmp_path, 0, 200, "full", WANDB_MODE="offline")
    assert full.wall_s < LIMIT_S
    on_disk = len(all_rows(tmp_path / "wandb"))
    assert on_disk < 200
    resumed = _track(tmp_path, 180, 220, WANDB_MODE="offline")
    assert resumed.next_step == on_disk
    assert [row["train/step"] for row in all_rows(tmp_path / "wandb")] == list(range(220))


def test_wandb_directory_that_cannot_be_made_warns_and_never_raises(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file")
    (warning,) = _track(tmp_path, 0, 3).warnings
    assert "FileExistsError" in warning


def test_wandb_with_an_unknown_mode_warns_and_never_raises(tmp_path: Path) -> None:
    warnings = _track(tmp_path, 0, 3, WANDB_MODE="bogus").warnings
    assert "Weights & Biases is off" in warnings[-1]


def test_wandb_run_file_in_another_format_warns_and_never_raises(tmp_path: Path) -> None:
    odd = tmp_path / "wandb" / "wandb" / "offline-run-20260101_000000-abcdef" / "run-abcdef.wandb"
    odd.parent.mkdir(parents=True)
    odd.write_bytes(b"SQLite format 3\0")
    (warning,) = _track(tmp_path, 0, 3).warnings
    assert "SQLite" in warning
