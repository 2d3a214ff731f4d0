"""The weights that a training has kept, put together from the files of all its ranks, some megabytes at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlm_core.models.config import ModelConfig
from dlm_core.models.tensor_shapes import is_buffer, tensor_shapes
from pipeline.artifact import Manifest, checked, load_manifest, read_json
from pipeline.config import from_json
from pipeline.convert.config import Weights
from pipeline.errors import CorruptionError, UserError
from pipeline.tensor_files import BLOCK_ELEMENTS
from pipeline.training_state import EMA, MASTER, StateFiles, list_checkpoints, read_manifest
from pipeline.weights import check_shapes


@dataclass(frozen=True)
class Gathered:
    """Weights by name; each is the mean over checkpoints of one of the tensors that these keep of it."""

    model: ModelConfig
    checkpoints: list[StateFiles]
    """Newest first."""
    which: Mapping[str, str]
    """Name of a parameter or buffer -> which of its tensors, in the order of the model."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every tensor, in the order of the model."""
        return {name: self.checkpoints[0].shapes[name] for name in self.which}

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints."""
        return sorted(files.step for files in self.checkpoints)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The elements of the flattened tensor, in order; a mean is added up in float64."""
        numel = int(np.prod(self.shapes[name]))
        for start in range(0, numel, BLOCK_ELEMENTS):
            values = np.empty(min(BLOCK_ELEMENTS, numel - start), np.float32)
            first, *others = self.checkpoints
            first.read(self.which[name], name, start, values)
            if others:
                total = values.astype(np.float64)
                for files in others:
                    files.read(self.which[name], name, start, values)
                    total += values
                values = (total / len(self.checkpoints)).astype(np.float32)
            yield values


def gather(weights: Weights, source: Path) -> Gathered:
    """The weights of a training that are asked for.  Its files have been verified, its checkpoints not yet compared.

    Raises UserError if the training has not kept such weights, CorruptionError if they are not of its model.
    """
    trained = load_manifest(source)
    model = from_json(ModelConfig, read_json(checked(source, "model_config.json", trained)))
    newest_first = [open_checkpoint(path, source, trained) for path in list_checkpoints(source / "checkpoints")]
    if not newest_first:
        raise CorruptionError(f"{source} has no checkpoint")
    check_shapes(model, newest_first[0].shapes, str(source))
    return _chosen(weights, model, newest_first, trained.stats["average_steps"])


def open_checkpoint(checkpoint: Path, source: Path, trained: Manifest) -> StateFiles:
    """The state in a checkpoint of a training, whose files were compared with the training's manifest.

    Raises CorruptionError if that manifest was made of other bytes than those that were saved.
    """
    manifest = read_manifest(checkpoint)
    committed = {record.path: record.sha256 for record in trained.files}
    for record in manifest.files:
        path = checkpoint / record.path
        if committed.get(path.relative_to(source).as_posix()) != record.sha256:
            raise CorruptionError(
                f"{path} was damaged between its saving and the end of the training: the manifest of its checkpoint "
                f"and that of {source} have different SHA-256 of it. Delete {source} and run the training again"
            )
    return StateFiles(checkpoint, manifest)


def _chosen(weights: Weights, model: ModelConfig, newest_first: list[StateFiles], average_steps: list[int]) -> Gathered:
    """``average_steps`` are those that the training has kept to be averaged.

    Buffers have no running average: they are as they are in the last checkpoint.
    """
    last = newest_first[0]
    names = list(tensor_shapes(model))
    if weights == "average":
        if not average_steps:
            raise UserError(
                "convert.weights is average, but the training has kept no checkpoints to be averaged. Train with "
                "pretrain.average, or set convert.weights=last"
            )
        kept = [files for files in newest_first if files.step in average_steps]
        if len(kept) < len(average_steps):
            missing = sorted(set(average_steps) - {files.step for files in kept})
            raise CorruptionError(f"the training has promised checkpoints of steps {missing}, which are not there")
        if any(files.shapes != last.shapes for files in kept):
            raise CorruptionError("the checkpoints to be averaged are of models of different shapes")
        return Gathered(model, kept, dict.fromkeys(names, MASTER))
    parameters = {name for name in names if not is_buffer(name)}
    if weights == "ema" and not all(last.has(EMA, name) for name in parameters):
        raise UserError(
            "convert.weights is ema, but the training has kept no running average of its weights. Train with "
            "pretrain.optimizer.ema_decay, or set convert.weights=last"
        )
    averaged = parameters if weights == "ema" else set()
    return Gathered(model, [last], {name: EMA if name in averaged else MASTER for name in names})
