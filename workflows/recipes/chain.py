"""The steps that all recipes share: text to tokens to a trained model to numbers about it."""

from dataclasses import replace

from pipeline.ar_init.config import ArInitConfig
from pipeline.convert.config import ConvertConfig
from pipeline.corpus.config import CorpusConfig
from pipeline.evaluate.config import EvaluateConfig
from pipeline.export.config import ExportConfig
from pipeline.generate.config import GenerateConfig
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig
from pipeline.tasks.config import TasksConfig
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.report.config import ReportConfig
from workflows.step import Step, Workflow


def chain(
    name: str,
    summary: str,
    pretrain: PretrainConfig,
    *,
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    packing: PackingConfig,
    generate: GenerateConfig | None = None,
    export: ExportConfig | None = None,
    init: tuple[Step, ...] = (),
    checkpoint: Step | None = None,
    title: str = ReportConfig.title,
    unpublished: tuple[str, ...] = (),
    deviations: tuple[str, ...] = (),
) -> Workflow:
    """A workflow of one training, with samples, and a directory for transformers, where they are asked for.

    What is evaluated, samples, and what is asked once tasks are given, are the averages of the weights where the
    optimizer keeps them, as in validation.  The last step of ``init`` makes the first weights.  A ``checkpoint`` brings
    the tokenizer along.
    """
    report = {
        "corpus": "corpus",
        "tokenizer": "tokenizer",
        "tokens": "tokenization",
        "rows": "packing",
        "pretrain": "pretrain",
        "weights": "convert",
        "evaluation": "evaluate",
        "tasks": "tasks",
    }
    to_ask = {"weights": "convert", "tokenizer": "tokenizer"}
    samples: tuple[Step, ...] = ()
    if generate is not None:
        report["samples"] = "generate"
        samples = (Step("generate", "pipeline.generate", generate, to_ask),)
    exported: tuple[Step, ...] = ()
    if export is not None:
        exported = (Step("export", "pipeline.export", export, to_ask),)
    to_train = {"rows": "packing", "tokenizer": "tokenizer"}
    if pretrain.validation.every_steps:
        to_train["tokens"] = "tokenization"
    if init:
        to_train["init"] = init[-1].name
    words = {"corpus": "corpus"} if checkpoint is None else {"checkpoint": checkpoint.name}
    weights = ConvertConfig("ema" if pretrain.optimizer.ema_decay else "last")
    to_evaluate = {"weights": "convert", "tokens": "tokenization", "tokenizer": "tokenizer", "corpus": "corpus"}
    both = {"corpus": "corpus", "tokenizer": "tokenizer"}
    return Workflow(
        name=name,
        summary=summary,
        steps=(
            *(() if checkpoint is None else (checkpoint,)),
            Step("corpus", "pipeline.corpus", corpus),
            Step("tokenizer", "pipeline.tokenizer", tokenizer, words),
            Step("tokenization", "pipeline.tokenization", TokenizationConfig(), both),
            Step("packing", "pipeline.packing", packing, {"tokens": "tokenization", "tokenizer": "tokenizer"}),
            *init,
            Step("pretrain", "pipeline.pretrain", pretrain, to_train),
            Step("convert", "pipeline.convert", weights, {"pretrain": "pretrain"}),
            Step("evaluate", "pipeline.evaluate", EvaluateConfig(), to_evaluate),
            Step("tasks", "pipeline.tasks", TasksConfig(), to_ask, optional=True),
            *samples,
            *exported,
            Step("report", "workflows.report", ReportConfig(title), report),
        ),
        unpublished=unpublished,
        deviations=deviations,
    )


def adapted_chain(
    name: str,
    summary: str,
    pretrain: PretrainConfig,
    *,
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    packing: PackingConfig,
    generate: GenerateConfig | None,
    title: str,
    unpublished: tuple[str, ...] = (),
    deviations: tuple[str, ...] = (),
) -> Workflow:
    """A training that goes on from a checkpoint of next tokens, whose path is to be given."""
    checkpoint = Step("import_checkpoint", "pipeline.import_checkpoint", ImportConfig())
    inputs = {"weights": checkpoint.name, "tokenizer": "tokenizer"}
    return chain(
        name,
        summary,
        pretrain,
        corpus=corpus,
        tokenizer=tokenizer,
        packing=packing,
        generate=generate,
        init=(Step("ar_init", "pipeline.ar_init", ArInitConfig(), inputs),),
        checkpoint=checkpoint,
        title=title,
        unpublished=unpublished,
        deviations=deviations,
    )


def published_chain(
    name: str,
    summary: str,
    pretrain: PretrainConfig,
    *,
    vocab_size: int,
    tokenizer: str,
    packing: PackingConfig,
    title: str,
    unpublished: tuple[str, ...],
    deviations: tuple[str, ...] = (),
) -> Workflow:
    """A training of published work, on a text that is to be given.

    ``tokenizer`` says whose the published one is, which a tokenizer of its size trained on the text stands in for;
    ``unpublished`` are fields of ``pretrain``.
    """
    ours = f"a byte-level BPE trained on the text takes the place of {tokenizer}; tokenizer.file takes another"
    return chain(
        name,
        summary,
        pretrain,
        corpus=CorpusConfig(source={}),
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        packing=packing,
        title=title,
        unpublished=("tokenizer", *(f"pretrain.{field}" for field in unpublished)),
        deviations=("the text does not come with the recipe; corpus.source is to be given", ours, *deviations),
    )


OPTIMIZER = (
    "optimizer.kind",
    "optimizer.lr",
    "optimizer.lr_schedule.kind",
    "optimizer.lr_schedule.warmup_steps",
    "optimizer.lr_schedule.decay",
    "optimizer.lr_schedule.decay_share",
    "optimizer.lr_schedule.final_scale",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
)
"""Settings that work which says nothing of its optimizer leaves open."""

SMALL_TEXT = CorpusConfig(undecodable="skip", held_out_fraction=0.01, shard_bytes=8_000_000)
"""Python's standard library, or a text of that size."""


def tiny_chain(
    name: str,
    title: str,
    summary: str,
    pretrain: PretrainConfig,
    *,
    export: ExportConfig | None = None,
    init: tuple[Step, ...] = (),
) -> Workflow:
    """The same training for two CPU cores and a few minutes: vocabulary 2048, rows of 128 tokens."""
    return chain(
        name,
        summary,
        replace(pretrain, min_workers=1),
        corpus=SMALL_TEXT,
        tokenizer=TokenizerConfig(vocab_size=2048),
        packing=PackingConfig(seq_len=128),
        generate=GenerateConfig(),
        export=export,
        init=init,
        title=f"{title}, tiny",
    )
