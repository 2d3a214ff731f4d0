"""A whole training against its bare step, and what its checkpoints hold it up beside torch.save.

The loop is that of the stage, on rows that our stages made of text: data, noise, step, metrics, Weights & Biases
offline, a checkpoint every so many steps.  The bare step is that of the same engine on one batch held in memory.  Where
there is a GPU: the utilisation of a dense model and of one with experts, and their steps beside an autoregressive
one's.  See README.md for the method and the results.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import tokenization, tokenization_ours
from benchmarks.child import in_child
from benchmarks.command import Measured, Options, run, table
from benchmarks.interleave import median_ratio
from benchmarks.process import run_program
from benchmarks.train_loop import Timed, measure_training
from benchmarks.train_models import MODELS, TimedModel, measure_model
from dlm_core.models.config import Architecture
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig


@dataclass(frozen=True)
class Size:
    """What is trained, and on what."""

    config: PretrainConfig
    seq_len: int
    vocab_size: int
    text_bytes: int
    warm_up_steps: int
    bare_steps: int
    """Of a round; the loop has ``checkpoint_every_steps``."""
    num_rounds: int


_SMALL = Architecture(d_model=256, num_layers=8, num_heads=4, d_ff=704, qk_norm=True, rope_base=100.0, init_std=0.04)
ON_CPU = Size(
    config=PretrainConfig(
        architecture=_SMALL, optimizer=OptimizerConfig(lr=1e-3), num_steps=10**6, global_batch_seqs=8, workers=1
    ),
    seq_len=128,
    vocab_size=8192,
    text_bytes=8_000_000,
    warm_up_steps=80,
    bare_steps=40,
    num_rounds=4,
)
ON_GPU = replace(
    ON_CPU,
    config=replace(
        ON_CPU.config, architecture=MODELS["dense"].architecture, precision="bf16", compile=True, global_batch_seqs=32
    ),
    seq_len=1024,
    text_bytes=32_000_000,
)
QUICK = replace(
    ON_CPU,
    config=replace(
        ON_CPU.config,
        architecture=replace(_SMALL, d_model=32, num_layers=1, num_heads=2, d_ff=64),
        checkpoint_every_steps=20,
    ),
    vocab_size=512,
    text_bytes=400_000,
    warm_up_steps=15,
    bare_steps=5,
    num_rounds=2,
)


def _size(*, quick: bool) -> Size:
    """One rank with all threads; a checkpoint falls into the middle of every round."""
    size = QUICK if quick else ON_GPU if torch.cuda.is_available() else ON_CPU
    return replace(size, config=replace(size.config, threads_per_worker=torch.get_num_threads()))


def make_artifacts(size: Size, text: tuple[Path, ...], root: Path) -> dict[str, Path]:
    """Inputs of pretrain, made of text by our stages."""
    given = tokenization.prepare(
        replace(
            tokenization.QUICK,
            text_bytes=size.text_bytes,
            part_bytes=size.text_bytes // 2,
            train_bytes=min(size.text_bytes, 2_000_000),
            vocab_size=size.vocab_size,
        ),
        text,
        root,
    )
    run_program(
        f"{tokenization_ours.__name__}:run",
        *(str(given.whole.path), str(given.tokenizer), str(size.seq_len), "1", "tokenizers", str(size.text_bytes)),
        str(root / "store"),
        log=root / "stages.log",
    )
    outputs = tokenization_ours.outputs_of(root / "store")
    return {"rows": outputs["packing"], "tokenizer": outputs["tokenizer"]}


def _measure_training(size: Size, inputs: dict[str, Path], root: Path) -> Timed:
    os.environ["WANDB_MODE"] = "offline"  # whoever is logged in would be sent the steps of a benchmark
    return measure_training(size.config, inputs, root, size.warm_up_steps, size.bare_steps, size.num_rounds)


def _loop_table(timed: Timed) -> str:
    rows = []
    for name, seconds in (("whole loop", timed.loop_step_s), ("bare step", timed.bare_step_s)):
        rates = [timed.tokens_per_step / s for s in seconds]
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(seconds):.1f}",
                f"{1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f}",
                f"{statistics.median(rates):.0f}",
            ]
        )
    return table([f"training, {timed.num_params / 1e6:.1f}M parameters", "ms a step", "range", "tokens/s"], rows)


def _checkpoint_table(timed: Timed) -> str:
    sides = {
        "ours: what training waits": timed.checkpoint_stall_s,
        "torch.save": timed.torch_save_s,
        "torch.save, brought to the disk": timed.torch_save_synced_s,
    }
    rows = [
        [name, f"{1e3 * statistics.median(s):.1f}", f"{1e3 * min(s):.1f}-{1e3 * max(s):.1f}"]
        for name, s in sides.items()
    ]
    return table([f"state of {timed.state_bytes / 1e6:.0f} MB", "ms", "range"], rows)


def _models_table(models: dict[str, TimedModel]) -> str:
    if not models:
        return "MFU, and the step beside an autoregressive one's: skipped, there is no GPU"
    rows = [
        [
            name,
            f"{model.num_params / 1e6:.0f}",
            side,
            f"{1e3 * statistics.median(seconds):.1f}",
            f"{model.mfu[side]:.3f}",
        ]
        for name, model in models.items()
        for side, seconds in model.step_s.items()
    ]
    return table(["model", "M parameters", "objective", "ms a step", "MFU"], rows)


def measure(options: Options) -> Measured:
    """The loop and the bare step in turn, with checkpoints of both kinds; then models on a GPU."""
    size = _size(quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="dlm-train-") as folder:
        root = Path(folder)
        inputs = make_artifacts(size, options.text, root)
        timed: Timed = in_child(_measure_training, size, inputs, root)
    models: dict[str, TimedModel] = {}
    if torch.cuda.is_available() and not options.quick:
        models = {name: in_child(measure_model, model) for name, model in MODELS.items()}
    ratios = {
        "loop_vs_bare_step": median_ratio(timed.bare_step_s, timed.loop_step_s),
        "checkpoint_stall_over_torch_save": median_ratio(timed.checkpoint_stall_s, timed.torch_save_s),
        "checkpoint_stall_over_torch_save_synced": median_ratio(timed.checkpoint_stall_s, timed.torch_save_synced_s),
    }
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **timed.figures(),
        "models": {name: model.figures() for name, model in models.items()},
    }
    for name, model in models.items():
        key = "diffusion_over_ar_step" if name == "dense" else f"diffusion_over_ar_step_{name}"
        ratios[key] = model.diffusion_over_ar
        ratios[f"mfu_{name}"] = model.mfu["diffusion"]
    parts = table(["of a step of the loop", "ms"], [[name, f"{ms:.1f}"] for name, ms in timed.parts_ms.items()])
    tables = (_loop_table(timed), parts, _checkpoint_table(timed), _models_table(models))
    return Measured("\n\n".join(tables), ratios, figures)


if __name__ == "__main__":
    sys.exit(run("train", measure))
