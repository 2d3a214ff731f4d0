"""Sampling: ours beside the manner of LLaDA's and MDLM's public scripts, same weights, same number of forward passes.

What counts is the model of the quickstart, 16 prompts, 256 tokens each, temperature 1.  A step's overhead is what
remains of it without the model's own forward, which is timed inside of every step, with exactly the rows and positions
that either side asks for: all for theirs, those that are to be filled for ours.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.child import in_child
from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import interleave, median_ratio
from benchmarks.sampling_sides import (
    DDPM,
    DDPM_CACHE,
    LOW_CONFIDENCE,
    RANDOM,
    Filled,
    Setting,
    check_equal,
    make_model,
    make_prompts,
    mask_of,
    ours,
    theirs,
)
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.presets import PRESETS
from pipeline.pretrain.config import PretrainConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.recipes.quickstart import quickstart


def _quickstart_model() -> ModelConfig:
    configs = {type(step.config): step.config for step in quickstart().steps}
    pretrain, tokenizer = configs[PretrainConfig], configs[TokenizerConfig]
    assert isinstance(pretrain, PretrainConfig)
    assert isinstance(tokenizer, TokenizerConfig)
    return ModelConfig(pretrain.architecture, tokenizer.vocab_size, tokenizer.vocab_size - 1)


QUICKSTART = Setting("quickstart", _quickstart_model(), (LOW_CONFIDENCE, RANDOM, DDPM))
"""The one with bars."""
GREEDY = replace(QUICKSTART, label="quickstart, temperature 0", samplers=(LOW_CONFIDENCE,), temperature=0.0)
MANY_STEPS = replace(
    QUICKSTART,
    label="quickstart, 4 prompts, 512 steps for 128 tokens",
    samplers=(DDPM_CACHE,),
    num_prompts=4,
    num_tokens=128,
    num_steps=512,
)
SMOLLM2 = Setting(
    "SmolLM2 135M, 4 prompts, 64 tokens, temperature 0",
    PRESETS["smollm2-135m"].model,
    (LOW_CONFIDENCE,),
    num_prompts=4,
    num_tokens=64,
    num_steps=16,
    temperature=0.0,
)


def _quick(setting: Setting) -> Setting:
    model = ModelConfig(Architecture(d_model=32, num_layers=1, num_heads=2, d_ff=64), 256, 255)
    return replace(
        setting, model=model, num_prompts=2, prompt_tokens=4, num_tokens=16, num_steps=4, num_rounds=2, weights=None
    )


@dataclass(frozen=True)
class Rounds:
    """One side of one sampler, an entry a round."""

    wall_s: list[float]
    forward_s: list[float]
    num_passes: list[int]

    def overhead_s(self) -> list[float]:
        """Of a step: what remains without the model's forward."""
        columns = zip(self.wall_s, self.forward_s, self.num_passes, strict=True)
        return [(wall - forward) / passes for wall, forward, passes in columns]


@torch.inference_mode()
def measure_setting(setting: Setting) -> dict[str, Rounds]:
    """Both sides of all samplers in turn, by "SAMPLER, SIDE"; RefusedError for unequal passes or a mask left."""
    torch.set_flush_denormal(True)
    model = make_model(setting)
    check_equal(setting, model)
    xt = make_prompts(setting)
    filled: dict[str, list[Filled]] = {}
    variants: dict[str, Callable[[int], object]] = {}
    for sampler in setting.samplers:
        for name, side in (("theirs", theirs), ("ours", ours)):
            key = f"{sampler}, {name}"
            filled[key], fill = [], side(setting, sampler, model)
            variants[key] = lambda number, fill=fill, key=key: filled[key].append(fill(xt, number))
            side(replace(setting, num_steps=2), sampler, model)(xt, 0)
    seconds = interleave(variants, setting.num_rounds)
    for sampler in setting.samplers:
        _check_filled(setting, xt, sampler, filled[f"{sampler}, theirs"], filled[f"{sampler}, ours"])
    return {
        key: Rounds(seconds[key], [one.forward_s for one in found], [one.num_passes for one in found])
        for key, found in filled.items()
    }


def _check_filled(setting: Setting, xt: Tensor, sampler: str, theirs: list[Filled], ours: list[Filled]) -> None:
    for one in theirs + ours:
        is_prompt = xt != mask_of(setting)
        if (one.x0 == mask_of(setting)).any() or not torch.equal(one.x0[is_prompt], xt[is_prompt]):
            raise RefusedError(f"{setting.label}: {sampler!r} left a mask or changed a prompt")
    passes = [(a.num_passes, b.num_passes) for a, b in zip(theirs, ours, strict=True)]
    if sampler != DDPM_CACHE and any(a != b for a, b in passes):
        raise RefusedError(f"{setting.label}: {sampler!r} made (theirs, ours) {passes} passes; wanted equal numbers")


def _ratios(setting: Setting, rounds: Mapping[str, Rounds]) -> dict[str, tuple[float, float]]:
    """Wall time and overhead a step, theirs over ours, by sampler."""
    found = {}
    for sampler in setting.samplers:
        a, b = rounds[f"{sampler}, theirs"], rounds[f"{sampler}, ours"]
        found[sampler] = (median_ratio(a.wall_s, b.wall_s), median_ratio(a.overhead_s(), b.overhead_s()))
    return found


def _table(setting: Setting, rounds: Mapping[str, Rounds]) -> str:
    rows = []
    for sampler, ratios in _ratios(setting, rounds).items():
        for side, (wall, overhead) in (("theirs", ratios), ("ours", (1.0, 1.0))):
            one = rounds[f"{sampler}, {side}"]
            steps = [1e3 * wall_s / passes for wall_s, passes in zip(one.wall_s, one.num_passes, strict=True)]
            rows.append(
                [
                    f"{sampler}, {side}",
                    f"{statistics.median(one.num_passes):.0f}",
                    f"{statistics.median(one.wall_s):.2f}",
                    f"{min(one.wall_s):.2f}-{max(one.wall_s):.2f}",
                    f"{wall:.2f}",
                    f"{statistics.median(steps):.1f}",
                    f"{1e3 * statistics.median(one.overhead_s()):.2f}",
                    f"{overhead:.2f}",
                ]
            )
    headings = [setting.label, "passes", "s", "range", "x ours", "ms a step", "overhead ms", "x ours"]
    return table(headings, rows)


def _figures(rounds: Mapping[str, Rounds]) -> dict[str, Any]:
    return {
        key: {
            "wall_s": [round(s, 3) for s in one.wall_s],
            "forward_s": [round(s, 3) for s in one.forward_s],
            "passes": one.num_passes,
            "overhead_ms_a_step": [round(1e3 * s, 3) for s in one.overhead_s()],
        }
        for key, one in rounds.items()
    }


def measure(options: Options) -> Measured:
    """One process a setting; the ratios are the least of the samplers of the first."""
    if options.text:
        raise ValueError("--text: prompts here are ids of no meaning; leave it out")
    own = options.own
    settings = [
        _with_weights(setting, weights)
        for setting, weights in (
            (QUICKSTART, own.weights),
            (GREEDY, own.weights),
            (MANY_STEPS, own.weights),
            (SMOLLM2, own.smollm2),
        )
    ]
    if options.quick:
        settings = [_quick(setting) for setting in settings]
    found = {setting.label: in_child(measure_setting, setting) for setting in settings}
    first = settings[0]
    walls, overheads = zip(*_ratios(first, found[first.label]).values(), strict=True)
    figures = {
        setting.label: {
            "weights": "drawn" if setting.weights is None else "trained",
            "parameters": setting.model.num_params(),
            "ratios": {name: [round(r, 3) for r in both] for name, both in _ratios(setting, rounds).items()},
            **_figures(rounds),
        }
        for setting, rounds in ((setting, found[setting.label]) for setting in settings)
    }
    ratios = {"sampling": min(walls), "overhead": min(overheads)}
    return Measured("\n\n".join(_table(setting, found[setting.label]) for setting in settings), ratios, figures)


def _with_weights(setting: Setting, weights: Path | None) -> Setting:
    """ValueError for weights of a model that is not sampled by masks."""
    if weights is None:
        return setting
    from pipeline.weights import load_record

    record = load_record(weights)
    if record.objective != "masked_nelbo":
        raise ValueError(f"{weights}: the model has the objective {record.objective}; wanted masked_nelbo")
    return replace(setting, model=record.model, target_offset=record.target_offset, weights=weights)


def arguments() -> argparse.ArgumentParser:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--weights", type=Path, help="weights of the quickstart's model (default: drawn ones)")
    parser.add_argument("--smollm2", type=Path, help="weights of the larger model (default: drawn ones)")
    return parser


if __name__ == "__main__":
    sys.exit(run("sampling", measure, own=arguments()))
