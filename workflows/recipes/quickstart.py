"""Text to an evaluated masked diffusion model in minutes, on two CPU cores."""

from dlm_core.models.config import Architecture
from pipeline.convert.config import ConvertConfig
from pipeline.corpus.config import CorpusConfig
from pipeline.evaluate.config import EvaluateConfig
from pipeline.generate.config import GenerateConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import OptimizerConfig, PretrainConfig
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.report.config import ReportConfig
from workflows.step import Step, Workflow


def quickstart() -> Workflow:
    """A small dense model on the sources of Python's standard library, or on your text."""
    return Workflow(
        name="quickstart",
        summary="text -> tokens -> a small diffusion model -> held-out bound, samples, report (2 CPU cores)",
        steps=(
            Step(
                "corpus",
                "pipeline.corpus",
                CorpusConfig(undecodable="skip", held_out_fraction=0.01, shard_bytes=8_000_000),
            ),
            Step("tokenizer", "pipeline.tokenizer", TokenizerConfig(vocab_size=4096), {"corpus": "corpus"}),
            Step(
                "tokenization",
                "pipeline.tokenization",
                TokenizationConfig(),
                {"corpus": "corpus", "tokenizer": "tokenizer"},
            ),
            Step(
                "packing",
                "pipeline.packing",
                PackingConfig(seq_len=128),
                {"tokens": "tokenization", "tokenizer": "tokenizer"},
            ),
            Step(
                "pretrain",
                "pipeline.pretrain",
                PretrainConfig(
                    architecture=Architecture(
                        d_model=192, num_layers=4, num_heads=4, d_ff=512, qk_norm=True, rope_base=100.0, init_std=0.04
                    ),
                    optimizer=OptimizerConfig(lr=3e-3),
                    num_steps=2000,
                    global_batch_seqs=8,
                    checkpoint_every_steps=200,
                ),
                {"rows": "packing", "tokenizer": "tokenizer"},
            ),
            Step("convert", "pipeline.convert", ConvertConfig(), {"pretrain": "pretrain"}),
            Step(
                "evaluate",
                "pipeline.evaluate",
                EvaluateConfig(),
                {
                    "weights": "convert",
                    "tokens": "tokenization",
                    "tokenizer": "tokenizer",
                    "corpus": "corpus",
                },
            ),
            Step(
                "generate",
                "pipeline.generate",
                GenerateConfig(),
                {"weights": "convert", "tokenizer": "tokenizer"},
            ),
            Step(
                "report",
                "workflows.report",
                ReportConfig(),
                {
                    "corpus": "corpus",
                    "tokenizer": "tokenizer",
                    "tokens": "tokenization",
                    "rows": "packing",
                    "pretrain": "pretrain",
                    "weights": "convert",
                    "evaluation": "evaluate",
                    "samples": "generate",
                },
            ),
        ),
    )
