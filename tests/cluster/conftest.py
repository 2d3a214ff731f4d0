"""Stores for the tests on clusters."""

from pathlib import Path

import pytest

from workflows.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return open_store(tmp_path / "store")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the toy stages record their executions."""
    path = tmp_path / "log"
    path.mkdir()
    return path
