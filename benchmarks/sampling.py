"""Sampling: ours beside the manner of LLaDA's and MDLM's public scripts, same weights, same number of forward passes.

What counts is the model of the quickstart, 16 prompts, 256 tokens each, temperature 1.  A step's overhead is what
remains of it without the model's own forward, which is timed inside of every step, with exactly the rows and positions
that either side asks for: all for theirs, those that are to be filled for ours.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.child import in_child
from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import interleave, median_ratio
from benchmarks.sampling_peers import MDLM_T_END, llada, mdlm
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.presets import PRESETS
from dlm_core.models.transformer import Denoiser
from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.confident import Confident
from dlm_core.samplers.contexts import Whole
from dlm_core.samplers.loop import Rule, without_pass
from dlm_core.samplers.planned import Ancestral, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas
from pipeline.pretrain.config import PretrainConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.recipes.quickstart import quickstart

WEIGHT_SCALE = 3.0
"""Of drawn matrices: as drawn, all logits of a row are nearly equal."""
LOW_CONFIDENCE, RANDOM = "LLaDA, low confidence", "LLaDA, random"
DDPM, DDPM_CACHE = "MDLM, ddpm", "MDLM, ddpm_cache"


@dataclass(frozen=True)
class Setting:
    """One table: a model, rows, and the samplers that are compared on them."""

    label: str
    model: ModelConfig
    samplers: tuple[str, ...]
    num_prompts: int = 16
    prompt_tokens: int = 16
    num_tokens: int = 256
    """Behind each prompt."""
    num_steps: int = 64
    temperature: float = 1.0
    num_rounds: int = 3
    weights: Path | None = None
    """An artifact; None for drawn weights."""


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


class Timed:
    """A model that counts its calls and the seconds in them."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self._call = call
        self.seconds, self.num_passes = 0.0, 0

    def __call__(self, *args: Tensor) -> Tensor:
        """What the model returns."""
        start = time.perf_counter()
        logits = self._call(*args)
        self.seconds += time.perf_counter() - start
        self.num_passes += 1
        return logits


@dataclass(frozen=True)
class Filled:
    """What a sampler made of the prompts, and the time that the model took of it."""

    x0: Tensor
    num_passes: int
    forward_s: float


Sampler = Callable[[Tensor, int], Filled]
"""(rows with masks behind their prompts, seed) -> the rows without."""


def _rule(sampler: str, num_steps: int) -> Rule:
    match sampler:
        case "LLaDA, low confidence":
            return Confident("probability", EvenQuotas(num_steps))
        case "LLaDA, random":
            return RandomOrder(EvenQuotas(num_steps))
        case _:
            return Ancestral(num_steps, t_end=MDLM_T_END, denoises_at_end="argmax", is_lazy=sampler == DDPM_CACHE)


def ours(setting: Setting, sampler: str, model: Denoiser) -> Sampler:
    """As ``dlm generate`` samples."""

    def fill(xt: Tensor, seed: int) -> Filled:
        timed = Timed(model)
        done = sample_blocks(
            Whole(without_pass(timed)),
            xt,
            _rule(sampler, setting.num_steps),
            Proposal(setting.temperature),
            block_size=setting.num_tokens,
            start=setting.prompt_tokens,
            mask_token_id=_mask(setting),
            noise_seed=seed,
        )
        assert done.num_passes == timed.num_passes
        return Filled(done.x0, done.num_passes, timed.seconds)

    return fill


def theirs(setting: Setting, sampler: str, model: Denoiser) -> Sampler:
    """As the public scripts do."""
    mask_token_id = _mask(setting)
    common = {"num_steps": setting.num_steps, "mask_token_id": mask_token_id}
    if sampler in (LOW_CONFIDENCE, RANDOM):
        remasking = "low_confidence" if sampler == LOW_CONFIDENCE else "random"
        of_script: Callable[..., tuple[Tensor, int]] = partial(
            llada,
            start=setting.prompt_tokens,
            block_size=setting.num_tokens,
            temperature=setting.temperature,
            remasking=remasking,
            **common,
        )
    else:
        of_script = partial(mdlm, keeps_prediction=sampler == DDPM_CACHE, **common)
    plain = Denoiser(replace(model.config, mask_token_id=None)).eval()  # whose logits nobody has touched
    plain.load_state_dict(model.state_dict(), assign=True)

    def fill(xt: Tensor, seed: int) -> Filled:
        torch.manual_seed(seed)
        timed = Timed(lambda rows: plain(rows).view(*rows.shape, -1))
        x0, num_passes = of_script(timed, xt)
        assert num_passes == timed.num_passes
        return Filled(x0, num_passes, timed.seconds)

    return fill


def _mask(setting: Setting) -> int:
    assert setting.model.mask_token_id is not None
    return setting.model.mask_token_id


def _model(setting: Setting) -> Denoiser:
    if setting.weights is not None:
        from pipeline.weights import load_denoiser

        return load_denoiser(setting.weights)[0]
    model = Denoiser(setting.model).eval()
    model.init_weights(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight *= WEIGHT_SCALE
    return model


def _prompts(setting: Setting) -> Tensor:
    """Ids of no meaning, and masks behind them."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.num_prompts, setting.prompt_tokens)
    ids = torch.randint(_mask(setting), shape, generator=generator)  # the mask is the last id, or nearly
    masks = torch.full((setting.num_prompts, setting.num_tokens), _mask(setting))
    return torch.cat([ids, masks], dim=1)


def check_equal(setting: Setting, model: Denoiser) -> None:
    """RefusedError unless both sides write the same at temperature 0, in float64, where no rounding decides."""
    small = replace(setting, num_prompts=2, prompt_tokens=4, num_tokens=24, num_steps=9, temperature=0.0)
    double = Denoiser(model.config).eval()
    double.load_state_dict(model.state_dict())
    double.double()
    found, expected = (side(small, LOW_CONFIDENCE, double)(_prompts(small), 0).x0 for side in (ours, theirs))
    if not torch.equal(found, expected):
        raise RefusedError(
            f"{setting.label}: at temperature 0, {int((found != expected).sum())} of {found.numel()} tokens of ours "
            "differ from theirs in float64"
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
    model = _model(setting)
    check_equal(setting, model)
    xt = _prompts(setting)
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
        is_prompt = xt != _mask(setting)
        if (one.x0 == _mask(setting)).any() or not torch.equal(one.x0[is_prompt], xt[is_prompt]):
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
    if record.objective != "masked_nelbo" or record.target_offset:
        raise ValueError(
            f"{weights}: the model has the objective {record.objective} and target_offset {record.target_offset}; "
            "wanted masked_nelbo and 0"
        )
    return replace(setting, model=record.model, weights=weights)


def arguments() -> argparse.ArgumentParser:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--weights", type=Path, help="weights of the quickstart's model (default: drawn ones)")
    parser.add_argument("--smollm2", type=Path, help="weights of the larger model (default: drawn ones)")
    return parser


if __name__ == "__main__":
    sys.exit(run("sampling", measure, own=arguments()))
