"""Gradients of one optimizer step, as a gang of ranks has them and as plain torch has them.

Ranks step once with SGD in float32: what a master value moves by is its gradient times the learning rate, which is so
large a power of 2 that a difference of weights loses no digits of it.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_core.models.config import ModelConfig, MoE
from dlm_core.models.router_losses import RouterTap, balance_loss, z_loss
from dlm_core.models.transformer import Denoiser
from pipeline.data.loader import RowBatch
from pipeline.data.special_tokens import SpecialTokens
from pipeline.pretrain.batches import micro_batches
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.engine import (
    build_engine,
    compile_blocks,
    leave_process_group,
    prepare_process,
    start_process_group,
)
from pipeline.pretrain.objective import ObjectiveConfig, RouterLossConfig
from pipeline.pretrain.routers import Routers
from pipeline.pretrain.watchdog import WatchdogLimits
from tests.support.tiny_run import TINY, _free_port, rank_context

WORKERS, STEP, VOCAB_SIZE = 2, 3, 61
SPECIAL = SpecialTokens(vocab_size=VOCAB_SIZE, mask_token_id=60, eos_token_id=59, pad_token_id=58)
DEADLINE_S = 150.0
RATE = 2.0**12
IDLE_EXPERT = 2

_DENSE = replace(TINY.architecture, d_model=12, num_heads=2, d_ff=20)
_MOE = replace(_DENSE, d_ff=None, moe=MoE(4, 2, 6, renormalise=False))
_IDLE = replace(_MOE, moe=MoE(4, 2, 6, num_shared_experts=1, router_score="sigmoid", selection_bias=True))
_LOSSES = RouterLossConfig(balance=0.3, z=0.1, group_seqs=2)


def _config(**changes: Any) -> PretrainConfig:
    """Two ranks, two micro batches each, and no clipping."""
    optimizer = replace(TINY.optimizer, max_grad_norm=1e9)
    return replace(TINY, optimizer=optimizer, workers=WORKERS, micro_batch_seqs=2, architecture=_DENSE, **changes)


def _cases() -> Iterator[tuple[str, PretrainConfig]]:
    for stage in (0, 1, 2, 3):
        dense = _config(zero_stage=stage)
        experts = replace(dense, architecture=_MOE, router_loss=_LOSSES)
        yield f"dense, ZeRO {stage}", dense
        yield f"experts, ZeRO {stage}", experts
        yield f"an idle expert, ZeRO {stage}", replace(experts, architecture=_IDLE)
        if stage:
            for ep_size in (1, 2):
                yield f"experts, ZeRO {stage}, ep_size {ep_size}", replace(experts, ep_size=ep_size)
            yield f"an idle expert, ZeRO {stage}, ep_size 2", replace(experts, architecture=_IDLE, ep_size=2)
    blocks = _config(zero_stage=2, objective=ObjectiveConfig(block_size=4))
    yield "blocks, ZeRO 2", blocks
    yield "blocks with experts, ZeRO 2, ep_size 2", replace(blocks, architecture=_MOE, router_loss=_LOSSES, ep_size=2)
    yield "next tokens, ZeRO 1", _config(objective=ObjectiveConfig(kind="autoregressive"))
    yield "shifted, CART, ZeRO 1", _config(objective=ObjectiveConfig(weighting="cart", cart_p=0.3, target_offset=1))
    yield "exact counts, ZeRO 1", _config(objective=ObjectiveConfig(masking="exact_count"))
    checkpointed = replace(experts, zero_stage=3, activation_checkpointing=True)
    yield "activations again, experts, ZeRO 3", checkpointed
    yield "activations again, experts, ZeRO 1, ep_size 2", replace(checkpointed, zero_stage=1, ep_size=2)
    yield "offload, ZeRO 2", _config(zero_stage=2, offload_optimizer=True)
    yield "offload, ZeRO 3", _config(zero_stage=3, offload_optimizer=True)
    yield "compiled, ZeRO 3", _config(zero_stage=3, compile=True)
    yield "compiled, activations again, experts, ZeRO 3, ep_size 2", replace(checkpointed, compile=True, ep_size=2)


CASES = dict(_cases())


def drawn_rows(config: PretrainConfig, rank: int) -> RowBatch:
    """The rank's rows of a batch whose ranks, and micro batches, have unequal numbers of tokens and documents."""
    generator = np.random.default_rng(0)
    x0 = generator.integers(0, 58, (config.global_batch_seqs, 32))
    lengths = np.array([32, 20, 12, 5, 27, 9, 23, 32, 32, 32, 1, 31, 30, 2], dtype=np.int32)
    edges = [(0, 1), (1, 3), (3, 5), (5, 7), (7, 8), (8, 9), (9, 10), (10, 12)]
    lengths[4], lengths[6], lengths[11] = -27, -23, -31  # padding: rows 2, 3 and 7 are mostly empty
    for row, (start, stop) in enumerate(edges):
        kept = sum(int(length) for length in lengths[start:stop] if length > 0)
        if any(length < 0 for length in lengths[start:stop]):
            x0[row, kept:] = SPECIAL.pad_token_id
    own = slice(rank * config.rank_batch_seqs, (rank + 1) * config.rank_batch_seqs)
    ids = STEP * config.global_batch_seqs + np.arange(config.global_batch_seqs)
    return RowBatch(ids[own], x0[own].astype(np.int64), [(lengths, *edge) for edge in edges[own]])


def model_of(config: PretrainConfig) -> Denoiser:
    """The model before the step; its router never chooses one expert if it has a bias for choosing."""
    model = Denoiser(ModelConfig(config.architecture, VOCAB_SIZE, SPECIAL.mask_token_id))
    model.init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)  # so that routing is not all but even
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer[IDLE_EXPERT] = -100.0
    return model


def plain_gradients(config: PretrainConfig) -> dict[str, Tensor]:
    """Gradients of (sum of weighted cross-entropies) / (tokens) + router losses, by one process and one pass."""
    config = replace(config, workers=1, micro_batch_seqs=0, ep_size=0, zero_stage=1, offload_optimizer=False)
    (batch,) = micro_batches(config, drawn_rows(config, 0), SPECIAL, STEP, 0)
    model, moe = model_of(config), config.architecture.moe
    tap = None if moe is None else RouterTap(model)
    named = {"mask": batch.mask} | ({} if batch.x0 is None else {"x0": batch.x0})
    if tap is None:
        logits = model(batch.xt, batch.targets.select, **named)
    else:
        with tap:
            logits = model(batch.xt, batch.targets.select, **named)
    costs = F.cross_entropy(logits, batch.targets.targets, reduction="none") * batch.targets.weight.float()
    loss = costs.sum() / batch.targets.num_tokens
    if tap is not None and moe is not None:
        for name, flat in tap.logits.items():
            logits = flat.view(len(batch.xt), -1, moe.num_experts)
            valid = batch.is_text.repeat(1, logits.shape[1] // batch.xt.shape[1])
            bias = tap.selection_bias(name)
            balance = balance_loss(logits, valid, moe, group_seqs=_LOSSES.group_seqs, selection_bias=bias)
            z = z_loss(logits, valid)
            loss = loss + _LOSSES.balance * balance.loss_sum / balance.denominator
            loss = loss + _LOSSES.z * z.loss_sum / z.denominator
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


class _Sgd(torch.optim.SGD):
    """Plain descent in the place of our optimizer."""

    def prepare(self, *rest: Any, **more: Any) -> None:
        """It has no state."""


def rank_gradients(config: PretrainConfig, rank: int) -> dict[tuple[str, int], Tensor]:
    """What this rank's masters moved by in one step, by (name, first element) of the plain model's parameters."""
    from torch._dynamo.utils import counters

    from pipeline.pretrain import optimizer
    from pipeline.pretrain.expert_parallel import with_experts_apart
    from pipeline.pretrain.fragments import local_tensors
    from pipeline.pretrain.guards import Guard
    from pipeline.pretrain.loop import Progress, take_step
    from pipeline.pretrain.ranks import Ranks

    optimizer.make_optimizer = lambda o, named, row: _Sgd(with_experts_apart([{"params": [p for _, p in named]}]), RATE)
    engine = build_engine(model_of(config), config)
    routers = None if config.architecture.moe is None else Routers(engine.module, config)
    if config.compile:
        with mock.patch("torch.compile", partial(torch.compile, backend="eager")):  # a quick one
            compile_blocks(engine, config)
    training: Any = SimpleNamespace(
        config=config,
        engine=engine,
        ranks=Ranks(engine.device),
        routers=routers,
        special=SPECIAL,
        progress=Progress(),
        guard=Guard(config, engine, print, Path(), False),
        checkpointer=SimpleNamespace(release_state=lambda: None),
    )
    before = [(local, local.tensor.detach().flatten().clone()) for local in local_tensors(engine)]
    counters.clear()
    take_step(training, drawn_rows(config, rank), STEP)
    if config.compile and not config.ep_size:
        assert counters["stats"]["unique_graphs"], "nothing was compiled"
        assert not counters["graph_break"], "layers were compiled in pieces"
    moved = {}
    for local, old in before:
        difference = (old - local.tensor.detach().flatten()) / RATE
        for run in local.runs:
            moved[run.name, run.start] = difference[run.offset : run.offset + run.numel].clone()
    return moved


def run_ranks(cases: Sequence[str], folder: Path) -> list[dict[str, dict[tuple[str, int], Tensor]]]:
    """``rank_gradients`` of some cases, for each rank; AssertionError with the ranks' words if one fails."""
    context = rank_context()
    port = _free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, cases, folder), daemon=True) for rank in range(WORKERS)]
    for process in ranks:
        process.start()
    deadline_s = time.monotonic() + DEADLINE_S
    for process in ranks:
        process.join(max(0.0, deadline_s - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(WORKERS))
    assert codes == [0] * WORKERS, f"exit codes {codes}:\n{logs}"
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORKERS)]


def _rank(rank: int, port: int, cases: Sequence[str], folder: Path) -> None:
    with (folder / f"rank{rank}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(
        OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORKERS), LOCAL_SIZE=str(WORKERS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    prepare_process(1)
    start_process_group(WatchdogLimits())
    torch.save({name: rank_gradients(CASES[name], rank) for name in cases}, folder / f"rank{rank}.pt")
    leave_process_group()
