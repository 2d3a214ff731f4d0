"""What the terminal shows of a run: one line a step, in place on a terminal, lines one after another elsewhere."""

import errno
import io
import time
from typing import Any

import pytest
from rich.console import Console

from workflows import display
from workflows.display import Display
from workflows.plan import PlannedStep
from workflows.progress import duration
from workflows.state import StepState

STARTED_AT = 1_000.0


def _step(name: str, **state: Any) -> StepState:
    return StepState(PlannedStep(name, f"pipeline.{name}", {}, {}, 1, None, name), **state)


def _training(done: int, loss: float | None, tokens_per_s: float, total: int = 1000) -> StepState:
    """A training that reported step 20 first and has done 10 steps a second since."""
    figures = {"tokens_per_s": tokens_per_s} | ({} if loss is None else {"loss": loss})
    progress = {"done": done, "total": total, "figures": figures, "time": STARTED_AT + (done - 20) / 10}
    return _step(
        "pretrain",
        status="running",
        started_at=time.time() - 60,
        progress=progress,
        first_progress=(STARTED_AT, 20.0),
    )


def _shown(*frames: list[StepState], is_terminal: bool, width: int = 100) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None, legacy_windows=False
    )
    with Display(console, "brave-run-1") as shown:
        for frame in frames:
            shown.update(frame)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (_training(220, 3.21449, 12_345.6), "220/1,000 steps  loss 3.214  12.3k tokens/s  1m18s left"),
        (_training(20, 10.0, 987.6), "20/1,000 steps  loss 10.000  988 tokens/s"),
        (_training(900, None, 4.561e6), "900/1,000 steps  loss not finite  4.56M tokens/s  10.0s left"),
        (_training(990, 1.0, 999_700.0), "990/1,000 steps  loss 1.000  1000k tokens/s  1.0s left"),
        (_step("tokens", status="running", progress={"done": 3, "total": 8, "figures": {}, "time": 1.0}), "3/8"),
        (_step("corpus", status="running"), "starting"),
        (_step("corpus", status="failed", reason="no file\nat all"), "no file"),
    ],
)
def test_line_of_a_step_tells_how_far_it_is(state: StepState, expected: str) -> None:
    (line,) = _shown([state], is_terminal=False).splitlines()
    assert line.startswith(f"{state.step.name:<13} {state.status}")
    assert line.endswith(f"  {expected}")


def test_training_on_a_terminal_stays_on_one_line_that_is_drawn_anew() -> None:
    frames = [[_step("rows", status="cached"), _training(done, 4.0, 5e4)] for done in (100, 200, 300)]
    shown = _shown(*frames, is_terminal=True, width=90)
    for done in (100, 200, 300):
        assert shown.count(f"{done}/1,000 steps") == (2 if done == 300 else 1)  # the last frame stays when it ends
    assert shown.count("\x1b[1A") >= 2 * 3, "each frame begins where the one before began"
    (line,) = {line.strip() for line in shown.splitlines() if "300/1,000 steps" in line}
    assert "left" in line, "the line of a training fits a terminal of 90 columns"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_training_that_was_resumed_says_once_from_which_checkpoint(is_terminal: bool) -> None:
    frames = [[_training(done, 4.0, 5e4)] for done in (220, 230, 240)]
    for (state,) in frames:
        state.progress["figures"]["resumed_at"] = 200
    shown = _shown(*frames, is_terminal=is_terminal)
    assert shown.count("pretrain goes on from checkpoint step-00000200: 200 of 1000 steps are done") == 1
    again = _training(310, 4.0, 5e4)
    again.progress["figures"]["resumed_at"] = 300
    shown = _shown(*frames, [again], is_terminal=is_terminal)
    assert shown.count(" goes on from checkpoint step-00000300: 300 of 1000 steps are done") == 1
    assert "goes on" not in _shown([_training(20, 4.0, 5e4)], is_terminal=is_terminal)


def test_wait_of_shards_for_places_is_told_once_and_a_later_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now_s[0])
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    reason = "wants 1 core; free are 0 cores"
    with Display(console, "r") as shown:
        for at_s, status in [
            (1, "queued"),
            (2, "running"),
            (3, "queued"),
            (4, "running"),
            (5, "queued"),
            (90, "running"),
        ]:
            now_s[0] = at_s
            shown.update([_step("evaluate", status=status, reason=reason if status == "queued" else "")])
        now_s[0] = 91
        shown.update([_step("evaluate", status="queued", reason=reason)])
    assert isinstance(console.file, io.StringIO)
    lines = [line.split()[1] for line in console.file.getvalue().splitlines()]
    assert lines == ["queued", "running", "running", "queued"]


def test_training_elsewhere_gives_a_line_every_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now_s[0])
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with Display(console, "r") as shown:
        for done in range(20, 420):
            now_s[0] += 0.125
            shown.update([_training(done, 4.0, 5e4)])
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["20/1,000", "140/1,000", "260/1,000", "380/1,000"]
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (8.12, "8.1s"),
        (59.94, "59.9s"),
        (59.97, "1m00s"),
        (125.0, "2m05s"),
        (125.7, "2m06s"),
        (3599.7, "1h00m"),
        (3720.0, "1h02m"),
        (3779.0, "1h03m"),
        (90_000.0, "25h00m"),
    ],
)
def test_duration_has_two_units_and_is_rounded(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_terminal_that_is_gone_ends_no_run():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    console = Console(file=Gone(), force_terminal=False, width=40)
    with Display(console, "r") as shown:
        for done in (100, 200):
            shown.update([_training(done, 4.0, 5e4)])
    assert console.quiet
