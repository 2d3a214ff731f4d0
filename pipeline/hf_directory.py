"""A directory as transformers loads it: what its config.json says, and of an export of this project its manifest.

A config.json cannot say what a model was trained to predict: plain Qwen2 may hold the tensors of a diffusion model.
The manifest that the stage export leaves beside it can, and has the SHA-256 of every file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from pipeline.artifact import MANIFEST, Manifest, checked, load_manifest, read_json
from pipeline.config import from_json
from pipeline.errors import CorruptionError, UserError
from pipeline.hf_config import CONFIG, GENERATION, NAMED_MASK, Described, read_config, read_object
from pipeline.scoring import Likelihood
from pipeline.weights import Origin

ADD_TOKENIZER = (
    f"Put the tokenizer.json of its model beside the {CONFIG} that it was imported with, and import it again"
)
"""What helps where a checkpoint was imported without a tokenizer."""
EXPORT_AGAIN = "Export the weights that it was made from again, with their tokenizer, and import that"
"""What helps where an export brought none, and it is not known which was its training's."""
EXPORT_STAGE = "export"
_TOLD = "an export of this project: objective, shift and lineage are those that its manifest tells"


@dataclass(frozen=True)
class _Training:
    """What the manifest of an export says of its model."""

    objective: Likelihood
    block_size: int
    target_offset: Literal[0, 1]
    within_documents: bool
    tokenizer: str
    lineage: list[Origin]


def read_directory(directory: Path) -> Described:
    """What config.json and, where they are there, generation_config.json and the manifest of an export say.

    Raises CorruptionError for a file that holds no JSON object or is not the one that was exported, else as
    ``read_config``.
    """
    generation, manifest = directory / GENERATION, export_manifest(directory)
    if manifest is not None:
        for path in (directory / CONFIG, generation):
            check_exported(path, manifest)
    described = read_config(read_object(directory / CONFIG), read_object(generation) if generation.is_file() else None)
    return described if manifest is None else _as_exported(described, directory, manifest)


def export_manifest(directory: Path) -> Manifest | None:
    """The manifest of this project's stage export, if it lies there; CorruptionError if it is damaged."""
    if not (directory / MANIFEST).is_file():
        return None
    value = read_json(directory / MANIFEST)
    is_ours = isinstance(value, Mapping) and value.get("stage") == EXPORT_STAGE
    return load_manifest(directory) if is_ours else None


def check_exported(path: Path, manifest: Manifest) -> None:
    """CorruptionError unless a file of an export has the bytes that were proved."""
    try:
        checked(path.parent, path.name, manifest)
    except CorruptionError as error:
        raise CorruptionError(
            f"{error}. If it was changed on purpose, take {MANIFEST} out of a copy of the directory: what the model "
            "was trained on and where it comes from is then not known"
        ) from None


def _as_exported(described: Described, directory: Path, manifest: Manifest) -> Described:
    """With what the manifest knows in the place of what the family lets suppose."""
    names = [field.name for field in fields(_Training)]
    stats = {"tokenizer": manifest.inputs.get("tokenizer", ""), **manifest.stats}  # older ones name the input alone
    try:
        training = from_json(_Training, {name: stats[name] for name in names if name in stats})
    except UserError as error:
        raise CorruptionError(
            f"{directory / MANIFEST} is not that of an export, or of one by an older version: stats: {error}. Export "
            "the weights again, or say it there in a copy of the directory, as the training was"
        ) from None
    return replace(
        described,
        **{name: getattr(training, name) for name in names},
        notices=(*(notice for notice in described.notices if notice != NAMED_MASK), _TOLD),
    )
