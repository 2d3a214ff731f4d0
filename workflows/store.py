"""The store: where runs and artifacts live, and how their writing is made safe.

    store.json                              what kind of store this is, created once
    runs/<run>/  run.json                   the frozen plan, and what it was submitted with, created once
                 amendments/<n>.json        the plan that holds from then on (workflows/amendments.py)
                 lease/                     who coordinates the run (workflows/lease.py)
                 events/<attempt>-<n>.json  appended under unique names
                 jobs/, jobs-taken/, job-ends/  what was handed over to a cluster, what it is known to have taken, and
                                            how that ended (workflows/submit.py)
                 work/<attempt>/<call>/     logs, progress, usage, failures
                 cancel                     request to stop
    artifacts/<stage>/<fp12>/
                 lease/                     who builds the artifact
                 attempts/                  what attempts wrote; only the committed one is ever read
                 state/                     checkpoints and the like, kept across attempts
                 shards/                    committed pieces of a map stage
                 COMMIT.json                created once: the attempt that counts
    shards/<stage>/<fingerprint>.json       where a shard lies that other artifacts of the stage may take over
    code/<sha256>.zip                       snapshots of the code that runs were submitted with
    sweeps/<sweep>.json                     what a sweep varies, and its runs, created once

What was not committed does not exist.  Every commit is one exclusive creation of a complete file.
"""

import re
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.auth import redacted_in
from pipeline.artifact import Manifest, check_file_sizes, fsync_dir, json_bytes, load_manifest, read_json
from pipeline.config import to_json
from pipeline.errors import CorruptionError, LeaseLostError, UserError
from pipeline.stage import Shard, is_same_shard
from pipeline.storage import Place, open_storage
from workflows.lease import Lease

FINGERPRINT_CHARS = 12
STORE_SCHEMA = 1
_MARK = "store.json"
_OWN = "id"
"""Of a plan in a run: it makes the file's bytes its own, by which ``Storage.create`` tells who has created it."""
_CACHED = "steps_cached"
"""Kind of the event about all steps that a coordinator found to be there at one look."""
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RunExistsError(UserError):
    """A run of that id was created before."""


def open_attempt(directory: Place) -> Manifest:
    """Manifest of an artifact in the store whose files are all there with the recorded sizes."""
    manifest = load_manifest(directory)
    check_file_sizes(str(directory), manifest, directory.sizes())
    return manifest


@dataclass(frozen=True)
class ArtifactPlace:
    """The folder of one artifact, committed or not."""

    directory: Place

    @property
    def address(self) -> str:
        """<stage>/<fp12>."""
        return f"{self.directory.parent.name}/{self.directory.name}"

    @property
    def state(self) -> Place:
        """What survives attempts."""
        return self.directory / "state"

    @property
    def lease_dir(self) -> Place:
        """Leases of those who build it."""
        return self.directory / "lease"

    def committed(self) -> Place | None:
        """Folder of the committed attempt, complete by its manifest; None if there is none.

        Raises CorruptionError if it was committed and is no longer whole.
        """
        found = self.committed_manifest()
        return None if found is None else found[0]

    def committed_manifest(self) -> tuple[Place, Manifest] | None:
        """Folder of the committed attempt and what its manifest says, as ``committed``."""
        try:
            attempt = self.attempt(_value(self.directory / "COMMIT.json", "attempt"))
        except FileNotFoundError:
            return None
        except CorruptionError as error:
            raise self._damaged(error) from None
        try:
            manifest = open_attempt(attempt)
            if not manifest.fingerprint.startswith(self.directory.name):
                raise CorruptionError(
                    f"{attempt} is the artifact {manifest.fingerprint[:FINGERPRINT_CHARS]}, filed in the wrong place"
                )
        except (CorruptionError, UserError) as error:
            raise self._damaged(error) from None
        return attempt, manifest

    def made_by(self) -> str:
        """The run that committed it; empty if nobody has."""
        try:
            return str(_value(self.directory / "COMMIT.json", "run"))
        except (FileNotFoundError, CorruptionError):
            return ""

    def _damaged(self, error: Exception) -> CorruptionError:
        return CorruptionError(
            f"{error}. The artifact was committed and has been damaged since; delete {self.directory} to build it again"
        )

    def attempt(self, name: Any) -> Place:
        """Folder below attempts/ that a commit names; nothing outside it is believed."""
        path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise CorruptionError(f"{self.directory}: a commit names {name!r}, which is no attempt")
        return self.directory / "attempts" / path.as_posix()

    def new_attempt(self, lease: Lease) -> Place:
        """A folder that only the holder of the lease writes to."""
        return self.directory / "attempts" / f"{lease.epoch:06d}-{secrets.token_hex(4)}"

    def commit(self, attempt: Place, lease: Lease, run_id: str) -> Place:
        """Publish an attempt whose manifest is written; the first to commit wins, and is returned."""
        open_attempt(attempt)
        if attempt.is_local:
            fsync_dir(attempt.parent.path)
        lease.check()
        value = {"attempt": attempt.name, "run": run_id, "epoch": lease.epoch, "committed_at": time.time()}
        (self.directory / "COMMIT.json").create(json_bytes(value))
        committed = self.committed()
        assert committed is not None
        return committed

    def committed_shards(self) -> dict[str, Place]:
        """Folders of the committed pieces of a map stage, by name; a record of a damaged one is dropped."""
        return {name: directory for name, directory, _ in self._open_shards()}

    def kept_shards(self, listed: Sequence[Shard]) -> dict[str, Place]:
        """Folders of the listed shards that are committed; a record of another shard of the name is dropped."""
        wanted = {shard["name"]: shard for shard in listed}
        found: dict[str, Place] = {}
        for name, directory, shard in self._open_shards():
            if name in wanted and is_same_shard(shard, wanted[name]):
                found[name] = directory
            elif name in wanted:
                self._shard_record(name).remove()
        return found

    def shard_folders(self) -> list[Place]:
        """Where the committed pieces of a map stage should lie; whether they do is not looked at."""
        folder = self.directory / "shards"
        return [self.attempt(_value(folder / name, "directory")) for name in folder.names()]

    def _open_shards(self) -> Iterator[tuple[str, Place, Shard]]:
        folder = self.directory / "shards"
        for name in folder.names():
            try:
                directory = self.attempt(_value(folder / name, "directory"))
                manifest = open_attempt(directory)
            except (CorruptionError, UserError):
                (folder / name).remove()  # not committed after all: it will be made again
                continue
            yield name.removesuffix(".json"), directory, manifest.shard

    def _shard_record(self, name: str) -> Place:
        return self.directory / "shards" / f"{name}.json"

    def name_of(self, attempt: Place) -> str:
        """What a record calls an attempt, or a shard's folder below attempts/."""
        return attempt.key.removeprefix(f"{(self.directory / 'attempts').key}/")

    def commit_shard(self, name: str, directory: Place, lease: Lease) -> Place:
        """Publish one piece whose manifest is written; the first of the same shard counts, and is returned.

        Another shard under the name was published by a coordinator that had lost its lease and not noticed yet: it
        gives way to the holder of the newest lease.
        """
        lease.check()
        shard = open_attempt(directory).shard
        record, value = self._shard_record(name), json_bytes({"directory": self.name_of(directory)})
        if record.create(value):
            return directory
        first = self.attempt(_value(record, "directory"))
        if is_same_shard(open_attempt(first).shard, shard):
            return first
        lease.check()
        record.write(value)
        return directory


def _value(record: Place, key: str) -> Any:
    """A value of a record, which may be damaged; FileNotFoundError if there is none."""
    value = read_json(record)
    if not isinstance(value, dict) or key not in value:
        raise CorruptionError(f"{record} names no {key}")
    return value[key]  # pyright: ignore[reportUnknownVariableType]


@dataclass(frozen=True)
class RunPlace:
    """The folder of one run."""

    run_id: str
    directory: Place

    @property
    def lease_dir(self) -> Place:
        """Leases of its coordinators."""
        return self.directory / "lease"

    @property
    def amendments(self) -> Place:
        """What was changed of its plan, and accepted, in the order of their numbers."""
        return self.directory / "amendments"

    @property
    def cancel_file(self) -> Place:
        """Exists once the run was asked to stop."""
        return self.directory / "cancel"

    def work_dir(self, attempt: int, call: str) -> Place:
        """Logs, progress, usage and failures of a call in one attempt."""
        return self.directory / "work" / f"{attempt:03d}" / call

    def plan(self) -> Any:
        """The frozen plan as JSON."""
        value = read_json(self.directory / "run.json")
        if isinstance(value, dict):
            value.pop(_OWN, None)  # pyright: ignore[reportUnknownMemberType]
        return value  # pyright: ignore[reportUnknownVariableType]

    def events(self) -> Iterator[dict[str, Any]]:
        """All events in the order of attempts and sequence numbers."""
        folder = self.directory / "events"
        for name in folder.names():
            event = read_json(folder / name)
            if event["kind"] != _CACHED:
                yield event
                continue
            for step, artifact in event.pop("steps").items():
                yield {**event, "kind": "step_cached", "step": step, "artifact": artifact}


class EventLog:
    """Append-only events of one run attempt, each under a name of its own, without the secrets of this process."""

    def __init__(self, run: RunPlace, attempt: int) -> None:
        self._folder = run.directory / "events"
        self._attempt, self._sequence = attempt, 0
        self._cached: dict[str, str] = {}
        self._noted: deque[bytes] = deque()

    @property
    def is_flushed(self) -> bool:
        """Whether everything that was noted is recorded."""
        return not self._cached and not self._noted

    def cached(self, step: str, artifact: str) -> None:
        """Note that a step was there already, to be recorded with others before anything else is."""
        self._cached[step] = artifact

    def note(self, kind: str, step: str = "", **details: Any) -> None:
        """Note that something happened just now, to be recorded by the next flush."""
        self._note_cached()
        told = redacted_in(to_json(details))  # what others say of a failure may hold anything
        event = {"time": time.time(), "attempt": self._attempt, "kind": kind, "step": step, **told}
        self._noted.append(json_bytes(event))

    def _note_cached(self) -> None:
        if self._cached:
            steps, self._cached = self._cached, {}
            self.note(_CACHED, steps=steps)

    def flush(self) -> None:
        """Record what was noted; what a storage does not take, the next flush tries again."""
        self._note_cached()
        while self._noted:
            file, data = self._folder / f"{self._attempt:03d}-{self._sequence:06d}.json", self._noted[0]
            # What failed the time before may have been done all the same: then its bytes are there.
            if not file.create(data) and file.read_bytes() != data:
                raise LeaseLostError(f"event {file.name} was written by another coordinator of this run")
            self._sequence += 1
            self._noted.popleft()

    def write(self, kind: str, step: str = "", **details: Any) -> None:
        """Record that something happened."""
        self.note(kind, step, **details)
        self.flush()


@dataclass(frozen=True)
class Store:
    """Runs and artifacts, in a file system or an object store."""

    root: Place

    @property
    def url(self) -> str:
        """What opens it on another machine."""
        return str(self.root)

    def artifact(self, stage: str, fingerprint: str) -> ArtifactPlace:
        """Place of an artifact by what it is."""
        return ArtifactPlace(self.root / "artifacts" / stage / fingerprint[:FINGERPRINT_CHARS])

    def artifacts(self, stage: str) -> list[ArtifactPlace]:
        """All places of a stage's artifacts."""
        folder = self.root / "artifacts" / stage
        return [ArtifactPlace(folder / name) for name in folder.names()]

    def mark(self) -> None:
        """Make it a store, if nobody has.

        UserError if its storage does not refuse to create a file twice: two coordinators could then commit.
        """
        mark = self.root / _MARK
        if mark.exists():
            return
        mark.create(json_bytes({"schema_version": STORE_SCHEMA, "id": secrets.token_hex(8)}))
        if mark.create(json_bytes({"probe": secrets.token_hex(8)})):
            mark.remove()
            raise UserError(
                f"{self.url} lets a file be created twice (it ignores conditions such as If-None-Match), so two "
                "coordinators could not be kept apart. Use a store that heeds them, or a file system"
            )

    @property
    def store_id(self) -> str:
        """What marks it, wherever it is mounted."""
        return read_json(self.root / _MARK)["id"]

    def create_run(self, run_id: str, plan: Any) -> RunPlace:
        """Freeze a plan under a new run id."""
        run = self.run_place(run_id)
        self.mark()
        value = {**plan, _OWN: secrets.token_hex(8)}
        if not (run.directory / "run.json").create(json_bytes(value)):
            raise RunExistsError(
                f"there is a run {run_id!r} already; continue it with: dlm resume {run_id}. "
                "For other settings leave --run-id out, or give another"
            )
        return run

    def run(self, run_id: str) -> RunPlace:
        """An existing run; UserError naming the latest ones otherwise."""
        run = self.run_place(run_id)
        if not (run.directory / "run.json").exists():
            known = [r.run_id for r in self.runs()][:5]
            hint = f"the latest are: {', '.join(known)}" if known else "there are none in this store"
            raise UserError(f"there is no run {run_id!r} in {self.root}; {hint}")
        return run

    def runs(self) -> list[RunPlace]:
        """All runs, newest first."""
        folder = self.root / "runs"
        created: list[tuple[float, RunPlace]] = []
        for name in folder.names():
            plan = folder / name / "run.json"
            if plan.exists():
                created.append((plan.modified(), RunPlace(name, folder / name)))
        return [run for _, run in sorted(created, key=lambda one: one[0], reverse=True)]

    def run_place(self, run_id: str) -> RunPlace:
        """Where a run of that name lies or would lie; UserError for a name that cannot be one."""
        if not _RUN_ID.fullmatch(run_id):
            raise UserError(
                f"{run_id!r} is no run id: letters, digits, '.', '_' and '-', at most 128, the first a letter or digit"
            )
        return RunPlace(run_id, self.root / "runs" / run_id)


def open_store(url: str | Path) -> Store:
    """The store at a path or URL, to look at; it need not be there.  UserError for one of another schema."""
    store = Store(Place(open_storage(str(url))))
    try:
        value = read_json(store.root / _MARK)
    except FileNotFoundError:
        return store
    schema = value.get("schema_version") if isinstance(value, dict) else None  # pyright: ignore
    if schema != STORE_SCHEMA:
        is_newer = isinstance(schema, int) and schema > STORE_SCHEMA
        which = "a newer dlm" if is_newer else "the version of dlm that made it"
        raise UserError(
            f"the store {url} has schema version {schema}, this program reads {STORE_SCHEMA}; use {which}, or another "
            "--store"
        )
    return store


def open_writable_store(url: str | Path) -> Store:
    """The store at a path or URL, made if it is not there; UserError as ``Store.mark``."""
    store = open_store(url)
    store.mark()
    return store
