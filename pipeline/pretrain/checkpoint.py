"""Training checkpoints that are complete or absent.

DeepSpeed names a checkpoint as the latest before all ranks have written it, and checksums nothing.  So every
rank writes into a staging directory, reports the sizes and SHA-256 of its files, rank 0 compares them with the
files that the topology demands, writes the manifest last and renames the directory into place.  Readers list
``step-*`` directories, newest first, verify all hashes before anything is parsed, and set damaged ones aside.
"""

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import (
    MANIFEST,
    FileRecord,
    file_sha256,
    fsync_dir,
    read_json,
    remove_tree,
    write_json,
)
from pipeline.config import diff, from_json
from pipeline.errors import CorruptionError, UserError

DEEPSPEED_TAG = "ds"
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Topology:
    """What the files of a DeepSpeed checkpoint are tied to."""

    workers: int
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class CheckpointManifest:
    """The record that makes a directory a checkpoint."""

    step: int
    """Optimizer steps done."""
    fingerprint: str
    """Of the pretraining artifact that the checkpoint belongs to."""
    topology: Topology
    files: list[FileRecord]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION


def expected_files(topology: Topology) -> set[str]:
    """Names of the files that all ranks together must have written."""
    bf16 = "bf16_" if topology.precision == "bf16" else ""
    ranks = range(topology.workers)
    optimizer = {f"{bf16}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in ranks}
    if topology.zero_stage == 3:
        return optimizer | {f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in ranks}
    return optimizer | {"mp_rank_00_model_states.pt"}


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints, newest first, none of them verified yet."""
    found = [p for p in directory.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, reverse=True)


def load_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """Manifest of a checkpoint after all its files proved to have the bytes that were written.

    Raises CorruptionError naming the file.
    """
    value = _read(checkpoint / MANIFEST)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{checkpoint} was written by a newer version of this program (schema version {version}, this one reads "
            f"{SCHEMA_VERSION}); use that version to go on"
        )
    try:
        manifest = from_json(CheckpointManifest, value)
    except UserError as error:
        raise CorruptionError(f"{checkpoint / MANIFEST} is not a checkpoint manifest: {error}") from None
    if manifest.schema_version != SCHEMA_VERSION or checkpoint.name != checkpoint_name(manifest.step):
        raise CorruptionError(
            f"{checkpoint} says step {manifest.step} and schema version {manifest.schema_version}; this program wrote "
            f"or reads neither (its schema version is {SCHEMA_VERSION})"
        )
    names = {Path(record.path).name for record in manifest.files}
    missing = expected_files(manifest.topology) - names
    if missing:
        raise CorruptionError(f"{checkpoint} lacks {sorted(missing)}")
    for record in manifest.files:
        path = checkpoint / record.path
        if not path.is_file() or path.stat().st_size != record.size_bytes:
            raise CorruptionError(f"{path} is missing or has the wrong size")
        if file_sha256(path) != record.sha256:
            raise CorruptionError(f"{path} is damaged: its SHA-256 differs from the manifest")
    return manifest


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CorruptionError(f"{path} is missing")
    return read_json(path)


def newest_valid(directory: Path, warn: Callable[[str], None]) -> tuple[Path, CheckpointManifest] | None:
    """The newest checkpoint that verifies; damaged ones are renamed aside with a warning.

    None if there never was one.  Raises CorruptionError if there were some and all are damaged: starting over
    silently would throw away the run.
    """
    candidates = list_checkpoints(directory)
    for checkpoint in candidates:
        try:
            return checkpoint, load_checkpoint_manifest(checkpoint)
        except CorruptionError as error:
            aside = checkpoint.with_name(f"corrupt-{checkpoint.name}-{time.time_ns()}")
            checkpoint.rename(aside)
            warn(f"{error}; set aside as {aside.name}, falling back to the checkpoint before")
    if candidates or any(directory.glob("corrupt-step-*")):
        raise CorruptionError(
            f"all checkpoints in {directory} are damaged. To train again from step 0, delete that directory"
        )
    return None


def check_topology(found: Topology, wanted: Topology) -> None:
    """UserError if a checkpoint was written by another number of workers, ZeRO stage or precision."""
    differing = diff(asdict(found), asdict(wanted))
    if differing:
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in differing.items())
        raise UserError(
            f"the unfinished training was started with another topology ({changes}), and its checkpoint can be "
            "continued only with the same one. Set it back, or delete the checkpoints to start over"
        )


def free_bytes(directory: Path) -> int:
    """Free space of the file system that holds a directory."""
    return shutil.disk_usage(directory).free


def publish(
    staging: Path,
    final: Path,
    step: int,
    fingerprint: str,
    topology: Topology,
    records: list[FileRecord],
    versions: dict[str, str],
) -> None:
    """Rank 0: check the file set, write the manifest, rename the staging directory into place."""
    names = {Path(record.path).name for record in records}
    missing = expected_files(topology) - names
    if missing:
        raise CorruptionError(f"the checkpoint of step {step} lacks {sorted(missing)}; nothing was published")
    manifest = CheckpointManifest(step, fingerprint, topology, records, versions)
    write_json(staging / MANIFEST, manifest)
    fsync_dir(staging / DEEPSPEED_TAG)
    if final.exists() and _is_whole(final):
        shutil.rmtree(staging)  # the same step of the same training, published by an attempt that was thought dead
        return
    remove_tree(final)
    staging.rename(final)
    fsync_dir(final.parent)


def _is_whole(checkpoint: Path) -> bool:
    try:
        load_checkpoint_manifest(checkpoint)
    except CorruptionError:
        return False
    return True


def retain(directory: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for checkpoint in list_checkpoints(directory)[keep:]:
        remove_tree(checkpoint)


def clear_staging(directory: Path) -> None:
    """Remove what attempts that died had not published."""
    for leftover in directory.glob("staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)
