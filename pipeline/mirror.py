"""The state of a stage whose store is no file system: it works on a directory of its machine, mirrored in the store.

    <name>.json           created once: the folder that counts, with sizes and SHA-256 of its files
    <name>-<attempt>/     what the machines of an attempt have put there
      beside/             files of the state that go with it, such as the log of metrics

A directory ``name`` of the state is published by the creation of its record.  Nothing else of the state is kept.
"""

import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.artifact import FileRecord, file_sha256, json_bytes, read_json
from pipeline.config import from_json
from pipeline.errors import CorruptionError, UserError
from pipeline.storage import Place

_THREADS = 8
"""Files that travel at a time."""
_BESIDE = "beside"
_ASIDE = "corrupt-"
_RECORD = ".json"


@dataclass(frozen=True)
class Published:
    """What a record says."""

    folder: str
    files: list[FileRecord]
    beside: list[FileRecord] = field(default_factory=list[FileRecord])


@dataclass(frozen=True)
class Mirror:
    """Directories of the state on this machine, and what is published of them."""

    place: Place
    """In the store; nobody else writes there."""
    directory: Path
    """The state on this machine."""
    is_first_here: bool
    """Of several processes that share the directory, one looks after it."""
    fence: Callable[[], None]
    """Raises once another attempt has taken over: called before anything is deleted."""

    def names(self) -> list[str]:
        """What is published, newest first by name."""
        return sorted((n for n in self._records() if not n.startswith(_ASIDE)), reverse=True)

    def has_aside(self) -> bool:
        """Whether something that was published turned out to be damaged."""
        return any(name.startswith(_ASIDE) for name in self._records())

    def _records(self) -> list[str]:
        return [name.removesuffix(_RECORD) for name in self.place.names() if name.endswith(_RECORD)]

    def _record(self, name: str) -> Place:
        return self.place / f"{name}{_RECORD}"

    def published(self, name: str) -> Published:
        """What a record says; CorruptionError if that is nothing."""
        record = self._record(name)
        try:
            return from_json(Published, read_json(record))
        except UserError as error:
            raise CorruptionError(f"{record} is no record of what was published: {error}") from error

    def upload(self, path: Path, folder: str) -> None:
        """Bring a file to the folder of an attempt."""
        (self.place / folder / path.name).upload(path)

    def upload_beside(self, path: Path, folder: str) -> FileRecord:
        """Bring a file, which may grow meanwhile, to the folder of an attempt as it is now."""
        copy = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            shutil.copyfile(path, copy)
            with copy.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            (self.place / folder / _BESIDE / path.name).upload(copy)
            return FileRecord(path.name, copy.stat().st_size, digest)
        finally:
            copy.unlink(missing_ok=True)

    def publish(self, name: str, published: Published) -> None:
        """Let the folder of an attempt count, if all its files are there; CorruptionError if they are not.

        A whole one of the same name, by an attempt that was thought dead, stays, and the folder goes.
        """
        self._check_sizes(published)
        value = json_bytes(published)
        if self._record(name).create(value):
            return
        if self._is_whole(name):
            if self.published(name).folder != published.folder:
                (self.place / published.folder).remove()
            return
        self._record(name).write(value)

    def _check_sizes(self, published: Published) -> None:
        sizes = (self.place / published.folder).sizes()
        for path, record in _by_key(published):
            if sizes.get(path) != record.size_bytes:
                raise CorruptionError(f"{self.place / published.folder}/{path} is missing or has the wrong size")

    def _is_whole(self, name: str) -> bool:
        try:
            self._check_sizes(self.published(name))
        except CorruptionError:
            return False
        return True

    def pull(self, name: str, beat: Callable[[], None] = lambda: None) -> Path:
        """Have a published directory whole on this machine; files that are here already are not fetched again.

        CorruptionError if what arrives does not have the bytes that were published.  ``beat`` is called now and then.
        """
        published, target = self.published(name), self.directory / name
        here = {record.path: target / record.path for record in published.files}
        missing = [r for r in published.files if not _has(here[r.path], r, beat)]
        self._fetch([(f"{published.folder}/{record.path}", here[record.path], record) for record in missing], beat)
        return target

    def pull_beside(self, name: str) -> None:
        """Put what was published with a directory beside it."""
        published = self.published(name)
        self._fetch(
            [(f"{published.folder}/{_BESIDE}/{r.path}", self.directory / r.path, r) for r in published.beside],
            lambda: None,
        )

    def _fetch(self, wanted: Sequence[tuple[str, Path, FileRecord]], beat: Callable[[], None]) -> None:
        def fetch(key: str, target: Path, record: FileRecord) -> None:
            source = self.place / key
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            try:
                source.download(aside)
                if file_sha256(aside) != record.sha256:
                    raise CorruptionError(f"{source} is damaged: its SHA-256 differs from what was published")
                aside.replace(target)
            except FileNotFoundError:
                raise CorruptionError(f"{source} is missing although it was published") from None
            finally:
                aside.unlink(missing_ok=True)

        with ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(fetch, *one) for one in wanted]:
                done.result()
                beat()

    def set_aside(self, name: str) -> str:
        """Let a damaged directory count no more; the new name of its record, whose files stay."""
        aside = f"{_ASIDE}{name}-{time.time_ns()}"
        self._record(aside).create(self._record(name).read_bytes())
        self._record(name).remove()
        return aside + _RECORD

    def remove(self, names: Iterable[str]) -> None:
        """Delete what was published, records first, and the folders of attempts that came to nothing."""
        doomed = list(names)
        self.fence()
        for name in doomed:
            self._record(name).remove()
        self.clear()

    def clear(self) -> None:
        """Delete folders that no record names.  None while a record cannot be read: one of them may be its.

        They are listed before the fence: what an attempt that takes over afterwards uploads is not among them.
        """
        found = self.place.names()
        try:
            kept = {self.published(n.removesuffix(_RECORD)).folder for n in found if n.endswith(_RECORD)}
        except CorruptionError:
            return
        self.fence()
        for name in found:
            if not name.endswith(_RECORD) and name not in kept:
                (self.place / name).remove()


def _by_key(published: Published) -> list[tuple[str, FileRecord]]:
    """Every file by its path in the folder."""
    return [(r.path, r) for r in published.files] + [(f"{_BESIDE}/{r.path}", r) for r in published.beside]


def _has(path: Path, record: FileRecord, beat: Callable[[], None]) -> bool:
    if not path.is_file() or path.stat().st_size != record.size_bytes:
        return False
    is_same = file_sha256(path) == record.sha256
    beat()
    return is_same
