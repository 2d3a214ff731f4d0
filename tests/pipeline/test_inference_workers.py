"""Questions to one model in several processes."""

import os
import signal
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.inference.model import OpenModel
from pipeline.inference.workers import Workers
from tests.support.model_kinds import save_models
from tests.support.tiny_run import Artifacts

pytestmark = pytest.mark.timeout(120)


def told(model: OpenModel, number: int) -> tuple[int, int, int]:
    assert model.device.type == "cpu"
    return number, os.getpid(), torch.get_num_threads()


def refused(model: OpenModel, number: int) -> None:
    if number == 1:
        raise UserError(f"rows have {model.record.seq_len}")


def killed(model: OpenModel, number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def weights(made: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("weights"), made.tokenizer, "masked")["masked"]


def test_answers_come_in_the_order_of_the_pieces_from_one_thread_each(weights: Path, made: Artifacts) -> None:
    workers, done, threads = Workers(weights, made.tokenizer, "cpu", 2), [], torch.get_num_threads()
    try:
        found = workers.map(told, range(8), lambda: done.append(1))
        assert [number for number, _, _ in found] == list(range(8))
        assert os.getpid() not in {pid for _, pid, _ in found}
        assert {one for _, _, one in found} == {1}
        assert len(done) == 8
        with pytest.raises(UserError, match="rows have 32"):
            workers.map(refused, range(4))
        again = workers.map(told, range(8))
        assert {pid for _, pid, _ in again} & {pid for _, pid, _ in found}
        with pytest.raises(RuntimeError, match="one of 2 workers died; most often the system killed it"):
            workers.map(killed, range(2))
    finally:
        workers.close()
    alone = Workers(weights, made.tokenizer, "cpu")
    assert alone.map(told, range(2)) == [(0, os.getpid(), 1), (1, os.getpid(), 1)]
    assert torch.get_num_threads() == threads
    assert alone.map(told, []) == []
