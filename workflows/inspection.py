"""What weights at some place are: a model of ours, a training, a directory of transformers, a file.  Without torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from dlm_core.models.config import ModelConfig
from dlm_core.models.tensor_shapes import tensor_shapes
from pipeline.artifact import MANIFEST, Manifest, checked, load_manifest, open_artifact, read_json
from pipeline.config import from_json, to_json
from pipeline.errors import UserError
from pipeline.gguf_header import read_gguf_header
from pipeline.hf_config import CONFIG, Described, read_object
from pipeline.hf_directory import EXPORT_STAGE, export_manifest, read_directory
from pipeline.import_checkpoint.config import place_of_file
from pipeline.import_checkpoint.gguf_tokenizer import why_no_tokenizer
from pipeline.import_checkpoint.source import TOKENIZER, find_source
from pipeline.import_checkpoint.unused import unused
from pipeline.pretrain.given import architecture_setting
from pipeline.repack import wrong_shapes
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE, ModelRecord, Origin, load_record
from workflows.copies import local_copy
from workflows.runs import committed_outputs, frozen_plan
from workflows.step import load_stage
from workflows.store import Store

WEIGHTS_STAGES = ("convert", "ar_init", "import_checkpoint")
"""Stages whose artifacts are interchange weights."""
IN_GGUF = "in the file"
"""What is said of the tokenizer of a .gguf file."""
_CHOSEN = ("convert", "ar_init", "pretrain", "import_checkpoint", EXPORT_STAGE)
"""Which step of a run is meant where none is named: the first of these that is there."""
_SHOWN_PROBLEMS = 5
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Place:
    """A file or directory that was asked for, and the tokenizers of its run, if it is that of a run."""

    path: Path
    tokenizers: tuple[Path, ...] = ()

    def tokenizer_of(self, found: "Found") -> Path | None:
        """The one that the weights speak, if the run has it."""
        wanted = found.record and found.record.tokenizer
        return next((path for path in self.tokenizers if load_manifest(path).fingerprint == wanted), None)


@dataclass(frozen=True)
class Found:
    """What is known of it."""

    kind: str
    path: Path
    stage: str = ""
    """Stage whose artifact it is."""
    family: str = ""
    record: ModelRecord | None = None
    """None where no family of ours is what it says."""
    dtypes: tuple[str, ...] = ()
    tokenizer: str = ""
    tensors: Tensors = field(default_factory=dict[str, tuple[str, tuple[int, ...]]])
    """(dtype, shape) by name."""
    known: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Other values that it names itself."""
    notices: tuple[str, ...] = ()

    @property
    def num_params(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def place_of(source: str, store: Store) -> Place:
    """A path, or RUN or RUN:STEP of the store; UserError if there is neither."""
    path = Path(source).expanduser()
    if path.exists():
        return Place(place_of_file(path))
    run_id, _, step = source.partition(":")
    if "/" in source or run_id not in {run.run_id for run in store.runs()}:
        raise UserError(f"there is no file or directory {source}, and no run of that name in {store.url}")
    run = store.run(run_id)
    outputs = committed_outputs(store, run)
    stages = {planned.name: load_stage(planned.stage).name for planned in frozen_plan(run).steps}
    by_stage = {stages[name]: name for name in outputs}  # the last of each
    step = step or next((by_stage[stage] for stage in _CHOSEN if stage in by_stage), "")
    if step not in outputs:
        done = [name for name in outputs if stages[name] in _CHOSEN]
        raise UserError(
            f"run {run_id} has finished no step {step or 'with weights'!r}; "
            + (f"it has {', '.join(done)}" if done else f"see: dlm status {run_id}")
        )
    tokenizers = tuple(local_copy(output) for name, output in outputs.items() if stages[name] == "tokenizer")
    return Place(local_copy(outputs[step]), tokenizers)


def look_at(path: Path) -> Found:
    """What lies there; UserError if nothing that has weights does, CorruptionError if it is damaged."""
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path)
    if path.suffix == ".safetensors" and path.is_file():
        return _with_tensors(Found("safetensors file", path), [path])
    if path.is_dir() and (path / CONFIG).is_file():
        found = _of_directory(path)
        is_ours = export_manifest(path) is not None  # of whose files only those that are read need be there and sound
        return replace(found, kind="export of this project", stage=EXPORT_STAGE) if is_ours else found
    if path.is_dir() and (path / MANIFEST).is_file():
        return _of_artifact(path, open_artifact(path))
    raise UserError(
        f"{path} is nothing with weights that is known here: an artifact of this project, a directory with a "
        f"{CONFIG}, a .gguf or a .safetensors file"
    )


def _of_artifact(path: Path, manifest: Manifest) -> Found:
    name = manifest.stage
    if name in WEIGHTS_STAGES:
        record = load_record(path)
        found = Found("interchange weights", path, name, record=record, family=manifest.stats.get("family", ""))
        brings = (path / TOKENIZER).is_file()
        own = TOKENIZER if brings else f"artifact {record.tokenizer[:12]}" if record.tokenizer else ""
        return _with_tensors(replace(found, tokenizer=own), [path / WEIGHTS_FILE])
    if name == "pretrain":
        return _of_training(path, manifest)
    raise UserError(f"{path} is an artifact of the stage {name}, which holds no weights")


def _of_training(path: Path, manifest: Manifest) -> Found:
    stats = manifest.stats
    model = from_json(ModelConfig, read_json(checked(path, "model_config.json", manifest)))
    record = ModelRecord(
        model,
        stats["seq_len"],
        stats["objective"],
        stats["block_size"],
        stats["target_offset"],
        stats["within_documents"],
        manifest.inputs["tokenizer"],
        [from_json(Origin, origin) for origin in stats.get("lineage", [])],
    )
    tensors: Tensors = {name: ("F32", shape) for name, shape in tensor_shapes(model).items()}
    known = {name: stats[name] for name in ("tokens", "final_loss", "average_steps")}
    tokenizer = f"artifact {record.tokenizer[:12]}"
    return Found(
        "training", path, "pretrain", "", record, ("F32",), tokenizer, tensors, known,
        ("its weights are float32 masters in the files of its ranks",),
    )  # fmt: skip


def _of_directory(path: Path) -> Found:
    config = read_object(path / CONFIG)
    found = Found("directory of transformers", path, tokenizer=TOKENIZER if (path / TOKENIZER).is_file() else "")
    described = None
    try:
        described = read_directory(path)
        found = replace(found, family=described.family, record=described.record(), notices=described.notices)
    except UserError as error:
        plain = {name: value for name, value in config.items() if not isinstance(value, Mapping | list)}
        found = replace(found, known=plain, notices=(str(error),))
    try:
        weights = find_source(path).weights
    except UserError as error:
        return replace(found, notices=(*found.notices, str(error)))
    found = _with_tensors(found, weights)
    return found if described is None else replace(found, notices=(*found.notices, *_misfits(described, found.tensors)))


def _misfits(described: Described, tensors: Tensors) -> Iterator[str]:
    """Why an import would refuse the tensors, if their names and shapes are enough to tell."""
    family, model = described.family, described.model
    left_out = unused(family, model.architecture, tensors)
    try:
        problems = wrong_shapes(family, model, {name: at[1] for name, at in tensors.items() if name not in left_out})
    except UserError as error:
        yield str(error)
        return
    if problems:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        yield f"its tensors are not those of its {CONFIG}: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}"


def _with_tensors(found: Found, paths: Sequence[Path]) -> Found:
    files = TensorFiles(paths)
    tensors: Tensors = {name: (files.info(name).dtype, files.info(name).shape) for name in files.names}
    return replace(found, tensors=tensors, dtypes=tuple(sorted({dtype for dtype, _ in tensors.values()})))


def _of_gguf(path: Path) -> Found:
    header = read_gguf_header(path)
    tokens = header.keys.get("tokenizer.ggml.tokens")
    why_not = why_no_tokenizer(header.keys)
    short = {name: value for name, value in header.keys.items() if not isinstance(value, list)}
    if isinstance(tokens, list):
        short["tokenizer.ggml.tokens"] = f"{len(cast('list[Any]', tokens)):,} tokens"
    return Found(
        "GGUF file",
        path,
        family=str(header.keys.get("general.architecture", "")),
        dtypes=tuple(sorted({dtype for dtype, _ in header.tensors.values()})),
        tokenizer="" if why_not else IN_GGUF,
        tensors=header.tensors,
        known=short,
        notices=(f"its weights in float32: dlm convert {path} DIR --to dlm", *([why_not] if why_not else [])),
    )


def as_json(found: Found) -> dict[str, Any]:
    """Everything, for programs."""
    record = found.record
    model = record and record.model
    return {
        "kind": found.kind,
        "path": str(found.path),
        "stage": found.stage,
        "family": found.family,
        "num_params": model.num_params() if model else found.num_params,
        "num_active_params": model.num_active_params() if model else None,
        "num_embedding_params": model.vocab_size * model.architecture.d_model if model else None,
        "record": to_json(record),
        "setting": architecture_setting(model.architecture) if model else None,
        "dtypes": list(found.dtypes),
        "tokenizer": found.tokenizer,
        "tensors": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in found.tensors.items()},
        "known": to_json(found.known),
        "notices": list(found.notices),
    }
