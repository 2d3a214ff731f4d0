"""Updates that would harm the weights are not made, on any rank; what can't be mended stops the training."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact import read_json
from pipeline.errors import NumericsError, classify
from pipeline.pretrain.config import STAGE
from pipeline.pretrain.guards import REPORT_FILE, Guard, Window
from pipeline.pretrain.replicas import _outvoted
from tests.support.hand_state import steps_in
from tests.support.tiny_run import Artifacts, losses, metrics, start_gang, tiny

EIGHT = tiny(num_steps=8, workers=2)
gang_test = pytest.mark.timeout(120)


class Bench:
    """A guard over one weight and torch's own optimizer, with nothing in between, as ZeRO 0 in float32 has it."""

    def __init__(self, state: Path, **changes: Any) -> None:
        self.config, self.warnings, self.state = tiny(**changes), [], state
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        engine = SimpleNamespace(basic_optimizer=self.optimizer, optimizer=self.optimizer, module=self.model)
        self.guard = Guard(self.config, engine, self.warnings.append, state, is_first_rank=True)

    def step(self, step: int, loss: float, gradient: float, *, is_short: bool = False) -> bool:
        """Take a step; whether the weight moved."""
        before = self.weight
        self.model.weight.grad = torch.full((1, 1), gradient)
        self.guard.before_step(step, loss, is_short=is_short)
        self.optimizer.step()
        self.guard.check(step, last_saved=lambda: 4)
        return self.weight != before

    def steps(self, figures: Iterable[tuple[float, float]], first: int = 0) -> list[bool]:
        """Take several."""
        return [self.step(first + number, *both) for number, both in enumerate(figures)]

    @property
    def weight(self) -> float:
        return self.model.weight.item()


CALM = [(2.0 + 0.1 * (number % 3), 1.0 + 0.05 * (number % 2)) for number in range(8)]
BAD = [(float("nan"), 1.0), (1.0, float("inf")), (1.0, float("nan")), (float("-inf"), 1.0)]


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
def test_an_update_that_is_not_finite_is_not_applied_and_told_with_its_samples(tmp_path, bad):
    bench = Bench(tmp_path)
    assert bench.steps([(2.0, 1.0), bad, (2.0, 1.0)]) == [True, False, True]
    assert bench.weight == -2.0
    assert bench.guard.num_refused == 1
    assert len(bench.warnings) == 1
    assert "step 1 had a non-finite loss or gradient and was skipped" in bench.warnings[0]
    assert "samples 8 to 15" in bench.warnings[0]


@pytest.mark.parametrize("bad", BAD)
def test_too_many_refused_in_a_row_stop_the_training_and_leave_their_samples_in_a_file(tmp_path, bad):
    bench = Bench(tmp_path, max_skipped_steps=3)
    bench.steps([(2.0, 1.0), bad, bad])
    with pytest.raises(
        NumericsError, match=r"3 steps in a row up to step 3 .*optimizer\.lr.*checkpoint is step-00000004"
    ):
        bench.step(3, *bad)
    report = read_json(tmp_path / REPORT_FILE)
    assert report["last_checkpoint_step"] == 4
    assert [entry["step"] for entry in report["skipped"]] == [1, 2, 3]
    assert [entry["sample_ids"] for entry in report["skipped"]] == [list(range(8 * n, 8 * n + 8)) for n in (1, 2, 3)]
    assert {entry["cause"] for entry in report["skipped"]} == {"non-finite loss or gradient"}
    assert float(report["skipped"][0]["loss"]) == pytest.approx(bad[0], nan_ok=True)


def test_the_file_is_written_by_the_first_rank_alone(tmp_path):
    bench = Bench(tmp_path, max_skipped_steps=1)
    bench.guard._is_first_rank = False
    with pytest.raises(NumericsError):
        bench.step(0, *BAD[0])
    assert not list(tmp_path.iterdir())


def test_a_good_step_forgives_those_before(tmp_path):
    bench = Bench(tmp_path, max_skipped_steps=2)
    for number in range(0, 10, 2):
        assert bench.steps([BAD[0], (2.0, 1.0)], number) == [False, True]
    assert bench.guard.num_refused == 5


def test_a_guard_that_is_told_of_another_step_than_was_taken_fails(tmp_path):
    bench = Bench(tmp_path)
    bench.guard.before_step(3, 2.0)
    with pytest.raises(AssertionError, match=r"stepped 4 after before_step\(3\)"):
        bench.guard.check(4, lambda: 0)


@pytest.mark.parametrize("spike", [(9.0, 1.0), (2.0, 5.0)], ids=["loss", "gradient norm"])
def test_a_spike_is_skipped_where_that_is_asked_and_told_in_any_case(tmp_path, spike):
    asked, not_asked = Bench(tmp_path, spike_sigmas=6.0, spike_window_steps=8), Bench(tmp_path, spike_window_steps=8)
    for bench in (asked, not_asked):
        bench.steps(CALM)
        assert not bench.warnings
        assert not bench.guard.is_spike
    assert not asked.step(8, *spike)
    assert "step 8 had a spike and was skipped" in asked.warnings[0]
    assert not_asked.step(8, *spike)
    assert "step 8 is a spike" in not_asked.warnings[0]
    assert "was applied; pretrain.spike_sigmas would skip such" in not_asked.warnings[0]
    assert asked.guard.is_spike
    assert not_asked.guard.is_spike
    assert asked.guard.num_refused == 1
    assert not_asked.guard.num_refused == 0


def test_a_step_of_short_rows_is_no_spike_and_tells_nothing_of_others(tmp_path):
    bench = Bench(tmp_path, spike_sigmas=6.0, spike_window_steps=8)
    bench.steps(CALM)
    window = bench.guard.state()["losses"]
    assert bench.step(8, 90.0, 90.0, is_short=True)
    assert not bench.guard.is_spike
    assert bench.warnings == []
    assert bench.guard.state()["losses"] == window
    assert not bench.step(9, 90.0, 90.0), "the window is as narrow as it was"
    assert not bench.step(10, float("nan"), 1.0, is_short=True), "what is no number is refused in any case"


def test_a_level_that_stays_high_stops_a_training_that_skips_spikes(tmp_path):
    bench = Bench(tmp_path, spike_sigmas=6.0, spike_window_steps=8, max_skipped_steps=3)
    bench.steps(CALM)
    bench.steps([(9.0, 1.0)] * 2, 8)
    with pytest.raises(NumericsError, match="3 steps in a row up to step 10 had a spike"):
        bench.step(10, 9.0, 1.0)


def test_a_phase_boundary_empties_the_window(tmp_path):
    bench = Bench(tmp_path, spike_sigmas=6.0, spike_window_steps=8)
    bench.steps(CALM)
    bench.guard.forget()
    assert all(bench.steps([(9.0, 5.0), (9.1, 5.1)], 8))


def test_no_spike_is_seen_before_half_of_the_window_is_filled(tmp_path):
    bench = Bench(tmp_path, spike_sigmas=6.0, spike_window_steps=16)
    assert all(bench.steps(CALM[:7]))
    assert bench.step(7, 900.0, 1.0)


@given(
    before=st.lists(st.floats(-10, 10), min_size=4, max_size=20),
    value=st.floats(-50, 50),
    sigmas=st.floats(0.5, 8),
)
def test_a_window_holds_a_value_against_the_mean_and_deviation_of_the_last_ones(before, value, sigmas):
    window = Window(8)
    for loss in before:
        window.add(loss, 1.0)
    last = torch.tensor(before[-8:], dtype=torch.float64)
    bound = float(last.mean() + sigmas * last.std())
    if not math.isclose(value, bound, abs_tol=1e-9):
        assert window.is_spike(value, 1.0, sigmas) == (value > bound)


@given(st.integers(0, 8), st.integers(0, 2))
def test_a_guard_goes_on_from_its_state_as_if_never_stopped(tmp_path_factory, num_good, num_bad):
    figures = [*CALM[:num_good], *BAD[:num_bad]]
    rest = [(2.0, 1.0), (9.0, 1.0), (2.1, 1.02)]
    settings = {"spike_sigmas": 6.0, "spike_window_steps": 8}
    state = tmp_path_factory.mktemp("state")
    straight, stopped, resumed = (Bench(state, **settings) for _ in range(3))
    straight.steps(figures)
    stopped.steps(figures)
    resumed.guard.restore(json.loads(json.dumps(stopped.guard.state())))
    assert resumed.guard.is_healthy == straight.guard.is_healthy
    assert resumed.steps(rest, len(figures)) == straight.steps(rest, len(figures))
    assert resumed.guard.state() == straight.guard.state()


def test_a_numerics_error_is_a_class_of_its_own():
    assert classify(NumericsError("")) == "numerics"


@pytest.mark.parametrize(
    ("copies", "wanted"),
    [([5, 5], []), ([5, 6], [1]), ([5, 6, 6], [0]), ([6, 6, 5, 6], [2]), ([1, 2, 3], [1, 2]), ([5], [])],
)
def test_the_rank_with_another_value_than_most_is_named(copies, wanted):
    assert _outvoted(dict(enumerate(copies))) == wanted


# --- gangs ----------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@gang_test
def test_two_nan_gradients_are_skipped_on_all_ranks_and_training_goes_on(made: Artifacts, tmp_path: Path) -> None:
    gang = start_gang(
        STAGE, EIGHT, made.inputs(), tmp_path / "out", workers=2, fault="make_gradients_nan", first=2, last=3
    )
    assert gang.wait() == [0, 0]
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [2, 3]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert gang.log().count("warning: step 2 had a non-finite loss or gradient") == 2
    assert all(line["loss"] is not None for line in lines)


@pytest.mark.distributed
@gang_test
@pytest.mark.parametrize("change", [{}, {"zero_stage": 3, "precision": "bf16"}], ids=str)
def test_a_spike_is_skipped_on_all_ranks_as_a_gradient_that_is_no_number(
    made: Artifacts, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Nothing is left of either step: the losses after it are the same."""
    config = tiny(num_steps=8, workers=2, spike_sigmas=1000.0, spike_window_steps=8, **change)
    spiked = start_gang(
        STAGE, config, made.inputs(), tmp_path / "a", workers=2, fault="scale_loss", first=6, factor=1e4
    )
    assert spiked.wait() == [0, 0], spiked.log()
    assert spiked.log().count("warning: step 6 had a spike and was skipped") == 2
    lines = metrics(tmp_path / "a")
    assert [line["skipped"] for line in lines] == [0] * 6 + [1, 2]
    assert [line["spike"] for line in lines] == [0] * 6 + [1, 1]
    nan = start_gang(
        STAGE, config, made.inputs(), tmp_path / "b", workers=2, fault="make_gradients_nan", first=6, last=7
    )
    assert nan.wait() == [0, 0], nan.log()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.distributed
@gang_test
def test_a_training_that_diverges_stops_with_its_samples_and_the_last_good_checkpoint(
    made: Artifacts, tmp_path: Path
) -> None:
    config = tiny(num_steps=8, workers=2, max_skipped_steps=3)
    gang = start_gang(
        STAGE, config, made.inputs(), tmp_path / "out", workers=2, fault="diverge_while_saving", first=4, write_s=1.0
    )
    assert gang.wait() == [3, 3]
    assert steps_in(gang.state) == [4], "the checkpoint under way was thrown away"
    assert gang.log().count("NumericsError: 3 steps in a row up to step 6 had a non-finite loss or gradient") == 2
    assert "Lower pretrain.optimizer.lr" in gang.log()
    report = read_json(gang.state / REPORT_FILE)
    assert report["last_checkpoint_step"] == 4
    assert (gang.state / "step-00000004").is_dir()
    assert [entry["sample_ids"] for entry in report["skipped"]] == [list(range(8 * n, 8 * n + 8)) for n in (4, 5, 6)]


@pytest.mark.distributed
@gang_test
def test_a_save_that_falls_on_refused_updates_is_made_after_the_next_one_that_is_applied(
    made: Artifacts, tmp_path: Path
) -> None:
    config = tiny(num_steps=14, checkpoint_every_steps=4, keep_checkpoints=9)
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out", fault="make_gradients_nan", first=7, last=8)
    assert gang.wait() == [0], gang.log()
    assert steps_in(gang.state) == [14, 12, 10, 4]


@pytest.mark.distributed
@gang_test
def test_steps_without_a_masked_token_have_no_loss_and_training_goes_on(made: Artifacts, tmp_path: Path) -> None:
    gang = start_gang(
        STAGE, EIGHT, made.inputs(), tmp_path / "out", workers=2, fault="mask_nothing", everywhere=3, one_rank=5
    )
    assert gang.wait() == [0, 0], gang.log()
    lines = metrics(tmp_path / "out")
    assert (lines[3]["loss"], lines[3]["masked_fraction"], lines[3]["grad_norm"]) == (0.0, 0.0, 0.0)
    assert lines[5]["loss"] > 0
    assert 0 < lines[5]["masked_fraction"] < 1
    assert [line["skipped"] for line in lines] == [0] * 8
    assert all(line["loss"] > 0 for line in lines if line["step"] != 3)


@pytest.mark.distributed
@gang_test
@pytest.mark.parametrize(
    ("zero_stage", "name"), [(1, "embedding.weight"), (2, "blocks.1.attention.qkv.weight"), (3, "norm.weight")]
)
def test_a_weight_that_differs_on_one_rank_stops_all_and_is_named(
    made: Artifacts, tmp_path: Path, zero_stage: Any, name: str
) -> None:
    config = tiny(num_steps=8, workers=2, zero_stage=zero_stage, replica_check_every_steps=3)
    gang = start_gang(
        STAGE, config, made.inputs(), tmp_path / "out", workers=2, fault="disturb_weight", step=6, rank=1, name=name
    )
    assert gang.wait() == [3, 3], gang.log()
    words = f"in step 6 the weights differ from those of the other ranks: {name} on rank 1. A device"
    assert gang.log().count(f"NumericsError: {words}") == 2
    assert len(metrics(gang.state)) == 6


@pytest.mark.distributed
@gang_test
def test_replicas_that_are_never_compared_are_not(made: Artifacts, tmp_path: Path) -> None:
    """ZeRO 1 spreads the right weights anew: nobody would ever know."""
    config = tiny(num_steps=8, workers=2, replica_check_every_steps=0)
    fault = {"step": 6, "rank": 1, "name": "embedding.weight"}
    gang = start_gang(STAGE, config, made.inputs(), tmp_path / "out", workers=2, fault="disturb_weight", **fault)
    assert gang.wait() == [0, 0], gang.log()


@pytest.mark.distributed
@gang_test
def test_ranks_that_are_about_to_do_different_things_stop_and_say_which(made: Artifacts, tmp_path: Path) -> None:
    fault = {"step": 3, "rank": 1}
    gang = start_gang(STAGE, EIGHT, made.inputs(), tmp_path / "out", workers=2, fault="disagree_on_saving", **fault)
    assert gang.wait() == [3, 3], gang.log()
    assert gang.log().count("RanksDisagreeError: the ranks are no longer in step") == 2
    assert "rank 0: {'done': 4, 'saves': 1" in gang.log()
    assert "rank 1: {'done': 4, 'saves': 0" in gang.log()
    assert not list(gang.state.glob("step-*"))
