"""Utilisation of a GPU by steps of a dense model and of one with experts, beside autoregressive steps of the same."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from benchmarks.bare_step import BareStep
from benchmarks.interleave import interleave, median_ratio
from dlm_core.models.config import Architecture, MaskFamily, ModelConfig, MoE
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
from pipeline.pretrain.meter import peak_tflops_per_worker
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.routers import Routers
from pipeline.pretrain.watchdog import WatchdogLimits

DIFFUSION, AUTOREGRESSIVE = "diffusion", "autoregressive"
_FAMILIES: dict[str, MaskFamily] = {DIFFUSION: "full", AUTOREGRESSIVE: "causal"}
_OBJECTIVES = {DIFFUSION: ObjectiveConfig(), AUTOREGRESSIVE: ObjectiveConfig(kind="autoregressive")}


@dataclass(frozen=True)
class Model:
    """A model, and how many random tokens it sees in a step."""

    architecture: Architecture
    precision: Literal["fp32", "bf16"] = "bf16"
    is_compiled: bool = True
    vocab_size: int = 32_768
    seq_len: int = 1024
    batch_seqs: int = 32
    num_warm_ups: int = 10
    num_rounds: int = 20
    steps_per_round: int = 5


_DENSE = Architecture(d_model=768, num_layers=12, num_heads=12, d_ff=2048, tied_head=False)
_EXPERTS = Architecture(
    d_model=512,
    num_layers=12,
    num_heads=8,
    d_ff=None,
    moe=MoE(num_experts=32, top_k=4, d_ff_expert=512),
    tied_head=False,
)
MODELS = {"dense": Model(_DENSE), "experts": Model(_EXPERTS)}
"""135M parameters, and 348M of which a token sees 83M besides the embedding."""


@dataclass(frozen=True)
class TimedModel:
    """What was measured of a model, a number a round."""

    num_params: int
    step_s: dict[str, list[float]]
    """By objective."""
    mfu: dict[str, float]
    """By objective, of the median step; 0 where the peak is not known."""

    @property
    def diffusion_over_ar(self) -> float:
        """Median step of diffusion over that of next tokens."""
        return median_ratio(self.step_s[DIFFUSION], self.step_s[AUTOREGRESSIVE])

    def figures(self) -> dict[str, Any]:
        """For the report."""
        step_s = {name: [round(s, 5) for s in seconds] for name, seconds in self.step_s.items()}
        return {"num_params": self.num_params, "step_s": step_s, "mfu": {n: round(m, 4) for n, m in self.mfu.items()}}


def make_engine(
    model: Model, peak_tflops: float = 0.0, threads: int = 1
) -> tuple[PretrainConfig, SpecialTokens, Any, Routers | None]:
    """An engine of this one process, as the pretraining stage makes it, with random weights.

    ``peak_tflops`` 0 takes that of a known GPU.
    """
    prepare_process(threads)
    start_process_group(WatchdogLimits())
    config = PretrainConfig(
        architecture=model.architecture,
        global_batch_seqs=model.batch_seqs,
        workers=1,
        precision=model.precision,
        compile=model.is_compiled,
        peak_tflops_per_worker=peak_tflops,
    )
    special = SpecialTokens(model.vocab_size - 1, model.vocab_size - 2, model.vocab_size - 3, model.vocab_size)
    denoiser = Denoiser(ModelConfig(model.architecture, special.vocab_size, special.mask_token_id))
    denoiser.init_weights(0)
    engine = build_engine(denoiser, config)
    routers = None if model.architecture.moe is None else Routers(engine.module, config)
    if config.compile:
        compile_blocks(engine, config)
    return config, special, engine, routers


def rows_of(model: Model) -> RowBatch:
    """Rows of random ordinary tokens, each one document."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size - 3, (model.batch_seqs, model.seq_len))
    whole = np.array([model.seq_len], dtype=np.int32)
    return RowBatch(np.arange(model.batch_seqs), ids, [(whole, 0, 1)] * model.batch_seqs)


def measure_model(model: Model, peak_tflops: float = 0.0) -> TimedModel:
    """Bare steps of both objectives in turn on one engine; to be called in a process of its own.

    ``peak_tflops`` as in ``make_engine``.
    """
    config, special, engine, routers = make_engine(model, peak_tflops)
    model_config, drawn = engine.module.config, rows_of(model)
    sides: dict[str, BareStep] = {}
    for name, objective in _OBJECTIVES.items():
        batches = list(micro_batches(replace(config, objective=objective), drawn, special, 0, 0))
        sides[name] = BareStep(config, engine, routers, batches)
        sides[name].run(model.num_warm_ups)
    rounds: dict[str, Callable[[int], object]] = {
        name: lambda _, side=side: side.run(model.steps_per_round) for name, side in sides.items()
    }
    times_s = interleave(rounds, model.num_rounds)
    step_s = {name: [s / model.steps_per_round for s in seconds] for name, seconds in times_s.items()}
    peak = 1e12 * peak_tflops_per_worker(config, engine.device)
    mfu: dict[str, float] = {}
    for name, side in sides.items():
        share = min(1.0, side.masked_share)
        flops = model_config.flops_per_token(model.seq_len, share, family=_FAMILIES[name]) * side.num_tokens
        mfu[name] = flops / statistics.median(step_s[name]) / peak if peak else 0.0
    leave_process_group()
    return TimedModel(model_config.num_params(), step_s, mfu)
