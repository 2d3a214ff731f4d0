"""Files of questions for tasks, models to ask, and the stage run on them."""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.artifact import load_manifest
from pipeline.inference.likelihood import LikelihoodConfig
from pipeline.inference.sampler import SamplerConfig
from pipeline.inference.sampling import SamplingConfig
from pipeline.tasks.config import STAGE, TAKES, TaskConfig, TasksConfig
from tests.support.tiny_run import run_stage

CONFIG = TasksConfig(likelihood=LikelihoodConfig(num_masks=8), device="cpu", track=False, num_shards=4)


def words(chance: random.Random, few: int, many: int) -> str:
    """Some words of few letters."""
    count = chance.randint(few, many)
    return " ".join("".join(chance.choices("abdegiklmnorstu", k=chance.randint(1, 5))) for _ in range(count))


def write(path: Path, questions: Sequence[Any]) -> Path:
    """A file of questions, compressed if it is called so."""
    text = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def choices(count: int = 14, seed: int = 0) -> list[dict[str, Any]]:
    """Which of several?  Some contexts end with a space, some are empty."""
    chance = random.Random(seed)
    return [
        {
            "id": number,
            "context": words(chance, 0, 3) + " " * (number % 3 == 0),
            "choices": [
                " " * (number % 3 > 0) + words(chance, 1, 3) + "é" * (number % 4 == 1)
                for _ in range(chance.randint(2, 4))
            ],
            "answer": chance.randint(0, 1),
        }
        for number in range(count)
    ]


def texts(count: int = 9, seed: int = 1) -> list[dict[str, Any]]:
    """How likely?  Some have several rows."""
    chance = random.Random(seed)
    return [{"text": words(chance, 1, 25) + " é\n"} for _ in range(count)]


def both(root: Path, config: TasksConfig = CONFIG, **changes: Any) -> TasksConfig:
    """A task of choices and one of texts."""
    tasks = {
        "which": TaskConfig("multiple_choice", str(write(root / "choices.jsonl", choices()))),
        "how": TaskConfig("text", str(write(root / "texts.jsonl.gz", texts()))),
    }
    return replace(config, tasks=tasks, **changes)


def every_kind(root: Path, model: str, config: TasksConfig = CONFIG, **changes: Any) -> TasksConfig:
    """A task of each kind, a few questions each, that a model of ``KINDS`` can be asked."""
    chance = random.Random(2)
    sampler = SamplerConfig() if model == "next" else SamplerConfig("confidence", num_steps=4)
    sampling = SamplingConfig(sampler, temperature=0.7, noise_seed=5)
    prompts = [{"prompt": words(chance, 0, 4), "answer": words(chance, 1, 2)} for _ in range(5)]
    suffix = "" if model in ("blocks", "next") else " " + words(chance, 1, 2)
    gaps = [{"prefix": words(chance, 1, 3), "middle": " " + words(chance, 1, 2), "suffix": suffix} for _ in range(5)]
    program = {"entry_point": "f", "canonical_solution": "", "test": "def check(f): pass\n"}
    programs = [{**program, "task_id": f"t/{n}", "prompt": f"f = {n} #"} for n in range(2)]
    files = {
        name: str(write(root / f"{name}.jsonl", questions))
        for name, questions in (("written", prompts), ("gaps", gaps), ("programs", programs))
    }
    tasks = {
        **both(root).tasks,
        "written": TaskConfig("match", files["written"], length=8, sampling=sampling),
        "gaps": TaskConfig("infill", files["gaps"], sampling=sampling),
        "programs": TaskConfig("code", files["programs"], length=8, num_samples=2, ks=(1, 2), sampling=sampling),
        "free": TaskConfig("samples", num_samples=4, length=8, sampling=sampling),
    }
    assert {task.kind for task in tasks.values()} == TAKES.keys()
    return replace(config, tasks=tasks, allow_unsandboxed=True, **changes)


def ask(config: TasksConfig, weights: Path, tokenizer: Path, out: Path, **inputs: Path) -> dict[str, Any]:
    """Results by task."""
    run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer, **inputs}, out)
    results = json.loads((out / "results.json").read_text())["tasks"]
    stats = {name: {m: row["value"] for m, row in found["metrics"].items()} for name, found in results.items()}
    assert stats == load_manifest(out).stats
    return results


def numbers(value: Any) -> list[float]:
    """All numbers of a JSON value, in order."""
    if isinstance(value, dict | list):
        return [n for one in (value.values() if isinstance(value, dict) else value) for n in numbers(one)]
    return [] if value is None or isinstance(value, str) else [float(value)]


@dataclass
class FakeWandbRun:
    """What wandb.init gives."""

    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    offline: bool = True
    is_finished: bool = False

    def finish(self) -> None:
        self.is_finished = True
