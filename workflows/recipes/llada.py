"""LLaDA (arXiv 2502.09992): one large dense model of whole rows, one step in a hundred shorter."""

from dlm_core.models.config import Architecture
from dlm_core.models.presets import PRESETS
from pipeline.export.config import ExportConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.optimizer_config import OptimizerConfig
from workflows.recipes.chain import published_chain, tiny_chain
from workflows.step import Workflow

SCHEDULE = LRSchedule("step_down", warmup_steps=2000, final_scale=0.025)
"""4e-4 for 1.2 of 2.3 trillion tokens, 1e-4 for 0.8, then down to 1e-5."""
NUM_STEPS = 438_690
"""2.3 trillion tokens of 1280 rows of 4096."""


def llada_8b() -> Workflow:
    """LLaDA 8B."""
    pretrain = PretrainConfig(
        architecture=PRESETS["llada-8b"].model.architecture,
        optimizer=OptimizerConfig(lr=4e-4, lr_schedule=SCHEDULE, beta1=0.9, beta2=0.95, weight_decay=0.1),
        num_steps=NUM_STEPS,
        global_batch_seqs=1280,
        short_step_share=0.01,
        precision="bf16",
        validation=ValidationConfig(every_steps=5_000, num_rows=512),
        workers=64,
        zero_stage=2,
        micro_batch_seqs=1,
        activation_checkpointing=True,
        checkpoint_every_steps=1_000,
    )
    return published_chain(
        "llada_8b",
        "LLaDA, 8B parameters, 2.3 trillion tokens in rows of 4096",
        pretrain,
        vocab_size=126_464,
        tokenizer="LLaDA's",
        packing=PackingConfig(seq_len=4096),
        title="LLaDA 8B",
        unpublished=(
            "optimizer.beta1",
            "optimizer.beta2",
            "optimizer.eps",
            "optimizer.max_grad_norm",
            "validation.every_steps",
            "validation.num_rows",
        ),
    )


TINY = Architecture(d_model=128, num_layers=4, num_heads=4, d_ff=352, rope_base=100.0, tied_head=False)


def llada_tiny() -> Workflow:
    """The course of LLaDA for two CPU cores."""
    pretrain = PretrainConfig(
        architecture=TINY,
        optimizer=OptimizerConfig(
            lr=2e-3, lr_schedule=LRSchedule("step_down", warmup_steps=20, final_scale=0.025), beta2=0.95
        ),
        num_steps=400,
        short_step_share=0.01,
        validation=ValidationConfig(every_steps=100, num_rows=16),
    )
    return tiny_chain(
        "llada_tiny",
        "LLaDA",
        "LLaDA's rates and short steps, for minutes on 2 CPU cores",
        pretrain,
        export=ExportConfig("llada"),
    )
