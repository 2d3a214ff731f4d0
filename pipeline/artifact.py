"""An artifact: a directory of files and, written last, a manifest with their sizes and SHA-256.

A directory without a valid manifest does not exist for any reader.  Opening an artifact reads the manifest and
compares sizes; a file's bytes are hashed at its first touch (``checked``) and the result remembered for
the process, whatever the name it is found under.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pipeline.config import from_json, to_json
from pipeline.errors import CorruptionError, UserError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

_FileState = tuple[int, int, int, int, int]
_hashed: dict[_FileState, str] = {}
_CLOCK_TICK_NS = 20_000_000
"""Two changes of a file within one tick of the kernel's clock (at most 10 ms) may leave the same stamps."""


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact, by its path relative to the artifact."""

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in self.path:
            raise ValueError(f"path {self.path!r} leads outside the artifact")


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from, and which bytes it consists of."""

    stage: str
    fingerprint: str
    code_version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    """Name of each input -> fingerprint of the artifact it was."""
    files: list[FileRecord]
    stats: dict[str, Any] = field(default_factory=dict)
    """Counts and figures that the stage reports about its output."""
    started_at: float = 0.0
    """Seconds since the epoch, for display only."""
    elapsed_s: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    """Versions of the packages and the machine."""
    shard: dict[str, Any] = field(default_factory=dict)
    """Of a piece of a map stage: the shard that it was made from."""
    external: Any = None
    """What identified the data from outside the store that it was made from."""
    schema_version: int = SCHEMA_VERSION


def fsync_dir(path: Path) -> None:
    """Flush a directory entry to disk, so that a rename in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace a file as a whole: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.writelines([data] if isinstance(data, bytes) else data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def json_bytes(value: Any) -> bytes:
    """A value as it is written to disk: indented JSON."""
    return (json.dumps(to_json(value), indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of indented JSON."""
    write_atomic(path, json_bytes(value))


def create_file(path: Path, data: bytes) -> bool:
    """Create a file completely or not at all; False if it was there already.

    The content is written aside and linked into place: link(2) is atomic and exclusive, locally and on NFS,
    and no reader can see the file half written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            if temporary.stat().st_nlink == 1:
                return False
            # Linked all the same: a server of NFS that answers twice says so.
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return True


class Readable(Protocol):
    """A file that can be read: a path, or a place in a storage."""

    def read_bytes(self) -> bytes:
        """All of it."""
        ...


def read_json(path: Readable) -> Any:
    """Parse a JSON file; CorruptionError if it is not one."""
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptionError(f"{path} is not valid JSON: {error}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered for the process while inode, size, mtime and ctime stay the same."""
    with path.open("rb") as handle:
        state = _file_state(os.fstat(handle.fileno()))
        if (known := _hashed.get(state)) is not None:
            return known
        is_settled = time.time_ns() - state[-1] > _CLOCK_TICK_NS
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if is_settled:
        _hashed[state] = digest
    return digest


def _file_state(stat: os.stat_result) -> _FileState:
    """What changes with the bytes of a file.  A new file may have inode, size and mtime of a deleted one, not ctime."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def list_files(directory: Path) -> list[Path]:
    """All regular files below a directory but its manifest, sorted, relative to it; symbolic links are refused."""
    found: list[Path] = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise CorruptionError(f"{path} is a symbolic link; an artifact holds plain files only")
        if path.is_file() and path != directory / MANIFEST:
            found.append(path.relative_to(directory))
    return found


def record_file(directory: Path, relative: Path) -> FileRecord:
    """Flush and hash one file."""
    path = directory / relative
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return FileRecord(relative.as_posix(), path.stat().st_size, file_sha256(path))


def record_files(directory: Path) -> list[FileRecord]:
    """Flush and hash every file below a directory."""
    records = [record_file(directory, relative) for relative in list_files(directory)]
    for parent in {(directory / r.path).parent for r in records}:
        fsync_dir(parent)
    return records


class Folder(Protocol):
    """Where an artifact lies: a directory, or a place in a storage."""

    def __truediv__(self, name: str, /) -> Readable:
        """A file in it."""
        ...


def load_manifest(directory: Folder) -> Manifest:
    """The manifest of an artifact; UserError if there is none, CorruptionError if it cannot be trusted."""
    path = directory / MANIFEST
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(
            f"{directory} is not a finished artifact: it has no {MANIFEST}. Point to a directory that a stage "
            "has completed, or run that stage again"
        ) from None
    version = value.get("schema_version") if isinstance(value, Mapping) else None
    if version != SCHEMA_VERSION:
        raise CorruptionError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}")
    try:
        return from_json(Manifest, value)
    except UserError as error:
        raise CorruptionError(f"{path} is not a manifest: {error}") from error


def check_file_sizes(where: str, manifest: Manifest, found: Mapping[str, int]) -> None:
    """CorruptionError unless every file of a manifest was found (path -> bytes) with its size."""
    for record in manifest.files:
        size = found.get(record.path)
        if size != record.size_bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise CorruptionError(f"{where}/{record.path} {state}, the manifest says {record.size_bytes} bytes")


def open_artifact(directory: Path) -> Manifest:
    """Manifest of an artifact whose files are all there with the recorded sizes."""
    manifest = load_manifest(directory)
    paths = {record.path: directory / record.path for record in manifest.files}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    check_file_sizes(str(directory), manifest, sizes)
    return manifest


def checked(directory: Path, relative: str, manifest: Manifest | None = None) -> Path:
    """Path of one file of an artifact, its bytes verified against the manifest (read, if it is not at hand)."""
    for record in (manifest or load_manifest(directory)).files:
        if record.path == relative:
            return checked_record(directory, record)
    raise CorruptionError(f"{directory} has no file {relative} in its manifest")


def checked_files(directory: Path, pattern: str) -> list[Path]:
    """Paths of the files that match a glob, sorted by name, each verified against the manifest."""
    records = [r for r in load_manifest(directory).files if Path(r.path).match(pattern)]
    return [checked_record(directory, record) for record in sorted(records, key=lambda r: r.path)]


def checked_record(directory: Path, record: FileRecord) -> Path:
    """Path of a file of an artifact whose manifest is at hand, its bytes verified; CorruptionError if they differ."""
    path = directory / record.path
    if not path.is_file():
        raise CorruptionError(f"{path} is missing although it was committed")
    if file_sha256(path) != record.sha256:
        raise CorruptionError(
            f"{path} does not have the bytes that were committed (SHA-256 differs). Delete {_whole(directory)} and run "
            "the stage again"
        )
    return path


def _whole(directory: Path) -> Path:
    """What to delete of a damaged artifact: in a store, all its attempts with the record of which of them counts."""
    return directory.parent.parent if directory.parent.name == "attempts" else directory


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file under a second name: a hard link where the file system allows, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    before = _file_state(source.stat())
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        return
    after = _file_state(target.stat())
    if before in _hashed and after[:-1] == before[:-1]:
        _hashed[after] = _hashed[before]  # the link alone has changed ctime


def remove_tree(directory: Path) -> None:
    """Delete an artifact or a checkpoint, its manifest first, so that no half of it looks complete."""
    with contextlib.suppress(OSError):
        (directory / MANIFEST).unlink()
    shutil.rmtree(directory, ignore_errors=True)
