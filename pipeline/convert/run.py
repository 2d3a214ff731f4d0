"""Gather float32 weights from the files of all ranks into one safetensors file, and prove that it has them."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import Manifest, checked_files, load_manifest
from pipeline.config import from_json
from pipeline.convert.config import ConvertConfig
from pipeline.convert.gather import Gathered, gather
from pipeline.errors import CorruptionError
from pipeline.logits_proof import in_fresh_process
from pipeline.stage import StageContext, Stats
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE, ModelRecord, Origin, save_record, weights_writer


def run(config: ConvertConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write model.safetensors and model.json, and read them back before the artifact is committed.

    No more than some megabytes of weights are held in this process.
    """
    source = inputs["pretrain"]
    trained = load_manifest(source)
    checked_files(source, "checkpoints/*/*")
    context.progress(0, 3)
    weights = gather(config.weights, source)
    with weights_writer(context.out, weights.shapes) as out:
        for name in weights.shapes:
            for values in weights.blocks(name):
                out.append(name, values)
    save_record(context.out, record_of(config, weights, trained))
    context.progress(1, 3)
    _prove_tensors(context.out, weights)
    context.progress(2, 3)
    if config.proof == "logits":
        in_fresh_process("pipeline.convert.prove:prove_logits", context.out, source, config.weights)
    context.progress(3, 3)
    return {
        "num_params": weights.model.num_params(),
        "tensors": len(weights.shapes),
        "steps": weights.steps,
        "proof": config.proof,
    }


def record_of(config: ConvertConfig, weights: Gathered, trained: Manifest) -> ModelRecord:
    """What is known of the weights: how they are used, and where they come from."""
    last = weights.checkpoints[0].manifest
    origin = Origin(
        "trained",
        {
            "objective": trained.stats["objective"],
            "training": trained.fingerprint,
            "tokens": trained.stats["tokens"],
            "weights": config.weights,
            "steps": weights.steps,
            "optimizer_steps": last.optimizer_steps,
            "versions": last.versions,
        },
    )
    before = [from_json(Origin, value) for value in trained.stats.get("lineage", [])]
    return ModelRecord(
        weights.model,
        seq_len=trained.stats["seq_len"],
        objective=trained.stats["objective"],
        block_size=trained.stats["block_size"],
        target_offset=trained.stats["target_offset"],
        within_documents=trained.stats["within_documents"],
        tokenizer=trained.inputs["tokenizer"],
        lineage=[*before, origin],
    )


def _prove_tensors(out: Path, weights: Gathered) -> None:
    """The written file holds exactly what was gathered, bit for bit."""
    written = TensorFiles([out / WEIGHTS_FILE])
    for name in weights.shapes:
        start = 0
        for values in weights.blocks(name):
            if written.read_stored(name, start, values.size).tobytes() != values.tobytes():
                raise CorruptionError(f"{name} changed on the way to {WEIGHTS_FILE}")
            start += values.size
