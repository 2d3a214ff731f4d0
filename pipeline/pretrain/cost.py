"""What a whole training takes: operations, time on so many GPUs, and memory of the phase that needs most.

No torch, but where a model is to be built.
"""

import math
from dataclasses import dataclass

from dlm_core.models.config import MaskFamily, ModelConfig
from dlm_core.models.presets import MEAN_MASKED_SHARE
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.gpus import Gpu
from pipeline.pretrain.memory import Layout, RankMemory, rank_memory
from pipeline.pretrain.phases import Span


@dataclass(frozen=True)
class Cost:
    """Of a training from its first step to its last."""

    tokens: int
    """Of the text: steps * rows * seq_len, without what short steps leave out."""
    flops: float
    """Of forward and backward passes (``ModelConfig.flops_per_token``), without what is computed again."""
    gpu_hours: float | None
    """flops / (mfu * peak); with activation checkpointing a third more is computed than counts.  None where the peak is
    not known."""
    hours: float | None
    """gpu_hours over the workers."""


def training_cost(model: ModelConfig, config: PretrainConfig, seq_len: int, gpu: Gpu, mfu: float) -> Cost:
    """Cost on ``config.workers`` GPUs of a kind that reach a share ``mfu`` of their peak (PaLM, arXiv 2204.02311).

    The peak is that of the configuration, else of the GPU in bfloat16: none is assumed for float32, as in the meter.
    Raises ValueError for an mfu outside (0, 1], and for blocks that don't divide a phase's rows.
    """
    if not 0.0 < mfu <= 1.0:
        raise ValueError(f"mfu is {mfu}; it must lie in (0, 1]")
    tokens, flops = 0, 0.0
    for span in config.spans:
        of_span = _tokens(config, span, seq_len)
        tokens += of_span
        flops += of_span * flops_per_token(model, config, span, seq_len)
    peak_flops = 1e12 * config.peak_tflops_per_worker or (gpu.peak_flops if config.precision == "bf16" else 0.0)
    if not peak_flops:
        return Cost(tokens, flops, None, None)
    gpu_hours = flops / (mfu * peak_flops) / 3600
    return Cost(tokens, flops, gpu_hours, gpu_hours / config.workers)


def _tokens(config: PretrainConfig, span: Span, seq_len: int) -> int:
    steps = span.stop_step - span.first_step
    length = seq_len
    if config.short_step_share:
        length -= config.short_step_share * (seq_len - (min(config.short_step_min, seq_len) + seq_len) / 2)
    return round(steps * config.global_batch_seqs * length)


def flops_per_token(model: ModelConfig, config: PretrainConfig, span: Span, seq_len: int) -> int:
    """Operations a token of the text in one phase; ValueError for blocks that don't divide its rows."""
    objective = config.objective
    is_diffusion = objective.kind == "diffusion"
    family: MaskFamily = "block_diffusion" if span.block_size else "full" if is_diffusion else "causal"
    masked_share = MEAN_MASKED_SHARE * sum(objective.mask_rates) if is_diffusion else 1.0
    return model.flops_per_token(
        span.seq_len or seq_len, masked_share, family=family, block_size=span.block_size or None
    )


def layout(config: PretrainConfig, span: Span, seq_len: int, *, on_gpu: bool = True) -> Layout:
    """How a phase is spread over workers; ValueError for rows that can't be cut as it says."""
    length = span.seq_len or seq_len
    if seq_len % length:
        raise ValueError(
            f"phase {span.name} cuts rows of {seq_len} tokens into pieces of {length}, which don't divide it"
        )
    return Layout(
        workers=config.workers,
        micro_batch_seqs=config.rows_per_pass * (seq_len // length),
        seq_len=length,
        precision=config.precision,
        zero_stage=config.zero_stage,
        ep_size=config.ep_size,
        grad_accum_steps=config.grad_accum_steps,
        block_diffusion=span.block_size > 0,
        activation_checkpointing=config.activation_checkpointing,
        offload_optimizer=config.offload_optimizer,
        muon=config.optimizer.kind == "muon",
        ema=config.optimizer.ema_decay > 0,
        on_gpu=on_gpu,
    )


def training_memory(
    model: ModelConfig, config: PretrainConfig, seq_len: int, *, on_gpu: bool = True
) -> dict[str, RankMemory]:
    """Memory of a worker in each phase, by name, the phase that needs most first."""
    found = {span.name: rank_memory(model, layout(config, span, seq_len, on_gpu=on_gpu)) for span in config.spans}
    return dict(sorted(found.items(), key=lambda item: -item[1].device_bytes))


def parameter_shapes(model: ModelConfig) -> dict[str, list[int]]:
    """Shapes of the parameters by name, of the model itself on the meta device, which holds no numbers.

    Their sum is checked against the formula, which all figures here are made of.
    """
    import torch

    from dlm_core.models.transformer import Denoiser

    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Denoiser(model).named_parameters()}
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == model.num_params(), f"the model has {total} parameters, the formula says {model.num_params()}"
    return shapes
