"""The interchange format: model.safetensors and model.json, loaded strictly."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlm_core.models.config import ModelConfig
from pipeline.artifact import checked, load_manifest, write_json
from pipeline.config import from_json
from pipeline.errors import CorruptionError, UserError
from pipeline.scoring import Likelihood, Scoring

if TYPE_CHECKING:
    from dlm_core.models.transformer import Denoiser

WEIGHTS_FILE, MODEL_FILE = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Origin:
    """One thing that happened to the weights: where they came from, how they were changed or trained."""

    kind: Literal["imported", "initialised", "trained"]
    details: dict[str, Any]
    """JSON values by name, such as {"family": "qwen2", "sha256": ...}."""


@dataclass(frozen=True)
class ModelRecord:
    """What model.json holds."""

    model: ModelConfig
    seq_len: int
    """Length of the rows that the model was trained on."""
    objective: Likelihood
    """How text is scored with it."""
    block_size: int = 0
    """Of a block_nelbo."""
    target_offset: Literal[0, 1] = 0
    """1: position l - 1 predicts token l."""
    within_documents: bool = False
    """Whether it was trained to see one document at a time; otherwise all of a row."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer artifact that its token ids belong to; empty if unknown."""
    lineage: list[Origin] = field(default_factory=list[Origin])
    """Oldest first."""
    format_version: int = 1

    def scoring(self, noise_seed: int) -> Scoring:
        """How text is scored with it, under this noise."""
        return Scoring(self.objective, self.block_size, noise_seed, self.target_offset, self.within_documents)


def save_weights(directory: Path, tensors: dict[str, Any], record: ModelRecord) -> None:
    """Write float32 tensors and the model's record."""
    from safetensors.torch import save_file

    save_file(tensors, str(directory / WEIGHTS_FILE), metadata={"format": "pt"})
    write_json(directory / MODEL_FILE, record)


def load_record(artifact: Path) -> ModelRecord:
    """The model's record in a committed artifact."""
    return from_json(ModelRecord, json.loads(checked(artifact, MODEL_FILE).read_text()), where=MODEL_FILE)


def load_denoiser(artifact: Path) -> "tuple[Denoiser, ModelRecord]":
    """The model with its weights, in evaluation mode; CorruptionError unless every tensor fits exactly."""
    from safetensors.torch import load_file

    from dlm_core.models.transformer import Denoiser

    record = load_record(artifact)
    model = Denoiser(record.model)
    tensors = load_file(str(checked(artifact, WEIGHTS_FILE)))
    check_tensors(model, tensors, str(artifact))
    model.load_state_dict(tensors)
    return model.eval(), record


def check_tokenizer(record: ModelRecord, tokenizer: Path) -> None:
    """UserError if a model does not speak the vocabulary of a tokenizer artifact."""
    if record.tokenizer and record.tokenizer != load_manifest(tokenizer).fingerprint:
        raise UserError(
            f"the model was trained with another tokenizer ({record.tokenizer[:12]}) than {tokenizer}; give the one "
            "that it was trained with"
        )


def check_tensors(model: "Denoiser", tensors: dict[str, Any], name: str) -> None:
    """CorruptionError naming every tensor that is missing, unexpected or of the wrong shape."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
    problems += [f"{key} is unknown" for key in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{key} has shape {found[key]}, the model wants {wanted[key]}"
        for key in sorted(wanted.keys() & found.keys())
        if wanted[key] != found[key]
    ]
    if problems:
        raise CorruptionError(f"the weights in {name} do not fit the model: " + "; ".join(problems))
