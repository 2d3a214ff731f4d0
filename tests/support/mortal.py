"""Storages whose process dies at one of their writes: before it, or after it and before anything else."""

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest

from pipeline import artifact
from pipeline.object_storage import ObjectStorage
from pipeline.storage import Storage


class Death(BaseException):
    """What no ``except Exception`` of the program outlives."""


@dataclass
class Life:
    """A process: the writes it made, and the one at which it dies, if any.  Afterwards it neither reads nor writes."""

    dies_at: int = -1
    when: Literal["before", "after"] = "before"
    writes: list[str] = field(default_factory=list[str])
    is_over: bool = False
    on_write: Callable[[], None] = lambda: None
    """Called after every write."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        if self.is_over:
            raise Death

    def write(self, what: str, act: Callable[[], Any]) -> Any:
        """Make a write, or die of it."""
        with self._lock:
            self.check()
            number = len(self.writes)
            self.writes.append(what)
            self.is_over = number == self.dies_at and self.when == "before"
            self.check()
            found = act()
            self.on_write()
            self.is_over = number == self.dies_at
            self.check()
            return found


class Mortal(Storage):
    """A storage as one process sees it."""

    def __init__(self, inner: Storage | ObjectStorage, life: Life) -> None:
        self._inner, self._life = inner, life

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def poll_s(self) -> float:
        return self._inner.poll_s

    def path(self, key: str) -> Path | None:
        return self._inner.path(key)

    def create(self, key: str, data: bytes) -> bool:
        return self._life.write(f"create {key}", lambda: self._inner.create(key, data))

    def write(self, key: str, data: bytes, is_durable: bool = True) -> None:
        self._life.write(f"write {key}", lambda: self._inner.write(key, data, is_durable))

    def touch(self, key: str) -> None:
        self._life.write(f"touch {key}", lambda: self._inner.touch(key))

    def remove(self, key: str) -> None:
        self._life.write(f"remove {key}", lambda: self._inner.remove(key))

    def upload(self, source: Path, key: str) -> None:
        self._life.write(f"upload {key}", lambda: self._inner.upload(source, key))

    def copy(self, key: str, to: str) -> None:
        self._life.write(f"copy {to}", lambda: self._inner.copy(key, to))

    def read(self, key: str) -> bytes:
        self._life.check()
        return self._inner.read(key)

    def exists(self, key: str) -> bool:
        self._life.check()
        return self._inner.exists(key)

    def names(self, key: str) -> list[str]:
        self._life.check()
        return self._inner.names(key)

    def sizes(self, key: str) -> dict[str, int]:
        self._life.check()
        return self._inner.sizes(key)

    def modified(self, key: str) -> float:
        self._life.check()
        return self._inner.modified(key)

    def now(self, key: str) -> float:
        self._life.check()
        return self._inner.now(key)

    def download(self, key: str, target: Path) -> None:
        self._life.check()
        self._inner.download(key, target)


class OneAtATime:
    """A client of which only one method is at work at a time: fsspec's files in memory have one position for all.

    It answers like those of object stores, and at once.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._lock = client, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*given: Any, timeout: float = 0.0, **more: Any) -> Any:
            with self._lock:
                return method(*given, **more)

        return call

    def info(self, path: str, timeout: float) -> dict[str, Any]:
        return {"LastModified": self.modified(path)}


def in_memory() -> ObjectStorage:
    """An empty object store in this process."""
    storage = ObjectStorage("memory", f"/bucket/{secrets.token_hex(4)}")
    storage.__dict__["_fs"] = OneAtATime(fsspec.filesystem("memory"))
    return storage


@contextmanager
def writing_files(life: Life) -> Iterator[None]:
    """What is written to files past the storage counts too, such as the manifest of an attempt."""
    write = artifact.write_atomic

    def write_or_die(path: Path, data: Any) -> None:
        life.write(f"file {path.name}", lambda: write(path, data))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "write_atomic", write_or_die)
        yield
