"""LLaDA2.0 mini (arXiv 2512.15745): the block size grows to whole rows, stays, and shrinks to that of inference.

The published model begins with the weights of an autoregressive one; this recipe trains the same course from scratch.
"""

from dataclasses import replace

from dlm_core.models.config import MoE
from dlm_core.models.presets import PRESETS
from pipeline.export.config import ExportConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import ObjectiveConfig, RouterLossConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.pretrain.phases import Phase
from workflows.recipes import llada
from workflows.recipes.chain import OPTIMIZER, published_chain, tiny_chain
from workflows.step import Workflow

ROUTER_LOSS = RouterLossConfig(bias_rate=0.001)


def _phases(grows: tuple[int, ...], shrinks: tuple[int, ...]) -> dict[str, Phase]:
    """A tenth of the steps grows, seven tenths are of whole rows, two tenths shrink."""
    rising = {f"grow_{size}": Phase(0.1 / len(grows), block_size=size) for size in grows}
    falling = {f"shrink_{size}": Phase(0.2 / len(shrinks), block_size=size) for size in shrinks}
    return {**rising, "rows": Phase(0.7), **falling}


def llada2_mini() -> Workflow:
    """LLaDA2.0 mini, 16B parameters, from scratch."""
    pretrain = PretrainConfig(
        architecture=PRESETS["llada2-mini"].model.architecture,
        objective=ObjectiveConfig(within_documents=True),
        router_loss=ROUTER_LOSS,
        optimizer=OptimizerConfig(
            lr=3e-4,
            lr_schedule=LRSchedule("wsd", warmup_steps=2000, decay_share=0.2, final_scale=0.1),
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
        ),
        phases=_phases((1, 4, 32, 64), (2048, 1024, 512, 256, 128, 64, 32)),
        num_steps=100_000,
        global_batch_seqs=2048,
        precision="bf16",
        validation=ValidationConfig(every_steps=2_000, num_rows=512),
        workers=64,
        ep_size=8,
        zero_stage=2,
        micro_batch_seqs=1,
        activation_checkpointing=True,
        checkpoint_every_steps=1_000,
    )
    return published_chain(
        "llada2_mini",
        "LLaDA2.0 mini, 16B parameters: block size 1 to 4096 and back to 32, within documents, from scratch",
        pretrain,
        vocab_size=157_184,
        tokenizer="LLaDA2.0's",
        packing=PackingConfig(seq_len=4096),
        title="LLaDA2.0 mini",
        unpublished=(
            *OPTIMIZER,
            *(f"phases.{name}.share" for name in pretrain.phases),
            "num_steps",
            "global_batch_seqs",
            "router_loss.balance",
            "router_loss.z",
            "router_loss.group_seqs",
            "router_loss.bias_rate",
            "architecture.init",
            "architecture.init_std",
            "validation.every_steps",
            "validation.num_rows",
        ),
        deviations=(
            "begins from scratch, where the published one begins with an autoregressive model",
            "exports the last weights, where the published one averages the checkpoints of the best validations; "
            "pretrain.average and convert.weights=average do",
        ),
    )


def llada2_tiny() -> Workflow:
    """The course of LLaDA2.0 for two CPU cores."""
    experts = MoE(
        num_experts=8,
        top_k=2,
        d_ff_expert=88,
        num_shared_experts=1,
        router_score="sigmoid",
        routed_scale=2.5,
        num_groups=4,
        top_groups=2,
        selection_bias=True,
        first_k_dense=1,
    )
    pretrain = PretrainConfig(
        architecture=replace(llada.TINY, moe=experts, qk_norm=True, rope_fraction=0.5),
        objective=ObjectiveConfig(within_documents=True),
        router_loss=ROUTER_LOSS,
        optimizer=OptimizerConfig(
            lr=2e-3, lr_schedule=LRSchedule("wsd", warmup_steps=20, decay_share=0.2, final_scale=0.1), beta2=0.95
        ),
        phases=_phases((1, 4, 32), (64, 32)),
        num_steps=400,
        validation=ValidationConfig(every_steps=100, num_rows=16),
    )
    return tiny_chain(
        "llada2_tiny",
        "LLaDA2.0",
        "LLaDA2's block sizes and experts, for minutes on 2 CPU cores",
        pretrain,
        export=ExportConfig("llada2"),
    )
