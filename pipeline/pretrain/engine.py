"""The DeepSpeed side of training: process group, generated configuration, engine, and the one loss scale.

The only module of this stage that knows how DeepSpeed averages.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from dlm_core.models.config import ModelConfig
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.expert_parallel import expert_parallel_section, route_in_float32
from pipeline.pretrain.watchdog import WatchdogLimits, collective_timeout
from pipeline.tensor_files import TensorFiles


def prepare_process(threads: int) -> None:
    """Settings that must be in place before torch and deepspeed start threads or load extensions.

    The CPU collectives that DeepSpeed would compile at run time are switched off in ``start_process_group``.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    # By default all environments of a user share one, by the names of the extensions, and wait for each other's locks.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    import torch

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"]))
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks_here:
        raise UserError(
            f"pretrain.workers puts {ranks_here} ranks on this machine, which has {torch.cuda.device_count()} GPU(s). "
            f"Set pretrain.workers={torch.cuda.device_count()}, or hide the GPUs to train on the CPU "
            "(CUDA_VISIBLE_DEVICES=)"
        )
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # denormals slow CPU matrix products a hundredfold


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def start_process_group(limits: WatchdogLimits) -> None:
    """Join the process group of the gang; a process started by itself makes one of size 1.

    One time-out is for it and for all groups that DeepSpeed makes later, which gives them none and so leaves them to
    torch's own.
    """
    import deepspeed
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed import distributed_c10d

    timeout = collective_timeout(limits)
    ops: Any = deepspeed.ops
    ops.__compatible_ops__ = {}  # asked for one kernel alone; it would call compilers to find out
    backend = "nccl" if os.environ["DS_ACCELERATOR"] == "cuda" else "gloo"
    if dist.is_initialized():  # by Ray Train, which does not know our limits
        distributed_c10d._set_pg_timeout(timeout)
        distributed_c10d._get_default_store().set_timeout(timeout)
    elif os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=timeout)


def deepspeed_config(config: PretrainConfig, *, on_gpu: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration, generated whole: users never write one.

    Clipping is always explicit, since its default has changed between releases.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    found: dict[str, Any] = {
        "train_batch_size": config.global_batch_seqs,
        "train_micro_batch_size_per_gpu": config.rows_per_pass,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.ep_size:
        found["expert_parallel"] = expert_parallel_section(config.architecture, config.ep_size, on_gpu=on_gpu)
    return found


def build_engine(model: Any, config: PretrainConfig, weights: TensorFiles | None = None) -> Any:
    """Wrap a model for ZeRO training, its experts spread by AutoEP if the configuration says so.

    The optimizer is ``engine.basic_optimizer``, a ShardedOptimizer with its state made.  ``weights`` is the file that
    the model was filled from: DeepSpeed makes masters of what it has rounded to bf16, and the file has all digits.
    """
    import deepspeed
    from torch.distributed import get_world_size

    from pipeline.pretrain.fragments import Run, fill_masters, local_tensors
    from pipeline.pretrain.optimizer import make_optimizer

    if get_world_size() != config.workers:
        raise UserError(
            f"pretrain.workers is {config.workers}, but {get_world_size()} process(es) were started. Start the "
            f"stage through dlm, or with: torchrun --nproc-per-node {config.workers} -m pipeline.pretrain"
        )
    if config.activation_checkpointing:
        keep_no_activations(model)
    if config.compile and config.zero_stage == 3:
        _gather_whole_layers(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    d_model = config.architecture.d_model
    mask_row = Run("embedding.weight", model.config.mask_token_id * d_model, d_model, 0)
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=model,
        # made once the layers of AutoEP are in their place
        optimizer=lambda _: make_optimizer(config.optimizer, model.named_parameters(), mask_row),
        config=deepspeed_config(config, on_gpu=os.environ["DS_ACCELERATOR"] == "cuda"),
        dist_init_required=False,
    )
    if config.ep_size:
        route_in_float32(engine.module)
    skips_nothing = config.zero_stage == 0 and config.precision == "fp32"
    tensors = local_tensors(engine)
    if weights is not None:
        fill_masters(tensors, weights)
    engine.basic_optimizer.prepare(tensors, shapes, engine.device, check_gradients=skips_nothing)
    return engine


def keep_no_activations(model: Any) -> None:
    """Compute each layer again in the backward pass."""
    for block in model.blocks:
        block.forward = _computed_again(block.forward)


def _computed_again(forward: Callable[..., Any]) -> "partial[Any]":
    """A checkpoint around a layer.  A reentrant one would lose the routers' gradients."""
    from torch.utils.checkpoint import checkpoint

    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def _gather_whole_layers(model: Any) -> None:
    """Let ZeRO 3 hook into whole layers: hooks within one leave the compiler nothing but the bits between them."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [type(model.blocks[0])])


def compile_blocks(engine: Any, config: PretrainConfig) -> None:
    """Compile every layer, after whatever hooks into it has been put there.

    A layer that is computed again is compiled within its checkpoint: the compiler gives up on one around it, and says
    nothing.
    """
    import torch

    limit = most_graphs(config)
    for block in engine.module.blocks:
        if isinstance(block.forward, partial):
            (forward,) = block.forward.args
            block.forward = _computed_again(_compiled_at_most(limit, torch.compile(forward)))
        else:
            block.forward = _compiled_at_most(limit, torch.compile(block.forward))


def most_graphs(config: PretrainConfig) -> int:
    """Graphs that the layers may be compiled to, all together: far more than a training needs."""
    from dlm_core.models.attention import NUM_STRIPES

    num_stripes = NUM_STRIPES if config.short_step_share else 1  # short rows of blocks may have fewer
    return _GRAPHS_OF_A_PHASE * len(config.spans) * num_stripes


_GRAPHS_OF_A_PHASE = 2**6
"""Layers are dense or sparse, the last one or not, under a mask or none; they run with or without gradients, for the
first time or again, for sizes that are fixed or free."""


def _compiled_at_most(limit: int, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that ends training where torch would leave it, and all that share its code, uncompiled.

    torch knows its settings by thread, and what is computed again on a GPU is so in another one.
    """
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit

    settings = {
        "recompile_limit": limit,
        "accumulated_recompile_limit": max(limit, dynamo.accumulated_recompile_limit),
        "fail_on_recompile_limit_hit": True,
    }

    def run(*arguments: Any, **named: Any) -> Any:
        try:
            with dynamo.patch(settings):
                return compiled(*arguments, **named)
        except FailOnRecompileLimitHit as error:
            raise UserError(
                f"pretrain.compile is true, but layers change too often what they are compiled for: {limit} times are "
                "allowed for the phases of this training, and one more is needed. Resume with pretrain.compile=false; "
                f"TORCH_LOGS=recompiles shows what changes. torch says: {error.__cause__}"
            ) from error

    return run


def with_rope_base(config: ModelConfig, rope_base: float) -> ModelConfig:
    """The same model with another rotary base, which no weight depends on."""
    return replace(config, architecture=replace(config.architecture, rope_base=rope_base))


def loss_scale(config: PretrainConfig, global_num_tokens: int) -> float:
    """Factor that turns a micro batch's loss *sum* into what DeepSpeed must be given.

    DeepSpeed averages gradients over ranks and divides by the accumulation steps; we want the gradient of
    (sum over all tokens of the global batch) / (number of its valid tokens).  The one place that compensates.
    """
    return config.workers * config.grad_accum_steps / max(1, global_num_tokens)


def set_lr(engine: Any, lr: float) -> None:
    """Set the rate of the schedule for the coming step."""
    engine.basic_optimizer.set_lr(lr)


def leave_process_group() -> None:
    """Let all ranks finish before any of them exits, then close the group."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
