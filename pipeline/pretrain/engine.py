"""The DeepSpeed side of training: process group, generated configuration, engine, and the one loss scale.

The only module of this stage that knows how DeepSpeed averages.
"""

import datetime
import os
from typing import Any

from pipeline.errors import UserError
from pipeline.pretrain.config import OptimizerConfig, PretrainConfig

_TIMEOUT = datetime.timedelta(minutes=10)


def prepare_process(threads: int) -> None:
    """Settings that must be in place before torch and deepspeed start threads or load extensions.

    Checkpoints are unpickled with torch's restricted loader only.  The CPU collectives that DeepSpeed would
    compile at run time are switched off in ``start_process_group``.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
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


def start_process_group() -> None:
    """Join the process group of the gang; a process started by itself makes one of size 1."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from torch._C._distributed_c10d import HashStore
    from torch.serialization import add_safe_globals

    add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if os.environ["DS_ACCELERATOR"] == "cuda" else "gloo"
    if not dist.is_initialized():
        if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
            store = HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=_TIMEOUT)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=_TIMEOUT)


def deepspeed_config(config: PretrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration, generated whole: users never write one.

    Clipping is always explicit, since its default has changed between releases.
    """
    return {
        "train_batch_size": config.global_batch_seqs,
        "train_micro_batch_size_per_gpu": config.rows_per_pass,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def build_engine(model: Any, config: PretrainConfig) -> Any:
    """Wrap a model for ZeRO training with AdamW."""
    import deepspeed
    from torch.distributed import get_world_size

    from pipeline.pretrain.writer import install_writer

    if get_world_size() != config.workers:
        raise UserError(
            f"pretrain.workers is {config.workers}, but {get_world_size()} process(es) were started. Start the "
            f"stage through dlm, or with: torchrun --nproc-per-node {config.workers} -m pipeline.pretrain"
        )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_adamw(model, config.optimizer),
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    install_writer(engine)
    return engine


def _adamw(model: Any, o: OptimizerConfig) -> Any:
    import torch

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": o.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)


def loss_scale(config: PretrainConfig, global_num_tokens: int) -> float:
    """Factor that turns a micro batch's loss *sum* into what DeepSpeed must be given.

    DeepSpeed averages gradients over ranks and divides by the accumulation steps; we want the gradient of
    (sum over all tokens of the global batch) / (number of its valid tokens).  The one place that compensates.
    """
    return config.workers * config.grad_accum_steps / max(1, global_num_tokens)


def set_lr(engine: Any, lr: float) -> None:
    """Set the learning rate of every parameter group for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def leave_process_group() -> None:
    """Let all ranks finish before any of them exits, then close the group."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
