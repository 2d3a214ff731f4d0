"""A tiny corpus, a tiny model, and gangs of ranks that train it on gloo.

Ranks are forked from a server process that has imported torch and deepspeed once, and run the command line of
the stage from there: what differs from ``python -m pipeline.STAGE`` are the seconds of imports.
"""

import argparse
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dlm_core.models.config import Architecture
from pipeline.artifact import MANIFEST, read_json, write_json
from pipeline.config import fingerprint
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.packing.config import STAGE as PACKING
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.meter import MEASURED
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.stage import Stage, _run_alone
from pipeline.tokenization.config import STAGE as TOKENIZATION
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig

DEADLINE_S = 50.0
"""A gang that takes longer hangs: a tiny one needs 3 s on an idle machine."""
_POLL_S = 0.02
_PRELOAD = [
    "torch._dynamo",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "safetensors.torch",
    "pydantic",
    "pytest",
    "pipeline.pretrain.loop",
    "pipeline.pretrain.run",
    "pipeline.convert.run",
]
"""What takes seconds to import: DeepSpeed's AdamW path pulls in the compiler."""
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

TINY = PretrainConfig(
    architecture=Architecture(
        d_model=32, num_layers=2, num_heads=2, d_ff=64, qk_norm=True, rope_base=100.0, norm_eps=1e-6, init_std=0.04
    ),
    optimizer=OptimizerConfig(
        kind="adamw",
        lr=3e-3,
        lr_schedule=LRSchedule("linear", warmup_steps=4, final_scale=0.0),
        beta1=0.9,
        beta2=0.98,
        eps=1e-8,
        weight_decay=0.1,
        max_grad_norm=1.0,
    ),
    num_steps=20,
    global_batch_seqs=8,
    objective=ObjectiveConfig(t_min=1e-3),
    workers=1,
    checkpoint_every_steps=4,
    track=False,
)
"""A training of seconds.  Every number is spelled out: the golden losses must not move with a default."""


@dataclass(frozen=True)
class Artifacts:
    """What comes before training, committed."""

    corpus: Path
    tokenizer: Path
    tokens: Path
    rows: Path

    def inputs(self) -> dict[str, Path]:
        """Inputs of pretrain."""
        return {"rows": self.rows, "tokenizer": self.tokenizer}

    def inputs_with_held_out(self) -> dict[str, Path]:
        """Inputs of a pretrain that validates."""
        return {**self.inputs(), "tokens": self.tokens}


def write_text(path: Path, seed: int, num_docs: int) -> Path:
    """Documents of a random walk over made-up words: the same on every machine, and learnable."""
    uniform = random.Random(seed).random  # the one method whose numbers are promised never to change
    pick = lambda items: items[int(uniform() * len(items))]  # noqa: E731
    words = ["".join(pick("bdfgklmnprstvz") + pick("aeiou") for _ in range(1 + int(uniform() * 3))) for _ in range(80)]
    follow = {word: [pick(words) for _ in range(4)] for word in words}
    with path.open("w") as handle:
        for number in range(num_docs):
            walk = [pick(words)]
            for _ in range(30 + int(uniform() * 90)):
                walk.append(pick(follow[walk[-1]]))
            handle.write(json.dumps({"text": " ".join(walk) + f" é{number}.\n"}) + "\n")
    return path


def make_artifacts(
    root: Path, seed: int = 0, num_docs: int = 300, vocab_size: int = 300, seq_len: int = 32
) -> Artifacts:
    """Corpus, tokenizer, token shards and rows."""
    source = write_text(root / "text.jsonl", seed, num_docs)
    made = Artifacts(root / "corpus", root / "tokenizer", root / "tokens", root / "rows")
    config = CorpusConfig(source={"text": Source((str(source),))}, held_out_fraction=0.025, shard_bytes=60_000)
    run_stage(CORPUS, config, {}, made.corpus)
    run_stage(TOKENIZER, TokenizerConfig(vocab_size=vocab_size), {"corpus": made.corpus}, made.tokenizer)
    run_stage(TOKENIZATION, TokenizationConfig(), {"corpus": made.corpus, "tokenizer": made.tokenizer}, made.tokens)
    run_stage(PACKING, PackingConfig(seq_len=seq_len), {"tokens": made.tokens, "tokenizer": made.tokenizer}, made.rows)
    return made


def arguments(config: Any, inputs: Mapping[str, Path], out: Path) -> list[str]:
    """The command line of a stage; its configuration is written beside ``out``."""
    file = out.with_name(out.name + ".config.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, config)
    given = [word for name, path in inputs.items() for word in ("--input", f"{name}={path}")]
    return ["--config", str(file), *given, "--out", str(out)]


def run_stage(stage: Stage, config: Any, inputs: Mapping[str, Path], out: Path) -> Path:
    """Run a stage that is no gang in this process and commit its output."""
    pairs = [f"{name}={path}" for name, path in inputs.items()]
    file = arguments(config, inputs, out)[1]
    _run_alone(stage, argparse.Namespace(config=file, input=pairs, out=str(out)))
    return out


class Gang:
    """Ranks of one stage that are running, each with a log of its own."""

    def __init__(self, ranks: list[BaseProcess], logs: list[Path], out: Path) -> None:
        self.ranks, self._logs, self.out = ranks, logs, out
        self.state = out.with_name(out.name + ".state")

    def log(self, *which: int) -> str:
        """What the given ranks have printed, by default all."""
        logs = [self._logs[rank] for rank in which] or self._logs
        return "\n".join(path.read_text(errors="replace") for path in logs if path.exists())

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until something is so; AssertionError past the deadline or once no rank runs any more."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            alive = any(rank.is_alive() for rank in self.ranks)
            if time.monotonic() > deadline_s or not (alive or condition()):
                self.kill()
                raise AssertionError(f"no {what}; the log:\n{self.log()}")
            time.sleep(_POLL_S)

    def kill(self, *which: int) -> None:
        """SIGKILL to the given ranks, by default to all."""
        for rank in [self.ranks[i] for i in which] or self.ranks:
            if rank.is_alive():
                os.kill(rank.pid or 0, signal.SIGKILL)
            rank.join()

    def wait(self, within_s: float = DEADLINE_S) -> list[int]:
        """Exit codes of the ranks; AssertionError with the log if they do not end in time."""
        deadline_s = time.monotonic() + within_s
        for rank in self.ranks:
            rank.join(max(0.0, deadline_s - time.monotonic()))
        if any(rank.is_alive() for rank in self.ranks):
            self.kill()
            raise AssertionError(f"the gang hangs; its log:\n{self.log()}")
        return [rank.exitcode if rank.exitcode is not None else -1 for rank in self.ranks]


def start_gang(
    stage: Stage,
    config: Any,
    inputs: Mapping[str, Path],
    out: Path,
    *,
    workers: int = 1,
    fault: str = "",
    **fault_arguments: Any,
) -> Gang:
    """Start the ranks of a stage.  ``fault`` names a function of tests.support.faults, called first in each."""
    line = arguments(config, inputs, out)
    environment = {"WORLD_SIZE": str(workers), "LOCAL_SIZE": str(workers)}
    if workers > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    context = rank_context()
    logs = [out.with_name(f"{out.name}.rank{rank}.log") for rank in range(workers)]
    ranks: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(stage, line, own, log, fault, fault_arguments), daemon=True)
        process.start()
        ranks.append(process)
    return Gang(ranks, logs, out)


def rank_context() -> ForkServerContext:
    """Where ranks are forked from: a server that has imported what they need, unless another one runs already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(stage: Stage, line: list[str], own: dict[str, str], log: Path, fault: str, given: dict[str, Any]) -> None:
    with log.open("wb") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    gc.freeze()  # what was imported is not searched for garbage by every rank anew
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.update(_ENVIRONMENT | own)
    sys.argv = [stage.name, *line]
    if fault:
        getattr(importlib.import_module("tests.support.faults"), fault)(**given)
    from pipeline.stage import main

    main(stage)


def run_gang(stage: Stage, config: Any, inputs: Mapping[str, Path], out: Path, **more: Any) -> Path:
    """Run a stage to its end on all ranks; AssertionError with the log unless every rank exits with 0."""
    gang = start_gang(stage, config, inputs, out, **more)
    codes = gang.wait()
    assert codes == [0] * len(codes), f"exit codes {codes}; the log:\n{gang.log()}"
    return out


def pretrain(config: PretrainConfig, made: Artifacts, out: Path) -> Path:
    """Train to the end."""
    from pipeline.pretrain.config import STAGE

    return run_gang(STAGE, config, made.inputs(), out, workers=config.workers)


def convert(trained: Path, out: Path, weights: Any = "last", proof: Any = "tensors") -> Path:
    """Weights of a training; the proof by logits is for the tests of conversion."""
    from pipeline.convert.config import STAGE, ConvertConfig

    return run_gang(STAGE, ConvertConfig(weights, proof), {"pretrain": trained}, out)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl without what is a clock's or a machine's."""
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def losses(directory: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in metrics(directory)]


def sha256(path: Path) -> str:
    """SHA-256 of a file, read anew."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def forge(directory: Path, *names: str) -> None:
    """Make the manifest of an artifact or a checkpoint agree with files that were changed."""
    manifest = read_json(directory / MANIFEST)
    for record in manifest["files"]:
        if record["path"] in names:
            path = directory / record["path"]
            record |= {"size_bytes": path.stat().st_size, "sha256": sha256(path)}
    if manifest.pop("sha256", None):  # that of a checkpoint has a checksum of its own
        manifest["sha256"] = fingerprint(manifest)
    write_json(directory / MANIFEST, manifest)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._marker),)


def copy_state(state: Path, out: Path) -> Path:
    """Give ``out`` a copy of the state of an unfinished run, to be continued and damaged at will."""
    copy = out.with_name(out.name + ".state")
    shutil.copytree(state, copy)
    return copy


def tiny(**changes: Any) -> PretrainConfig:
    """TINY with other values."""
    return replace(TINY, **changes)
