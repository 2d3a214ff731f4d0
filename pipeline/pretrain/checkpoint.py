"""The checkpoints of one training: which of them counts, how one is published, and which are deleted.

A checkpoint is complete or absent.  Every rank writes into a staging directory; when all files are on the disk, rank 0
writes the manifest and renames the directory into place.  Readers list ``step-*`` directories, newest first, verify all
hashes before anything is parsed, and set damaged ones aside.  What is in the files: pipeline/training_state.py.

With a store that is no file system, every rank has brought its file there by then, and the exclusive creation of a
record takes the place of the rename (pipeline/mirror.py).  One who goes on brings the newest to its machine first.
"""

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, FileRecord, fsync_dir, record_file, remove_tree
from pipeline.config import diff
from pipeline.errors import CorruptionError, UserError
from pipeline.mirror import Mirror, Published
from pipeline.pretrain.ranks import Ranks, done_by_all, done_by_first
from pipeline.training_state import (
    CheckpointManifest,
    check_content,
    check_file_set,
    check_sizes,
    checkpoint_name,
    list_checkpoints,
    read_manifest,
    verify,
    verify_bytes,
    write_manifest,
)


def load_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """Manifest of a checkpoint after all its files proved to have the bytes that were written.

    Raises CorruptionError naming the file.
    """
    manifest = read_manifest(checkpoint)
    verify(checkpoint, manifest)
    return manifest


def newest_valid(
    directory: Path,
    ranks: Ranks,
    warn: Callable[[str], None],
    accept: Callable[[Path, CheckpointManifest], object] = lambda checkpoint, manifest: None,
) -> tuple[Path, CheckpointManifest] | None:
    """The newest checkpoint that verifies, of which each rank hashes a share; damaged ones are renamed aside.

    Rank 0 proposes, warns and renames.  ``accept``, which it asks before any file but the manifest is read, raises if a
    checkpoint is not to be continued at all.  None if there never was a checkpoint.  Whatever is raised is raised on
    all ranks: CorruptionError if there were checkpoints and all are damaged, since starting over silently would throw
    away the run.
    """
    while (found := done_by_first(ranks, partial(_propose, directory, warn, accept))) is not None:
        try:
            _verify_together(*found, ranks)
            return found
        except CorruptionError as error:
            done_by_first(ranks, partial(_set_aside, found[0], error, warn))
    return None


def _propose(
    directory: Path, warn: Callable[[str], None], accept: Callable[[Path, CheckpointManifest], object]
) -> tuple[Path, CheckpointManifest] | None:
    """The newest checkpoint with a manifest that is whole and accepted, and files of the right sizes."""
    for checkpoint in list_checkpoints(directory):
        try:
            manifest = read_manifest(checkpoint)
            accept(checkpoint, manifest)
            check_sizes(checkpoint, manifest)
            return checkpoint, manifest
        except CorruptionError as error:
            _set_aside(checkpoint, error, warn)
    if any(directory.glob("corrupt-step-*")):
        raise CorruptionError(
            f"all checkpoints in {directory} are damaged. To train again from step 0, delete that directory. If only "
            "the storage was ill and is mended, give the newest corrupt-step-* its old name back"
        )
    return None


def newest_mirrored(
    mirror: Mirror,
    ranks: Ranks,
    warn: Callable[[str], None],
    accept: Callable[[Path, CheckpointManifest], object] = lambda checkpoint, manifest: None,
) -> tuple[Path, CheckpointManifest] | None:
    """As ``newest_valid``, of what was published in an object store, and afterwards is whole on each machine.

    What else the machines have of checkpoints is deleted: it may never have been published.
    """
    while (name := done_by_first(ranks, partial(_newest_name, mirror))) is not None:
        try:
            done_by_all(ranks, partial(_bring, mirror, name, ranks.rank == 0))
            manifest = done_by_first(ranks, partial(_judge, mirror.directory / name, accept))
            return mirror.directory / name, manifest
        except CorruptionError as error:
            done_by_first(ranks, partial(_set_record_aside, mirror, name, error, warn))
    done_by_all(ranks, partial(_forget_others, mirror, ""))
    return None


def _newest_name(mirror: Mirror) -> str | None:
    if names := mirror.names():
        return names[0]
    if mirror.has_aside():
        raise CorruptionError(
            f"all checkpoints in {mirror.place} are damaged. To train again from step 0, delete that folder. If only "
            "the storage was ill and is mended, give the newest corrupt-step-*.json its old name back"
        )
    return None


def _bring(mirror: Mirror, name: str, is_first: bool) -> None:
    _forget_others(mirror, name)
    if mirror.is_first_here:
        mirror.pull(name)
    if is_first:
        mirror.pull_beside(name)


def _forget_others(mirror: Mirror, name: str) -> None:
    if mirror.is_first_here:
        clear_staging(mirror.directory)
        for checkpoint in list_checkpoints(mirror.directory):
            if checkpoint.name != name:
                remove_tree(checkpoint)


def _judge(checkpoint: Path, accept: Callable[[Path, CheckpointManifest], object]) -> CheckpointManifest:
    """The manifest of a checkpoint whose bytes are those that were published."""
    manifest = read_manifest(checkpoint)
    accept(checkpoint, manifest)
    check_sizes(checkpoint, manifest)
    check_content(checkpoint, manifest)
    return manifest


def _set_record_aside(mirror: Mirror, name: str, error: CorruptionError, warn: Callable[[str], None]) -> None:
    warn(f"{error}; set aside as {mirror.set_aside(name)}, falling back to the checkpoint before")


def _verify_together(
    checkpoint: Path, manifest: CheckpointManifest, ranks: Ranks, beat: Callable[[], None] = lambda: None
) -> None:
    """CorruptionError on all ranks unless the bytes are right, of which each hashes a share, and then the content."""
    share = share_of(manifest.files, ranks.rank, ranks.workers)
    done_by_all(ranks, lambda: verify_bytes(checkpoint, share, beat))
    done_by_first(ranks, lambda: check_content(checkpoint, manifest))


def verify_kept(checkpoint: Path, ranks: Ranks, beat: Callable[[], None]) -> None:
    """CorruptionError on all ranks, with what to do, unless a checkpoint kept to be averaged is still whole.

    Each rank hashes a share and calls ``beat`` after every file.
    """
    try:
        manifest = done_by_first(ranks, lambda: _manifest_and_sizes(checkpoint))
        _verify_together(checkpoint, manifest, ranks, beat)
    except CorruptionError as error:
        raise CorruptionError(
            f"{error}. {checkpoint.name} was kept to be averaged (pretrain.average) and was damaged since it was "
            f"saved; no artifact was made. Delete {checkpoint} and all newer checkpoints beside it and resume: "
            "training goes on after the newest before it, or from the start if there is none, and makes them again"
        ) from error


def _manifest_and_sizes(checkpoint: Path) -> CheckpointManifest:
    manifest = read_manifest(checkpoint)
    check_sizes(checkpoint, manifest)
    return manifest


def share_of(files: Sequence[FileRecord], rank: int, workers: int) -> list[FileRecord]:
    """The files that a rank hashes: dealt out from the largest on, so that all have about as much to read."""
    return sorted(files, key=lambda record: (-record.size_bytes, record.path))[rank::workers]


def _set_aside(checkpoint: Path, error: CorruptionError, warn: Callable[[str], None]) -> None:
    aside = checkpoint.with_name(f"corrupt-{checkpoint.name}-{time.time_ns()}")
    checkpoint.rename(aside)
    warn(f"{error}; set aside as {aside.name}, falling back to the checkpoint before")


def changes_of_identity(
    checkpoint: Path,
    found: CheckpointManifest,
    fingerprint: str,
    identity: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    is_accepted: bool,
) -> dict[str, list[Any]]:
    """What differs between the training that wrote a checkpoint and the one that is to go on: path -> [old, new].

    Raises UserError with the differences unless they are none or were accepted.  Another shape of the model cannot be.
    """
    if found.fingerprint == fingerprint and found.shapes == shapes:
        return {}
    changes = {path: list(pair) for path, pair in diff(found.identity, identity).items()}
    told = ", ".join(f"{path} {old!r} -> {new!r}" for path, (old, new) in changes.items()) or "nothing that it records"
    if found.shapes != shapes:
        reshaped = diff(found.shapes, shapes)
        some = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in list(reshaped.items())[:3])
        raise UserError(
            f"{checkpoint} holds a model of another shape ({told}; {len(reshaped)} parameters differ, such as {some}). "
            "Set it back, or choose another directory for the new model"
        )
    if not is_accepted:
        raise UserError(
            f"{checkpoint} belongs to another training ({found.fingerprint[:12]}, this one is {fingerprint[:12]}), "
            f"which differs in: {told}. Set it back, choose another directory, or continue all the same with "
            "pretrain.accept_changed_identity=true, which the checkpoints will record"
        )
    return changes


def free_bytes(directory: Path) -> int:
    """Free space of the file system that holds a directory."""
    return shutil.disk_usage(directory).free


def folder_of(staging: Path) -> str:
    """Where a mirror has the files of a staging directory."""
    return staging.name.replace("staging", "step", 1)


def publish(
    staging: Path, manifest: CheckpointManifest, mirror: Mirror | None = None, beside: Sequence[Path] = ()
) -> None:
    """Rank 0: check the file set, write the manifest, and let it count in one atomic step.

    That is a rename of the staging directory; with a mirror, where all ranks have uploaded their files, the creation of
    a record, and the ``beside`` files go along.
    """
    check_file_set(staging, manifest.topology, manifest.files)
    try:
        if mirror is None:
            _publish_here(staging, manifest)
        else:
            _publish_there(staging, manifest, mirror, beside)
    except CorruptionError as error:
        raise CorruptionError(f"{error}, unlike what its rank has written; nothing was published") from error


def _publish_there(staging: Path, manifest: CheckpointManifest, mirror: Mirror, beside: Sequence[Path]) -> None:
    folder = folder_of(staging)
    write_manifest(staging, manifest)
    mirror.upload(staging / MANIFEST, folder)
    files = [*manifest.files, record_file(staging, Path(MANIFEST))]
    along = [mirror.upload_beside(path, folder) for path in beside]
    mirror.publish(checkpoint_name(manifest.step), Published(folder, files, along))


def settle(staging: Path, step: int) -> None:
    """Keep what this machine has written of a checkpoint that a mirror has published: it need not be fetched."""
    final = staging.with_name(checkpoint_name(step))
    remove_tree(final)
    staging.rename(final)


def _publish_here(staging: Path, manifest: CheckpointManifest) -> None:
    final = staging.with_name(checkpoint_name(manifest.step))
    check_sizes(staging, manifest)
    write_manifest(staging, manifest)
    if final.exists() and _is_whole(final):
        shutil.rmtree(staging)  # the same step of the same training, published by an attempt that was thought dead
        return
    remove_tree(final)
    staging.rename(final)
    fsync_dir(final.parent)


def _is_whole(checkpoint: Path) -> bool:
    try:
        load_checkpoint_manifest(checkpoint)
    except (CorruptionError, UserError):
        return False
    return True


def retain(
    directory: Path, keep: int, warn: Callable[[str], None], *, verified: int, pinned: Collection[int] = ()
) -> None:
    """Delete all but the newest ``keep`` checkpoints, those of ``pinned`` steps, and the newest known to be whole.

    The manifest goes first, so that no half of a checkpoint looks complete.  What cannot be deleted stays, with a
    warning.
    """
    spared = {checkpoint_name(step) for step in (verified, *pinned)}
    for checkpoint in list_checkpoints(directory)[keep:]:
        if checkpoint.name in spared:
            continue
        try:
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
        except OSError as error:
            warn(f"the old checkpoint {checkpoint} could not be deleted ({error}); delete it by hand")


def retain_mirrored(mirror: Mirror, keep: int, *, verified: int, pinned: Collection[int] = ()) -> None:
    """As ``retain``, of what was published in an object store; and delete what attempts that died had uploaded."""
    spared = {checkpoint_name(step) for step in (verified, *pinned)}
    mirror.remove(name for name in mirror.names()[keep:] if name not in spared)


def clear_staging(directory: Path) -> None:
    """Remove what attempts that died had not published."""
    for leftover in directory.glob("staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)
