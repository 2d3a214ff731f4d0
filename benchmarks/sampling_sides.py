"""Both sides of the benchmark of sampling: what they are given, how each fills it, that they write the same."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.command import RefusedError
from benchmarks.sampling_peers import MDLM_T_END, llada, mdlm
from dlm_core.ar_init import shifted
from dlm_core.models.config import ModelConfig
from dlm_core.models.transformer import Denoiser
from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.confident import Confident
from dlm_core.samplers.contexts import Whole
from dlm_core.samplers.loop import Rule, without_pass
from dlm_core.samplers.planned import Ancestral, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas

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
    target_offset: int = 0
    weights: Path | None = None
    """An artifact; None for drawn weights."""


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


def rule_of(sampler: str, num_steps: int) -> Rule:
    """Ours with the same passes."""
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
            Whole(without_pass(shifted(timed) if setting.target_offset else timed)),
            xt,
            rule_of(sampler, setting.num_steps),
            Proposal(setting.temperature),
            block_size=setting.num_tokens,
            start=setting.prompt_tokens,
            mask_token_id=mask_of(setting),
            noise_seed=seed,
        )
        assert done.num_passes == timed.num_passes
        return Filled(done.x0, done.num_passes, timed.seconds)

    return fill


def theirs(setting: Setting, sampler: str, model: Denoiser) -> Sampler:
    """As the public scripts do."""
    mask_token_id = mask_of(setting)
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
        timed = Timed(lambda rows: _moved(plain(rows).view(*rows.shape, -1), setting.target_offset))
        x0, num_passes = of_script(timed, xt)
        assert num_passes == timed.num_passes
        return Filled(x0, num_passes, timed.seconds)

    return fill


def _moved(logits: Tensor, target_offset: int) -> Tensor:
    """As Dream's scripts move the logits of a shifted model, all of them."""
    return torch.cat([logits[:, :target_offset], logits[:, :-target_offset]], dim=1) if target_offset else logits


def mask_of(setting: Setting) -> int:
    """Its mask token."""
    assert setting.model.mask_token_id is not None
    return setting.model.mask_token_id


def make_model(setting: Setting) -> Denoiser:
    """With the weights given, or drawn ones."""
    if setting.weights is not None:
        from pipeline.weights import load_denoiser

        return load_denoiser(setting.weights)[0]
    model = Denoiser(setting.model).eval()
    model.init_weights(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight *= WEIGHT_SCALE
    return model


def make_prompts(setting: Setting) -> Tensor:
    """Ids of no meaning, and masks behind them."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.num_prompts, setting.prompt_tokens)
    ids = torch.randint(setting.model.vocab_size - 1, shape, generator=generator)
    ids += ids >= mask_of(setting)  # any id but the mask
    masks = torch.full((setting.num_prompts, setting.num_tokens), mask_of(setting))
    return torch.cat([ids, masks], dim=1)


def check_equal(setting: Setting, model: Denoiser) -> None:
    """RefusedError unless both sides write the same at temperature 0, in float64, where no rounding decides."""
    small = replace(setting, num_prompts=2, prompt_tokens=4, num_tokens=24, num_steps=9, temperature=0.0)
    double = Denoiser(model.config).eval()
    double.load_state_dict(model.state_dict())
    double.double()
    found, expected = (side(small, LOW_CONFIDENCE, double)(make_prompts(small), 0).x0 for side in (ours, theirs))
    if not torch.equal(found, expected):
        raise RefusedError(
            f"{setting.label}: at temperature 0, {int((found != expected).sum())} of {found.numel()} tokens of ours "
            "differ from theirs in float64"
        )
