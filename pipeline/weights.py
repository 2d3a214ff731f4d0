"""The interchange format: model.safetensors and model.json, loaded strictly."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dlm_core.models.config import ModelConfig
from dlm_core.models.tensor_shapes import tensor_shapes
from pipeline.artifact import checked, load_manifest, write_json
from pipeline.config import from_json
from pipeline.data.special_tokens import SpecialTokens, load_special_tokens
from pipeline.errors import CorruptionError, UserError
from pipeline.scoring import Likelihood, Scoring
from pipeline.tensor_files import TensorFiles, TensorWriter, shape_problems

if TYPE_CHECKING:
    from dlm_core.models.transformer import Denoiser

WEIGHTS_FILE, MODEL_FILE = "model.safetensors", "model.json"
METADATA = {"format": "pt"}
"""Without it transformers refuses a file."""


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


def weights_writer(directory: Path, shapes: Mapping[str, Sequence[int]]) -> TensorWriter:
    """Writes the float32 tensors of a model part by part; ``save_record`` makes the directory complete."""
    return TensorWriter(directory / WEIGHTS_FILE, {name: ("F32", shape) for name, shape in shapes.items()}, METADATA)


def save_record(directory: Path, record: ModelRecord) -> None:
    """Write the model's record."""
    write_json(directory / MODEL_FILE, record)


def save_weights(directory: Path, tensors: Mapping[str, Any], record: ModelRecord) -> None:
    """Write float32 tensors, of torch or NumPy, and the model's record."""
    with weights_writer(directory, {name: tensor.shape for name, tensor in tensors.items()}) as out:
        for name, tensor in tensors.items():
            out.append(name, _as_array(tensor))
    save_record(directory, record)


def _as_array(tensor: Any) -> np.ndarray:
    return tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy()


def load_record(artifact: Path) -> ModelRecord:
    """The model's record in a committed artifact."""
    return read_record(checked(artifact, MODEL_FILE))


def read_record(path: Path) -> ModelRecord:
    """The model's record in a file that was verified, or just written."""
    return from_json(ModelRecord, json.loads(path.read_text()), where=MODEL_FILE)


def load_denoiser(artifact: Path) -> "tuple[Denoiser, ModelRecord]":
    """The model with its weights, in evaluation mode; CorruptionError unless every tensor fits exactly."""
    record = load_record(artifact)
    return read_denoiser(record.model, checked(artifact, WEIGHTS_FILE), str(artifact)), record


def read_denoiser(config: ModelConfig, path: Path, name: str) -> "Denoiser":
    """A model with the weights of a file, in evaluation mode: they are read to where they stay, and held once.

    Raises CorruptionError, which calls them the weights in ``name``, unless every tensor fits exactly.
    """
    from dlm_core.models.transformer import Denoiser

    files = TensorFiles([path])
    check_shapes(config, files.shapes, name)
    model = Denoiser(config).eval()
    for key, tensor in model.state_dict().items():
        files.read_elements(key, 0, tensor.view(-1).numpy())
    return model


def check_same_vocabulary(record: ModelRecord, weights: Path, tokenizer: Path) -> None:
    """UserError unless weights were made with a tokenizer artifact, or it is the one of their import."""
    manifest = load_manifest(tokenizer)
    is_of_weights = manifest.inputs.get("checkpoint") == load_manifest(weights).fingerprint
    if not is_of_weights and record.tokenizer != manifest.fingerprint:
        raise UserError(
            f"the tokenizer {tokenizer} is not that of the weights in {weights}: its ids mean other tokens. Give the "
            "one that they were trained with, or make one whose input checkpoint they are"
        )


def check_tokenizer(record: ModelRecord, weights: Path, tokenizer: Path) -> SpecialTokens:
    """The special ids of a tokenizer; UserError unless a model can be used with it.

    It is of the same vocabulary, with no id that the embedding lacks, and with the model's mask.  A model without one
    is never shown a mask, which may then have the id behind its last row.
    """
    check_same_vocabulary(record, weights, tokenizer)
    special, model = load_special_tokens(tokenizer), record.model
    is_mask_last = model.mask_token_id is None and special.mask_token_id == special.vocab_size - 1
    if special.vocab_size - is_mask_last > model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} has ids up to {special.vocab_size - 1}, but the embedding in {weights} has "
            f"{model.vocab_size} rows. Initialise the new ones first (pipeline.ar_init)"
        )
    if model.mask_token_id not in (None, special.mask_token_id):
        raise UserError(
            f"the mask token of the model in {weights} is {model.mask_token_id}, that of the tokenizer {tokenizer} is "
            f"{special.mask_token_id}; give the tokenizer that the model was trained with"
        )
    return special


def check_shapes(config: ModelConfig, found: Mapping[str, Sequence[int]], name: str) -> None:
    """CorruptionError naming every tensor that is missing, unexpected or of the wrong shape."""
    if problems := shape_problems(found, tensor_shapes(config)):
        raise CorruptionError(f"the weights in {name} do not fit the model: " + "; ".join(problems))
