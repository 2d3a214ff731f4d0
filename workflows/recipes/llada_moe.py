"""LLaDA-MoE 7B-A1B (arXiv 2509.24389): experts, two stages of pretraining, annealing, then longer rows."""

from dataclasses import replace

from dlm_core.models.config import MoE
from dlm_core.models.presets import PRESETS
from pipeline.export.config import ExportConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import RouterLossConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.pretrain.phases import Phase
from workflows.recipes import llada
from workflows.recipes.chain import OPTIMIZER, published_chain, tiny_chain
from workflows.step import Workflow

ROUTER_LOSS = RouterLossConfig(balance=0.01, z=0.001)


def _phases(short: int, rope_base: float) -> dict[str, Phase]:
    """10 + 10 trillion tokens of short rows, half a trillion of better text, and as much in long rows."""
    return {
        "first": Phase(10.0, seq_len=short),
        "second": Phase(10.0, seq_len=short),
        "anneal": Phase(0.5, seq_len=short),
        "long": Phase(0.5, rope_base=rope_base),
    }


def llada_moe_7b() -> Workflow:
    """LLaDA-MoE 7B-A1B; the sources of each stage are to be given as phases' mixtures."""
    pretrain = PretrainConfig(
        architecture=replace(PRESETS["llada-moe-7b-a1b"].model.architecture, rope_base=10_000.0),
        router_loss=ROUTER_LOSS,
        optimizer=OptimizerConfig(
            lr=4e-4,
            lr_schedule=LRSchedule("wsd", warmup_steps=2000, decay_share=0.05, final_scale=0.1),
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
        ),
        phases=_phases(4096, rope_base=50_000.0),
        num_steps=1_250_000,
        global_batch_seqs=2048,
        short_step_share=0.01,
        short_step_min=8,
        precision="bf16",
        validation=ValidationConfig(every_steps=5_000, num_rows=512),
        workers=64,
        ep_size=8,
        zero_stage=2,
        micro_batch_seqs=1,
        activation_checkpointing=True,
        checkpoint_every_steps=1_000,
    )
    return published_chain(
        "llada_moe_7b",
        "LLaDA-MoE, 7B parameters of which 1.4B are active, 21 trillion tokens in four phases",
        pretrain,
        vocab_size=157_184,
        tokenizer="LLaDA-MoE's",
        packing=PackingConfig(seq_len=8192),
        title="LLaDA-MoE 7B-A1B",
        unpublished=(
            *OPTIMIZER,
            "num_steps",
            "global_batch_seqs",
            "router_loss.group_seqs",
            "architecture.init",
            "architecture.init_std",
            "validation.every_steps",
            "validation.num_rows",
        ),
        deviations=(
            "all phases draw from one mixture, where the published stages have texts of their own; "
            "pretrain.phases.NAME.mixture takes others",
            "annealing goes on from the last weights, where the published one takes the checkpoint of the best "
            "evaluation",
        ),
    )


def llada_moe_tiny() -> Workflow:
    """The course of LLaDA-MoE for two CPU cores."""
    pretrain = PretrainConfig(
        architecture=replace(
            llada.TINY, d_ff=None, moe=MoE(num_experts=8, top_k=2, d_ff_expert=176, renormalise=False), qk_norm=True
        ),
        router_loss=ROUTER_LOSS,
        optimizer=OptimizerConfig(
            lr=2e-3, lr_schedule=LRSchedule("wsd", warmup_steps=20, decay_share=0.05, final_scale=0.1), beta2=0.95
        ),
        phases=_phases(64, rope_base=500.0),
        num_steps=400,
        short_step_share=0.01,
        short_step_min=8,
        validation=ValidationConfig(every_steps=100, num_rows=16),
    )
    return tiny_chain(
        "llada_moe_tiny",
        "LLaDA-MoE",
        "LLaDA-MoE's experts and four phases, for minutes on 2 CPU cores",
        pretrain,
        export=ExportConfig("llada_moe"),
    )
