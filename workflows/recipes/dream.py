"""Dream 7B (arXiv 2508.15487): Qwen2.5 goes on as a diffusion model, with its shift and context-adaptive weights."""

from dlm_core.models.config import Architecture
from dlm_core.models.presets import PRESETS
from pipeline.ar_init.config import ArInitConfig
from pipeline.convert.config import ConvertConfig
from pipeline.corpus.config import CorpusConfig
from pipeline.export.config import ExportConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.recipes.chain import OPTIMIZER, adapted_chain, tiny_chain
from workflows.step import Step, Workflow

OBJECTIVE = ObjectiveConfig(weighting="cart", cart_p=0.1, target_offset=1)
"""0.1 is the p of Dream-Coder's fine-tuning; that of the pretraining was not published."""
NUM_STEPS = 276_566
"""580 billion tokens in 1024 rows of 2048 a step."""


def dream_7b() -> Workflow:
    """Dream 7B from a checkpoint of Qwen2.5 7B."""
    pretrain = PretrainConfig(
        architecture=PRESETS["dream-7b"].model.architecture,
        objective=OBJECTIVE,
        optimizer=OptimizerConfig(lr=2e-5, lr_schedule=LRSchedule("constant", 2000), beta2=0.95, weight_decay=0.1),
        num_steps=NUM_STEPS,
        global_batch_seqs=1024,
        precision="bf16",
        validation=ValidationConfig(every_steps=1_000, num_rows=512),
        workers=64,
        zero_stage=2,
        micro_batch_seqs=2,
        activation_checkpointing=True,
        checkpoint_every_steps=500,
    )
    return adapted_chain(
        "dream_7b",
        "Dream 7B: Qwen2.5 7B trained on 580 billion tokens as a diffusion model, rows of 2048",
        pretrain,
        corpus=CorpusConfig(source={}),
        tokenizer=TokenizerConfig(mask_from="unused_row"),
        packing=PackingConfig(seq_len=2048),
        generate=None,
        title="Dream 7B",
        unpublished=tuple(
            f"pretrain.{field}"
            for field in (
                *OPTIMIZER,
                "objective.cart_p",
                "global_batch_seqs",
                "validation.every_steps",
                "validation.num_rows",
            )
        ),
        deviations=(
            "neither the text nor the checkpoint comes with the recipe; corpus.source and import_checkpoint.path are "
            "to be given",
            "the mask is the first row of the embedding that no token has, 151665 of Qwen2.5, where Dream's is 151666",
            "the mask's row becomes the mean of all others, where Dream keeps what Qwen2.5 has there; "
            'ar_init.mask_row="keep" does so too',
        ),
    )


TINY = Architecture(
    d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=352, qkv_bias=True, rope_base=1e6, tied_head=False
)


def dream_tiny() -> Workflow:
    """The course of Dream for two CPU cores, from a next-token model of its own."""
    ar = PretrainConfig(
        architecture=TINY,
        objective=ObjectiveConfig(kind="autoregressive"),
        optimizer=OptimizerConfig(lr=2e-3, lr_schedule=LRSchedule("linear", 20), beta2=0.95),
        num_steps=400,
        min_workers=1,
    )
    pretrain = PretrainConfig(
        architecture=TINY,
        objective=OBJECTIVE,
        optimizer=OptimizerConfig(lr=5e-4, lr_schedule=LRSchedule("constant", 20), beta2=0.95),
        num_steps=300,
        validation=ValidationConfig(every_steps=100, num_rows=16),
        data_seed=1,
    )
    words = {"rows": "packing", "tokenizer": "tokenizer"}
    init = (
        Step("ar_pretrain", "pipeline.pretrain", ar, words),
        Step("ar_convert", "pipeline.convert", ConvertConfig(), {"pretrain": "ar_pretrain"}),
        Step("ar_init", "pipeline.ar_init", ArInitConfig(), {"weights": "ar_convert", "tokenizer": "tokenizer"}),
    )
    return tiny_chain(
        "dream_tiny",
        "Dream",
        "a small next-token model, trained on as a diffusion model with Dream's shift and weights, on 2 CPU cores",
        pretrain,
        export=ExportConfig("dream"),
        init=init,
    )
