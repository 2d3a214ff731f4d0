"""Settings of the model "dlm" as lm-evaluation-harness hands them over: flat, by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.config import from_json, suggestion
from pipeline.data.special_tokens import SpecialTokens
from pipeline.errors import UserError
from pipeline.inference.greedy import check_greedy
from pipeline.inference.likelihood import LikelihoodConfig, check_guidance
from pipeline.inference.model import find_device
from pipeline.inference.rules import check_sampling
from pipeline.inference.sampler import SamplerConfig
from pipeline.inference.sampling import SamplingConfig
from pipeline.weights import ModelRecord

_DRAWN = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class OwnConfig:
    """What is neither of likelihoods nor of samples."""

    weights: str
    """Directory of interchange weights: the output of convert, ar_init or import_checkpoint."""
    tokenizer: str
    """Directory of their tokenizer."""
    workers: int = 1
    """Processes, each with the weights; no effect on any digit."""
    device: str = "auto"
    length: int = 0
    """Tokens that are drawn for an answer, at most the task's max_gen_toks; 0: as many as that."""
    is_greedy: bool | None = None
    """Whether to find out for each answer if greedy decoding from left to right would give it, which takes a pass for
    each of its tokens.  null: no, and a task that asks for nothing else is refused."""
    details: str = ""
    """A file of JSON lines to be written, one for each request, with the standard errors that the harness drops."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")
        if self.length < 0:
            raise ValueError(f"length is {self.length}; it must be 0 or more")


@dataclass(frozen=True)
class HarnessConfig:
    """All settings, each where it is used."""

    own: OwnConfig
    likelihood: LikelihoodConfig
    sampling: Mapping[str, Any]
    """Those of SamplingConfig that were given; what decides about drawn tokens is else the task's."""

    def sampling_of(self, wanted: Mapping[str, Any]) -> SamplingConfig:
        """How a task is answered that wants do_sample, temperature, top_k or top_p; settings of the model win.

        As in transformers, nothing is drawn without do_sample, nor anything but the most likely at temperature 0.
        Windows behind the end of an answer make no pass, nor do next tokens: its text is the same without.
        """
        asked = {name: wanted[name] for name in _DRAWN if wanted.get(name) is not None}
        do_sample = wanted.get("do_sample")
        is_drawn = asked.get("temperature", 0.0) > 0 if do_sample is None else do_sample
        settings = {**({"temperature": 1.0, **asked} if is_drawn else {"temperature": 0.0}), **self.sampling}
        if settings["temperature"] == 0:
            settings = {"temperature": 0.0, **self.sampling}
        ends = {"ends_at_eos": not settings.get("suppresses_eos", False)}
        return from_json(SamplingConfig, ends | settings, "sampling")


_SAMPLER = {"sampler": "kind"} | {f.name: f.name for f in fields(SamplerConfig) if f.name != "kind"}
"""Fields of SamplerConfig by the names of settings."""
_THEIR_NAMES = {"pretrained": "weights", "batch_size": "batch_rows", "max_gen_toks": "length"}
"""Settings of the harness's own models."""
_PARTS = (OwnConfig, LikelihoodConfig, SamplingConfig)


def read_config(given: Mapping[str, Any]) -> HarnessConfig:
    """The settings in model_args; UserError for one that is unknown, missing or out of range.

    What both likelihoods and samples have (guidance, noise_seed, batch_rows) is for both.
    """
    names = {f.name for part in _PARTS for f in fields(part)} | _SAMPLER.keys()
    for name in given:
        if name not in names:
            hint = f"; it is {_THEIR_NAMES[name]} here" if name in _THEIR_NAMES else suggestion(name, sorted(names))
            raise UserError(f"unknown setting {name} of the model dlm{hint}")
    own, likelihood, sampling = ({f.name: given[f.name] for f in fields(part) if f.name in given} for part in _PARTS)
    sampler = {field: given[name] for name, field in _SAMPLER.items() if name in given}
    where = "model_args"
    sampling |= {"sampler": asdict(from_json(SamplerConfig, sampler, where))}
    config = HarnessConfig(from_json(OwnConfig, own, where), from_json(LikelihoodConfig, likelihood, where), sampling)
    _check_for_tasks(config)
    return config


def _check_for_tasks(config: HarnessConfig) -> None:
    """UserError for settings that do not go with what tasks want, whether that is do_sample or not."""
    refused: dict[str, UserError] = {}
    for word, do_sample in (("with", True), ("without", False)):
        try:
            config.sampling_of({"do_sample": do_sample})
        except UserError as error:
            refused[word] = error
    if len(refused) == 2:
        raise refused["with"]
    for word, error in refused.items():
        raise UserError(f"{error}. A task {word} do_sample has that temperature unless model_args sets one") from None


def check_model(config: HarnessConfig, record: ModelRecord, special: SpecialTokens) -> None:
    """UserError for settings that a model has no use for, whatever is asked of it: before its weights are read."""
    check_guidance(config.likelihood, record)
    for do_sample in (True, False):
        check_sampling(config.sampling_of({"do_sample": do_sample}), record, special)
    if config.own.is_greedy:
        check_greedy(config.likelihood, record)
    if config.own.length >= record.seq_len:
        raise UserError(
            f"length is {config.own.length}, which leaves no room for a prompt in rows of {record.seq_len}; set "
            f"length={record.seq_len // 2}, or less"
        )
    find_device(config.own.device)


def with_theirs(given: Mapping[str, Any], device: str | None, batch_size: Any, max_batch_size: Any) -> dict[str, Any]:
    """Settings in model_args, and what the harness passes beside them; None and "auto" say nothing.

    Raises UserError for a setting that stands in both places with two values, and for one without a use.
    """
    if max_batch_size is not None:
        raise UserError(f"max_batch_size is {max_batch_size}, but batches are not searched for; set batch_size")
    theirs = {"device": None if device == "auto" else device, "batch_rows": _rows_of(batch_size)}
    both = dict(given)
    for name, value in theirs.items():
        if value is not None and both.setdefault(name, value) != value:
            raise UserError(f"{name} is {both[name]!r} in model_args and {value!r} beside them; leave one out")
    return both


def _rows_of(batch_size: Any) -> int | None:
    if batch_size in (None, "auto"):
        return None
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(
            f"batch_size is {batch_size!r}; it must be a number of rows, or auto, which searches for none and takes "
            f"{LikelihoodConfig.batch_rows} for likelihoods and {SamplingConfig.batch_rows} for what is generated"
        )
    return int(batch_size)
