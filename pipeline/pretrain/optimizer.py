"""AdamW and Muon over whatever pieces of the parameters ZeRO has left this rank, with averages beside the weights.

DeepSpeed is given this optimizer, puts its float32 masters in the place of the parameters, and calls ``step`` for all
of them at once or group by group.  What a tensor holds it learns from ``prepare``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.pretrain.expert_parallel import with_experts_apart
from pipeline.pretrain.fragments import LocalTensor, Run
from pipeline.pretrain.muon import Matrix, MatrixExchange, matrices_of, takes_muon
from pipeline.pretrain.optimizer_config import OptimizerConfig

_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}
_SWAP_NUMEL = 1 << 24
"""Elements exchanged at a time, so that averages take no third copy of the weights."""


def make_optimizer(
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], mask_row: Run
) -> "ShardedOptimizer":
    """The optimizer of a model's parameters in groups of one rule, rate and decay, with what AutoEP spread apart.

    AutoEP puts other parameters in the place of experts; so give DeepSpeed a function that it calls after that:
    ``deepspeed.initialize(model=model, optimizer=lambda _: make_optimizer(config, model.named_parameters(), row))``.
    ``mask_row`` is the mask token's row of the embedding.  Once the engine stands, call ``prepare``.
    """
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        ndim = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 has emptied what it has cut up
        scale = 1.0
        if name == mask_row.name:
            scale = config.lr_scale.embedding
        elif ".experts." in name:
            scale = config.lr_scale.experts
        rule = "muon" if config.kind == "muon" and takes_muon(name, ndim) else "adamw"
        groups.setdefault((rule, scale, config.weight_decay if ndim >= 2 else 0.0), []).append(parameter)
    made = [
        {"params": parameters, "rule": rule, "lr_scale": scale, "weight_decay": decay}
        for (rule, scale, decay), parameters in groups.items()
    ]
    return ShardedOptimizer(with_experts_apart(made), config, mask_row)


class ShardedOptimizer(torch.optim.Optimizer):
    """AdamW and Muon; its state for a tensor are tensors of the same layout, made by ``prepare`` and changed in place.

    ``group["lr"]`` is the rate of the schedule for every group; ``group["lr_scale"]`` multiplies it.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimizerConfig, mask_row: Run) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config = config
        self.skipped = 0
        """Steps not taken for a gradient that was not finite, of those that DeepSpeed would have taken."""
        self.overflow = False
        """Whether the last step was skipped; DeepSpeed counts it where no wrapper of its own stands before this."""
        self.is_swapped = False
        """Whether the masters hold the averages."""
        self._mask_row = mask_row
        self._runs: dict[Tensor, tuple[Run, ...]] = {}
        self._matrices: list[Matrix] = []
        self._exchanges: dict[tuple[Tensor, ...], MatrixExchange] = {}
        self._device = torch.device("cpu")
        self._must_check_gradients = False

    def prepare(
        self,
        local_tensors: Sequence[LocalTensor],
        shapes: Mapping[str, Sequence[int]],
        device: torch.device,
        *,
        check_gradients: bool = False,
    ) -> None:
        """Make the state for the masters, which hold the initial weights: moments are 0, averages are these weights.

        ``shapes`` are those of the plain model, by name; ``device`` is that of the engine.  ``check_gradients`` is for
        ZeRO stage 0 in float32, where DeepSpeed applies gradients that are not finite; elsewhere it skips such steps
        itself.
        """
        self._device, self._must_check_gradients = device, check_gradients
        self._matrices = matrices_of(shapes)
        for local in local_tensors:
            tensor: Tensor = local.tensor
            assert tensor.dtype == torch.float32, f"a master of {tensor.dtype}"
            assert tensor.is_contiguous(), "a master that is a view with gaps"
            assert all(run.offset + run.numel <= tensor.numel() for run in local.runs), "a run leaves its tensor"
            with_muon = self.config.kind == "muon"
            rules = {"muon" if with_muon and takes_muon(r.name, len(shapes[r.name])) else "adamw" for r in local.runs}
            assert len(rules) <= 1, "a tensor holds parameters of two groups"
            self._runs[tensor] = tuple(local.runs)
            state = self.state[tensor]
            state["step"] = 0
            for rule, keys in _MOMENTS.items():
                if rule in (rules or _MOMENTS):  # what is all padding may be in any group
                    state |= {key: torch.zeros_like(tensor, requires_grad=False) for key in keys}
            if self.config.ema_decay:
                state["ema"] = tensor.detach().clone()

    def state_tensors(self, tensor: Tensor) -> dict[str, Tensor]:
        """The state of a master, to be saved or restored in place: moments or momentum, and ``ema``."""
        return {key: value for key, value in self.state[tensor].items() if isinstance(value, Tensor)}

    @property
    def steps_taken(self) -> int:
        """Updates so far, the same for all tensors; skipped steps are none."""
        counts = {self.state[tensor]["step"] for tensor in self._runs}
        assert len(counts) == 1, f"tensors have been updated {sorted(counts)} times"
        return counts.pop()

    @steps_taken.setter
    def steps_taken(self, count: int) -> None:
        for tensor in self._runs:
            self.state[tensor]["step"] = count

    def set_lr(self, lr: float) -> None:
        """Set the rate of the schedule for the coming step."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the masters that stand in the groups now; a gradient that is None counts as zeros.

        A collective call with Muon.
        """
        assert closure is None, "a closure would compute gradients that DeepSpeed has not reduced"
        assert not self.is_swapped, "the masters hold averages; call swap_ema first"
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if not self._runs:
            # DeepSpeed's wrapper of bf16 without ZeRO steps with zero gradients when it is made: no weight may decay
            assert not any(bool(t.grad.any()) for t in tensors if t.grad is not None), "call prepare before step"
            return
        gradients = {tensor: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors}
        self.overflow = self._must_check_gradients and not self._are_finite(gradients.values())
        if self.overflow:
            self.skipped += 1
            return
        for group in self.param_groups:
            chosen = group["params"]
            if not chosen:
                continue
            for tensor in chosen:
                self.state[tensor]["step"] += 1
            update = self._step_muon if group["rule"] == "muon" else self._step_adamw
            update(group, chosen, [gradients[tensor] for tensor in chosen])
        self._average(tensors)

    def swap_ema(self) -> None:
        """Exchange masters and averages in place; the caller pushes the masters to the model.  Twice is as before."""
        assert self.config.ema_decay, "there are no averages: optimizer.ema_decay is 0"
        for tensor in self._runs:
            average = self.state[tensor]["ema"].view(-1)
            for a, b in zip(tensor.detach().view(-1).split(_SWAP_NUMEL), average.split(_SWAP_NUMEL), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
        self.is_swapped = not self.is_swapped

    def _step_adamw(self, group: dict[str, Any], tensors: list[Tensor], gradients: list[Tensor]) -> None:
        by_scale: dict[float, list[tuple[Tensor, ...]]] = {}
        for tensor, gradient in zip(tensors, gradients, strict=True):
            row = (tensor, gradient, *(self.state[tensor][key] for key in _MOMENTS["adamw"]))
            for piece, scale in self._pieces(tensor):
                cut = row if piece is None else tuple(column.reshape(-1)[piece] for column in row)
                by_scale.setdefault(scale * group["lr_scale"], []).append(cut)
        count = torch.full((), float(self.state[tensors[0]]["step"]), device=tensors[0].device)
        for scale, rows in by_scale.items():
            masters, slopes, means, squares = (list(column) for column in zip(*rows, strict=True))
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage] - what torch.optim.AdamW calls
                masters,
                slopes,
                means,
                squares,
                [],
                [count] * len(rows),
                lr=group["lr"] * scale,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                weight_decay=group["weight_decay"],
                eps=self.config.eps,
                amsgrad=False,
                maximize=False,
            )

    def _pieces(self, tensor: Tensor) -> Iterator[tuple[slice | None, float]]:
        """Parts of a tensor with rates of their own, as multiples of the group's; None is the whole."""
        row, scale = self._mask_row, self.config.lr_scale.mask_embedding
        found = []
        for run in self._runs[tensor]:
            low, high = max(run.start, row.start), min(run.start + run.numel, row.start + row.numel)
            if run.name == row.name and low < high:
                found.append((run.offset + low - run.start, run.offset + high - run.start))
        if scale == 1.0 or not found:
            yield None, 1.0
            return
        ((begin, end),) = found
        for low, high, own in ((0, begin, 1.0), (begin, end, scale), (end, tensor.numel(), 1.0)):
            if low < high:
                yield slice(low, high), own

    def _step_muon(self, group: dict[str, Any], tensors: list[Tensor], gradients: list[Tensor]) -> None:
        """Nesterov's momentum as in the reference code of Muon; the decay is AdamW's."""
        lr, beta = group["lr"] * group["lr_scale"], self.config.muon_momentum
        updates: list[Tensor] = []
        for tensor, gradient in zip(tensors, gradients, strict=True):
            momentum: Tensor = self.state[tensor]["momentum"].mul_(beta).add_(gradient)
            updates.append(gradient.add(momentum, alpha=beta))
        exchange = self._exchanges.get(tuple(tensors))
        if exchange is None:
            runs = [self._runs[tensor] for tensor in tensors]
            exchange = self._exchanges[tuple(tensors)] = MatrixExchange(runs, self._matrices, self._device)
        exchange.replace([update.view(-1) for update in updates], self.config.muon_iterations)
        for tensor, update in zip(tensors, updates, strict=True):
            tensor.mul_(1.0 - lr * group["weight_decay"]).add_(update, alpha=-lr)

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """ema <- ema + (1 - d) (master - ema),  d = min(ema_decay, (1 + n) / (10 + n)) at update n (MDLM's ramp)."""
        if not self.config.ema_decay:
            return
        for tensor in tensors:
            n = self.state[tensor]["step"]
            decay = min(self.config.ema_decay, (1 + n) / (10 + n))
            self.state[tensor]["ema"].lerp_(tensor, 1.0 - decay)

    def _are_finite(self, gradients: Iterable[Tensor]) -> bool:
        """Whether those of all ranks are: a rank that has experts of its own must not go on alone."""
        norms = torch.stack([gradient.norm() for gradient in gradients])
        verdict = norms.isfinite().all().float().to(self._device)
        if dist.is_initialized():
            dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict)
