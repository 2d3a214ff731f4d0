"""The training state on disk: the format of a checkpoint, how it is verified, and how any part of it is read.

Each rank wrote one safetensors file of float32 stretches: consecutive elements of one tensor of one parameter of the
*plain* model, whatever ZeRO and AutoEP had made of it.  Their names say where they belong (``tensor_name``), so that
ranks that hold other parts, or no rank at all, read what they need.  manifest.json has everything that is no tensor.
Nothing is ever unpickled.
"""

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import MANIFEST, FileRecord, file_sha256, read_json, write_json
from pipeline.config import fingerprint, from_json, to_json
from pipeline.errors import CorruptionError, UserError

if TYPE_CHECKING:
    import numpy as np

    from pipeline.tensor_files import TensorFiles

SCHEMA_VERSION = 2
"""Version 1 was DeepSpeed's own files."""
MASTER, EMA = "master", "ema"
"""Names of what a parameter has besides what its optimizer keeps: its float32 value, and the average of these."""
_CHECKSUM = "sha256"
_NAME = re.compile(r"step-(\d{8})")
_HASHING_THREADS = 8
_READING_THREADS = 8
_READ_ELEMENTS = 1 << 22
"""Of a file by one thread at a time: 16 MB."""
_COPIED_ELEMENTS = 1 << 24
"""On their way to a GPU at a time: 64 MB."""
_PATIENCE_S = (0.05, 0.2, 0.75, 3.0)
"""Waits for a file that another machine wrote and this one does not see yet, or that can't be read at the moment."""

Stretch = tuple[str, str, int, int]
"""(which tensor, parameter of the plain model, first element in the flattened parameter, number of elements)."""


@dataclass(frozen=True)
class Topology:
    """How the ranks that wrote a checkpoint shared the work; those that read it may share it otherwise."""

    workers: int
    zero_stage: int
    ep_size: int
    precision: str
    micro_batch_seqs: int


@dataclass(frozen=True)
class CheckpointManifest:
    """The record that makes a directory a checkpoint."""

    step: int
    """Optimizer steps done, skipped ones included."""
    fingerprint: str
    """Of the pretraining artifact that the checkpoint belongs to."""
    identity: dict[str, Any]
    """What the fingerprint was made of: a refusal can say what differs."""
    topology: Topology
    shapes: dict[str, list[int]]
    """Of every parameter and buffer of the plain model."""
    optimizer_steps: int
    """Updates that the optimizer has applied: Adam corrects its bias by it."""
    skipped_steps: int
    extras: dict[str, Any]
    """What else the training wants back after a resume."""
    lineage: list[dict[str, Any]]
    """Changes of the identity that a user has accepted on the way, oldest first."""
    files: list[FileRecord]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def file_name(rank: int) -> str:
    """File of one rank."""
    return f"rank-{rank:05d}.safetensors"


def tensor_name(stretch: Stretch) -> str:
    """Name of a stretch in its file."""
    which, parameter, start, _ = stretch
    return f"{which}:{parameter}:{start}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints, newest first, none of them verified yet."""
    found = [p for p in directory.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, reverse=True)


def write_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    """Write the record of a checkpoint, with a checksum of its own."""
    value = to_json(manifest)
    write_json(directory / MANIFEST, {**value, _CHECKSUM: fingerprint(value)})


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The record of a checkpoint whose files are not looked at yet.

    Raises CorruptionError, or UserError if another version of this program wrote it.
    """
    path = checkpoint / MANIFEST
    try:
        _patiently(lambda: _plain_size(path), path)
    except TimeoutError:
        raise CorruptionError(f"{path} is missing") from None
    value = _patiently(lambda: read_json(path), path)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        age = "a newer" if version > SCHEMA_VERSION else "an older"
        raise UserError(
            f"{checkpoint} was written by {age} version of this program (schema version {version}, this one reads "
            f"{SCHEMA_VERSION}); use that version to go on, or delete the checkpoints to start over"
        )
    if not isinstance(value, dict) or value.pop(_CHECKSUM, None) != _fingerprint(value):
        raise CorruptionError(f"{path} is damaged: it does not have the checksum that it says it has")
    try:
        manifest = from_json(CheckpointManifest, value)
    except UserError as error:
        raise CorruptionError(f"{path} is not a checkpoint manifest: {error}") from None
    if checkpoint.name != checkpoint_name(manifest.step):
        raise CorruptionError(f"{checkpoint} says that it is of step {manifest.step}")
    check_file_set(checkpoint, manifest.topology, manifest.files)
    return manifest


def _fingerprint(value: dict[str, Any]) -> str | None:
    try:
        return fingerprint(value)
    except (UserError, UnicodeEncodeError):  # a number or a text that no manifest is written with
        return None


def check_file_set(checkpoint: Path, topology: Topology, records: Iterable[FileRecord]) -> None:
    """CorruptionError unless there is exactly one file of each rank."""
    wanted, found = {file_name(rank) for rank in range(topology.workers)}, [record.path for record in records]
    if wanted != set(found) or len(found) != len(wanted):
        lacking, foreign = sorted(wanted - set(found)), sorted(set(found) - wanted)
        raise CorruptionError(
            f"{checkpoint} does not have the files of its {topology.workers} ranks: it lacks {lacking or 'none'}, and "
            f"{foreign or 'nothing'} does not belong to it"
        )


def verify(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """CorruptionError naming the file unless every byte is what was written, and no element is absent or double."""
    check_sizes(checkpoint, manifest)
    verify_bytes(checkpoint, manifest.files)
    check_content(checkpoint, manifest)


def check_sizes(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """CorruptionError naming the file unless each is there with its size, or soon is; none is opened."""

    def look(path: Path, size_bytes: int) -> None:
        if _plain_size(path) != size_bytes:
            raise FileNotFoundError(errno.ENOENT, "not there as it was written", str(path))

    for record in manifest.files:
        path = checkpoint / record.path
        try:
            _patiently(partial(look, path, record.size_bytes), path)
        except TimeoutError:
            raise CorruptionError(f"{path} is missing or has the wrong size") from None


def verify_bytes(checkpoint: Path, records: Sequence[FileRecord], beat: Callable[[], None] = lambda: None) -> None:
    """CorruptionError naming the file unless every byte of these files is what was written; nothing is parsed.

    ``beat`` is called after each file, to show that there is progress.
    """
    paths = [checkpoint / record.path for record in records]
    with ThreadPoolExecutor(max(1, min(_HASHING_THREADS, os.cpu_count() or 1, len(paths)))) as pool:
        for path, record, digest in zip(paths, records, pool.map(_sha256_patiently, paths), strict=True):
            if digest != record.sha256:
                raise CorruptionError(f"{path} is damaged: its SHA-256 differs from the manifest")
            beat()


def check_content(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """CorruptionError unless files whose bytes are right are of training state, no element of it absent or double."""
    StateFiles(checkpoint, manifest)


def check_coverage(stretches: Iterable[Stretch], shapes: Mapping[str, Sequence[int]], name: str) -> None:
    """CorruptionError unless the stretches hold every element of every parameter exactly once.

    Of what an optimizer keeps, a parameter has all elements or none.
    """
    ends: dict[tuple[str, str], int] = {}
    for which, parameter, start, numel in sorted(stretches):
        end = ends.get((which, parameter), 0)
        if parameter not in shapes:
            raise CorruptionError(f"{name}: {parameter} is no parameter of the model")
        if start != end:
            state = "double" if start < end else "absent"
            raise CorruptionError(f"{name}: elements of {which} of {parameter} are {state} at {min(start, end)}")
        ends[which, parameter] = end + numel
    missing = [parameter for parameter in shapes if (MASTER, parameter) not in ends]
    if missing:
        raise CorruptionError(f"{name} lacks the values of {', '.join(missing)}")
    for (which, parameter), end in ends.items():
        if end != _numel(shapes[parameter]):
            raise CorruptionError(
                f"{name}: {which} of {parameter} has {end} elements, the model wants {_numel(shapes[parameter])}"
            )


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


class StateFiles:
    """Reads any part of the state from the files of all ranks, straight to where it is wanted."""

    def __init__(self, checkpoint: Path, manifest: CheckpointManifest) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self.step, self.shapes = manifest.step, manifest.shapes
        self._stretches: dict[tuple[str, str], list[tuple[int, int, TensorFiles]]] = {}
        found: list[Stretch] = []
        for record in manifest.files:
            files = _open_patiently(checkpoint / record.path)
            for stretch in _stretches_of(files, checkpoint / record.path):
                which, parameter, start, numel = stretch
                found.append(stretch)
                self._stretches.setdefault((which, parameter), []).append((start, numel, files))
        check_coverage(found, manifest.shapes, str(checkpoint))
        for parts in self._stretches.values():
            parts.sort(key=lambda part: part[0])

    def has(self, which: str, parameter: str) -> bool:
        """Whether a parameter has it."""
        return (which, parameter) in self._stretches

    def read(self, which: str, parameter: str, start: int, target: Any) -> None:
        """Fill a flat float32 array or tensor, on any device, with consecutive elements from ``start`` on.

        Raises UserError if nothing of the kind was saved.
        """
        if (which, parameter) not in self._stretches:
            raise UserError(
                f"{self.checkpoint} has no {which!r} of {parameter}, which this training keeps: it was written with "
                "another optimizer. Set the optimizer back, or start over"
            )
        import numpy as np

        if isinstance(target, np.ndarray):
            self._fill((which, parameter), start, target)
        elif target.device.type == "cpu":
            self._fill((which, parameter), start, target.detach().numpy())
        else:
            import torch

            for first in range(0, target.numel(), _COPIED_ELEMENTS):
                part = target[first : first + _COPIED_ELEMENTS]
                host = torch.empty(part.numel())
                self._fill((which, parameter), start + first, host.numpy())
                part.copy_(host)

    def _fill(self, key: tuple[str, str], start: int, target: "np.ndarray") -> None:
        reads: list[Callable[[], None]] = []
        stop = start + target.size
        for first, numel, files in self._stretches[key]:
            low, high = max(start, first), min(stop, first + numel)
            for here in range(low, high, _READ_ELEMENTS):
                part = target[here - start : min(high, here + _READ_ELEMENTS) - start]
                reads.append(partial(files.read_elements, tensor_name((*key, first, numel)), here - first, part))
        if target.size <= _READ_ELEMENTS:
            for read in reads:
                read()
            return
        with ThreadPoolExecutor(max(1, min(_READING_THREADS, os.cpu_count() or 1, len(reads)))) as pool:
            for _ in pool.map(lambda read: read(), reads):
                pass

    def whole(self, which: str, parameter: str) -> "np.ndarray":
        """A parameter's array in its shape."""
        import numpy as np

        flat = np.empty(_numel(self.shapes[parameter]), np.float32)
        self.read(which, parameter, 0, flat)
        return flat.reshape(self.shapes[parameter])


def _stretches_of(files: "TensorFiles", path: Path) -> Iterator[Stretch]:
    """The stretches of one file."""
    for name in files.names:
        info, (which, parameter, start) = files.info(name), [*name.split(":"), "", ""][:3]
        stretch = (which, parameter, int(start) if start.isdecimal() else 0, info.numel)
        if tensor_name(stretch) != name or info.dtype != "F32" or len(info.shape) != 1:
            raise CorruptionError(
                f"{path} is not a file of training state: {name!r} is no stretch of float32 elements, but {info.dtype} "
                f"{list(info.shape)}"
            )
        yield stretch


def _sha256_patiently(path: Path) -> str:
    return _patiently(lambda: file_sha256(path), path)


def _open_patiently(path: Path) -> "TensorFiles":
    return _patiently(lambda: _open(path), path)


def _open(path: Path) -> "TensorFiles":
    from pipeline.tensor_files import TensorFiles

    try:
        return TensorFiles([path])
    except (CorruptionError, UserError) as error:
        raise CorruptionError(f"{path} is not a file of training state: {error}") from None


def _plain_size(path: Path) -> int:
    """Size of a file; FileNotFoundError if there is none, or something else in its place, such as a link."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, "no plain file", str(path))
    return found.st_size


def _patiently(look: Callable[[], Any], path: Path) -> Any:
    """What a look at a file finds, as soon as this machine sees it and its storage can read it.

    Raises TimeoutError if it is not seen: that is not the file's fault.  CorruptionError if it can't be read: here
    there are older checkpoints to fall back to, and a sector that is lost stays lost.
    """
    for wait_s in _PATIENCE_S:
        try:
            return look()
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and error.errno != errno.EIO:
                raise
        time.sleep(wait_s)
    waited = f"after {sum(_PATIENCE_S):.0f} s"
    try:
        return look()
    except FileNotFoundError:
        raise TimeoutError(f"{path} was committed, but this machine does not see it {waited}") from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CorruptionError(f"{path} still cannot be read {waited} ({error})") from error
