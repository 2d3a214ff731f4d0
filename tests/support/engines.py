"""Engines of every ZeRO stage and precision around a tiny denoiser of odd sizes, dense or with experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.transformer import Denoiser
from pipeline.pretrain.expert_parallel import expert_parallel_section, route_in_float32, with_experts_apart
from pipeline.pretrain.fragments import LocalTensor, local_tensors, owned, persistent_buffers, push_masters

WORKERS, MAX_GRAD_NORM, NUM_STEPS, MASK = 2, 0.05, 3, 36
_MOE = MoE(4, 2, 5, num_shared_experts=1, router_score="sigmoid", selection_bias=True, first_k_dense=1)
_SIZES: dict[str, Any] = {"d_model": 9, "num_layers": 3, "num_heads": 2, "head_dim": 6, "d_ff": 7, "qk_norm": True}
MODELS = {
    "dense": ModelConfig(Architecture(**_SIZES), MASK + 1, MASK),
    "experts": ModelConfig(Architecture(**_SIZES, moe=_MOE, tied_head=False), MASK + 1, MASK),
}
"""Nothing here divides evenly: parameters are cut within rows, and partitions are padded."""


@dataclass(frozen=True)
class Case:
    """One way to train."""

    stage: int
    model: str = "dense"
    ep_size: int | None = None
    """None leaves the experts as they are."""
    bf16: bool = False
    float32_sums: bool = False
    """Add up bf16 gradients in float32: ZeRO 1 has another wrapper then."""
    small_parts: bool = False
    """ZeRO 3 with several subgroups, and matrices that are gathered anew for each use."""
    offload: bool = False

    def __str__(self) -> str:
        words = [f"zero{self.stage}", "bf16" if self.bf16 else "fp32", self.model]
        words += [] if self.ep_size is None else [f"ep{self.ep_size}"]
        return "-".join(words + [name for name in ("float32_sums", "small_parts", "offload") if getattr(self, name)])


_KINDS: list[tuple[str, int | None]] = [("dense", None), ("experts", None), ("experts", 1), ("experts", 2)]
CASES = [
    *(Case(stage, model, ep_size, bf16) for stage in range(4) for bf16 in (False, True) for model, ep_size in _KINDS),
    Case(1, "experts", 2, bf16=True, float32_sums=True),
    Case(3, "experts", 2, bf16=True, small_parts=True),
    Case(2, "experts", 2, bf16=True, offload=True),
    Case(3, bf16=True, offload=True),
]
TRAINED = [
    Case(0, "experts"),
    Case(0, bf16=True),
    Case(1, "experts", 2),
    Case(1, "experts", 2, bf16=True, float32_sums=True),
    Case(2, "experts", 2, offload=True),
    Case(3, "experts", small_parts=True),
    Case(3, "experts", 2, small_parts=True),
]


def plain_model(case: Case, seed: int) -> Denoiser:
    """The model without an engine, every element of its state another one, in the precision of the case."""
    model = Denoiser(MODELS[case.model])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.bfloat16() if case.bf16 else model


def tokens(rank: int) -> Tensor:
    """A row [1, 6] that differs from rank to rank."""
    return torch.randint(0, MASK, (1, 6), generator=torch.Generator().manual_seed(rank))


def groups(parameters: Any) -> list[dict[str, Any]]:
    """Matrices decay, norms don't."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]


def build(
    case: Case,
    model: Denoiser,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    max_grad_norm: float = MAX_GRAD_NORM,
) -> Any:
    """An engine with what ``optimizer`` makes of its parameters.

    By default it is torch's AdamW in three groups: matrices, norms, and the experts that are spread.
    """
    import deepspeed

    zero: dict[str, Any] = {"stage": case.stage, "reduce_bucket_size": 10_000}
    if case.small_parts:
        zero |= {"stage3_param_persistence_threshold": 20, "sub_group_size": 150, "stage3_prefetch_bucket_size": 100}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_batch_size": WORKERS,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": case.bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if case.float32_sums:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.ep_size is not None:
        config["expert_parallel"] = expert_parallel_section(model.config.architecture, case.ep_size, on_gpu=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer or (lambda parameters: torch.optim.AdamW(with_experts_apart(groups(parameters)), lr=0.01)),
        config=config,
        dist_init_required=False,
    )
    if optimizer is None:
        _undo_first_step(engine)
    if case.ep_size is not None:
        route_in_float32(engine.module)
    return engine


def _undo_first_step(engine: Any) -> None:
    """Take back the step with gradients of zero that DeepSpeed makes at once where ZeRO 0 trains in bf16.

    It has decayed the masters and counted a step in the state of torch's optimizer; ours takes no such step.
    """
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 0 and hasattr(wrapper, "fp32_groups"):
        wrapper.refresh_fp32_params()
        wrapper.optimizer.state.clear()


# What ranks do


def held_and_pushed(rank: int) -> dict[str, dict[str, Any]]:
    """What a rank holds in each case, what it would write, and its logits once model 1 has become model 2."""
    return {str(case): _held_and_pushed(case, rank) for case in CASES}


def _held_and_pushed(case: Case, rank: int) -> dict[str, Any]:
    engine = build(case, plain_model(case, 1))
    tensors = local_tensors(engine)
    found: dict[str, Any] = {
        "held": [_values(tensor) for tensor in tensors],
        "written": [[(run.name, run.start, run.numel) for run in tensor.runs] for tensor in owned(tensors)],
        "sizes": [tensor.tensor.numel() for tensor in tensors],
        "buffers": {name: buffer.clone() for name, buffer in persistent_buffers(engine).items()},
    }
    with torch.no_grad():
        engine(tokens(rank))  # so that ZeRO 3 has parameters gathered, and knows what to fetch
        wanted = plain_model(case, 2).state_dict()
        for tensor in tensors:
            flat = tensor.tensor.view(-1)
            for run in tensor.runs:
                flat[run.offset : run.offset + run.numel] = wanted[run.name].view(-1)[run.start : run.start + run.numel]
        for name, buffer in persistent_buffers(engine).items():
            buffer.copy_(wanted[name])
        push_masters(engine)
        found["logits"] = engine(tokens(rank))[:, :MASK]
    engine.destroy()
    return found


def _values(tensor: LocalTensor) -> list[tuple[str, int, int, Tensor]]:
    flat = tensor.tensor.detach().view(-1)
    return [(r.name, r.start, r.offset, flat[r.offset : r.offset + r.numel].clone()) for r in tensor.runs]


def trained_with_exchanges(rank: int) -> dict[str, dict[str, Any]]:
    """Losses and norms of steps in each case, while before the last one masters are others for a while."""
    return {str(case): _trained(case, rank) for case in TRAINED}


def _trained(case: Case, rank: int) -> dict[str, Any]:
    engine = build(case, plain_model(case, 1))
    tensors = local_tensors(engine)
    set_biases(persistent_buffers(engine))
    losses, norms = [], []
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            _exchange_for_a_while(engine, tensors, rank)
        loss = loss_share(engine, step, slice(rank, rank + 1))
        engine.backward(WORKERS * loss)  # DeepSpeed averages over workers
        engine.step()
        losses.append(float(loss.detach()))
        norms.append(engine.get_global_grad_norm())
    state = getattr(engine.optimizer, "optimizer", engine.optimizer).state
    in_order = [id(key) for key in state] == [id(tensor.tensor) for tensor in tensors]
    engine.destroy()
    return {"losses": losses, "norms": [None if norm is None else float(norm) for norm in norms], "in_order": in_order}


def _exchange_for_a_while(engine: Any, tensors: list[LocalTensor], rank: int) -> None:
    with torch.no_grad():
        own = [tensor.tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.tensor.fill_(0.3)
        push_masters(engine)
        engine(tokens(rank))
        for tensor, values in zip(tensors, own, strict=True):
            tensor.tensor.copy_(values)
        push_masters(engine)


def set_biases(buffers: dict[str, Tensor]) -> None:
    """Send every token to the first two experts, which one of two workers has."""
    for bias in buffers.values():
        bias.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0]))


def loss_share(model: nn.Module, step: int, rows: slice) -> Tensor:
    """The share that some rows, of one token, have in the mean loss of a step."""
    generator = torch.Generator().manual_seed(10 + step)
    x, y = torch.randint(0, MASK, (2, WORKERS, 1), generator=generator)
    logits = model(x[rows])[:, :MASK].float()
    return F.cross_entropy(logits, y[rows].flatten(), reduction="sum") / WORKERS
