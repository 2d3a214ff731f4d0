"""Settings of the tests of the benchmarks."""

import os
from collections.abc import Iterator
from multiprocessing import forkserver
from unittest import mock

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def server_of_ranks() -> None:
    """The one server that children of this session are forked from has what ranks import, whoever asks first."""
    from tests.support.tiny_run import rank_context

    rank_context()
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are small: threads gain nothing and, on a shared machine, wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)  # a measurement sets it for its process
