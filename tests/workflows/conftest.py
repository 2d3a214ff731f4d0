"""Stores and executors for the tests of the workflow engine."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.executor import Executor
from cluster.local import LocalExecutor
from pipeline.data.special_tokens import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN
from pipeline.storage import OBJECT_STORES, ObjectStorage, Place
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.executors import NUM_CPUS, RAY_LIMIT_S, Kept, ray_executor
from tests.support.mortal import in_memory
from tests.support.tiny_run import run_stage
from tests.support.toy_workflow import toy_workflow
from workflows import cli, retries
from workflows.commands import common
from workflows.recipes import RECIPES
from workflows.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return open_store(tmp_path / "store")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


Dlm = Callable[..., Done]


@pytest.fixture
def dlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: Store) -> Dlm:
    """The command line, with the toy recipe beside the real ones."""
    monkeypatch.setitem(RECIPES, "toy", toy_workflow)
    monkeypatch.setenv("DLM_STORE", str(store.root.path))
    for console in (common.console, common.errors):
        monkeypatch.setattr(console, "width", 200)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["dlm", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Store:
    """An object store, which the commands find under any name."""
    monkeypatch.setitem(OBJECT_STORES, "memory", "fsspec")
    found = Store(Place(in_memory()))
    monkeypatch.setattr(ObjectStorage, "poll_s", 0.1)
    monkeypatch.setattr(common, "open_store", lambda url: found)
    return found


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the toy stages record their executions."""
    path = tmp_path / "log"
    path.mkdir()
    return path


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes as tokens: the tokenizer must not change with the corpus here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([MASK_TOKEN, EOS_TOKEN, PAD_TOKEN])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """It as the stage commits it."""
    out = tmp_path_factory.mktemp("tokenizer") / "artifact"
    return run_stage(TOKENIZER, TokenizerConfig(file=str(tokenizer_file)), {}, out)


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[Executor]:
    """One Ray for the module."""
    with ray_executor() as executor:
        yield executor


_ON_RAY = (pytest.mark.ray, pytest.mark.timeout(RAY_LIMIT_S))


@pytest.fixture(params=["local", pytest.param("ray", marks=_ON_RAY)])
def executor(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """How to make an executor of each kind."""
    return _executor(request)


@pytest.fixture(params=["local", pytest.param("ray", marks=(*_ON_RAY, pytest.mark.slow))])
def executor_of_gangs(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """The same for several gangs one after another: on Ray each takes 10 s to start."""
    return _executor(request)


def _executor(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    if request.param == "local":
        return lambda: LocalExecutor(NUM_CPUS)
    shared = request.getfixturevalue("shared_ray")
    return lambda: Kept(shared)
