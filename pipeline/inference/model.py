"""A trained model and its vocabulary, opened for questions: once a process, whatever asks."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.vocabulary import Vocabulary, load_vocabulary
from pipeline.errors import UserError
from pipeline.weights import ModelRecord, check_tokenizer, load_denoiser, load_record

if TYPE_CHECKING:
    import torch

    from dlm_core.models.transformer import Denoiser


@dataclass(frozen=True, eq=False)
class OpenModel:
    """What is needed to ask a model about text."""

    denoiser: "Denoiser"
    record: ModelRecord
    vocabulary: Vocabulary
    device: "torch.device"

    @property
    def mask_token_id(self) -> int:
        """The id that stands for what is to be predicted."""
        return self.vocabulary.special.mask_token_id

    @property
    def is_autoregressive(self) -> bool:
        """Whether it predicts the next token, and is never shown a mask."""
        return self.record.objective == "autoregressive_nll"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, taken literally."""
        return self.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids

    def literal(self, ids: list[int]) -> str:
        """Text of ids, the special ones spelled out."""
        return self.vocabulary.tokenizer.decode(ids, skip_special_tokens=False)


def open_model(weights: Path, tokenizer: Path, device: str = "auto") -> OpenModel:
    """Two committed artifacts as one model; "auto" is a GPU where there is one.

    The last two stay open, a model and what scores its texts, so that a process reads their weights once.  Raises
    UserError as ``read_about`` does, and for a device that is not there.
    """
    return _open(weights, tokenizer, find_device(device))


@lru_cache(maxsize=2)
def _open(weights: Path, tokenizer: Path, device: str) -> OpenModel:
    import torch

    record, vocabulary = read_about(weights, tokenizer)
    model, _ = load_denoiser(weights)
    return OpenModel(model.to(device).requires_grad_(False), record, vocabulary, torch.device(device))


def read_about(weights: Path, tokenizer: Path) -> tuple[ModelRecord, Vocabulary]:
    """What is known of a model without its weights.

    Raises UserError for a tokenizer of other weights, and for a model that is conditioned on the time, whose schedule
    weights don't tell.
    """
    record = load_record(weights)
    if record.model.architecture.time_conditioning:
        raise UserError(
            f"the model in {weights} is conditioned on the time of its noise, whose schedule its weights do not tell; "
            "it can be neither sampled nor asked so far. Train with architecture.time_conditioning=false"
        )
    check_tokenizer(record, weights, tokenizer)
    return record, load_vocabulary(tokenizer)


def forget_models() -> None:
    """Let go of the model that is open."""
    _open.cache_clear()


def find_device(name: str) -> str:
    """What torch calls a device; "auto" is a GPU where there is one.  UserError for one that is not there."""
    import torch

    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if num_gpus else "cpu"
    gpus = ["cuda", *(f"cuda:{number}" for number in range(num_gpus))] if num_gpus else []
    if name not in ("cpu", *gpus):
        raise UserError(
            f'device is "{name}", which this machine lacks; it must be one of {", ".join(["auto", "cpu", *gpus])}'
        )
    return name
