"""A tiny model of experts, trained for a step by one process or by ranks that share its experts through AutoEP."""

from typing import Any

import torch
from torch import Tensor, nn

from dlm_core.models.config import Architecture, MoE
from dlm_core.models.moe import SparseFeedForward
from dlm_core.models.router_losses import RouterTap, balance_loss, z_loss

D_MODEL, NUM_ROWS, SEQ_LEN, WORKERS = 16, 4, 12, 2

ROUTERS = {
    "llada-moe": MoE(8, 2, 8, renormalise=False),
    "llada2": MoE(
        8,
        3,
        8,
        num_shared_experts=1,
        router_score="sigmoid",
        routed_scale=2.5,
        num_groups=4,
        top_groups=2,
        selection_bias=True,
    ),
}
LOSSES = {"task": (1.0, 0.0, 0.0), "balance": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0), "all": (1.0, 0.3, 0.1)}
"""Coefficients of the task, the balance loss and the z-loss."""
CASES = [("llada-moe", "z"), ("llada-moe", "all"), ("llada2", "balance"), ("llada2", "all")]


def architecture(moe: MoE) -> Architecture:
    """Where every layer has experts."""
    return Architecture(d_model=D_MODEL, num_heads=2, d_ff=None, moe=moe)


class Stack(nn.Module):
    """Three residual layers, the middle one dense, named as in the denoiser."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        a = architecture(moe)
        layers = [SparseFeedForward(a), nn.Linear(D_MODEL, D_MODEL), SparseFeedForward(a)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"feed_forward": layer}) for layer in layers)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.copy_(0.25 * torch.randn(tensor.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["feed_forward"](x)
        return x


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and valid tokens, of which the halves of the batch have unequal numbers."""
    x, y = torch.randn(2, NUM_ROWS, SEQ_LEN, D_MODEL, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(NUM_ROWS, SEQ_LEN, dtype=torch.bool)
    valid[0, 5:] = False
    valid[3, :2] = False
    return x, y, valid


def loss_of(model: nn.Module, tap: RouterTap, moe: MoE, rows: slice, coefficients: tuple[float, ...]) -> Tensor:
    """The share that some rows have in the loss of the whole batch."""
    x, y, valid = batch()
    num_tokens = int(valid.sum())
    x, y, valid = x[rows], y[rows], valid[rows]
    with tap:
        out = model(x)
    losses = [((out - y).square().sum(dim=-1) * valid).sum() / num_tokens, torch.zeros(()), torch.zeros(())]
    for name, flat in tap.logits.items():
        logits = flat.view(*valid.shape, -1)
        bias = tap.selection_bias(name)
        balance = balance_loss(logits, valid, moe, group_seqs=1, selection_bias=bias).loss_sum
        losses[1] = losses[1] + balance / NUM_ROWS
        losses[2] = losses[2] + z_loss(logits, valid).loss_sum / num_tokens
    return sum(c * loss for c, loss in zip(coefficients, losses, strict=True) if c)


def plain_gradients(router: str, losses: str) -> dict[str, Tensor]:
    """Gradients of one process, all rows at once; zeros where there is none."""
    model, moe = Stack(ROUTERS[router]), ROUTERS[router]
    loss_of(model, RouterTap(model), moe, slice(None), LOSSES[losses]).backward()
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def shared_gradients(router: str, losses: str, rank: int) -> dict[str, Any]:
    """What a rank sees: names of routers, how far one step of SGD at rate 1 moves what it holds, and how far off its
    output is from that of one process.
    """
    import deepspeed

    from pipeline.pretrain.expert_parallel import expert_parallel_section, route_in_float32, with_experts_apart

    moe = ROUTERS[router]
    model = Stack(moe)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=lambda parameters: torch.optim.SGD(with_experts_apart([{"params": parameters}]), lr=1.0),
        config={
            "train_batch_size": NUM_ROWS,
            "train_micro_batch_size_per_gpu": NUM_ROWS // WORKERS,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "expert_parallel": expert_parallel_section(architecture(moe), WORKERS, on_gpu=False),
        },
        dist_init_required=False,
    )
    route_in_float32(engine.module)
    tap = RouterTap(engine.module)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    half = NUM_ROWS // WORKERS
    rows = slice(rank * half, (rank + 1) * half)
    with torch.no_grad():
        x = batch()[0][rows]
        difference = float((engine(x) - Stack(moe)(x)).abs().max())
    loss = WORKERS * loss_of(engine, tap, moe, rows, LOSSES[losses])  # DeepSpeed averages over workers
    engine.backward(loss)
    engine.step()
    moved = {name: before[name] - p.detach() for name, p in engine.module.named_parameters()}
    return {"moved": moved, "routers": list(tap.logits), "difference": difference}


def gradients_of_cases(rank: int) -> dict[tuple[str, str], dict[str, Any]]:
    """``shared_gradients`` of every case, on one rank of a gang."""
    return {case: shared_gradients(*case, rank) for case in CASES}
