"""Copies of what lies in an object store, on the disk of this machine; on a file system there is nothing to copy.

A copy is kept for later readers of this machine.  Its name holds that of an attempt, which never changes, so a copy is
never out of date.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.artifact import MANIFEST, json_bytes, load_manifest, record_files, write_json
from pipeline.errors import CorruptionError
from pipeline.storage import CACHE_ENV, Place

_THREADS = 8
"""Files that travel at a time."""


def scratch(place: Place) -> Path:
    """Where this machine keeps what belongs to a place in an object store.

    A folder for each machine: a home may be one directory for all of them, on which their locks may not hold.
    """
    root = Path(os.environ.get(CACHE_ENV) or "~/.cache/dlm").expanduser() / socket.gethostname()
    store = hashlib.sha256(place.storage.url.encode()).hexdigest()[:12]
    return root / store / place.key


def local_copy(directory: Place) -> Path:
    """A directory of this machine with an artifact, or a shard, of the store.

    CorruptionError if what arrives does not have the bytes that were committed.
    """
    if directory.is_local:
        return directory.path
    target = scratch(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks of this machine want the same
        if not (target / MANIFEST).exists():
            _download(directory, target)
    return target


def _download(directory: Place, target: Path) -> None:
    manifest = load_manifest(directory)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        _each((directory / record.path, aside / record.path) for record in manifest.files)
        if record_files(aside) != sorted(manifest.files, key=lambda record: Path(record.path)):
            raise CorruptionError(
                f"{directory} does not have the bytes that were committed (SHA-256 differs). Delete "
                f"{directory.parent.parent} and run the stage again"
            )
        write_json(aside / MANIFEST, manifest)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _each(files: Iterable[tuple[Place, Path]]) -> None:
    def download(source: Place, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.storage.download(source.key, target)

    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(download, *pair) for pair in files]:
            done.result()


def upload_artifact(directory: Path, to: Place) -> None:
    """Copy an artifact to the store, its manifest last."""
    manifest = load_manifest(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        uploads = [
            pool.submit(to.storage.upload, directory / record.path, f"{to.key}/{record.path}")
            for record in manifest.files
        ]
        for done in uploads:
            done.result()
    (to / MANIFEST).write(json_bytes(manifest))
