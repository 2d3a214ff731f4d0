"""Stores and executors for the tests of the workflow engine."""

from pathlib import Path

import pytest

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
