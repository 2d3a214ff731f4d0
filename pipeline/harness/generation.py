"""What a task wants written, and how it is asked of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.config import suggestion
from pipeline.errors import UserError
from pipeline.harness.config import HarnessConfig
from pipeline.inference.model import OpenModel
from pipeline.inference.rules import window_of
from pipeline.inference.sampling import SamplingConfig
from pipeline.inference.stops import before_end
from pipeline.weights import ModelRecord

if TYPE_CHECKING:
    from pipeline.inference.filling import Canvas

_MAX_GEN_TOKS = 256
"""Where a task says nothing, as in the harness's own models; of shorter rows the half."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting, of which the first that is there holds, as in the harness's own models."""
_KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Prompt:
    """A text to be gone on with."""

    ids: tuple[int, ...]
    length: int
    """Tokens to be drawn."""
    sample_id: int


@dataclass(frozen=True)
class Written:
    """What came of it."""

    text: str
    nfe: int
    num_cut: int


@dataclass(frozen=True)
class Wish:
    """What a task wants of every answer."""

    length: int
    until: tuple[str, ...]
    sampling: SamplingConfig


def wish_of(wanted: Mapping[str, Any], config: HarnessConfig, record: ModelRecord) -> Wish:
    """Generation settings of a task; UserError for unknown ones, and for more tokens than a row has room for."""
    seq_len = record.seq_len
    for name in wanted:
        if name not in _KNOWN:
            raise UserError(f"the task sets {name} for what is generated{suggestion(name, _KNOWN)}")
    until = wanted.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    said = next((name for name in _LENGTHS if wanted.get(name) is not None), None)
    at_most = _number(said, wanted[said]) if said else min(_MAX_GEN_TOKS, seq_len // 2)
    length = min(at_most, config.own.length or at_most)
    if length >= seq_len:
        raise UserError(
            f"{length} tokens are to be generated ({said}), which leaves no room for a prompt in rows of "
            f"{seq_len}; set length={seq_len // 2} in model_args, or less, and the beginning of longer prompts is cut"
        )
    sampling = config.sampling_of(wanted)
    if record.objective == "masked_nelbo":
        window_of(sampling, record, length)
    return Wish(length, tuple(text for text in until if text), sampling)


def _number(name: str, wanted: Any) -> int:
    if not isinstance(wanted, int) or wanted < 1:
        raise UserError(f"the task sets {name} to {wanted!r}; it must be a number of tokens, at least 1")
    return wanted


def cut_prompts(prompts: Sequence[Prompt], batch_rows: int) -> list[list[Prompt]]:
    """Every prompt once, those of like length together, the longest first: by what is in them alone."""
    ordered = sorted(set(prompts), key=lambda one: (-one.length, -len(one.ids), one.sample_id, one.ids))
    return [ordered[first : first + batch_rows] for first in range(0, len(ordered), batch_rows)]


def _canvas(model: OpenModel, prompt: Prompt) -> "Canvas":
    """Of a model of next tokens the first of the prompt stands before the row, as the harness's own models have it."""
    from pipeline.inference.filling import prompted

    if not model.is_autoregressive or not prompt.ids:
        return prompted(model, prompt.ids, prompt.length, prompt.sample_id)
    kept = prompt.ids[-(model.record.seq_len - prompt.length) :]
    canvas = prompted(model, kept[1:], prompt.length, prompt.sample_id)
    return replace(canvas, before=kept[0], num_cut=len(prompt.ids) - len(kept))


def write(model: OpenModel, prompts: Sequence[Prompt], config: SamplingConfig) -> list[Written]:
    """Text behind each prompt, up to the first end of a text that was drawn."""
    from pipeline.inference.filling import drawn_ids, fill

    canvases = [_canvas(model, prompt) for prompt in prompts]
    found: dict[int, Written] = {}
    eos = model.vocabulary.special.eos_token_id
    for number, filled in fill(model, canvases, config):
        text = model.vocabulary.decode(before_end(drawn_ids(model, canvases[number], filled), eos))
        found[number] = Written(text, filled.nfe, filled.num_cut)
    return [found[number] for number in range(len(prompts))]
