import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking import MetricsLog, StepLines, Tracker, WandbRun, is_logged_in, step_line, told


def _write_steps(path: Path, first: int, last: int) -> None:
    log = MetricsLog(path, first)
    for step in range(first, last):
        log.write({"step": step, "loss": step / 2})
    log.close()


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_log_holds_one_object_a_step(tmp_path: Path) -> None:
    _write_steps(tmp_path / "m.jsonl", 0, 4)
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": i, "loss": i / 2} for i in range(4)]


@pytest.mark.parametrize("resume_step", [0, 1, 5, 9, 10])
def test_metrics_log_rewinds_to_the_step_of_a_resume(tmp_path: Path, resume_step: int) -> None:
    path = tmp_path / "m.jsonl"
    _write_steps(path, 0, 10)
    MetricsLog(path, resume_step).close()
    assert _steps(path) == list(range(resume_step))
    _write_steps(path, resume_step, 12)
    assert _steps(path) == list(range(12))


@pytest.mark.parametrize(
    "tail",
    ['{"step": 3, "lo', '{"step": 3, "loss": 1.5}', "\0" * 40, "\0" * 40 + "\n", "{}\n", "null\n", "\u00e9"],
    ids=["half", "no newline", "zeros", "zeros and newline", "no step", "not an object", "not ASCII"],
)
def test_metrics_log_drops_a_line_that_is_not_whole(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "m.jsonl"
    _write_steps(path, 0, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + tail.encode())
    MetricsLog(path, 100).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole + tail.encode("latin-1"))
    MetricsLog(path, 100).close()
    assert path.read_bytes() == whole


def _without(*steps: int) -> Callable[[Path], object]:
    def drop(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for step, line in enumerate(lines) if step not in steps))

    return drop


@pytest.mark.parametrize(
    ("lose", "missing"),
    [
        (lambda path: None, []),
        (_without(8, 9), []),  # of steps that are trained again
        (Path.unlink, [range(8)]),
        (lambda path: path.write_text(""), [range(8)]),
        (_without(0), [range(1)]),
        (_without(5, 6, 7, 8, 9), [range(5, 8)]),
        (_without(1, 3, 4, 7), [range(1, 2), range(3, 5), range(7, 8)]),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"ste\x00: 3')), [range(3, 4)]),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step": 2')), [range(3, 4)]),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), [range(4, 8)]),
    ],
    ids=["whole", "later", "gone", "empty", "start", "end", "holes", "damaged", "repeated", "cut"],
)
def test_metrics_log_tells_which_steps_before_a_resume_were_lost_and_keeps_all_others(
    tmp_path: Path, lose: Callable[[Path], object], missing: list[range]
) -> None:
    path = tmp_path / "m.jsonl"
    _write_steps(path, 0, 10)
    lose(path)
    log = MetricsLog(path, 8)
    log.close()
    assert log.missing == missing
    lost = {step for steps in missing for step in steps}
    assert _steps(path) == [step for step in range(8) if step not in lost]


def test_lost_steps_are_told_as_stretches_and_not_all_of_them() -> None:
    assert told([range(3, 4)]) == "3"
    assert told([range(5), range(6, 7), range(8, 10)]) == "0 to 4, 6, 8 to 9"
    assert told([range(n, n + 1) for n in range(0, 14, 2)]) == "0, 2, 4, 6, 8 and 2 more stretches"


@pytest.mark.parametrize("first_step", [0, 3, 5, 9])
def test_metrics_log_gives_the_rows_from_a_step_on_while_it_is_written(tmp_path: Path, first_step: int) -> None:
    _write_steps(tmp_path / "m.jsonl", 0, 7)
    log = MetricsLog(tmp_path / "m.jsonl", 4)
    log.write({"step": 4, "loss": 2.0})
    assert list(log.rows(first_step)) == [{"step": i, "loss": i / 2} for i in range(first_step, 5)]
    log.close()


def test_metrics_log_survives_without_being_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.write({"step": 0, "loss": None})
    assert _steps(tmp_path / "m.jsonl") == [0]
    log.close()


def test_metrics_log_of_nan_is_refused_and_keeps_the_log_readable(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    with pytest.raises(ValueError, match="JSON"):
        log.write({"step": 0, "loss": float("nan")})
    log.write({"step": 0, "loss": 1.0})
    log.close()
    assert _steps(tmp_path / "m.jsonl") == [0]


def test_tracker_closes_the_log_when_training_fails(tmp_path: Path) -> None:
    tracker = Tracker(MetricsLog(tmp_path / "m.jsonl", 0), None)

    def train() -> None:
        with tracker:
            tracker.write({"step": 0})
            raise RuntimeError("loss is not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        train()
    assert _steps(tmp_path / "m.jsonl") == [0]
    with pytest.raises(ValueError, match="closed"):
        tracker.write({"step": 1})


_STEP = {"step": 19, "loss": 6.37983, "grad_norm": 0.93479, "lr": 2.7272e-4, "tokens_per_s": 12_345.6}


def test_a_step_is_told_with_its_units_and_what_was_validated() -> None:
    assert step_line(_STEP, 300) == (
        "20/300 steps  loss 6.3798 nats/token  gradient norm 0.935  lr 0.000273  12,346 tokens/s"
    )
    validated = {**_STEP, "val_nelbo": 6.77497, "val_nelbo_mc_se": 0.03744}
    assert step_line(validated, 300).endswith("tokens/s  validation NELBO 6.7750 ± 0.0374 nats/token")
    assert step_line({**_STEP, "val_nll": 5.5}, 300).endswith("validation loss 5.5000 nats/token")
    broken = step_line({**_STEP, "loss": None, "grad_norm": None}, 300)
    assert broken == "20/300 steps  loss not finite  lr 0.000273  12,346 tokens/s"


def test_quick_steps_are_told_once_a_second_and_the_validated_and_the_last_always(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    now_s = [0.0]
    lines = StepLines(10, lambda: now_s[0])
    with Tracker(MetricsLog(tmp_path / "m.jsonl", 0), None, lines) as tracker:
        for step in range(10):
            now_s[0] = 0.4 * step
            tracker.write({**_STEP, "step": step} | ({"val_nll": 1.0} if step == 4 else {}))
    told = [int(line.partition("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert told == [1, 4, 5, 8, 10]
    assert _steps(tmp_path / "m.jsonl") == list(range(10))


def test_wandb_missing_warns_once_and_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    run = WandbRun(tmp_path / "wandb", "id", "group", {}, warnings.append)
    run.log({"step": 0})
    run.finish()
    assert len(warnings) == 1
    assert "ModuleNotFoundError" in warnings[0]


_KEY = "0123456789" * 4


class _BrokenRun:
    """A service that accepts a run and fails at one call, with a message that says too much."""

    offline, starting_step = False, 0

    def __init__(self, fails_at: str) -> None:
        self.fails_at, self.calls = fails_at, 0

    def _call(self, name: str) -> None:
        if name == self.fails_at:
            self.calls += 1
            raise RuntimeError(f"broken {name} of {_KEY}")

    def define_metric(self, *_: Any, **__: Any) -> None:
        self._call("define_metric")

    def log(self, *_: Any, **__: Any) -> None:
        self._call("log")

    def finish(self, **_: Any) -> None:
        self._call("finish")


@pytest.mark.parametrize("fails_at", ["define_metric", "log", "finish"])
def test_wandb_failing_at_any_call_warns_once_and_never_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    broken = _BrokenRun(fails_at)
    wandb: Any = type(sys)("wandb")
    wandb.Settings = lambda **_: None
    wandb.init = lambda **_: broken
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_API_KEY", _KEY)
    warnings: list[str] = []
    run = WandbRun(tmp_path / "wandb", "id", "group", {}, warnings.append)
    for step in range(3):
        run.log({"step": step})
    run.finish()
    assert broken.calls == 1
    assert len(warnings) == 1
    assert f"broken {fails_at} of [the API key]" in warnings[0]


@pytest.mark.parametrize(
    ("key", "netrc", "expected"),
    [
        ("k" * 40, "", True),
        ("", "machine api.wandb.ai login user password kkk\n", True),
        ("", "machine elsewhere.example login user password kkk\n", False),
        ("", "machine broken", False),
        ("", None, False),
    ],
)
def test_is_logged_in_looks_at_the_key_and_the_netrc_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, netrc: str | None, expected: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    if netrc is not None:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    assert is_logged_in() is expected
