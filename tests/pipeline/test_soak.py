"""A training of experts with averages, killed four times, is the one that was not; ``make soak`` kills it oftener."""

from pathlib import Path

import pytest

from tests.support.resuming import differences
from tests.support.soak import ROUNDS, SAVE_PHASES, Kill, draw, fault_of, main, num_steps, run_through, soak
from tests.support.tiny_run import Artifacts, pretrain, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
SHARED = ROUNDS["experts shared, averages"]


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_training_ends_with_the_same_metrics_weights_and_averages(
    kills: int, made: Artifacts, tmp_path: Path
) -> None:
    table: list[str] = []
    assert soak(SHARED, made.inputs(), tmp_path, kills=kills, seed=3, say=table.append) == []
    assert len(table) == kills + 1


def test_soak_of_another_training_tells_its_metrics_and_weights(made: Artifacts, tmp_path: Path) -> None:
    config = tiny(num_steps=2)
    one, other = (pretrain(tiny(num_steps=2, noise_seed=seed), made, tmp_path / str(seed)) for seed in (0, 1))
    assert differences(config, one, other) == ["metrics of steps [0, 1]", "weights (last)"]


def test_soak_fails_over_a_kill_that_does_not_come(made: Artifacts, tmp_path: Path) -> None:
    late = Kill(rank=0, step=99, moment="step", delay_s=0.0)
    with pytest.raises(AssertionError, match=r"moment='step'.*exit codes \[0, 0\]"):
        run_through(tiny(num_steps=2, workers=2), made.inputs(), tmp_path / "out", [late], print)


@pytest.mark.parametrize("seed", range(20))
def test_kills_lie_in_the_training_in_order_half_of_them_in_saves_and_follow_from_the_seed(seed: int) -> None:
    every, kills = SHARED.checkpoint_every_steps, draw(20, 4, seed)
    assert kills == draw(20, every, seed)
    assert kills != draw(20, every, seed + 1)
    moments = [kill.moment for kill in kills]
    assert moments.count("step") == 10
    assert set(moments) == {"step", "restore", *SAVE_PHASES}
    assert {kill.rank for kill in kills} == {0, 1}
    resumed = 0
    for number, kill in enumerate(kills):
        fault, given = fault_of(kill, SHARED, resumed)
        at = given["step"] if fault == "die_in_save" else kill.step
        assert resumed < at <= max(12, 8 * (number + 1)) < num_steps(20, every)
        assert fault != "die_in_save" or at % every == 0
        resumed = at - at % every


@pytest.mark.parametrize("kills", ["0", "-1"])
def test_soak_without_kills_is_refused(kills: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--kills", kills])
    assert f"--kills is {kills}; it must be at least 1" in capsys.readouterr().err
