"""Our optimizer against torch's AdamW and against a naive one on the whole model, on two ranks and every ZeRO stage."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlm_core.models.config import ModelConfig
from dlm_core.models.presets import PRESETS
from dlm_core.models.transformer import Denoiser
from pipeline.pretrain.fragments import LocalTensor, Run
from pipeline.pretrain.muon import Matrix, MatrixExchange, matrices_of, orthogonal_update
from pipeline.pretrain.optimizer import ShardedOptimizer, make_optimizer
from pipeline.pretrain.optimizer_config import LRScale, OptimizerConfig
from tests.support.engines import MASK, MODELS, Case, plain_model
from tests.support.naive_optimizer import NaiveOptimizer, is_hidden_matrix, linear_maps, orthogonal
from tests.support.optimizer_ranks import (
    CASES,
    NOT_FINITE,
    all_cases,
    exchanges,
    logits,
    optimizer_of,
    trained_naively,
)
from tests.support.ranks import run_ranks

SAME = 1e-6
"""Bar for ten updates in other orders of float32 sums; 3e-7 is found, and weights move by 1e-3 and more."""
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(all_cases, tmp_path_factory.mktemp("optimizer"), 2)


def assembled(parts: Sequence[dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters from the elements that ranks hold; where both hold one they must agree."""
    found = {}
    for name, wanted in like.items():
        held = [part[name][: wanted.numel()] for part in parts if name in part]
        whole = held[0]
        for other in held[1:]:
            is_shared = ~(whole.isnan() | other.isnan())
            assert torch.equal(whole[is_shared], other[is_shared]), f"ranks hold different {name}"
            whole = torch.where(whole.isnan(), other, whole)
        found[name] = whole.view(wanted.shape)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_ten_updates_of_two_ranks_are_those_of_the_naive_optimizer(
    ranks: list[dict[tuple[str, str], dict[str, Any]]], name: str, case: Case
) -> None:
    naive, start = trained_naively(name, case.model), plain_model(case, 1).state_dict()
    found = [rank[name, str(case)] for rank in ranks]
    for kind, wanted in (("masters", naive.masters), ("ema", naive.ema)):
        values = assembled([rank[kind] for rank in found], wanted)
        for parameter, value in wanted.items():
            torch.testing.assert_close(
                values[parameter], value, atol=SAME, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}"
            )
            assert float((value - start[parameter]).abs().max()) > 300 * SAME, f"{parameter} hardly moved: a weak test"
    keys = {"exp_avg", "exp_avg_sq", "ema"} | ({"momentum"} if name == "muon" else set())
    assert set(found[0]["keys"]) == keys


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_swapped_averages_are_what_the_model_computes_with(
    ranks: list[dict[tuple[str, str], dict[str, Any]]], name: str, case: Case
) -> None:
    naive, model = trained_naively(name, case.model), plain_model(case, 1)
    for rank in ranks:
        found = rank[name, str(case)]
        for kind, weights in (("logits", naive.masters), ("logits of ema", naive.ema)):
            model.load_state_dict({**model.state_dict(), **weights})
            torch.testing.assert_close(found[kind], logits(model), atol=1e-5, rtol=1e-5)
        assert torch.equal(found["logits again"], found["logits"])
        assert not torch.allclose(found["logits of ema"], found["logits"], atol=1e-4)


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", NOT_FINITE, ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted(
    ranks: list[dict[tuple[str, str], dict[str, Any]]], case: Case
) -> None:
    for rank in ranks:
        found = rank["not finite", str(case)]
        before, first, skipped, last = [
            {key: value.nan_to_num(9.0) for key, value in at.items()} for at in found["masters"]
        ]
        initial = dict(plain_model(case, 1).named_parameters())
        for key, value in before.items():
            wanted = initial[key].detach().float().flatten()
            is_held = value[: len(wanted)] != 9.0
            assert torch.equal(value[: len(wanted)][is_held], wanted[is_held]), "a weight decayed before the first step"
        assert all(torch.equal(skipped[key], first[key]) for key in first)
        assert all(not torch.equal(last[key], first[key]) and not torch.equal(first[key], before[key]) for key in first)
        assert (found["taken"], found["engine"]) == (2, 1)
        assert found["skipped"] == (1 if case == Case(0) else 0), "DeepSpeed skips where it can"


# On one process


def alone(config: OptimizerConfig, model: nn.Module, mask_row: Run | None = None) -> ShardedOptimizer:
    """The optimizer of whole parameters."""
    row = mask_row or Run("embedding.weight", MASK * 9, 9, 0)
    optimizer = make_optimizer(config, model.named_parameters(), row)
    named = list(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in named}
    whole = [LocalTensor(p, (Run(name, 0, p.numel(), 0),)) for name, p in named]
    optimizer.prepare(whole, shapes, named[0][1].device)
    return optimizer


def set_gradients(model: nn.Module, step: int) -> None:
    """Random ones, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def denoiser(kind: str = "dense") -> Denoiser:
    return plain_model(Case(0, kind), 1)


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_has_every_bit_of_torch(device: str) -> None:
    ours, theirs = denoiser("experts").to(device), denoiser("experts").to(device)
    config = OptimizerConfig()
    optimizer = alone(config, ours)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    wanted = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for step in range(10):
        for model in (ours, theirs):
            set_gradients(model, step)
        optimizer.set_lr(1e-3 / (1 + step))
        for group in wanted.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        optimizer.step()
        wanted.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("cut", [1, 36 * 9, 36 * 9 + 4, 37 * 9 - 1])
def test_mask_row_that_partitions_cut_is_updated_at_its_own_rate(cut: int) -> None:
    config = OptimizerConfig(eps=1e-3, weight_decay=0.2, lr_scale=LRScale(embedding=0.5, mask_embedding=6.0))
    model, shape = denoiser(), (37, 9)
    whole = model.embedding.weight.detach().clone()
    naive = NaiveOptimizer(config, model.config, {"embedding.weight": whole})
    row = Run("embedding.weight", 36 * 9, 9, 0)
    parts = [nn.Parameter(torch.cat([torch.zeros(3), part])) for part in whole.flatten().split([cut, 37 * 9 - cut])]
    ranks = []
    for part, start in zip(parts, (0, cut), strict=True):
        optimizer = make_optimizer(config, [("embedding.weight", model.embedding.weight)], row)
        optimizer.param_groups[0]["params"] = [part]
        run = Run("embedding.weight", start, part.numel() - 3, 3)
        optimizer.prepare([LocalTensor(part, (run,))], {"embedding.weight": shape}, CPU)
        ranks.append(optimizer)
    for step in range(10):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        naive.step({"embedding.weight": gradient}, 1e-3)
        for optimizer, part, g in zip(ranks, parts, gradient.flatten().split([cut, 37 * 9 - cut]), strict=True):
            part.grad = torch.cat([torch.zeros(3), g])
            optimizer.set_lr(1e-3)
            optimizer.step()
    found = torch.cat([part.detach()[3:] for part in parts]).view(shape)
    torch.testing.assert_close(found, whole, atol=SAME, rtol=0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_missing_gradient_counts_as_zeros(kind: Any) -> None:
    models = [denoiser("experts"), denoiser("experts")]
    for place, model in enumerate(models):
        optimizer = alone(OptimizerConfig(kind), model)
        for step in range(3):
            set_gradients(model, step)
            expert = model.get_parameter("blocks.1.feed_forward.experts.down_proj")
            if step == 1:
                expert.grad = torch.zeros_like(expert) if place else None
            optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_scale_of_zero_freezes(kind: Any) -> None:
    model = denoiser("experts")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = alone(OptimizerConfig(kind, lr_scale=LRScale(experts=0.0)), model)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    is_expert = {name: name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in before}
    assert sum(is_expert.values()) == 4
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == is_expert[name], name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(kind: Any) -> None:
    config = OptimizerConfig(kind, ema_decay=0.9)
    straight, again = denoiser("experts"), denoiser("experts")
    optimizer, restored = alone(config, straight), alone(config, again)
    for step in range(4):
        if step == 2:
            for a, b in zip(straight.parameters(), again.parameters(), strict=True):
                b.data.copy_(a.data)
                for key, value in optimizer.state_tensors(a).items():
                    restored.state_tensors(b)[key].copy_(value)
            restored.steps_taken = optimizer.steps_taken
        for model, which in ((straight, optimizer), (again, restored)):
            set_gradients(model, step)
            if model is straight or step >= 2:
                which.step()
    assert optimizer.steps_taken == restored.steps_taken == 4
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["ema"], restored.state[b]["ema"])


def test_a_step_before_prepare_moves_nothing_and_is_refused_with_gradients() -> None:
    model = denoiser()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of("adamw", model)(None)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    set_gradients(model, 0)
    with pytest.raises(AssertionError, match="call prepare before step"):
        optimizer.step()


def test_averages_and_masters_swapped_twice_are_as_before_and_no_step_is_taken_between() -> None:
    model = denoiser()
    optimizer = alone(OptimizerConfig(ema_decay=0.5), model)
    set_gradients(model, 0)
    optimizer.step()
    masters = [p.detach().clone() for p in model.parameters()]
    averages = [optimizer.state[p]["ema"].clone() for p in model.parameters()]
    optimizer.swap_ema()
    assert all(torch.equal(p, average) for p, average in zip(model.parameters(), averages, strict=True))
    with pytest.raises(AssertionError, match="the masters hold averages"):
        optimizer.step()
    optimizer.swap_ema()
    assert all(torch.equal(p, master) for p, master in zip(model.parameters(), masters, strict=True))
    assert all(torch.equal(optimizer.state[p]["ema"], a) for p, a in zip(model.parameters(), averages, strict=True))


def test_there_are_no_averages_to_swap_without_a_decay() -> None:
    model = denoiser()
    optimizer = alone(OptimizerConfig(), model)
    assert all("ema" not in optimizer.state_tensors(p) for p in model.parameters())
    with pytest.raises(AssertionError, match="ema_decay is 0"):
        optimizer.swap_ema()


def test_a_tensor_of_two_groups_or_of_less_than_float32_is_refused() -> None:
    model = denoiser()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = ("embedding.weight", "blocks.0.attention.out.weight")
    optimizer = make_optimizer(OptimizerConfig("muon"), model.named_parameters(), Run(names[0], 0, 9, 0))
    mixed = LocalTensor(torch.zeros(8), (Run(names[0], 0, 4, 0), Run(names[1], 0, 4, 4)))
    with pytest.raises(AssertionError, match="two groups"):
        optimizer.prepare([mixed], shapes, CPU)
    with pytest.raises(AssertionError, match="bfloat16"):
        optimizer.prepare([replace(mixed, tensor=torch.zeros(8, dtype=torch.bfloat16))], shapes, CPU)


# Muon


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 9), (2, 9, 4), (1, 1, 7), (1, 7, 1)])
def test_orthogonal_update_is_the_polynomial_of_the_singular_values(shape: tuple[int, int, int]) -> None:
    updates = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal_update(updates, 5)
    for got, matrix in zip(found, updates, strict=True):
        torch.testing.assert_close(got, orthogonal(matrix, 5), atol=1e-5, rtol=0)


def test_orthogonal_update_has_singular_values_near_one_times_the_scale() -> None:
    update = orthogonal_update(torch.randn(1, 24, 40, generator=torch.Generator().manual_seed(0)), 5)
    values = torch.linalg.svdvals(update[0]) / (0.2 * math.sqrt(40))
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    assert 0.15 < float(update.square().mean().sqrt()) < 0.25


def test_orthogonal_update_of_a_zero_gradient_is_zero() -> None:
    assert torch.equal(orthogonal_update(torch.zeros(2, 3, 4), 5), torch.zeros(2, 3, 4))


def all_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Denoiser(config).named_parameters()}


@pytest.mark.parametrize("config", [pytest.param(p.model, id=name) for name, p in PRESETS.items()])
def test_matrices_of_a_model_tile_every_hidden_matrix_and_nothing_else(config: ModelConfig) -> None:
    shapes = all_shapes(config)
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices_of(shapes):
        found.setdefault(matrix.name, []).append(matrix)
    assert set(found) == {
        name
        for name, shape in shapes.items()
        if name.startswith("blocks.") and len(shape) >= 2 and is_hidden_matrix(name)
    }
    for name, matrices in found.items():
        end = 0
        for matrix in matrices:
            assert (matrix.start, matrix.cols) == (end, shapes[name][-1])
            end += matrix.numel
        assert end == math.prod(shapes[name])


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_matrices_of_a_model_are_the_naive_ones(kind: str) -> None:
    shapes = all_shapes(MODELS[kind])
    for name in {matrix.name for matrix in matrices_of(shapes)}:
        places = torch.arange(math.prod(shapes[name])).view(shapes[name])
        wanted = [places[part] for part in linear_maps(name, MODELS[kind])]
        found = [m for m in matrices_of(shapes) if m.name == name]
        assert [(m.start, m.rows, m.cols) for m in found] == [(int(w.min()), *w.shape) for w in wanted]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_matrices_that_three_ranks_cut_or_copy_at_random_become_orthogonal(tmp_path: Path) -> None:
    assert max(run_ranks(exchanges, tmp_path, 3)) < 1e-5


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([Run("a", 0, 11, 0)], "no rank holds the end"),
        ([Run("a", 0, 5, 0), Run("a", 6, 6, 5)], "twice, or not at all"),
        ([Run("a", 0, 7, 0), Run("a", 5, 7, 7)], "twice, or not at all"),
    ],
)
def test_an_exchange_of_a_matrix_that_is_not_whole_is_refused(runs: list[Run], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        MatrixExchange([runs], [Matrix("a", 0, 3, 4)], CPU)
