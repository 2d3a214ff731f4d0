"""From settings to the parts of a sampler: its rule, what tokens are drawn from, what a window sees of its row."""

from functools import partial
from typing import TYPE_CHECKING, cast

from dlm_core.ar_init import shifted
from dlm_core.cross_entropy import Denoise
from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import Denoiser
from dlm_core.samplers.confident import Confident, Count, EntropyBound, Factor, Threshold
from dlm_core.samplers.contexts import Context, DualCache, ExactCache, PrefixCache, Whole
from dlm_core.samplers.loop import Rule, without_pass
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas, Quotas, ScheduleQuotas, TimedQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from dlm_core.samplers.speculative import SelfSpeculative
from pipeline.errors import UserError
from pipeline.generate.config import GenerateConfig
from pipeline.generate.sampler import SamplerConfig

if TYPE_CHECKING:
    from pipeline.weights import ModelRecord

_MDLM_T_END = 1e-5
"""Where MDLM (arXiv 2406.07524) stops, and fills what is left with the most likely tokens."""


def make_rule(sampler: SamplerConfig) -> Rule:
    """How positions are chosen."""
    value = sampler.value
    match sampler.kind:
        case "ancestral" if value("noise_removal"):
            return Ancestral(value("num_steps"), t_end=_MDLM_T_END, denoises_at_end="argmax")
        case "ancestral":
            return Ancestral(value("num_steps"))
        case "first_hitting":
            return FirstHitting(per_pass=value("per_pass"))
        case "random":
            return RandomOrder(_quotas(sampler))
        case "remdm":
            return ReMDM(value("num_steps"), value("eta"), value("remasking"))
        case "path_planning":
            return PathPlanning(value("num_steps"), value("eta"), value("is_tempered"))
        case "self_speculative":
            return SelfSpeculative(value("num_states"))
        case "threshold" | "factor":
            return Confident("probability", _count(sampler), value("is_tempered"))
        case "entropy_bound":
            return Confident("entropy", _count(sampler), value("is_tempered"))
        case "confidence" | "margin" | "entropy":
            score = "probability" if sampler.kind == "confidence" else sampler.kind
            return Confident(score, _quotas(sampler), value("is_tempered"), value("order_temperature"))


def _count(sampler: SamplerConfig) -> Count:
    if sampler.kind == "threshold":
        return Threshold(sampler.value("tau"))
    return Factor(sampler.value("factor")) if sampler.kind == "factor" else EntropyBound(sampler.value("gamma"))


def _quotas(sampler: SamplerConfig) -> Quotas:
    kind, num_steps = sampler.value("quotas"), sampler.value("num_steps")
    if kind == "even":
        return EvenQuotas(num_steps)
    return TimedQuotas(num_steps) if kind == "timed" else ScheduleQuotas(num_steps, kind)


def make_proposal(config: GenerateConfig) -> Proposal:
    """What tokens are drawn from."""
    return Proposal(config.temperature, config.top_k, config.top_p)


def make_context(config: GenerateConfig, model: Denoise, record: "ModelRecord") -> Context:
    """What a window sees of its row; UserError for a cache or a model that has no use here."""
    if record.model.architecture.time_conditioning:
        raise UserError(
            "the model is conditioned on the time of its noise, whose schedule its weights do not tell; samples are "
            "drawn from models without time_conditioning so far. Leave this stage out"
        )
    is_approximate, denoiser = config.cache in ("prefix", "dual"), cast("Denoiser", model)
    if record.objective == "block_nelbo":
        if is_approximate:
            raise UserError(
                f'generate.cache is "{config.cache}", an approximation for models of full attention; this one is of '
                'blocks, for which "auto" keeps exact keys and values'
            )
        if config.cache == "auto" and not make_rule(config.sampler).adds_rows:
            return ExactCache(denoiser, record.block_size)
        mask = AttentionMask("block_causal", block_size=record.block_size)
        return Whole(without_pass(partial(denoiser, mask=mask)))
    if is_approximate:
        kind = PrefixCache if config.cache == "prefix" else DualCache
        return kind(denoiser, config.refresh_every, record.target_offset)
    return Whole(without_pass(shifted(model) if record.target_offset else model))


def window_of(config: GenerateConfig, record: "ModelRecord", length: int) -> int:
    """Size of the windows; UserError unless they are the blocks of the model, if it has some, and divide a row."""
    size = config.block_size or record.block_size or length
    if record.block_size and size != record.block_size:
        raise UserError(
            f"generate.block_size is {size}, but the model was trained on blocks of {record.block_size}; leave it 0"
        )
    if length % size:
        raise UserError(
            f"generate.length is {length}, which windows of {size} tokens do not divide; change one of them"
        )
    return size
