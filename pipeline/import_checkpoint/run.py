"""A checkpoint of another project to interchange weights, its tokenizer beside them; proved before it is committed."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifact import file_sha256, write_json
from pipeline.config import to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.gguf_header import read_gguf_header
from pipeline.hf_config import (
    AUTOREGRESSIVE,
    CONFIG,
    GENERATION,
    Described,
    read_object,
    write_config,
    write_generation_config,
)
from pipeline.hf_directory import read_directory
from pipeline.hf_names import DITS, packed_tensors
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.import_checkpoint.fetch import Opened, need, open_checkpoint
from pipeline.import_checkpoint.gguf import gguf_license
from pipeline.import_checkpoint.source import (
    HUB_PREFIX,
    INDEX,
    SINGLE,
    TOKENIZER,
    SourceFiles,
    check_files,
    check_index,
    files_read,
    license_of,
)
from pipeline.import_checkpoint.unused import check_tied, unused
from pipeline.lineage import tokenizer_remedy
from pipeline.logits_proof import in_fresh_process
from pipeline.repack import check_round_trip, dtypes_kept, write_ours
from pipeline.stage import StageContext, Stats, scratch
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE, ModelRecord, Origin, save_record

SOURCE_CONFIG, REPORT = "source_config.json", "report.json"
LOGITS_RTOL = 1e-4
"""Of float32 logits through two orders of summation, over the largest of them."""
_NOT_THE_PEERS = ("auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset")
"""Keys of a config.json that ask for code which is not run, or for kernels that may not be installed."""


def run(config: ImportConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write model.safetensors, model.json, the files of the tokenizer and report.json."""
    context.progress(0, 3)
    with scratch(context) as beside:
        opened = open_checkpoint(config, beside)
        source = opened.source
        check_files(source)
        described, notices = _described(opened)
        if config.proof == "logits" and described.family not in DITS:
            need(("transformers",), "the proof by logits", ", or set import_checkpoint.proof=tensors")
        theirs = TensorFiles(source.weights)
        check_index(source, theirs)
        left_out = unused(described.family, described.model.architecture, theirs.names)
        check_tied(described.family, described.model.architecture, theirs)
        used = [name for name in theirs.names if name not in left_out]
        theirs.check_usable(used)
        write_ours(described.family, described.model, theirs, context.out / WEIGHTS_FILE, left_out)
        kept = dtypes_kept(described.family, described.model, {name: theirs.info(name).dtype for name in used})
        save_record(context.out, _record(config, opened, described, kept))
        for path in source.passed_on:
            shutil.copyfile(path, context.out / path.name)
        shutil.copyfile(source.directory / CONFIG, context.out / SOURCE_CONFIG)
        context.progress(1, 3)
        check_round_trip(described.family, described.model, TensorFiles([context.out / WEIGHTS_FILE]), theirs)
        context.progress(2, 3)
        proof = _prove(config, described, source, context.out, beside)
    report = _report(described, left_out, notices)
    write_json(context.out / REPORT, report)
    context.progress(3, 3)
    return {
        "family": described.family,
        "num_params": described.model.num_params(),
        "vocab_size": described.model.vocab_size,
        "tensors": len(report["copied"]) + len(report["joined"]),
        "left_out": len(left_out),
        "notices": notices,
        "special_ids": {name.removesuffix("_token_id"): value for name, value in to_json(described.special).items()},
        **proof,
    }


def _described(opened: Opened) -> tuple[Described, list[str]]:
    """What config.json says, and what there is to tell about the files beside it."""
    source = opened.source
    described = read_directory(source.directory)
    notices = [*described.notices, *opened.notices]
    if any(source.directory.glob("*.py")):
        notices.append("*.py files beside the weights were not read")
    if not (source.directory / TOKENIZER).is_file():
        if opened.gguf is None:
            remedy = tokenizer_remedy({} if source.manifest is None else {"export": source.manifest.fingerprint})
            notices.append(f"there is no {TOKENIZER}, which trainings and exports want. {remedy}")
        return described, notices
    rows, size = described.model.vocab_size, _vocabulary_size(source.directory / TOKENIZER)
    if size > rows:
        raise UserError(
            f"{source.directory / TOKENIZER} has ids up to {size - 1}, but the embedding has {rows} rows; it is the "
            "tokenizer of another model"
        )
    if size < rows:
        notices.append(f"the embedding has {rows - size} row(s) behind the last id of the tokenizer")
    return described, notices


def _vocabulary_size(path: Path) -> int:
    """Highest id and 1."""
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # noqa: BLE001 - the Rust parser raises plain Exception
        raise CorruptionError(f"{path} is not a tokenizer.json: {error}") from None
    return max(vocabulary.values(), default=-1) + 1


def _record(config: ImportConfig, opened: Opened, described: Described, dtypes: list[str]) -> ModelRecord:
    is_hub, gguf = config.path.startswith(HUB_PREFIX), opened.gguf
    files = [gguf] if gguf else files_read(opened.source)
    details = {
        "family": described.family,
        "name": config.name or (config.path.removeprefix(HUB_PREFIX) if is_hub else None),
        "sha256": {path.name: file_sha256(path) for path in files},
        "dtype": sorted({kind for kind, _ in read_gguf_header(gguf).tensors.values()}) if gguf else dtypes,
        "dequantised_from": gguf.name if gguf else None,
        "dequantised_by": opened.dequantised_by,
        "license": gguf_license(gguf) if gguf else license_of(opened.source.directory),
        "export": opened.source.manifest.fingerprint if opened.source.manifest else None,
    }
    origin = Origin("imported", {name: value for name, value in details.items() if value is not None})
    return replace(described.record(), lineage=[*described.lineage, origin])


def _report(described: Described, left_out: Mapping[str, str], notices: list[str]) -> dict[str, Any]:
    packed = [p for p in packed_tensors(described.family, described.model.architecture) if p.role == "same"]
    is_copy = {p.ours: len(p.theirs) == 1 and not p.num_experts for p in packed}
    return {
        "copied": {p.ours: p.theirs[0] for p in packed if is_copy[p.ours]},
        "joined": {p.ours: list(p.theirs) for p in packed if not is_copy[p.ours]},
        "left_out": dict(left_out),
        "notices": notices,
    }


def _prove(
    config: ImportConfig, described: Described, source: SourceFiles, written: Path, beside: Path
) -> dict[str, Any]:
    """Which proof was made, the tensors having been compared already; CorruptionError if the logits differ."""
    if config.proof == "tensors":
        return {"proof": "tensors"}
    if described.family in DITS:
        return {"proof": "tensors", "why_no_logits": f"nobody's loader runs {described.family} without its own code"}
    peer = _peer(described, source, beside / "peer")
    attention = "causal" if described.family in AUTOREGRESSIVE else "full"
    difference = in_fresh_process("pipeline.import_checkpoint.prove:difference", written, peer, beside, attention)
    if difference > LOGITS_RTOL:
        raise CorruptionError(
            f"the converted model is not the same function: its logits differ from those of {source.directory} by "
            f"{difference:.2g} of the largest, above {LOGITS_RTOL:g}. This is a defect of the conversion; report it "
            "with the config.json"
        )
    return {"proof": "logits", "logits_difference": difference}


def _peer(described: Described, source: SourceFiles, peer: Path) -> Path:
    """The source as transformers may load it: its weights by link, its configuration, and no code but our own."""
    peer.mkdir()
    values = read_object(source.directory / CONFIG)
    for name in _NOT_THE_PEERS:
        values.pop(name, None)
    if described.family not in AUTOREGRESSIVE:
        code = Path(__file__).parents[1] / "export" / "hf"
        for path in code.glob("*.py"):
            shutil.copyfile(path, peer / path.name)
        record = described.record()
        own = write_config(described.family, record, described.special)
        given = {name: value for name, value in values.items() if value is not None}
        values = own | given | {name: own[name] for name in ("auto_map", "model_type", "architectures")}
        write_json(peer / GENERATION, write_generation_config(described.special))
    write_json(peer / CONFIG, values)
    index = [source.directory / INDEX] if source.index is not None else []
    for path in (*source.weights, *index):
        name = path.name if source.index is not None else SINGLE
        (peer / name).symlink_to(path.resolve())
    return peer
