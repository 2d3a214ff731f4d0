"""Gather float32 weights from the files of all ranks into one safetensors file."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dlm_core.models.config import ModelConfig
from pipeline.artifact import Manifest, checked, checked_files, load_manifest, read_json
from pipeline.config import from_json
from pipeline.convert.config import ConvertConfig
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import StageContext, Stats
from pipeline.training_state import EMA, MASTER, StateFiles, list_checkpoints, read_manifest
from pipeline.weights import WEIGHTS_FILE, ModelRecord, check_tensors, save_weights


def run(config: ConvertConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write model.safetensors and model.json, and read them back before the artifact is committed."""
    source = inputs["pretrain"]
    trained = load_manifest(source)
    model_config = from_json(ModelConfig, read_json(checked(source, "model_config.json")))
    checked_files(source, "checkpoints/*/*")
    context.progress(0, 1)
    import torch

    from dlm_core.models.transformer import Denoiser

    with torch.device("meta"):  # names and shapes are all that is asked of it
        model = Denoiser(model_config)
    newest_first = [open_checkpoint(path, source, trained) for path in list_checkpoints(source / "checkpoints")]
    if not newest_first:
        raise CorruptionError(f"{source} has no checkpoint")
    parameters = {name for name, _ in model.named_parameters()}
    tensors, steps = gather(config, newest_first, parameters, trained.stats["average_steps"])
    check_tensors(model, tensors, str(source))
    record = ModelRecord(
        model_config,
        seq_len=trained.stats["seq_len"],
        objective=trained.stats["objective"],
        block_size=trained.stats["block_size"],
        target_offset=trained.stats["target_offset"],
        within_documents=trained.stats["within_documents"],
        tokenizer=trained.inputs["tokenizer"],
    )
    save_weights(context.out, tensors, record)
    _prove(context.out, tensors)
    return {"num_params": model_config.num_params(), "tensors": len(tensors), "steps": steps}


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


def gather(
    config: ConvertConfig, newest_first: list[StateFiles], parameters: set[str], average_steps: Collection[int]
) -> tuple[dict[str, Any], list[int]]:
    """The weights that the configuration asks for, by name, and the steps of the checkpoints they are from.

    ``average_steps`` are those that the training has kept to be averaged; ``parameters`` are what is trained; buffers
    have no running average and are as they are in the last checkpoint.
    Raises UserError if the training has not kept such weights.
    """
    last = newest_first[0]
    if config.weights == "average":
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
        return {name: _mean(kept, name) for name in sorted(last.shapes)}, sorted(average_steps)
    if config.weights == "ema" and not all(last.has(EMA, name) for name in parameters & last.shapes.keys()):
        raise UserError(
            "convert.weights is ema, but the training has kept no running average of its weights. Train with "
            "pretrain.optimizer.ema_decay, or set convert.weights=last"
        )
    average = parameters if config.weights == "ema" else set()
    which = {name: EMA if name in average else MASTER for name in sorted(last.shapes)}
    return {name: last.whole(kind, name) for name, kind in which.items()}, [last.step]


def _mean(checkpoints: list[StateFiles], name: str) -> Any:
    """Mean of the masters of a parameter, added up in float64."""
    total = checkpoints[0].whole(MASTER, name).double()
    for files in checkpoints[1:]:
        total += files.whole(MASTER, name)
    return (total / len(checkpoints)).float()


def _prove(out: Path, tensors: dict[str, Any]) -> None:
    """The written file holds exactly the tensors that were gathered; one of them at a time is there twice."""
    import torch
    from safetensors import safe_open

    with safe_open(str(out / WEIGHTS_FILE), framework="pt") as written:
        for name, tensor in tensors.items():
            if not torch.equal(written.get_tensor(name), tensor):
                raise CorruptionError(f"{name} changed on the way to {WEIGHTS_FILE}")
