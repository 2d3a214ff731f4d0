"""Trainings that several files of tests look at, each run once a session.

Imports stay inside the fixtures: dlm_core must not be imported before its shapes are instrumented.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # what a single example takes says nothing on a busy one
if settings.get_current_profile_name() == "default":  # the planted faults are looked for under one of their own
    settings.load_profile("any machine")

if TYPE_CHECKING:
    from tests.support.tiny_run import Artifacts


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> "Artifacts":
    """A tiny corpus, its tokenizer and its tokens."""
    from tests.support.tiny_run import make_artifacts

    return make_artifacts(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, made: "Artifacts") -> Path:
    """A finished training of 20 steps by one rank."""
    from tests.support.tiny_run import pretrain, tiny

    return pretrain(tiny(), made, tmp_path_factory.mktemp("alone") / "pretrain")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, made: "Artifacts") -> Path:
    """A finished training of 20 steps by two ranks."""
    from tests.support.tiny_run import pretrain, tiny

    return pretrain(tiny(workers=2), made, tmp_path_factory.mktemp("pair") / "pretrain")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    """The weights of ``alone``."""
    from tests.support.tiny_run import convert

    return convert(alone, tmp_path_factory.mktemp("weights") / "convert")
