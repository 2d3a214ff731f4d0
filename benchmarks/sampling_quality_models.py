"""What the curves of quality are measured on: the quickstart's model, a next-token model of its size, their text."""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import quality_models
from benchmarks.quality_models import QUICK_STEPS, WORKERS
from benchmarks.quality_stages import run_stage
from pipeline.convert.config import STAGE as CONVERT
from pipeline.convert.config import ConvertConfig
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig
from pipeline.packing.config import STAGE as PACKING
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.tokenization.config import STAGE as TOKENIZATION
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from workflows.recipes.quickstart import quickstart


@dataclass(frozen=True)
class Artifacts:
    """What is sampled from, what scores the samples, and the text that both know."""

    weights: Path
    scorer: Path
    tokenizer: Path
    tokens: Path


@dataclass(frozen=True)
class Training:
    """Settings of both trainings, which differ in the objective alone."""

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    packing: PackingConfig
    pretrain: PretrainConfig


def full() -> Training:
    """The quickstart's."""
    found = {type(step.config): step.config for step in quickstart().steps}
    corpus, tokenizer = found[CorpusConfig], found[TokenizerConfig]
    packing, pretrain = found[PackingConfig], found[PretrainConfig]
    assert isinstance(corpus, CorpusConfig)
    assert isinstance(tokenizer, TokenizerConfig)
    assert isinstance(packing, PackingConfig)
    assert isinstance(pretrain, PretrainConfig)
    return Training(corpus, tokenizer, packing, _alone(pretrain))


def quick() -> Training:
    """Tiny ones, which learn next to nothing."""
    size = quality_models.QUICK
    model = quality_models.pretrain_config(quality_models.MDLM, size, QUICK_STEPS, size.learning_rates[0])
    return Training(size.corpus, size.tokenizer, PackingConfig(size.seq_len), _alone(model))


def _alone(pretrain: PretrainConfig) -> PretrainConfig:
    return replace(pretrain, validation=ValidationConfig(), workers=WORKERS, track=False)


def train(training: Training, work: Path) -> Artifacts:
    """Both models in a work directory, where an interrupted call is gone on with."""
    text = {name: work / "text" / name for name in ("corpus", "tokenizer", "tokens", "rows")}
    run_stage(CORPUS, training.corpus, {}, text["corpus"])
    run_stage(TOKENIZER, training.tokenizer, {"corpus": text["corpus"]}, text["tokenizer"])
    both = {name: text[name] for name in ("corpus", "tokenizer")}
    run_stage(TOKENIZATION, TokenizationConfig(), both, text["tokens"])
    words = {name: text[name] for name in ("tokens", "tokenizer")}
    run_stage(PACKING, training.packing, words, text["rows"])
    objectives = {
        "diffusion": training.pretrain.objective,
        "autoregressive": ObjectiveConfig(kind="autoregressive"),
    }
    made = {}
    for name, objective in objectives.items():
        config, made[name] = replace(training.pretrain, objective=objective), work / name / "weights"
        rows = {input_name: text[input_name] for input_name in ("rows", "tokenizer")}
        run_stage(PRETRAIN, config, rows, work / name / "pretrain", workers=WORKERS)
        run_stage(CONVERT, ConvertConfig(), {"pretrain": work / name / "pretrain"}, made[name])
    return Artifacts(made["diffusion"], made["autoregressive"], text["tokenizer"], text["tokens"])
