"""Ten updates of a tiny model: by DeepSpeed's engines on two ranks with our optimizer, and naively by one process."""

import itertools
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_core.models.transformer import Denoiser
from pipeline.pretrain.fragments import Run
from pipeline.pretrain.optimizer_config import LRScale, OptimizerConfig
from tests.support.engines import MASK, WORKERS, Case, build, plain_model, tokens
from tests.support.naive_optimizer import NaiveOptimizer, gradients_of

NUM_STEPS = 10
NUM_CUTS = 40
_SCALES = LRScale(experts=0.5, embedding=0.25, mask_embedding=8.0)
# eps of the size of gradients: Adam divides what rounding made by what rounding made where a gradient is nearly 0.
OPTIMIZERS = {
    "adamw": OptimizerConfig(eps=1e-3, ema_decay=0.9),
    "adamw by group": OptimizerConfig(eps=1e-3, lr_scale=_SCALES, ema_decay=0.4),
    "muon": OptimizerConfig("muon", eps=1e-3, lr_scale=_SCALES, ema_decay=0.9),
}
_SPREAD = [Case(0, "experts"), *(Case(stage, "experts", 2) for stage in (1, 2, 3))]
CASES: list[tuple[str, Case]] = [
    *itertools.product(["adamw by group", "muon"], _SPREAD),
    ("adamw", Case(1)),
    ("muon", Case(2, offload=True)),
    ("muon", Case(0, "experts", 2)),
    ("muon", Case(3, "experts", small_parts=True)),
]
NOT_FINITE = [Case(0), Case(0, bf16=True), Case(1), Case(1, bf16=True, float32_sums=True), Case(2, bf16=True)]


def lr_at(step: int) -> float:
    """Another rate at each step."""
    return 2e-3 / (1 + step)


def loss_of(model: nn.Module, step: int, rows: slice) -> Tensor:
    """Mean cross-entropy of some rows of the batch of a step."""
    xt, x0 = torch.randint(0, MASK, (2, WORKERS, 6), generator=torch.Generator().manual_seed(step))
    xt = torch.where(torch.arange(6) % 2 == 0, MASK, xt)
    return F.cross_entropy(model(xt[rows]), x0[rows].flatten())


def optimizer_of(name: str, model: Denoiser) -> Callable[[Any], Any]:
    """What DeepSpeed is to call once the parameters of the model are what they will be."""
    from pipeline.pretrain.optimizer import make_optimizer

    d_model = model.config.architecture.d_model
    row = Run("embedding.weight", MASK * d_model, d_model, 0)
    return lambda _: make_optimizer(OPTIMIZERS[name], model.named_parameters(), row)


def prepared(engine: Any, case: Case) -> tuple[Any, list[Any]]:
    """The optimizer of an engine, ready to step, and the tensors of this rank."""
    from pipeline.pretrain.fragments import local_tensors

    found = local_tensors(engine)
    optimizer = engine.basic_optimizer
    shapes = {name: tuple(p.shape) for name, p in plain_model(case, 0).named_parameters()}
    optimizer.prepare(found, shapes, engine.device, check_gradients=case.stage == 0 and not case.bf16)
    return optimizer, found


def trained(name: str, case: Case, rank: int) -> dict[str, Any]:
    """What a rank holds after the steps: masters, averages, and logits with either."""
    from pipeline.pretrain.fragments import push_masters

    model = plain_model(case, 1)
    engine = build(case, model, max_grad_norm=1e9, optimizer=optimizer_of(name, model))
    optimizer, found = prepared(engine, case)
    for step in range(NUM_STEPS):
        optimizer.set_lr(lr_at(step))
        engine.backward(loss_of(engine, step, slice(rank, rank + 1)))
        engine.step()
    assert optimizer.steps_taken == NUM_STEPS
    result: dict[str, Any] = {"masters": held(found), "logits": logits(engine)}
    keys = {key for local in found for key in optimizer.state_tensors(local.tensor)}
    result["keys"] = sorted(keys)
    optimizer.swap_ema()
    push_masters(engine)
    result |= {"ema": held(found), "logits of ema": logits(engine)}
    optimizer.swap_ema()
    push_masters(engine)
    result["logits again"] = logits(engine)
    engine.destroy()
    return result


def held(found: list[Any]) -> dict[str, Tensor]:
    """Parameters by name with the elements that this rank holds, NaN elsewhere."""
    values: dict[str, Tensor] = {}
    for local in found:
        flat = local.tensor.detach().view(-1)
        for run in local.runs:
            whole = values.setdefault(run.name, torch.full((4000,), torch.nan))
            whole[run.start : run.start + run.numel] = flat[run.offset : run.offset + run.numel]
    return values


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of one row, without the column of the mask token."""
    return model(tokens(0))[:, :MASK].float().clone()


@cache
def trained_naively(name: str, model_name: str) -> NaiveOptimizer:
    """The same steps, all rows at once."""
    model = plain_model(Case(0, model_name), 1)
    masters = {key: p.detach() for key, p in model.named_parameters()}
    naive = NaiveOptimizer(OPTIMIZERS[name], model.config, masters)
    for step in range(NUM_STEPS):
        model.zero_grad()
        loss_of(model, step, slice(0, WORKERS)).backward()
        naive.step(gradients_of(model), lr_at(step))
    return naive


def all_cases(rank: int) -> dict[tuple[str, str], Any]:
    """``trained`` of every case, and what becomes of a gradient that is not finite."""
    found: dict[tuple[str, str], Any] = {(name, str(case)): trained(name, case, rank) for name, case in CASES}
    for case in NOT_FINITE:
        found["not finite", str(case)] = not_finite(case, rank)
    return found


def not_finite(case: Case, rank: int) -> dict[str, Any]:
    """A good step, one with a NaN on rank 1, a good step: masters after each and what was counted."""
    model = plain_model(case, 1)
    engine = build(case, model, max_grad_norm=1.0, optimizer=optimizer_of("adamw", model))
    optimizer, found = prepared(engine, case)
    masters = [held(found)]
    for step, factor in enumerate((1.0, float("nan") if rank == 1 else 1.0, 1.0)):
        engine.backward(factor * loss_of(engine, step, slice(rank, rank + 1)))
        engine.step()
        masters.append(held(found))
    counted = {"taken": optimizer.steps_taken, "skipped": optimizer.skipped, "engine": engine.skipped_steps}
    engine.destroy()
    return {"masters": masters, **counted}


def exchanges(rank: int) -> float:
    """Largest error of updates of matrices that three ranks have cut at random, over many cuts."""
    from pipeline.pretrain.muon import Matrix, MatrixExchange
    from tests.support.naive_optimizer import orthogonal

    worst = 0.0
    for seed in range(NUM_CUTS):
        chance = random.Random(seed)
        matrices, held = [], [[[], []] for _ in range(3)]
        for name in "abcd"[: chance.randint(1, 4)]:
            count, rows, cols = (chance.randint(1, 3) for _ in range(3))
            matrices += [Matrix(name, k * rows * cols, rows, cols) for k in range(count)]
            total, tensor = count * rows * cols, chance.randint(0, 1)
            is_copied = chance.random() < 0.3
            cuts = sorted(chance.randint(0, total) for _ in range(2))
            for place, (low, high) in enumerate(itertools.pairwise([0, *cuts, total])):
                part = (0, total) if is_copied else (low, high)
                if part[0] < part[1]:
                    held[place][tensor].append((name, *part))
        generator = torch.Generator().manual_seed(seed)
        whole = {name: torch.randn(99, generator=generator) for name in "abcd"}
        wanted = {name: torch.zeros(99) for name in "abcd"}
        for m in matrices:
            update = orthogonal(whole[m.name][m.start : m.start + m.numel].view(m.rows, m.cols), 5)
            wanted[m.name][m.start : m.start + m.numel] = update.flatten()
        runs: list[list[Run]] = []
        for mine in held[rank]:
            offsets = itertools.accumulate((high - low for _, low, high in mine), initial=2)
            runs.append([Run(name, low, high - low, at) for (name, low, high), at in zip(mine, offsets, strict=False)])
        flats = [torch.full((400,), 7.0) for _ in runs]
        targets = [flat.clone() for flat in flats]
        for flat, target, mine in zip(flats, targets, runs, strict=True):
            for run in mine:
                place, part = slice(run.offset, run.offset + run.numel), slice(run.start, run.start + run.numel)
                flat[place], target[place] = whole[run.name][part], wanted[run.name][part]
        MatrixExchange(runs, matrices, torch.device("cpu")).replace(flats, 5)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(flats, targets, strict=True)))
    return worst
