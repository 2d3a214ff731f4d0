"""Trainings that several files of tests look at, each run once a session.

Imports stay inside the fixtures: dlm_core must not be imported before its shapes are instrumented.
"""

import functools
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of many tests on few cores wait for each other
settings.register_profile("any machine", deadline=None)  # what a single example takes says nothing on a busy one
if settings.get_current_profile_name() == "default":  # the planted faults are looked for under one of their own
    settings.load_profile("any machine")

if TYPE_CHECKING:
    from xdist.scheduler.protocol import Scheduling

    from tests.support.tiny_run import Artifacts
    from tests.support.warm_python import Call

_WITH_RAY = ("cluster", "workflows")
"""Packages with tests that start a Ray or talk to one."""
_STARTS_RAY = re.compile(r"mark\.ray\b|^def test\w+\([^)]*\bexecutor\b", re.MULTILINE)
"""In a file of such tests; those that are slow on Ray (``executor_of_gangs``) run in one process anyway."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "Scheduling":
    """Two Rays at once are too many for two cores: the files that start one share a process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "Ray" if starts_ray(file) else file

    @functools.cache
    def starts_ray(file: str) -> bool:
        return _STARTS_RAY.search((config.rootpath / file).read_text()) is not None

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_ray_token(request: pytest.FixtureRequest) -> None:
    """Where there are tests that may start a Ray, its token is settled before the first."""
    if any(item.path.relative_to(Path(__file__).parent).parts[0] in _WITH_RAY for item in request.session.items):
        from tests.support.ray_token import settle_token

        settle_token()


@pytest.fixture(autouse=True, scope="module")
def denormals() -> Iterator[None]:
    """Small numbers are numbers again for the next file, whatever a stage set for its process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


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


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[Mapping[str, str]]:
    """A running S3 server."""
    from tests.support.object_stores import s3_server

    with s3_server() as environment:
        yield environment


@pytest.fixture(scope="session")
def gs_environment() -> Iterator[Mapping[str, str]]:
    """A running server of Google Cloud Storage."""
    from tests.support.object_stores import gs_server

    with gs_server() as environment:
        yield environment


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch, s3_environment: Mapping[str, str]) -> str:
    """An empty store on S3."""
    return _empty(monkeypatch, s3_environment, "s3")


@pytest.fixture
def gs_url(monkeypatch: pytest.MonkeyPatch, gs_environment: Mapping[str, str]) -> str:
    """An empty store on Google Cloud Storage."""
    return _empty(monkeypatch, gs_environment, "gs")


def _empty(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], scheme: str) -> str:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return f"{scheme}://bucket/{secrets.token_hex(4)}/store"


@pytest.fixture(params=["files", "s3", "gs"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    return str(tmp_path / "store") if request.param == "files" else request.getfixturevalue(f"{request.param}_url")


@pytest.fixture(scope="session")
def transformers4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57, to be put in front of PYTHONPATH; pip fetches it once a session."""
    from tests.support.transformers4 import install

    own = tmp_path_factory.getbasetemp()
    return install((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "transformers4")


@pytest.fixture(scope="session")
def warm_call() -> Iterator["Call"]:
    """An interpreter with transformers, of which others are forked."""
    from tests.support.warm_python import warm_python

    with warm_python() as call:
        yield call


@pytest.fixture(scope="module")
def forked_proofs(warm_call: "Call") -> Iterator[None]:
    """Proofs are forked from a warm interpreter where this process starts them, and not started anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.logits_proof._call", warm_call)
        yield
