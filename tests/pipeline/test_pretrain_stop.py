"""What ends a training from outside, or one rank from inside, costs nothing that was done."""

import os
import signal
import sys
from pathlib import Path

import pytest

from pipeline.artifact import MANIFEST
from pipeline.errors import classify
from pipeline.pretrain.config import STAGE
from tests.pipeline.conftest import python
from tests.support.tiny_run import Artifacts, Gang, metrics, run_gang, start_gang, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
TWENTY = tiny(workers=2)
"""As in the fixture ``pair``."""


def ask(gang: Gang, *ranks: int) -> None:
    """SIGTERM to some ranks."""
    for rank in ranks:
        os.kill(gang.ranks[rank].pid or 0, signal.SIGTERM)


def goes_on(made: Artifacts, gang: Gang, straight: Path) -> None:
    """Start the training again: it ends as one that nothing disturbed."""
    out = run_gang(STAGE, TWENTY, made.inputs(), gang.out, workers=2)
    assert metrics(out) == metrics(straight)


def test_a_rank_killed_in_a_step_ends_the_gang_and_training_goes_on_from_the_last_checkpoint(
    made: Artifacts, pair: Path, tmp_path: Path
) -> None:
    fault = {"step": 6, "rank": 1, "number": int(signal.SIGKILL)}
    gang = start_gang(STAGE, TWENTY, made.inputs(), tmp_path / "out", workers=2, fault="signal_in_step", **fault)
    assert gang.wait() == [3, -9]
    assert [path.name for path in gang.state.glob("step-*")] == ["step-00000004"]
    goes_on(made, gang, pair)


def test_the_rank_that_lost_its_peer_does_not_pass_for_the_cause(made: Artifacts, tmp_path: Path) -> None:
    fault = {"step": 6, "rank": 1}
    gang = start_gang(STAGE, TWENTY, made.inputs(), tmp_path / "out", workers=2, fault="raise_in_step", **fault)
    assert gang.wait() == [3, 3]
    symptom = [line for line in gang.log(0).splitlines() if line.startswith(("RuntimeError: ", "torch.distributed."))]
    assert symptom, gang.log()
    assert classify(RuntimeError(symptom[-1])) == "infra"
    assert "KeyError: 'a defect of one rank'" in gang.log(1)
    assert classify(KeyError("a defect of one rank")) == "code"


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=str)
def test_a_request_to_end_is_heard_after_the_step_and_saves(
    made: Artifacts, pair: Path, tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    gang = start_gang(STAGE, TWENTY, made.inputs(), tmp_path / "out", workers=2)
    gang.wait_for(lambda: len(metrics(gang.state)) > 2, "third step")
    ask(gang, *ranks)
    assert gang.wait() == [75, 75], gang.log()
    done = len(metrics(gang.state))
    assert (gang.state / f"step-{done:08d}").is_dir()
    assert (
        f"pretrain: training was asked to stop; {done} steps are done, and step-{done:08d} is saved; the same"
        in gang.log()
    )
    assert "SIGTERM: ends after this step" in gang.log()
    assert not (gang.out / MANIFEST).exists()
    goes_on(made, gang, pair)


def test_a_second_request_ends_at_once_and_publishes_nothing(made: Artifacts, pair: Path, tmp_path: Path) -> None:
    gang = start_gang(STAGE, TWENTY, made.inputs(), tmp_path / "out", workers=2, fault="hang_before_publishing", step=8)
    gang.wait_for(lambda: len(list(gang.state.glob("staging-00000008-*/rank-*"))) == 2, "files of step 8")
    ask(gang, 0, 1)
    gang.wait_for(lambda: gang.log().count("SIGTERM: ends after this step") == 2, "answers of both")
    ask(gang, 0, 1)
    assert gang.wait() == [-signal.SIGTERM, -signal.SIGTERM]
    assert [path.name for path in gang.state.glob("step-*")] == ["step-00000004"]
    goes_on(made, gang, pair)


def test_nothing_is_compiled_and_no_stale_lock_is_waited_for(made: Artifacts, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    config = tiny(num_steps=2, workers=2)
    fault = {"fault": "stale_extension_locks", "home": str(home)}
    out = run_gang(STAGE, config, made.inputs(), tmp_path / "out", workers=2, **fault)
    assert len(metrics(out)) == 2
    assert not (home / "compiled").exists(), "a compiler was called, if only to ask what it can do"


def test_extensions_of_another_environment_are_another_directory() -> None:
    code = "import os; from pipeline.pretrain.engine import prepare_process as p; p(1); print(os.environ[NAME], end='')"
    name = "TORCH_EXTENSIONS_DIR"
    given = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    assert python("-c", code.replace("NAME", repr(name)), **given, **{name: None}).stdout.startswith(sys.prefix)
    assert python("-c", code.replace("NAME", repr(name)), **given, **{name: "/chosen"}).stdout == "/chosen"
