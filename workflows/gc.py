"""What no run refers to any more, and its deletion.

Marks come from the plans of all runs, amendments included; whatever carries a mark stays.  An artifact is removed under
its own lease and its commit first, so that nobody takes a half of it for the whole.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import read_json
from pipeline.errors import CorruptionError
from pipeline.storage import Place
from workflows.amendments import all_plans
from workflows.lease import Lease, LeaseHeldError, acquire_lease, lease_is_free
from workflows.store import FINGERPRINT_CHARS, ArtifactPlace, Store

DAY_S = 86_400.0
_STAGING = re.compile(r"^\.(.+\.[0-9a-f]{8}\.tmp|clock-[0-9a-f]{8}|reserve-[0-9]+)$")
"""Names of files that were being written when their writer was killed."""

What = Literal["artifact", "attempt", "shards", "state", "record", "code", "sweep", "staging"]


@dataclass(frozen=True)
class Garbage:
    """Something to delete, and why."""

    what: What
    place: Place
    reason: str
    owner: ArtifactPlace | None = None
    """The artifact under whose lease it is deleted."""
    freed_bytes: int = 0
    """That deleting it gives back, as ``measured``."""


@dataclass(frozen=True)
class Marks:
    """What the runs of a store refer to."""

    fingerprints: frozenset[str]
    """First digits of the fingerprints of artifacts; they tell stages apart too."""
    code: frozenset[str]
    plans: frozenset[str]
    """Keys of the files that were read for it."""


def marks(store: Store) -> Marks:
    """What the runs refer to.  CorruptionError for a run whose plan cannot be read: nothing is deleted on a guess."""
    fingerprints, code = set[str](), set[str]()
    for run in store.runs():
        for value in all_plans(run):
            try:
                steps = value["plan"]["steps"]
                fingerprints |= {step["fingerprint"][:FINGERPRINT_CHARS] for step in steps}
            except (KeyError, TypeError) as error:
                raise CorruptionError(
                    f"the plan of run {run.run_id} cannot be read ({error!r}), so nobody knows what it needs; delete "
                    f"{run.directory} if it is of no use"
                ) from None
            recorded: dict[str, Any] = value.get("code") or {}
            code.add(str(recorded.get("sha256", "")))
    return Marks(frozenset(fingerprints), frozenset(code), _plans(store))


def _plans(store: Store) -> frozenset[str]:
    found = [(run.directory / "run.json").key for run in store.runs()]
    found += [(run.amendments / name).key for run in store.runs() for name in run.amendments.names()]
    return frozenset(found)


def find_garbage(store: Store, older_than_s: float, keep_state: bool = False) -> list[Garbage]:
    """What could be deleted: nothing that a run refers to, that is leased or that is younger than the given age."""
    marked, now = marks(store), _now(store)
    found: list[Garbage] = []
    for stage in (store.root / "artifacts").names():
        for artifact in store.artifacts(stage):
            if now - _last_used(artifact) >= older_than_s and lease_is_free(artifact.lease_dir):
                found += _of_artifact(store, artifact, artifact.directory.name in marked.fingerprints, keep_state)
    found += _records(store, found)
    for name in (store.root / "code").names():
        place = store.root / "code" / name
        if name.removesuffix(".zip") not in marked.code and now - place.modified() >= older_than_s:
            found.append(Garbage("code", place, "no run was submitted with it"))
    known = {run.run_id for run in store.runs()}
    for name in (store.root / "sweeps").names():
        place = store.root / "sweeps" / name
        if not known & set(_field(place, "runs") or ()) and now - place.modified() >= older_than_s:
            found.append(Garbage("sweep", place, "none of its runs is there"))
    return measured([*found, *_staging(store, now, older_than_s)])


def _now(store: Store) -> float:
    """By the clock that stamps the files of a store."""
    folder = store.root / "artifacts"
    return folder.now() if folder.exists() else time.time()


def _last_used(artifact: ArtifactPlace) -> float:
    """When anybody committed it or held its lease; long ago if there is no trace of either."""
    files = [artifact.directory / "COMMIT.json", *(artifact.lease_dir / name for name in artifact.lease_dir.names())]
    return max((file.modified() for file in files if file.exists()), default=0.0)


def _of_artifact(store: Store, artifact: ArtifactPlace, is_marked: bool, keep_state: bool) -> Iterator[Garbage]:
    if not is_marked:
        yield Garbage("artifact", artifact.directory, "no run refers to it", artifact)
        return
    try:
        committed = artifact.committed()
    except CorruptionError:
        return  # whoever needs it is told, and may still mend it
    if committed is None:
        return  # a run may go on with it: its state and its shards are what it goes on from
    registered = _registered(store, artifact)
    for name in (artifact.directory / "attempts").names():
        attempt = artifact.directory / "attempts" / name
        if name == committed.name:
            continue
        if "-shards-" not in name:
            yield Garbage("attempt", attempt, "another attempt was committed", artifact)
            continue
        spare = [shard for shard in attempt.names() if f"{name}/{shard}" not in registered]
        reason = "their artifact is committed, and no other one takes them over"
        if len(spare) == len(attempt.names()):
            yield Garbage("shards", attempt, reason, artifact)
        else:
            yield from (Garbage("shards", attempt / shard, reason, artifact) for shard in spare)
    if not keep_state and artifact.state.exists():
        yield Garbage("state", artifact.state, "its artifact is committed", artifact)


def _registered(store: Store, artifact: ArtifactPlace) -> set[str]:
    """Directories of shards that a record offers to other artifacts."""
    folder = store.root / "shards" / artifact.directory.parent.name
    values = [(_field(folder / name, "artifact"), _field(folder / name, "directory")) for name in folder.names()]
    return {str(directory) for owner, directory in values if owner == artifact.directory.name}


def _records(store: Store, found: Iterable[Garbage]) -> Iterator[Garbage]:
    """Records of shards that are gone or go, whether other artifacts or their own point to them."""
    gone = {one.place.key for one in found}
    for stage in (store.root / "shards").names():
        for name in (store.root / "shards" / stage).names():
            record = store.root / "shards" / stage / name
            owner = store.root / "artifacts" / stage / str(_field(record, "artifact"))
            target = owner / "attempts" / str(_field(record, "directory"))
            if owner.key in gone or target.key in gone or not target.exists():
                yield Garbage("record", record, "the shard that it names is not there any more")
    for one in list(found):
        if one.what == "shards" and one.owner is not None:
            start = f"{(one.owner.directory / 'attempts').key}/"
            for name in (one.owner.directory / "shards").names():
                record = one.owner.directory / "shards" / name
                directory = f"{start}{_field(record, 'directory')}/"
                if directory.startswith(f"{one.place.key}/"):
                    yield Garbage("record", record, "the shard that it names is not needed any more", one.owner)


def _staging(store: Store, now: float, older_than_s: float) -> Iterator[Garbage]:
    """Files of a file system that a killed process was writing; an object store shows none."""
    if not store.root.is_local:
        return
    at_work = {run.directory.path for run in store.runs() if not lease_is_free(run.lease_dir)}
    for folder, folders, files in os.walk(store.root.path):
        folders[:] = [name for name in folders if Path(folder) / name not in at_work]
        for name in files:
            if _STAGING.match(name):
                relative = os.path.relpath(os.path.join(folder, name), store.root.path)
                place = store.root / relative
                if now - place.modified() >= older_than_s:
                    yield Garbage("staging", place, "its writer did not finish it")


def _field(record: Place, name: str) -> Any:
    """A value of a record; None for one that is damaged or gone."""
    try:
        value = read_json(record)
    except (CorruptionError, FileNotFoundError):
        return None
    return value.get(name) if isinstance(value, dict) else None  # pyright: ignore


def measured(found: Iterable[Garbage]) -> list[Garbage]:
    """The same, each with the bytes that deleting it gives back once all before it are deleted.

    A file with several links gives its bytes with the last of them, and none as long as there are others elsewhere: an
    artifact has links to files of its state.
    """
    gone, seen = Counter[tuple[int, int]](), set[Path]()
    return [replace(one, freed_bytes=_freed_bytes(one.place, gone, seen)) for one in found]


def _freed_bytes(place: Place, gone: Counter[tuple[int, int]], seen: set[Path]) -> int:
    """Bytes that deleting a place gives back; takes note of its links and files."""
    if not place.is_local:
        return sum(_sizes(place).values())
    freed = 0
    for path in _files(place.path):
        if path in seen:
            continue
        seen.add(path)
        try:
            stat = path.lstat()
        except FileNotFoundError:  # whoever wrote it has just finished
            continue
        inode = (stat.st_dev, stat.st_ino)
        gone[inode] += 1
        freed += stat.st_size if gone[inode] == stat.st_nlink else 0
    return freed


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        return [root]
    return [Path(folder) / name for folder, _, names in os.walk(root) for name in names]


def _sizes(place: Place) -> dict[str, int]:
    """Of what an object store holds: one object, or all below a folder."""
    return place.sizes() or ({"": len(place.read_bytes())} if place.key.endswith((".json", ".zip")) else {})


def collect(store: Store, found: Iterable[Garbage]) -> list[Garbage]:
    """Delete it, and return what was deleted: not what somebody has begun to use in the meantime."""
    deleted, seen = list[Garbage](), set[Path]()
    marked, next_look_s = marks(store), 0.0
    for one in found:
        if store.root.is_local or time.monotonic() >= next_look_s:
            next_look_s = time.monotonic() + store.root.storage.poll_s
            if _plans(store) != marked.plans:  # a run was created, or amended, since
                marked = marks(store)
        if one.what == "artifact" and one.place.name in marked.fingerprints:
            continue
        if one.what == "code" and one.place.name.removesuffix(".zip") in marked.code:
            continue
        if one.place.is_local:  # what was left before may hold other links
            one = replace(one, freed_bytes=_freed_bytes(one.place, Counter(), seen))
        if _remove(one):
            deleted.append(one)
    return deleted


def _remove(one: Garbage) -> bool:
    """False if somebody holds the lease of the artifact that it belongs to."""
    if one.owner is None:
        one.place.remove()
        return True
    try:
        lease = acquire_lease(one.owner.lease_dir, "gc")
    except LeaseHeldError:
        return False
    if one.what != "artifact":
        one.place.remove()
        lease.release()
        return True
    (one.place / "COMMIT.json").remove()
    for folder in ("shards", "state", "attempts"):
        for name in (one.place / folder).names():
            lease.heartbeat()  # LeaseLostError if this took so long that somebody builds it again
            (one.place / folder / name).remove()
    lease.heartbeat()
    for name in one.place.names():
        if name != lease.folder.name:
            (one.place / name).remove()
    _remove_leases(lease)
    return True


def _remove_leases(own: Lease) -> None:
    """The folder of a lease and the one that it lies in, which holds nothing else any more.

    The newest epoch goes last: as long as there is any, whoever held an earlier one sees that it was taken over.  Once
    there is none, somebody may begin anew, whose files stay.
    """
    mark = f"{own.epoch:06d}."
    for name in sorted(own.folder.names(), key=lambda name: (name.startswith(mark), not name.endswith(".json"), name)):
        (own.folder / name).remove()
    if own.folder.is_local:
        for folder in (own.folder.path, own.folder.parent.path):
            with suppress(OSError):
                folder.rmdir()
