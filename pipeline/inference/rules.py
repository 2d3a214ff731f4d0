"""From settings to the parts of a sampler: its rule, what tokens are drawn from, what a window sees of its row."""

from collections.abc import Mapping

from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import FULL
from dlm_core.samplers.confident import Confident, Count, EntropyBound, Factor, Threshold
from dlm_core.samplers.contexts import Context, DualCache, ExactCache, PrefixCache, Whole
from dlm_core.samplers.guidance import Guided
from dlm_core.samplers.loop import Rule
from dlm_core.samplers.padding import Padding, whole_rows
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal, Score
from dlm_core.samplers.quotas import EvenQuotas, Quotas, ScheduleQuotas, TimedQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from dlm_core.samplers.speculative import SelfSpeculative
from dlm_core.schedules import LinearSchedule
from pipeline.data.special_tokens import SpecialTokens
from pipeline.errors import UserError
from pipeline.inference.model import OpenModel
from pipeline.inference.sampler import Kind, SamplerConfig
from pipeline.inference.sampling import SamplingConfig
from pipeline.weights import ModelRecord

_MDLM_T_END = 1e-5
"""Where MDLM (arXiv 2406.07524) stops, and fills what is left with the most likely tokens."""
_SCORES: Mapping[Kind, Score] = {"margin": "margin", "entropy": "entropy", "entropy_bound": "entropy"}
"""Of kinds that take the surest first, by what is no probability."""
_APPROXIMATE = ("prefix", "dual")
"""Caches."""


def make_rule(sampler: SamplerConfig, special: SpecialTokens) -> Rule:
    """How positions are chosen."""
    value = sampler.value
    match sampler.kind:
        case "ancestral" if value("noise_removal"):
            return Ancestral(value("num_steps"), t_end=_MDLM_T_END, denoises_at_end="argmax")
        case "ancestral":
            return Ancestral(value("num_steps"))
        case "origin":
            return Ancestral.origin(value("num_steps"))
        case "analytic":
            return Ancestral.analytic(value("num_steps"), LinearSchedule())
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
        case "confidence" | "margin" | "entropy" | "threshold" | "factor" | "entropy_bound":
            score = _SCORES.get(sampler.kind, "probability")
            last = (special.eos_token_id,) if value("takes_eos_last") else ()
            how = value("is_tempered"), value("order_temperature"), value("look_every"), last
            return Confident(score, _num(sampler), *how)


def _num(sampler: SamplerConfig) -> Quotas | Count:
    match sampler.kind:
        case "threshold":
            return Threshold(sampler.value("tau"))
        case "factor":
            return Factor(sampler.value("factor"))
        case "entropy_bound":
            return EntropyBound(sampler.value("gamma"))
        case _:
            return _quotas(sampler)


def _quotas(sampler: SamplerConfig) -> Quotas:
    kind, num_steps = sampler.value("quotas"), sampler.value("num_steps")
    if kind == "even":
        return EvenQuotas(num_steps)
    return TimedQuotas(num_steps) if kind == "timed" else ScheduleQuotas(num_steps, kind)


def check_sampling(config: SamplingConfig, record: ModelRecord, special: SpecialTokens) -> None:
    """UserError for settings that a model has no use for, found without its weights."""
    if record.objective == "autoregressive_nll":
        _refuse_idle(config)
    if record.objective == "block_nelbo":
        _refuse_for_blocks(config, record.block_size)
    vocab_size = record.model.vocab_size
    for token_id in config.suppressed:
        if token_id >= vocab_size:
            raise UserError(f"suppressed has the id {token_id}; the model has the ids 0..{vocab_size - 1}")
    if config.sampler.takes_eos_last and special.eos_token_id in config.suppressed:
        raise UserError(
            f"sampler.takes_eos_last is true, but suppressed has the end of a text, {special.eos_token_id}, which is "
            "then never drawn; leave one out"
        )
    if not set(range(vocab_size)) - _suppressed(config, special) - {special.mask_token_id}:
        raise UserError(f"suppressed has {len(config.suppressed)} ids and leaves no token to draw; take some out")


def _refuse_idle(config: SamplingConfig) -> None:
    idle: dict[str, object] = {
        "sampler": config.sampler.kind if config.sampler != SamplerConfig() else None,
        "block_size": config.block_size,
        "cache": config.cache if config.cache != "auto" else None,
        "guidance": config.guidance,
    }
    for name, value in idle.items():
        if value:
            raise UserError(
                f"{name} is {value!r}, but the model predicts the next token and is sampled from left to right; leave "
                "it out"
            )


def _refuse_for_blocks(config: SamplingConfig, own: int) -> None:
    if config.cache in _APPROXIMATE:
        raise UserError(
            f'cache is "{config.cache}", an approximation for models of full attention; this one is of blocks, for '
            'which "auto" keeps exact keys and values'
        )
    if config.guidance:
        raise UserError(
            f"guidance is {config.guidance}, but the model is of blocks, for which it is not built; set it to 0"
        )
    if config.block_size not in (0, own):
        raise UserError(f"block_size is {config.block_size}, but the model was trained on blocks of {own}; leave it 0")


def _suppressed(config: SamplingConfig, special: SpecialTokens) -> set[int]:
    return {*config.suppressed, *([special.eos_token_id] if config.suppresses_eos else [])}


def make_proposal(config: SamplingConfig, model: OpenModel) -> Proposal:
    """What tokens are drawn from."""
    suppressed = _suppressed(config, model.vocabulary.special)
    return Proposal(config.temperature, config.top_k, config.top_p, tuple(sorted(suppressed)))


def make_context(config: SamplingConfig, model: OpenModel, padding: Padding | None = None) -> Context:
    """What a window sees of its row, under settings that ``check_sampling`` lets pass."""
    record, denoiser = model.record, model.denoiser
    if record.objective == "block_nelbo":
        if config.cache == "auto" and not make_rule(config.sampler, model.vocabulary.special).adds_rows:
            return ExactCache(denoiser, record.block_size, padding)
        mask = AttentionMask("block_causal", block_size=record.block_size)
        return Whole(whole_rows(denoiser, mask, padding), padding)
    if config.cache in _APPROXIMATE:
        kind = PrefixCache if config.cache == "prefix" else DualCache
        return kind(denoiser, config.refresh_every, record.target_offset, padding)
    predict = whole_rows(denoiser, FULL, padding, record.target_offset)
    if config.guidance:
        return Guided(predict, config.guidance, model.mask_token_id, record.target_offset, padding)
    return Whole(predict, padding)


def has_windows(config: SamplingConfig, record: ModelRecord) -> bool:
    """Whether rows are filled part by part from their first mask on, or keep keys and values of what lies before."""
    return record.objective != "masked_nelbo" or bool(config.block_size) or config.cache in _APPROXIMATE


def window_of(config: SamplingConfig, record: ModelRecord, length: int) -> int:
    """Size of the windows of ``length`` tokens; UserError unless they divide it."""
    size = config.block_size or record.block_size or length
    if length % size:
        raise UserError(
            f"a row has {length} tokens from its first mask on, which windows of {size} tokens do not divide; change "
            "block_size or the length"
        )
    return size
