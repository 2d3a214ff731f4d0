"""Stores and executors for the tests of the workflow engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.executor import Executor
from cluster.local import LocalExecutor
from tests.support.executors import NUM_CPUS, RAY_LIMIT_S, Kept, ray_executor
from workflows import coordinator
from workflows.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the toy stages record their executions."""
    path = tmp_path / "log"
    path.mkdir()
    return path


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr(coordinator, "_BACKOFF_S", 0.01)


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[Executor]:
    """One Ray for the module."""
    with ray_executor() as executor:
        yield executor


@pytest.fixture(
    params=["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(RAY_LIMIT_S)])],
)
def executor(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """How to make an executor of each kind."""
    if request.param == "local":
        return lambda: LocalExecutor(NUM_CPUS)
    shared = request.getfixturevalue("shared_ray")
    return lambda: Kept(shared)
