"""Small artifacts made by the real stages, and ways to damage files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.artifact import MANIFEST, open_artifact, write_json
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.sandbox.isolation import NAMESPACES, Isolation
from pipeline.stage import Stage, StageContext, build_manifest, external_identity, run_here, stage_fingerprint
from pipeline.tokenization.config import STAGE as TOKENIZATION
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.sandboxed import are_namespaces_allowed

if TYPE_CHECKING:
    from pipeline.inference.model import OpenModel
    from tests.support.tiny_run import Artifacts

AWKWARD = (
    "a [MASK] and <|endoftext|> and [PAD] inside the text",
    "[MASK]",
    "<|endoftext|><|endoftext|>",
    "e\u0301 \u00e9 \u212b \ufb01 \u202e right to left \u200b\u200d joined",
    "\U0001f469\u200d\U0001f52c \U0001f1fa\U0001f1f3 \U00010348",
    "tabs\t\tand\r\nold\rline ends\n\n\n   and spaces   ",
    "nul \x00 and bell \x07 and \x1b[0m escape",
    "\ufeffa mark in front",
    "\ufffd replacement and \uffff noncharacter",
)
"""Documents that a careless tokenizer would change."""


def make_artifact(stage: Stage, config: Any, inputs: Mapping[str, Path], out: Path) -> Path:
    """Run a stage in this process and commit what it wrote."""
    state = out.with_name(out.name + ".state")
    out.mkdir(parents=True)
    state.mkdir()
    fingerprints = {name: open_artifact(path).fingerprint for name, path in inputs.items()}
    own = stage_fingerprint(stage, config, fingerprints, external_identity(stage, config))
    stats = run_here(stage, config, inputs, StageContext(out, state, own))
    write_json(out / MANIFEST, build_manifest(stage, config, own, inputs, out, stats, 0.0, 0.0))
    return out


def damage(path: Path, change: Callable[[bytearray], Any]) -> None:
    """Change the bytes of a file; its time stamp moves on, as it would outside a test that takes no time."""
    data = bytearray(path.read_bytes())
    change(data)
    stamp_ns = path.stat().st_mtime_ns + 10**9
    path.write_bytes(data)
    os.utime(path, ns=(stamp_ns, stamp_ns))


def flip_bit(path: Path, offset: int = -1) -> None:
    """Flip one bit; the size stays."""

    def flip(data: bytearray) -> None:
        data[offset] ^= 0x10

    damage(path, flip)


def cut_end(path: Path, num_bytes: int = 1) -> None:
    """Drop bytes from the end of a file."""

    def cut(data: bytearray) -> None:
        del data[-num_bytes:]

    damage(path, cut)


def python(*arguments: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of the tests in a process of its own; None takes a variable out of its environment."""
    merged = {**os.environ, **env}
    return subprocess.run(
        [sys.executable, *arguments],
        env={name: value for name, value in merged.items() if value is not None},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=50,
    )


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One {"text": ...} a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(params=["namespaces", "rlimits alone"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    """Each isolation of code under test that this machine allows."""
    if request.param == NAMESPACES and not are_namespaces_allowed():
        pytest.skip("namespaces are not allowed here")
    return Isolation(request.param, request.param)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Different documents, enough for a split and a small vocabulary."""
    words = ["the", "a", "of", "token", "mask", "noise", "model", "data", "text", "learns", "reads", "writes"]
    plain = [" ".join(words[(i * j) % len(words)] for j in range(3, 40)) + f" {i}" for i in range(120)]
    return [*plain, *AWKWARD]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A committed corpus of several shards."""
    root = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(root / "documents.jsonl", documents)
    config = CorpusConfig(source={"text": Source((str(source),))}, held_out_fraction=0.2, shard_bytes=4000)
    return make_artifact(CORPUS, config, {}, root / "corpus")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A committed tokenizer, trained on the corpus."""
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return make_artifact(TOKENIZER, TokenizerConfig(vocab_size=300), {"corpus": corpus}, out)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Path) -> Path:
    """The committed token shards of the corpus."""
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    return make_artifact(TOKENIZATION, TokenizationConfig(), {"corpus": corpus, "tokenizer": tokenizer}, out)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, made: "Artifacts") -> dict[str, Path]:
    """Weights of a random model of each kind."""
    from tests.support.model_kinds import save_models

    return save_models(tmp_path_factory.mktemp("saved"), made.tokenizer)


@pytest.fixture(scope="module")
def doubles(saved: dict[str, Path], made: "Artifacts") -> "dict[str, OpenModel]":
    """The models of ``saved`` in float64."""
    from pipeline.inference.model import open_model

    opened = {kind: open_model(weights, made.tokenizer, "cpu") for kind, weights in saved.items()}
    for model in opened.values():
        model.denoiser.double()
    return opened


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Undo what a stage sets for its process."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
