"""What a plan's trainings take on GPUs: memory of a worker, operations, hours; and what to change if they don't fit."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.presets import PRESETS
from pipeline.config import to_json
from pipeline.errors import UserError
from pipeline.hf_directory import read_directory
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.cost import Cost, parameter_shapes, training_cost, training_memory
from pipeline.pretrain.engine import deepspeed_config
from pipeline.pretrain.given import planned_directory
from pipeline.pretrain.gpus import Gpu, find_gpu
from pipeline.pretrain.memory import RankMemory
from pipeline.tokenizer.config import TokenizerConfig
from workflows.plan import Plan, PlannedStep, step_config
from workflows.report.text import scaled
from workflows.runs import DoesNotFitError
from workflows.step import load_stage

DEFAULT_GPU, DEFAULT_MFU = "h100", 0.35
LEGEND = {
    "parameters": "that it computes with",
    "masters": "float32 copy that the optimizer steps",
    "moments": "of AdamW, two numbers a master",
    "momentum": "of Muon, one number a master",
    "ema": "average of the masters",
    "accumulated": "gradients of the passes before",
    "bucket": "where gradients are laid to be reduced",
    "reduction": "gradients as they are reduced, with a copy",
    "gathered": "parameters whole at once (ZeRO-3)",
    "update": "gradients as the masters are stepped",
    "activations": "what the forward pass keeps",
    "working_layer": "one layer as it is passed back",
    "head": "logits with their gradients",
    "head_gradient": "of the head's weights",
    "exchange": "tokens on their way to experts",
    "host_start": "model as it is made, in float32",
    "host_optimizer": "offloaded: masters, moments, gradients",
    "host_checkpoint": "copy that is written from",
}
"""What a component is, in a few words; how it follows from the configuration stands at the fields of RankMemory."""
HOST = ("host_start", "host_optimizer", "host_checkpoint")
"""The components beside the device; the first is gone when the others come."""


@dataclass(frozen=True)
class Training:
    """A training step of a plan, with what its inputs decide of the model."""

    step: str
    config: PretrainConfig
    model: ModelConfig
    seq_len: int


@dataclass(frozen=True)
class Sizing:
    """A training on GPUs of one kind."""

    training: Training
    gpu: Gpu
    mfu: float
    memory: dict[str, RankMemory]
    """Of a worker in each phase, the one that needs most first."""
    cost: Cost
    shapes: dict[str, list[int]]
    """Of the parameters by name."""

    @property
    def needed(self) -> RankMemory:
        """Memory in the phase that needs most."""
        return next(iter(self.memory.values()))


def trainings(plan: Plan) -> list[Training]:
    """The training steps of a plan; UserError if there is none."""
    found = [_training(plan, step) for step in plan.steps if load_stage(step.stage).config is PretrainConfig]
    if not found:
        raise UserError(f"workflow {plan.workflow} has no training step, so there is nothing to size")
    return found


def _training(plan: Plan, step: PlannedStep) -> Training:
    config: PretrainConfig = step_config(step)
    packing: PackingConfig = step_config(plan.step(step.inputs["rows"]))
    tokenizer: TokenizerConfig = step_config(plan.step(step.inputs["tokenizer"]))
    checkpoint = plan.step(step.inputs["tokenizer"]).inputs.get("checkpoint")
    if checkpoint is None:
        vocab_size = _vocab_size(tokenizer)
    else:
        vocab_size = _rows_of(step_config(plan.step(checkpoint)), config.architecture, checkpoint)
    return Training(step.name, config, ModelConfig(config.architecture, vocab_size, vocab_size - 1), packing.seq_len)


def _vocab_size(config: TokenizerConfig) -> int:
    """Ids of a tokenizer's file, or the size asked for, which a small corpus may not reach."""
    if not config.file:
        return config.vocab_size
    try:
        content: Any = json.loads(Path(config.file).read_bytes())
        vocab: dict[str, int] | list[Any] = content["model"]["vocab"]
        added: list[dict[str, Any]] = content.get("added_tokens") or []
        highest = max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1
        return max([highest, *(token["id"] for token in added)]) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer.file {config.file!r} is not a tokenizer.json: {error!r}") from None


def _rows_of(config: ImportConfig, architecture: Architecture, step: str) -> int:
    """Rows of a checkpoint's embedding: those that its config.json tells, or of the published model of that shape."""
    directory = planned_directory(to_json(config))
    if directory is not None:
        return read_directory(directory).model.vocab_size
    same = [preset.model for preset in PRESETS.values() if preset.model.architecture == architecture]
    if not same:
        raise UserError(
            f"{step}.path is {config.path!r}, which has no config.json to tell the size of the vocabulary, and no "
            f"published model here has this architecture; set {step}.path to a directory that has one"
        )
    return same[0].vocab_size


def dry_run(plan: Plan, gpu: str, mfu: float) -> list[Sizing]:
    """Every training step of a plan on GPUs of a kind, with its model built on the meta device.

    UserError for settings that don't fit each other, DoesNotFitError with what to change if a worker needs more memory
    than the GPU has.
    """
    return [_sized(training, find_gpu(gpu), mfu) for training in trainings(plan)]


def _sized(training: Training, gpu: Gpu, mfu: float) -> Sizing:
    try:
        memory = training_memory(training.model, training.config, training.seq_len)
        cost = training_cost(training.model, training.config, training.seq_len, gpu, mfu)
    except ValueError as error:
        raise UserError(f"{training.step}: {error}") from None
    needed = next(iter(memory.values()))
    if needed.device_bytes > gpu.memory_bytes:
        raise DoesNotFitError(_refusal(training, gpu, memory))
    return Sizing(training, gpu, mfu, memory, cost, parameter_shapes(training.model))


def _refusal(training: Training, gpu: Gpu, memory: dict[str, RankMemory]) -> str:
    step, (phase, needed) = training.step, next(iter(memory.items()))
    largest, *others = (f"{name} {_gigabytes(value)}" for name, value in needed.peak().items() if value)
    where = f" in phase {phase}" if len(memory) > 1 else ""
    lines = [
        f"{step} does not fit: a worker needs {_gigabytes(needed.device_bytes)}{where}, and {gpu.name} has "
        f"{_gigabytes(gpu.memory_bytes)}. Most of it is {largest}; then {', '.join(others[:3])}"
    ]
    ways = list(_ways_to_fit(training, gpu.memory_bytes))
    for settings, fitting in ways:
        given = " ".join(f"--set {step}.{name}={json.dumps(value)}" for name, value in settings.items())
        lines.append(f"  with {given}: {_gigabytes(fitting)}")
    if not ways:
        lines.append("  no such setting on this many workers makes it fit: take more workers, or a larger GPU (--gpu)")
    return "\n".join(lines)


def _ways_to_fit(training: Training, memory_bytes: int) -> Iterator[tuple[dict[str, Any], float]]:
    """Settings with which a training fits, and what it then needs: each that does alone, or else all up to the first
    that does, or else on more workers.
    """
    changes = _changes(training.config)
    alone = [({name: value}, _needed(training, {name: value})) for name, value in changes]
    fitting = [(settings, needed) for settings, needed in alone if needed <= memory_bytes]
    if fitting:
        yield from fitting
        return
    together: dict[str, Any] = {}
    for name, value in (*changes, *_more_workers(training.config)):
        needed = _needed(training, together | {name: value})
        if needed < _needed(training, together):
            together |= {name: value}
        if needed <= memory_bytes:
            yield together, needed
            return


def _changes(config: PretrainConfig) -> list[tuple[str, Any]]:
    """Settings that save memory, the cheapest in time first."""
    moe = config.architecture.moe
    widest = math.gcd(config.workers, moe.num_experts) if moe is not None else 0
    found: list[tuple[str, Any]] = [("zero_stage", stage) for stage in (1, 2) if stage > config.zero_stage]
    found += [("ep_size", widest)] if widest > max(1, config.ep_size) else []
    found += [("micro_batch_seqs", 1)] if config.rows_per_pass > 1 else []
    found += [] if config.activation_checkpointing else [("activation_checkpointing", True)]
    found += [("zero_stage", 3)] if config.zero_stage < 3 else []
    return found + ([] if config.offload_optimizer else [("offload_optimizer", True)])


def _more_workers(config: PretrainConfig) -> list[tuple[str, Any]]:
    """Numbers of workers that the global batch can be divided by."""
    batch = config.global_batch_seqs
    return [("workers", number) for number in range(config.workers + 1, batch + 1) if batch % number == 0]


def _needed(training: Training, settings: dict[str, Any]) -> float:
    """Bytes of a worker with other settings; infinite where they don't fit each other."""
    try:
        config = replace(training.config, **settings)
        memory = training_memory(training.model, config, training.seq_len)
    except ValueError:
        return math.inf
    return next(iter(memory.values())).device_bytes


def deepspeed_configs(plan: Plan) -> dict[str, Any]:
    """The generated DeepSpeed configuration of every training step, as on GPUs."""
    return {training.step: deepspeed_config(training.config, on_gpu=True) for training in trainings(plan)}


def as_json(sizing: Sizing) -> dict[str, Any]:
    """Everything that is shown, in bytes, operations and hours."""
    training, needed = sizing.training, sizing.needed
    return {
        "step": training.step,
        "num_params": training.model.num_params(),
        "num_active_params": training.model.num_active_params(),
        "parameters": sizing.shapes,
        "vocab_size": training.model.vocab_size,
        "seq_len": training.seq_len,
        "workers": training.config.workers,
        "gpu": sizing.gpu,
        "mfu": sizing.mfu,
        "memory": {
            "device_bytes": needed.device_bytes,
            "host_bytes": needed.host_bytes,
            "host_components": {name: getattr(needed, name) for name in HOST},
            "components": needed.peak(),
            "by_phase": {name: memory.device_bytes for name, memory in sizing.memory.items()},
        },
        "checkpoint_bytes": sizing.needed.checkpoint_bytes,
        **{name: getattr(sizing.cost, name) for name in ("tokens", "flops", "gpu_hours", "hours")},
    }


def print_sizings(console: Console, sizings: Sequence[Sizing]) -> None:
    """For each training a table of a worker's memory, and what the whole of it takes."""
    for sizing in sizings:
        _print(console, sizing)


def _print(console: Console, sizing: Sizing) -> None:
    training, needed, gpu = sizing.training, sizing.needed, sizing.gpu
    title = f"{scaled(training.model.num_params())} parameters in {len(sizing.shapes)} tensors"
    if training.config.architecture.moe is not None:
        title += f", {scaled(training.model.num_active_params())} active"
    console.print(f"[bold]{training.step}[/bold]: {title}", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"memory of one of {training.config.workers} workers", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")

    def add(names: Iterable[str], peak: str, peak_bytes: int, note: str = "") -> None:
        for name in names:
            if value := getattr(needed, name):
                table.add_row(name.replace("_", " "), _gigabytes(value), LEGEND[name])
        table.add_row(f"[bold]{peak}[/bold]", f"[bold]{_gigabytes(peak_bytes)}[/bold]", note)

    add(needed.peak(), "at its peak, on the device", needed.device_bytes)
    table.add_row(f"of {gpu.name}", _gigabytes(gpu.memory_bytes))
    table.add_row()
    add(HOST, "at its peak, on its host", needed.host_bytes, "beside the process with its libraries")
    console.print(table)
    for label, text in _totals(sizing):
        console.print(f"{label:<21} {text}", highlight=False, markup=False, soft_wrap=True)


def _totals(sizing: Sizing) -> Sequence[tuple[str, str]]:
    return (
        ("tokens", scaled(sizing.cost.tokens)),
        ("operations", f"{sizing.cost.flops:.3g} FLOP"),
        *_hours(sizing),
        ("checkpoint", _gigabytes(sizing.needed.checkpoint_bytes)),
    )


def _hours(sizing: Sizing) -> Sequence[tuple[str, str]]:
    gpu_hours, hours, training = sizing.cost.gpu_hours, sizing.cost.hours, sizing.training
    if gpu_hours is None or hours is None:
        why = (
            f"not told: the peak of {sizing.gpu.name} is known in bfloat16 alone, and {training.step}.precision is "
            f"fp32; set that to bf16, or {training.step}.peak_tflops_per_worker"
            if sizing.gpu.peak_flops
            else f"not told: the peak of a {sizing.gpu.name} is not known; set {training.step}.peak_tflops_per_worker"
        )
        return (("GPU-hours", why),)
    days = f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h"
    return (
        ("GPU-hours", f"{gpu_hours:,.0f} of {sizing.gpu.name} at an MFU of {sizing.mfu:g}"),
        ("time", f"{days} on {training.config.workers}"),
    )


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"
