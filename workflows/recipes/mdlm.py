"""MDLM (arXiv 2406.07524): masked diffusion of whole rows, with the hyperparameters of its appendix."""

from dataclasses import replace

from dlm_core.models.config import Architecture
from dlm_core.models.presets import PRESETS
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from workflows.recipes.chain import published_chain, tiny_chain
from workflows.step import Workflow

SMALL = PRESETS["mdlm-small"].model.architecture
OPTIMIZER = OptimizerConfig(
    lr=3e-4,
    lr_schedule=LRSchedule("constant", warmup_steps=2500),
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    max_grad_norm=1.0,
    ema_decay=0.9999,
)
PRETRAIN = PretrainConfig(
    architecture=SMALL,
    optimizer=OPTIMIZER,
    num_steps=1_000_000,
    global_batch_seqs=512,
    precision="bf16",
    validation=ValidationConfig(every_steps=5_000, num_rows=512),
    workers=8,
    micro_batch_seqs=32,
    checkpoint_every_steps=500,
)
NO_DROPOUT = "no dropout, where the published network has 0.1"
TINY_DIT = Architecture(
    d_model=128,
    num_layers=2,
    num_heads=4,
    d_ff=512,
    norm="layer",
    norm_eps=1e-5,
    activation="gelu",
    rope_base=100.0,  # for rows of 128 tokens
    cond_dim=32,
    tied_head=False,
    head_bias=True,
    init="mdlm",
    init_std=None,
)


def mdlm_lm1b() -> Workflow:
    """MDLM on the One Billion Word benchmark: sentences, one a row of 128 tokens."""
    return published_chain(
        "mdlm_lm1b",
        "MDLM, 110M parameters, one sentence a row of 128 tokens, one million steps of 512 rows",
        PRETRAIN,
        vocab_size=30_522,
        tokenizer="BERT's",
        packing=PackingConfig(seq_len=128, policy="document"),
        title="MDLM, LM1B",
        unpublished=("validation.every_steps", "validation.num_rows"),
        deviations=(
            NO_DROPOUT,
            "a sentence longer than a row goes on in the next one, where the published one is cut off",
            "held-out sentences are joined and scored in full rows, where the published perplexity is of one a row",
        ),
    )


def mdlm_owt() -> Workflow:
    """MDLM on OpenWebText: documents one after another, rows of 1024 tokens."""
    return published_chain(
        "mdlm_owt",
        "MDLM, 110M parameters, documents in rows of 1024 tokens, one million steps of 512 rows",
        PRETRAIN,
        vocab_size=50_258,
        tokenizer="GPT-2's",
        packing=PackingConfig(seq_len=1024),
        title="MDLM, OpenWebText",
        unpublished=("validation.every_steps", "validation.num_rows"),
        deviations=(NO_DROPOUT,),
    )


def ar_tiny() -> Workflow:
    """The yardstick: next tokens with the network, rows and rate of ``mdlm_tiny``."""
    (pretrain,) = (step.config for step in mdlm_tiny().steps if step.name == "pretrain")
    return tiny_chain(
        "ar_tiny",
        "Next tokens",
        "next tokens with MDLM's network, an exact yardstick for the others, for minutes on 2 CPU cores",
        replace(pretrain, objective=ObjectiveConfig(kind="autoregressive")),
    )


def mdlm_tiny() -> Workflow:
    """The shape of MDLM for two CPU cores."""
    optimizer = OptimizerConfig(lr=2e-3, lr_schedule=LRSchedule("constant", 50), ema_decay=0.99, weight_decay=0.0)
    pretrain = PretrainConfig(
        architecture=TINY_DIT,
        optimizer=optimizer,
        num_steps=1600,  # the unigram plateau ends after some 600
        global_batch_seqs=8,
        validation=ValidationConfig(every_steps=200, num_rows=16),
        checkpoint_every_steps=200,
    )
    return tiny_chain(
        "mdlm_tiny", "MDLM", "MDLM's network, averages and constant rate, for minutes on 2 CPU cores", pretrain
    )
