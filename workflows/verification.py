"""Whether committed artifacts still have the bytes that were committed: every file is read and hashed."""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import FileRecord
from pipeline.errors import CorruptionError
from pipeline.storage import Place
from workflows.runs import frozen_plan
from workflows.step import load_stage
from workflows.store import ArtifactPlace, RunPlace, Store


@dataclass(frozen=True)
class Verified:
    """An artifact that was looked at."""

    artifact: str
    """<stage>/<fp12>."""
    path: str
    """Path or URL of the committed attempt; of the folder, where that cannot be told."""
    num_files: int
    num_bytes: int
    faults: list[str]
    """What is not as it was committed."""
    delete: str
    """What to delete so that it is built again."""


def artifacts_of_run(store: Store, run: RunPlace) -> dict[str, ArtifactPlace]:
    """Step -> place of its artifact, committed or not."""
    return {step.name: store.artifact(load_stage(step.stage).name, step.fingerprint) for step in frozen_plan(run).steps}


def all_artifacts(store: Store) -> Iterator[ArtifactPlace]:
    """Every place of an artifact in a store, committed or not."""
    for stage in (store.root / "artifacts").names():
        yield from store.artifacts(stage)


def verify_artifact(place: ArtifactPlace) -> Verified | None:
    """Hash every file of a committed artifact; None for one that is not committed."""
    delete = str(place.directory)
    try:
        committed = place.committed_manifest()
    except CorruptionError as error:
        return Verified(place.address, delete, 0, 0, [str(error)], delete)
    if committed is None:
        return None
    directory, manifest = committed
    faults = [fault for record in manifest.files if (fault := _fault(directory, record))]
    num_bytes = sum(record.size_bytes for record in manifest.files)
    return Verified(place.address, str(directory), len(manifest.files), num_bytes, faults, delete)


def _fault(directory: Place, record: FileRecord) -> str:
    """What is wrong with a file; nothing if its bytes are those of the manifest."""
    file = directory / record.path
    try:
        found = _sha256(file)
    except FileNotFoundError:
        return f"{file} is missing"
    return "" if found == record.sha256 else f"{file} has SHA-256 {found}, the manifest says {record.sha256}"


def _sha256(file: Place) -> str:
    """Of the bytes as they lie there now: nothing that was remembered is believed."""
    if file.is_local:
        return _hash(file.path)
    with tempfile.TemporaryDirectory(prefix="dlm-verify-") as folder:
        copy = Path(folder) / "file"
        file.storage.download(file.key, copy)
        return _hash(copy)


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
