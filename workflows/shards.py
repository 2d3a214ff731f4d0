"""The shards of a map step: which wait, which are to be tried again, which another artifact has already.

Here is the bookkeeping of one attempt, and the records by which artifacts of a stage share shards.  The coordinator
starts, commits and decides about failures.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifact import MANIFEST, Manifest, json_bytes, link_or_copy, read_json, record_files
from pipeline.config import from_json, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import Shard, Stage, shard_fingerprint
from pipeline.storage import Place
from workflows.store import FINGERPRINT_CHARS, ArtifactPlace, Store, open_attempt

_ADOPTERS = 4
"""Threads that hash and link: flushing and reading wait for the disk most of the time."""


@dataclass(frozen=True)
class ShardRegistry:
    """Where the committed shards of a stage lie, by what determines their files.

    A record is a hint, never believed: a shard that is taken over is compared with its manifest, on a file system byte
    for byte.  (In an object store it is copied by the store itself; whoever reads it first hashes it.)
    """

    store: Store
    stage: Stage

    @property
    def _directory(self) -> Place:
        return self.store.root / "shards" / self.stage.name

    def fingerprints(self) -> set[str]:
        """Shards that are registered, whole or not."""
        return {name.removesuffix(".json") for name in self._directory.names()}

    def register(self, fingerprint: str, place: ArtifactPlace, directory: Place) -> None:
        """Record a finished shard of an artifact, unless one with the same files is recorded already."""
        value = {"artifact": place.directory.name, "directory": place.name_of(directory)}
        (self._directory / f"{fingerprint}.json").create(json_bytes(value))

    def adopt(self, fingerprint: str, shard: Shard, config: Any, artifact: str, out: Place) -> Place:
        """Link a registered shard into ``out``, where nothing is, as the ``shard`` of another artifact.

        CorruptionError if it is gone or damaged: its record is then removed.  OSError if the disk fails.
        """
        record = self._directory / f"{fingerprint}.json"
        try:
            found = self._link(fingerprint, _read(record), out)
        except (CorruptionError, UserError) as error:
            record.remove()
            out.remove()
            raise CorruptionError(f"shard {shard['name']} cannot be taken over: {error}") from error
        manifest = dataclasses.replace(found, fingerprint=artifact, config=to_json(config), shard=shard)
        (out / MANIFEST).write(json_bytes(manifest))
        return out

    def _link(self, fingerprint: str, record: Any, out: Place) -> Manifest:
        match record:
            case {"artifact": str(artifact), "directory": directory} if _is_artifact(artifact):
                source = self.store.artifact(self.stage.name, artifact).attempt(directory)
            case _:
                raise CorruptionError(f"its record holds {record!r}")
        found = open_attempt(source)
        if (found.stage, found.code_version) != (self.stage.name, self.stage.code_version) or (
            "identity" not in found.shard
            or shard_fingerprint(self.stage, from_json(self.stage.config, found.config), found.shard) != fingerprint
        ):
            raise CorruptionError(f"{source} holds another shard")
        for file in found.files:
            if source.is_local:
                link_or_copy(source.path / file.path, out.path / file.path)
            else:
                out.storage.copy(f"{source.key}/{file.path}", f"{out.key}/{file.path}")
        if source.is_local and record_files(out.path) != found.files:
            raise CorruptionError(f"{source} does not have the bytes that were committed (SHA-256 differs)")
        return found


def _read(record: Place) -> Any:
    try:
        return read_json(record)
    except FileNotFoundError:
        raise CorruptionError(f"{record} is gone") from None


def _is_artifact(name: str) -> bool:
    return re.fullmatch(f"[0-9a-f]{{{FINGERPRINT_CHARS}}}", name) is not None


@dataclass
class FanOut:
    """The shards of a map step in one attempt.  Its size in memory is that of the list, on disk nothing."""

    shards: Sequence[Shard]
    """The list of this attempt."""
    committed: dict[str, Place]
    """Directory of each shard that is done, by name."""
    fingerprints: dict[str, str] = field(default_factory=dict[str, str])
    """Of the shards that may be shared, by name."""
    waiting: deque[Shard] = field(default_factory=deque[Shard])
    delayed: list[tuple[float, Shard]] = field(default_factory=list[tuple[float, Shard]])
    """Shards that failed, and the monotonic second from which each may be tried again."""
    num_adopted: int = 0
    refused: list[str] = field(default_factory=list[str])
    """Why registered shards were not taken over."""
    _adopting: deque[tuple[Shard, Future[Place]]] = field(default_factory=deque[tuple[Shard, Future[Place]]])

    @property
    def is_complete(self) -> bool:
        """Whether every shard is committed."""
        return len(self.committed) == len(self.shards)

    @property
    def is_adopting(self) -> bool:
        """Whether shards of other artifacts are still looked at."""
        return bool(self._adopting)

    @property
    def has_adopted(self) -> bool:
        """Whether a shard of another artifact is ready to be committed, or known to be of no use."""
        return bool(self._adopting) and self._adopting[0][1].done()

    def adopt(self, registry: ShardRegistry, config: Any, artifact: str, out: Place) -> None:
        """Begin to take registered shards over, each into a directory below ``out``; they wait no longer.

        Hashing takes long: it is done in threads, so that the caller can go on.
        """
        registered = registry.fingerprints()
        shared = [shard for shard in self.waiting if self.fingerprints.get(shard["name"]) in registered]
        if not shared:
            return
        self.waiting = deque(s for s in self.waiting if self.fingerprints.get(s["name"]) not in registered)
        pool = ThreadPoolExecutor(_ADOPTERS, thread_name_prefix="adopt")
        for shard in shared:
            fingerprint = self.fingerprints[shard["name"]]
            future = pool.submit(_adopt, registry, fingerprint, shard, config, artifact, out / shard["name"])
            self._adopting.append((shard, future))
        pool.shutdown(wait=False)  # its threads end with the last shard

    def next_adopted(self) -> tuple[Shard, Place] | None:
        """A shard that was taken over, to be committed; one that could not be waits to be run instead."""
        while self.has_adopted:
            shard, future = self._adopting[0]
            try:
                return shard, future.result()
            except (CorruptionError, OSError) as error:
                self._adopting.popleft()
                self.refused.append(str(error))
                self.waiting.append(shard)
        return None

    def drop_adopted(self) -> None:
        """The next one was committed."""
        self._adopting.popleft()
        self.num_adopted += 1

    def next_shard(self, now_s: float) -> Shard | None:
        """A shard to start, those that failed and whose time has come first."""
        for place, (not_before_s, shard) in enumerate(self.delayed):
            if not_before_s <= now_s:
                del self.delayed[place]
                return shard
        return self.waiting.popleft() if self.waiting else None

    def close(self) -> None:
        """Take no further shard over; those that are looked at right now are neither waited for nor committed."""
        for _, future in self._adopting:
            future.cancel()
        self._adopting.clear()


def _adopt(registry: ShardRegistry, fingerprint: str, shard: Shard, config: Any, artifact: str, out: Place) -> Place:
    return registry.adopt(fingerprint, shard, config, artifact, out)
