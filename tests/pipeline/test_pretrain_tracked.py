"""What a training sends to Weights & Biases when it is killed and goes on, and what stays out of its files."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import to_json
from pipeline.pretrain.config import STAGE
from pipeline.pretrain.run import make_tracker
from pipeline.stage import StageContext
from pipeline.tracking import MetricsLog
from tests.support.tiny_run import Artifacts, losses, metrics, start_gang, tiny
from tests.support.wandb_file import all_rows, read_records, run_files

TRACKED = tiny(num_steps=12, track=True)
_KEY = "fedcba9876" * 4
_SECRETS = {"WANDB_API_KEY": _KEY, "HF_TOKEN": f"hf_{_KEY}", "AWS_SECRET_ACCESS_KEY": _KEY[::-1]}


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_training_killed_twice_is_one_run_with_every_step_once_and_tells_no_secret(
    made: Artifacts, tmp_path: Path
) -> None:
    environment = {**_SECRETS, "WANDB_MODE": "offline", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    for kill_at in (6, 10, None):
        end = 12 if kill_at is None else kill_at
        given: dict[str, Any] = {"environment": environment, "step": end}
        gang = start_gang(STAGE, TRACKED, made.inputs(), tmp_path / "out", fault="pause_with_environment", **given)
        if kill_at is None:
            assert gang.wait() == [0], gang.log()
            assert f"12/12 steps  loss {losses(tmp_path / 'out')[-1]:.4f} nats/token" in gang.log(0)
        else:
            gang.wait_for(lambda gang=gang, end=end: len(metrics(gang.state)) == end, f"line of step {end - 1}")
            gang.kill()
    wandb = tmp_path / "out.state" / "wandb"
    rows = all_rows(wandb)
    assert [row["train/step"] for row in rows] == list(range(12))
    assert [row["train/loss"] for row in rows] == losses(tmp_path / "out")
    runs = [r.run for path in run_files(wandb) for r in read_records(path) if r.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in _SECRETS.values()), path


def test_tracker_of_a_workflow_run_has_its_group_and_the_stages_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: dict[str, Any] = {}

    def begin(**given: Any) -> None:
        begun.update(given)
        raise ConnectionError("enough is seen")

    wandb: Any = type(sys)("wandb")
    wandb.Settings = lambda **_: None
    wandb.init = begin
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    context = StageContext(tmp_path / "out", tmp_path, "f" * 64, labels={"run_id": "brave-run-1", "step": "pretrain"})
    with make_tracker(TRACKED, context, MetricsLog(tmp_path / "metrics.jsonl", 0), 1234) as tracker:
        tracker.write({"step": 0, "loss": 6.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 10.0})
    assert "1/12 steps  loss 6.5000 nats/token" in capsys.readouterr().out
    assert (begun["group"], begun["id"], begun["resume"]) == ("brave-run-1", "f" * 12, "allow")
    assert begun["config"] == {**to_json(TRACKED), "num_params": 1234}
