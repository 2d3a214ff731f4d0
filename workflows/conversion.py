"""``dlm convert``: a checkpoint into another layout, by the stages of the pipeline, one after the other, here.

Without a store, Ray or DeepSpeed.  What is made lies beside the destination until all of it is proved.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipeline.artifact import MANIFEST, fsync_dir, open_artifact, write_json
from pipeline.config import apply_settings
from pipeline.convert.config import STAGE as CONVERT
from pipeline.convert.config import ConvertConfig
from pipeline.errors import UserError
from pipeline.export.config import STAGE as EXPORT
from pipeline.export.config import Dtype, ExportConfig
from pipeline.export.fit import DIFFUSION
from pipeline.export.run import STORED, check_exportable
from pipeline.gguf_header import INSTEAD
from pipeline.hf_config import CONFIG
from pipeline.hf_directory import EXPORT_AGAIN
from pipeline.hf_names import Family
from pipeline.import_checkpoint.config import STAGE as IMPORT
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.import_checkpoint.source import TOKENIZER
from pipeline.lineage import tokenizer_remedy
from pipeline.repack import dtypes_kept
from pipeline.stage import (
    Stage,
    StageContext,
    build_manifest,
    check_external,
    external_identity,
    nobody_else,
    run_here,
    stage_fingerprint,
)
from pipeline.tokenizer.config import STAGE as TOKENIZERS
from pipeline.weights import check_tokenizer
from workflows.inspection import IN_GGUF, Found

INTERCHANGE = "dlm"
"""What --to calls this project's own layout."""
_EXPORTED = "export of this project"
_DIRECTORIES = ("directory of transformers", _EXPORTED)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """What is to be made of what."""

    stages: tuple[Stage, ...]
    configs: Mapping[str, Any]
    """By name of the stage."""
    source: Path
    tokenizer: Path | None = None
    kept_in: Dtype | None = None
    """Dtype of all tensors of the source, or of the checkpoint that they are unchanged; None: several, or unknown."""


def plan_conversion(
    found: Found,
    to: str,
    export: Mapping[str, Any],
    tokenizer: Path | None,
    settings: Sequence[tuple[str, Any]],
    tokenizer_of_run: Path | None = None,
) -> Conversion:
    """The stages that lead there; UserError where there is nothing to do, or where the family cannot say the model.

    ``export`` are fields of ExportConfig; ``settings`` have paths that begin with the name of a stage.
    ``tokenizer_of_run`` is taken where none is given and one is wanted.
    """
    stages: list[Stage] = []
    configs: dict[str, Any] = {}
    kept_in = _kept_in(found)
    if found.kind == "training":
        stages, configs = [CONVERT], {CONVERT.name: ConvertConfig()}
    elif found.kind in (*_DIRECTORIES, "GGUF file"):
        stages, configs = [IMPORT], {IMPORT.name: ImportConfig(path=str(found.path))}
    elif found.kind != "interchange weights":
        raise UserError(
            f"{found.path} is a {found.kind}: its model is not known without the config.json beside it. Give the "
            "directory"
        )
    if to != INTERCHANGE:
        stages.append(EXPORT)
        values = {"dtype": kept_in, **export} if kept_in else export
        configs[EXPORT.name] = ExportConfig(family=to, **values)  # pyright: ignore[reportArgumentType]
    elif not stages:
        raise UserError(f"{found.path} has interchange weights already; --to names the family to write")
    elif export or tokenizer:
        raise UserError(
            f"--to {INTERCHANGE} writes float32 weights without a tokenizer; leave --dtype and --tokenizer out"
        )
    configs = apply_settings(configs, settings)
    if to != INTERCHANGE:
        if tokenizer is None and not configs[EXPORT.name].without_tokenizer:
            tokenizer = tokenizer_of_run
        _check_export(configs[EXPORT.name], found, tokenizer)
    return Conversion(tuple(stages), configs, found.path, tokenizer, kept_in)


def _kept_in(found: Found) -> Dtype | None:
    record = found.record
    dtypes: list[str] = []
    if record is not None and found.tensors and found.kind in _DIRECTORIES:
        stored = {name: dtype for name, (dtype, _) in found.tensors.items()}
        dtypes = dtypes_kept(cast("Family", found.family), record.model, stored)
    elif record is not None and record.lineage and found.kind == "interchange weights":
        last = record.lineage[-1]
        is_unchanged = last.kind == "imported" and "dequantised_from" not in last.details
        dtypes = last.details.get("dtype", []) if is_unchanged else []
    return next((name for name, stored in STORED.items() if dtypes == [stored]), None)


def _check_export(config: ExportConfig, found: Found, tokenizer: Path | None) -> None:
    """UserError for what the last stage would refuse: before hours of reading, not after them."""
    if found.record is not None:
        check_exportable(config, found.record, "--to")
    if tokenizer is not None:
        _check_tokenizer(config, found, tokenizer)
    if tokenizer is None and found.tokenizer not in (TOKENIZER, IN_GGUF) and not config.without_tokenizer:
        raise UserError(f"{found.path} brings no tokenizer. {_remedy(found)}, or --set export.without_tokenizer=true")


def _remedy(found: Found) -> str:
    """Where a tokenizer comes from."""
    if found.record is not None and found.record.tokenizer:
        return f"Give that of its training (--tokenizer DIR, an artifact of the stage {TOKENIZERS.name})"
    if found.kind == _EXPORTED:
        return EXPORT_AGAIN
    if found.kind == "GGUF file":
        return INSTEAD
    lineage = found.record.lineage if found.record is not None and found.kind == "interchange weights" else []
    imports = [origin.details for origin in lineage if origin.kind == "imported"]
    return tokenizer_remedy(imports[-1] if imports else {})


def _check_tokenizer(config: ExportConfig, found: Found, tokenizer: Path) -> None:
    if config.without_tokenizer:
        raise UserError(f"--tokenizer is {tokenizer}, but export.without_tokenizer is true; leave one of them out")
    stage = open_artifact(tokenizer).stage if (tokenizer / MANIFEST).is_file() else ""
    if stage != TOKENIZERS.name:
        raise UserError(
            f"--tokenizer {tokenizer} is {f'an artifact of the stage {stage}' if stage else 'no artifact'}; it takes "
            f"one of the stage {TOKENIZERS.name}, that of a training. A checkpoint of another project has none: leave "
            f"--tokenizer out and put its {TOKENIZER} beside the {CONFIG} of the checkpoint"
        )
    may_be_of_import = "checkpoint" in open_artifact(tokenizer).inputs  # which is there only once it is imported
    if found.kind in ("training", "interchange weights") or (found.kind == _EXPORTED and not may_be_of_import):
        assert found.record is not None
        check_tokenizer(found.record, found.path, tokenizer)


def convert(conversion: Conversion, target: Path, say: Say) -> None:
    """Make ``target``, a directory that is not there yet or empty; an interrupted conversion leaves nothing in it.

    What a killed one leaves beside it is removed by the next to the same place.
    """
    _check_free(target)
    new_parents = [path for path in target.parents if not path.exists()]
    work = target.with_name(f".{target.name}.converting")
    work.mkdir(parents=True, exist_ok=True)
    with nobody_else(target, work):
        try:
            _check_free(target)  # from a call that held the lock until now
            made = conversion.source
            for stage in conversion.stages:
                made = _make(stage, conversion, made, work, say)
            made.rename(target)
            fsync_dir(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: it is done, or others have put something there
                for path in new_parents:
                    path.rmdir()
    say(f"it lies in {target}")


def _check_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already; choose a new or an empty directory")


def _make(stage: Stage, conversion: Conversion, source: Path, work: Path, say: Say) -> Path:
    """The artifact of a stage, made in ``work``."""
    config = conversion.configs[stage.name]
    inputs = {name: source for name in stage.inputs}
    if stage is EXPORT and conversion.tokenizer is not None:
        inputs["tokenizer"] = conversion.tokenizer
    out = make_artifact(stage, config, inputs, work)
    for line in _told(stage, config, conversion.kept_in, open_artifact(out).stats):
        say(f"{stage.name:17}  {line}")
    return out


def make_artifact(stage: Stage, config: Any, inputs: Mapping[str, Path], work: Path) -> Path:
    """Run a stage in this process; its committed artifact in ``work``."""
    out, state = work / stage.name, work / f"{stage.name}.state"
    for directory in (out, state):
        shutil.rmtree(directory, ignore_errors=True)  # of one that was killed
        directory.mkdir()
    started_at, start_s = time.time(), time.monotonic()
    external = external_identity(stage, config)
    own = stage_fingerprint(stage, config, {n: open_artifact(path).fingerprint for n, path in inputs.items()}, external)
    stats = run_here(stage, config, inputs, StageContext(out, state, own)) or {}
    check_external(stage, config, external)
    elapsed_s = time.monotonic() - start_s
    manifest = build_manifest(stage, config, own, inputs, out, stats, started_at, elapsed_s, external=external)
    write_json(out / MANIFEST, manifest)
    return out


def _told(stage: Stage, config: Any, kept_in: Dtype | None, stats: Mapping[str, Any]) -> list[str]:
    """What a stage did, in words."""
    proof = "every tensor read back, bit for bit"
    lines = [f"{stats['num_params']:,} parameters in {stats['tensors']} tensors"]
    if stage is IMPORT:
        lines[0] = f"read as {stats['family']}: {lines[0]}; {stats['left_out']} left out"
        lines += [f"note: {notice}" for notice in stats["notices"]]
    if stage is CONVERT:
        lines[0] += f", of step {', '.join(map(str, stats['steps']))}"
    if stage is EXPORT:
        lines[0] = f"written as {stats['family']} in {config.dtype}: {lines[0]}, {len(stats['files'])} file(s)"
        if stats["objective"] != "autoregressive_nll" and config.family not in DIFFUSION:
            lines.append(
                f"note: `generate` is causal and meaningless for this model, a diffusion model in the tensors of "
                f"{config.family}; README.md says how it is used"
            )
        if config.dtype not in ("float32", kept_in):
            proof += f", with the float32 weights rounded to {config.dtype}"
    if stats["proof"] == "logits" and "logits_difference" in stats:
        proof += f"; logits in a fresh process, which differ by {stats['logits_difference']:.2g} of the largest"
    elif stats["proof"] == "logits":
        proof += "; logits in a fresh process, which are the same numbers"
    return [*lines, f"proved: {proof}"]
