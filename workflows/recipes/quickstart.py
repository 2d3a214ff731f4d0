"""Text to an evaluated masked diffusion model in minutes, on two CPU cores."""

from dlm_core.models.config import Architecture
from pipeline.generate.config import GenerateConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.recipes.chain import SMALL_TEXT, chain
from workflows.step import Workflow


def quickstart() -> Workflow:
    """A small dense model on the sources of Python's standard library, or on your text."""
    return chain(
        "quickstart",
        "text -> tokens -> a small diffusion model -> held-out bound, samples, report (2 CPU cores)",
        PretrainConfig(
            architecture=Architecture(
                d_model=192, num_layers=4, num_heads=4, d_ff=512, qk_norm=True, rope_base=100.0, init_std=0.04
            ),
            optimizer=OptimizerConfig(lr=3e-3),
            num_steps=2000,
            global_batch_seqs=8,
            validation=ValidationConfig(every_steps=200, num_rows=32),
            checkpoint_every_steps=200,
            min_workers=1,
        ),
        corpus=SMALL_TEXT,
        tokenizer=TokenizerConfig(vocab_size=4096),
        packing=PackingConfig(seq_len=128),
        generate=GenerateConfig(),
    )
