"""Where files lie that several machines see: a file system, or an object store through fsspec.

Everything that the engine's safety rests on is one of these operations:

    create   a complete file under a name that nothing had: of several who try, exactly one succeeds
    write    a complete file in place of what was there: a reader sees the old one or the new one
    now      the clock that stamps files, for all machines the same

On a file system ``create`` is link(2), which is atomic and exclusive locally and on NFS; on S3 and Google Cloud Storage
it is a PUT on the condition that there is no such object (``If-None-Match: *``, ``ifGenerationMatch=0``).
"""

import errno
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.artifact import create_file, write_atomic
from pipeline.errors import UserError
from pipeline.object_storage import OBJECT_STORES, ObjectStorage

CACHE_ENV = "DLM_CACHE"
"""Directory for copies of what lies in an object store."""


class Storage(Protocol):
    """A tree of files by keys such as "runs/r1/run.json"; "" is the root."""

    @property
    def url(self) -> str:
        """What ``open_storage`` opens it by, on any machine."""
        ...

    @property
    def poll_s(self) -> float:
        """How often somebody who waits may look, so that looking costs next to nothing."""
        ...

    def path(self, key: str) -> Path | None:
        """Where a key lies in the file system; None for an object store."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Create a file, complete and durable; False if there was one.

        Of several who try, each has bytes of its own: on an object store they tell who it was.
        """
        ...

    def write(self, key: str, data: bytes, is_durable: bool = True) -> None:
        """Put a complete file in the place of what was there; without ``is_durable`` a power cut may undo that."""
        ...

    def touch(self, key: str) -> None:
        """Stamp a file with the time, make it empty if there is none."""
        ...

    def read(self, key: str) -> bytes:
        """The bytes of a file; FileNotFoundError if there is none."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is a file, or anything below a folder."""
        ...

    def names(self, key: str) -> list[str]:
        """What lies directly below a folder, sorted; nothing for one that is not there."""
        ...

    def sizes(self, key: str) -> dict[str, int]:
        """Bytes of every file below a folder, by path relative to it."""
        ...

    def modified(self, key: str) -> float:
        """When a file was written, by the clock of ``now``; FileNotFoundError if there is none."""
        ...

    def now(self, key: str) -> float:
        """Seconds by the clock that stamps files below a folder."""
        ...

    def remove(self, key: str) -> None:
        """Delete a file or a folder with all below it; nothing happens if there is none."""
        ...

    def upload(self, source: Path, key: str) -> None:
        """Copy a file of this machine to a key."""
        ...

    def download(self, key: str, target: Path) -> None:
        """Copy a file to this machine; FileNotFoundError if there is none."""
        ...

    def copy(self, key: str, to: str) -> None:
        """Put a file under a second key, without moving its bytes where the storage can do that."""
        ...


@dataclass(frozen=True)
class FileStorage(Storage):
    """A directory, local or of a shared file system."""

    root: Path

    @property
    def url(self) -> str:
        """The absolute path."""
        return str(self.root)

    @property
    def poll_s(self) -> float:
        """A call of the kernel."""
        return 0.25

    def path(self, key: str) -> Path:
        """The file itself."""
        return self.root / key if key else self.root

    def create(self, key: str, data: bytes) -> bool:
        """link(2) of a complete file."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return create_file(path, data)

    def write(self, key: str, data: bytes, is_durable: bool = True) -> None:
        """rename(2) of a complete file."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_durable:
            write_atomic(path, data)
            return
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            aside.write_bytes(data)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def touch(self, key: str) -> None:
        """By the clock of the file system's server."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def read(self, key: str) -> bytes:
        """The bytes."""
        return self.path(key).read_bytes()

    def exists(self, key: str) -> bool:
        """stat(2)."""
        return self.path(key).exists()

    def names(self, key: str) -> list[str]:
        """Without what is being written aside."""
        try:
            return sorted(name for name in os.listdir(self.path(key)) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, key: str) -> dict[str, int]:
        """Of regular files."""
        folder = self.path(key)
        return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}

    def modified(self, key: str) -> float:
        """mtime."""
        return self.path(key).stat().st_mtime

    def now(self, key: str) -> float:
        """The mtime of a file that is made and deleted."""
        probe = self.path(key) / f".clock-{secrets.token_hex(4)}"
        try:
            probe.touch()
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return time.time()  # a store that can only be looked at
            raise
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def remove(self, key: str) -> None:
        """A file, or a tree."""
        path = self.path(key)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def upload(self, source: Path, key: str) -> None:
        """A copy that appears complete."""
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            shutil.copyfile(source, aside)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def download(self, key: str, target: Path) -> None:
        """A copy."""
        shutil.copyfile(self.path(key), target)

    def copy(self, key: str, to: str) -> None:
        """A hard link where the file system allows it."""
        target = self.path(to)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self.path(key), target)
        except OSError:
            shutil.copy2(self.path(key), target)


def open_storage(url: str) -> Storage:
    """The storage at a path or a URL.  UserError for a scheme that is not known, or a bucket without a name."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FileStorage(Path(url).expanduser().resolve())
    scheme = {"gcs": "gs"}.get(scheme, scheme)
    if scheme not in OBJECT_STORES:
        raise UserError(
            f"{url}: the scheme is {scheme!r}; a store is a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
        )
    root = rest.rstrip("/")
    if not root or any(part in ("", ".", "..") for part in root.split("/")):
        raise UserError(f"{url} names no bucket and prefix; write {scheme}://BUCKET/PREFIX")
    return _object_storage(scheme, root)


@cache
def _object_storage(scheme: str, root: str) -> ObjectStorage:
    """One client a process."""
    return ObjectStorage(scheme, root)


@dataclass(frozen=True)
class Place:
    """A file or folder of a storage."""

    storage: Storage
    key: str = ""

    def __truediv__(self, name: str) -> "Place":
        return Place(self.storage, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.key}" if self.key else self.storage.url

    @property
    def name(self) -> str:
        """The last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "Place":
        """The folder that it lies in."""
        return Place(self.storage, self.key.rpartition("/")[0])

    @property
    def is_local(self) -> bool:
        """Whether it lies in a file system."""
        return self.storage.path(self.key) is not None

    @property
    def path(self) -> Path:
        """Where it lies in the file system; what lies in an object store is copied first (workflows/copies.py)."""
        path = self.storage.path(self.key)
        assert path is not None, f"{self} is in no file system"
        return path

    def create(self, data: bytes) -> bool:
        """``Storage.create``."""
        return self.storage.create(self.key, data)

    def write(self, data: bytes, is_durable: bool = True) -> None:
        """``Storage.write``."""
        self.storage.write(self.key, data, is_durable)

    def touch(self) -> None:
        """``Storage.touch``."""
        self.storage.touch(self.key)

    def read_bytes(self) -> bytes:
        """``Storage.read``."""
        return self.storage.read(self.key)

    def exists(self) -> bool:
        """``Storage.exists``."""
        return self.storage.exists(self.key)

    def names(self) -> list[str]:
        """``Storage.names``."""
        return self.storage.names(self.key)

    def sizes(self) -> dict[str, int]:
        """``Storage.sizes``."""
        return self.storage.sizes(self.key)

    def modified(self) -> float:
        """``Storage.modified``."""
        return self.storage.modified(self.key)

    def now(self) -> float:
        """``Storage.now``."""
        return self.storage.now(self.key)

    def remove(self) -> None:
        """``Storage.remove``."""
        self.storage.remove(self.key)

    def upload(self, source: Path) -> None:
        """``Storage.upload``."""
        self.storage.upload(source, self.key)

    def download(self, target: Path) -> None:
        """``Storage.download``."""
        self.storage.download(self.key, target)
