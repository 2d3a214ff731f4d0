"""Workflows that ask models questions: text, a tokenizer of bytes, given weights, an evaluation and tasks."""

from pathlib import Path
from typing import Any

import torch

from pipeline.corpus.config import CorpusConfig, Source
from pipeline.evaluate.config import EvaluateConfig
from pipeline.stage import environment
from pipeline.tasks.config import TasksConfig
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.exports import LLAMA
from tests.support.interchange import drawn, random_model, save_model
from tests.support.tiny_run import write_text
from tests.support.toy_stages.given.config import GivenConfig
from workflows.plan import Plan, make_plan
from workflows.step import Step, Workflow

_VOCAB_SIZE, _MASK = 259, 256
"""Of the tokenizer of bytes that tests/workflows have."""


class Asked:
    """Plans over one text and one tokenizer, below a directory."""

    def __init__(self, root: Path, tokenizer_file: Path) -> None:
        self._root = root
        source = Source((str(write_text(root / "text.jsonl", seed=0, num_docs=30)),))
        corpus = CorpusConfig(source={"text": source}, held_out_fraction=0.3)
        self._before = (
            Step("corpus", "pipeline.corpus", corpus),
            Step("tokenizer", "pipeline.tokenizer", TokenizerConfig(file=str(tokenizer_file)), {"corpus": "corpus"}),
        )

    def plan(self, tasks: TasksConfig | None, model: str, *, evaluates: bool = False, **record: Any) -> Plan:
        """A run that asks a model of that name: another name, other tensors."""
        path = self._root / model
        if not path.exists():
            made_with = make_plan(Workflow("before", "", self._before), environment()).step("tokenizer").fingerprint
            made = random_model(drawn(LLAMA), _VOCAB_SIZE, _MASK)
            with torch.no_grad():
                for tensor in made.parameters():
                    tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(model)))
            save_model(path, made, tokenizer=made_with, **{"seq_len": 64, **record})
        both = {"weights": "weights", "tokenizer": "tokenizer"}
        steps = [*self._before, Step("weights", "tests.support.toy_stages.given", GivenConfig(str(path)))]
        if evaluates:
            inputs = {"corpus": "corpus", "tokenizer": "tokenizer"}
            steps.append(Step("tokenization", "pipeline.tokenization", TokenizationConfig(), inputs))
            inputs = {**both, "tokens": "tokenization", "corpus": "corpus"}
            steps.append(Step("evaluate", "pipeline.evaluate", EvaluateConfig(device="cpu", num_shards=2), inputs))
        if tasks is not None:
            steps.append(Step("tasks", "pipeline.tasks", tasks, both))
        return make_plan(Workflow("asked", "questions", tuple(steps)), environment())
