"""A rank that makes no progress is ended, says where it was, and shows what its threads were doing."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm_core.models.config import ModelConfig
from pipeline.pretrain.batches import step_kind, step_length
from pipeline.pretrain.config import STAGE
from pipeline.pretrain.phases import Phase
from pipeline.pretrain.watchdog import Activity, Watchdog, WatchdogLimits, _grace_s, collective_timeout
from tests.support.ranks import run_ranks
from tests.support.resuming import EXPERTS
from tests.support.tiny_run import Artifacts, metrics, start_gang, tiny

ROOT = Path(__file__).parents[2]
LIMITS = WatchdogLimits(start_s=7.0, first_step_s=5.0, step_s=2.0, step_medians=10.0, checkpoint_s=30.0)
PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from pipeline.pretrain.watchdog import Activity, Watchdog, WatchdogLimits, _grace_s, collective_timeout

def failed(error):
    Path("failed").write_text(f"{type(error).__name__}: {error}")

limits = WatchdogLimits(start_s=30.0, first_step_s=0.4, step_s=0.4, evaluation_s=0.4)
with Watchdog(limits, 0, 1, Path("."), failed) as watchdog:
BODY
print("left")
"""


def watched(body: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run the body under a watchdog whose limits are short, in a process of its own."""
    lines = "\n".join("    " + line for line in body.splitlines())
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("BODY", lines)],
        env={"PYTHONPATH": str(ROOT)}, cwd=directory, capture_output=True, text=True, timeout=50,
    )  # fmt: skip


def test_a_hang_is_ended_with_its_phase_its_step_its_rank_and_every_stack(tmp_path):
    body = "import threading\nthreading.Thread(target=lambda: time.sleep(99), name='other', daemon=True).start()\n"
    run = watched(body + "watchdog.phase('data', 7)\ntime.sleep(99)", tmp_path)
    assert run.returncode == 75
    message = "rank 0 made no progress for 0.4 s in phase 'data' of step 7"
    assert run.stderr.startswith(f"watchdog: {message}\n")
    assert run.stderr.lower().count("thread 0x") >= 3
    assert 'File "<string>", line' in run.stderr
    assert (tmp_path / "failed").read_text() == f"HangError: {message}"


def test_a_thread_that_holds_the_interpreter_is_ended_with_its_stack(tmp_path):
    run = watched("watchdog.phase('step', 7)\ntime.sleep(0.2)\nctypes.PyDLL(None).pause()", tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("Timeout (")
    assert 'File "<string>", line' in run.stderr
    assert "phase 'step' of step 7" in (tmp_path / "alive-0.json").read_text()


def test_progress_keeps_a_process_alive_and_its_end_leaves_nothing(tmp_path):
    body = """
for step in range(4):
    watchdog.phase('step', step)
    time.sleep(0.15)
watchdog.phase('evaluation', 4)
for _ in range(6):
    time.sleep(0.15)
    watchdog.beat()
"""
    run = watched(body.strip(), tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "left\n", "")
    assert not list(tmp_path.iterdir())


def test_an_error_passes_through_and_nothing_is_watched_any_more(tmp_path):
    run = watched("watchdog.phase('step', 0)\nraise SystemExit(9)", tmp_path)
    assert run.returncode == 9
    program = "try:\n    exec(open('program').read())\nexcept KeyError:\n    time.sleep(1.5)\n    print('went on')"
    lines = "    watchdog.phase('step', 0)\n    raise KeyError"
    (tmp_path / "program").write_text(PROGRAM.replace("BODY", lines))
    run = subprocess.run(
        [sys.executable, "-c", "import time\n" + program],
        env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert run.stdout == "went on\n", run.stderr


def test_limits_follow_the_phase_and_the_median_step(tmp_path, monkeypatch):
    watchdog = Watchdog(LIMITS, 0, 1, tmp_path, pytest.fail)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert watchdog._last.limit_s == 7.0
    watchdog.phase("restore")
    assert watchdog._last.limit_s == 30.0
    limits = []
    for step, lasts_s in enumerate([1.0, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5]):
        watchdog.phase("data", step)
        now[0] += 50.0  # waiting for data is not part of a step
        watchdog.phase("step", step)
        limits.append(watchdog._last.limit_s)
        now[0] += lasts_s
        watchdog.phase("checkpoint", step)
        assert watchdog._last.limit_s == 30.0
    assert limits == pytest.approx([5.0, 10.0, 5.5, 2.0, 3.0, 5.0, 5.0])
    watchdog.phase("data", 7)
    assert watchdog._last.limit_s == pytest.approx(5.0)
    watchdog.phase("evaluation")
    assert watchdog._last.limit_s == 1800.0


def test_the_first_step_of_each_kind_has_the_time_of_a_first_step(tmp_path, monkeypatch):
    watchdog = Watchdog(replace(LIMITS, first_step_s=20.0), 0, 1, tmp_path, pytest.fail)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limits: list[tuple[float, float]] = []
    for step, kind in enumerate(["rows", "rows", "blocks", "rows", "blocks"]):
        watchdog.phase("data", step, kind)
        of_data = watchdog._last.limit_s
        watchdog.phase("step", step, kind)
        limits.append((of_data, watchdog._last.limit_s))
        now[0] += 0.1
        watchdog.phase("checkpoint", step)
    assert limits == [(20.0, 20.0), (2.0, 2.0), (20.0, 20.0), (2.0, 2.0), (2.0, 2.0)]
    now[0] += 99.0
    watchdog._steps_s.extend([3.0] * 99)
    watchdog.phase("step", 5, "long")
    assert watchdog._last.limit_s == 30.0, "a first step has no less than a usual one"


def test_steps_are_of_a_kind_by_their_phase_and_where_layers_are_compiled_by_their_length():
    config = tiny(num_steps=400, short_step_share=0.5, phases={"rows": Phase(), "blocks": Phase(block_size=4)})
    assert {step_kind(config, 32, step) for step in range(400)} == {("rows", 0), ("blocks", 0)}
    compiled = {step_kind(replace(config, compile=True), 32, step) for step in range(400)}
    assert compiled == {(config.span_at(step).name, step_length(config, 32, step)) for step in range(400)}
    assert len(compiled) > 20


@pytest.mark.parametrize("field", ["start_s", "first_step_s", "step_s", "step_medians", "checkpoint_s", "evaluation_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_is_not_positive_is_refused_with_its_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        WatchdogLimits(**{field: value})


SECONDS = st.floats(1e-2, 1e6)


@given(st.builds(WatchdogLimits, *[SECONDS] * 6), st.lists(SECONDS, min_size=1, max_size=5))
def test_the_watchdog_and_its_timer_fire_before_a_collective_does_in_every_phase(limits, lasting_s):
    watchdog = Watchdog(limits, 0, 1, Path(), pytest.fail)
    found = {watchdog._last.limit_s}
    for step, seconds in enumerate(lasting_s):
        for phase in get_args(Activity):
            watchdog.phase(phase, step)
            found.add(watchdog._last.limit_s)
        watchdog._steps_s.append(seconds)
    timeout_s = collective_timeout(limits).total_seconds()
    assert all(limit_s + _grace_s(limit_s) < timeout_s for limit_s in found)
    assert timeout_s < 2 * limits.longest_s + 10


# --- gangs ----------------------------------------------------------------------------------------------------------


CONFIGS = {
    "zero 1": tiny(workers=2, watchdog=LIMITS),
    "zero 3": tiny(workers=2, zero_stage=3, watchdog=LIMITS),
    "experts": tiny(workers=2, ep_size=2, architecture=EXPERTS, watchdog=LIMITS),
}


def timeouts_of_groups(rank: int) -> dict[str, list[float]]:
    """Seconds of all groups, in a process group that was made with others; run on each of two ranks."""
    from torch.distributed import distributed_c10d

    from dlm_core.models.transformer import Denoiser
    from pipeline.pretrain.engine import build_engine, start_process_group

    found: dict[str, list[float]] = {}
    for name, config in CONFIGS.items():
        start_process_group(config.watchdog)
        model = Denoiser(ModelConfig(config.architecture, vocab_size=300, mask_token_id=299))
        model.init_weights(0)
        build_engine(model, config)
        backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
        found[name] = [backend.options._timeout.total_seconds() for backend in backends]
    return found


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_every_group_has_the_time_out_of_the_limits_those_of_deepspeed_too(tmp_path: Path) -> None:
    wanted = collective_timeout(LIMITS).total_seconds()
    assert wanted not in (600.0, 1800.0), "torch has these by itself: a weak test"
    for found in run_ranks(timeouts_of_groups, tmp_path, 2):
        assert len(found["experts"]) > len(found["zero 1"]) >= 2, "no group but the first: a weak test"
        assert {name: set(timeouts) for name, timeouts in found.items()} == {name: {wanted} for name in CONFIGS}


def hung(made: Artifacts, out: Path, fault: str, **more: Any) -> Any:
    """A gang whose steps may take 5 s, and in which step 6 goes wrong on rank 1."""
    config = tiny(num_steps=8, workers=2, watchdog=WatchdogLimits(step_s=5.0))
    return start_gang(STAGE, config, made.inputs(), out, workers=2, fault=fault, step=6, rank=1, **more)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_stopped_rank_is_noticed_and_named_by_the_other(made: Artifacts, tmp_path: Path) -> None:
    gang = hung(made, tmp_path / "out", "signal_in_step", number=int(signal.SIGSTOP))
    gang.ranks[0].join(50)
    assert gang.ranks[0].exitcode == 75, gang.log()
    gang.kill(1)
    assert "rank 0 made no progress for 5 s in phase 'step' of step 6; rank 1 has not been heard of for" in gang.log()
    assert "in take_step" in gang.log()
    assert len(metrics(gang.state)) == 6
    assert (gang.state / "step-00000004").is_dir()


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_data_loader_that_hangs_is_named_as_the_phase(made: Artifacts, tmp_path: Path) -> None:
    gang = hung(made, tmp_path / "out", "hang_in_data")
    assert gang.wait()[1] in (75, 3), gang.log()
    log = gang.log()
    named = "rank 1 made no progress for 5 s in phase 'data' of step 6"
    asked_after = "rank 1 was last seen in phase 'data' of step 6"
    assert named in log or asked_after in log
    assert "in rows_or_hang" in log or asked_after in log


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_rank_that_holds_its_interpreter_is_ended_by_the_timer_in_c(made: Artifacts, tmp_path: Path) -> None:
    gang = hung(made, tmp_path / "out", "hold_interpreter")
    codes = gang.wait()
    assert codes[1] == 1, gang.log()
    assert "Timeout (" in gang.log()
    assert "rank 1 has not been heard of for" in gang.log()
