"""Interchange weights to a directory that transformers loads; proved before it is committed."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifact import checked, load_manifest, read_json, write_json
from pipeline.config import diff, flatten, to_json
from pipeline.errors import CorruptionError
from pipeline.export.card import model_card, num_held
from pipeline.export.code_files import code_files
from pipeline.export.config import Dtype, ExportConfig, check_ready
from pipeline.export.fit import DIFFUSION, Exported, check_fit
from pipeline.export.tokenizer_files import find_tokenizer, write_tokenizer
from pipeline.hf_config import AUTOREGRESSIVE, read_config, write_config, write_generation_config
from pipeline.hf_keys import IN_BLOCKS, SHIFTED
from pipeline.hf_names import Family
from pipeline.logits_proof import in_fresh_process
from pipeline.repack import check_round_trip, check_theirs, write_theirs
from pipeline.stage import StageContext, Stats, scratch
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE, ModelRecord, load_record

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
STORED: dict[Dtype, str] = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}


def run(config: ExportConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write config.json, the weights, the tokenizer, the code that they need, and a model card."""
    weights, out = inputs["weights"], context.out
    record = load_record(weights)
    check_exportable(config, record)
    tokenizer = find_tokenizer(record, inputs, may_be_absent=config.without_tokenizer)
    described = write_config(config.family, record, tokenizer.special, config.dtype)

    context.progress(0, 3)
    write_json(out / CONFIG, described)
    write_json(out / GENERATION, write_generation_config(tokenizer.special))
    for path in code_files(described.get("auto_map", {})):
        shutil.copyfile(path, out / path.name)
    write_tokenizer(tokenizer, record.seq_len, out, pads_left=config.family in DIFFUSION)
    ours = TensorFiles([checked(weights, WEIGHTS_FILE)])
    files = write_theirs(config.family, record.model, ours, out, STORED[config.dtype], config.max_shard_bytes)
    context.progress(1, 3)
    theirs = TensorFiles(files)
    _prove_tensors(config, record, ours, theirs, out)
    context.progress(2, 3)
    proof = _prove_logits(config, weights, context, ", ".join(tokenizer.carried))
    (out / CARD).write_text(model_card(config, record, tokenizer, theirs, proof), encoding="utf-8")
    context.progress(3, 3)
    return {
        "family": config.family,
        "num_params": num_held(theirs),
        "tensors": len(theirs.names),
        "files": [path.name for path in files],
        "target_offset": record.target_offset,
        "objective": record.objective,
        "block_size": record.block_size,
        "within_documents": record.within_documents,
        "tokenizer": load_manifest(inputs["tokenizer"]).fingerprint if "tokenizer" in inputs else record.tokenizer,
        "lineage": to_json(record.lineage),
        **proof,
    }


def check_exportable(config: ExportConfig, record: ModelRecord, where: str = "export.family") -> None:
    """UserError, before anything is written, for weights that the family cannot say, or a proof that cannot be made.

    ``where`` is what the user calls the setting of the family.
    """
    model = Exported(
        record.model.architecture,
        is_causal=record.objective == "autoregressive_nll",
        block_size=record.block_size,
        target_offset=record.target_offset,
    )
    check_fit(config.family, model, where)
    check_ready(config, "export")


def _prove_tensors(
    config: ExportConfig, record: ModelRecord, ours: TensorFiles, theirs: TensorFiles, out: Path
) -> None:
    """CorruptionError unless the files hold what is ours, rounded, bit for bit, and an import would take them back."""
    check_round_trip(config.family, record.model, ours, theirs)
    back = read_config(read_json(out / CONFIG), read_json(out / GENERATION))
    differing = diff(
        {"family": config.family, **_told(_in_config(config.family, record))},
        {"family": back.family, **_told(back.record())},
    )
    if differing:
        name, (own, read) = next(iter(differing.items()))
        raise CorruptionError(f"{out / CONFIG}, read again, says that {name} is {read}; written was {own}")
    check_theirs(back.family, back.model, theirs)


def _in_config(family: Family, record: ModelRecord) -> ModelRecord:
    """What a family's config.json lets suppose of a model that it fits: the family says how it was trained."""
    objective = "block_nelbo" if family in IN_BLOCKS else "masked_nelbo"
    return replace(
        record,
        objective="autoregressive_nll" if family in AUTOREGRESSIVE else objective,
        block_size=(record.block_size or record.seq_len) if family in IN_BLOCKS else 0,
        target_offset=1 if family in SHIFTED else 0,
        within_documents=False,
        tokenizer="",
        lineage=[],
    )


def _told(record: ModelRecord) -> dict[str, Any]:
    """The fields that every family keeps: not how weights were drawn, and not which tensors may be zeros or the
    embedding once more."""
    values = flatten(to_json(record))
    a, prefix = record.model.architecture, "model.architecture."
    values |= {f"{prefix}head_dim": a.head_size, f"{prefix}num_kv_heads": a.kv_heads}
    free = {f"{prefix}{name}" for name in ("init", "init_std", "qkv_bias", "tied_head", "moe.selection_bias")}
    return {name: value for name, value in values.items() if name not in free}


def _prove_logits(config: ExportConfig, weights: Path, context: StageContext, carried: str) -> dict[str, Any]:
    """Which proof was made, and what it found."""
    if config.proof == "tensors":
        return {"proof": "tensors"}
    with scratch(context) as beside:
        found = in_fresh_process(
            "pipeline.export.prove:prove_logits", context.out, weights, config.family, config.dtype, beside, carried
        )
    return {"proof": "logits", "logits_difference": found.pop("difference"), **found}
