"""The store: where runs and artifacts live, and the protocol that makes their writing safe.

    runs/<run>/  run.json                   the frozen plan, created once
                 lease/<epoch>.json         who coordinates the run
                 events/<attempt>-<n>.json  appended under unique names
                 work/<attempt>/<step>/     logs, progress, failures
                 cancel                     request to stop
    artifacts/<stage>/<fp12>/
                 lease/<epoch>.json         who builds the artifact
                 attempts/                  what attempts wrote; only the committed one is ever read
                 state/                     checkpoints and the like, kept across attempts
                 shards/                    committed pieces of a map stage
                 COMMIT.json                created once: the attempt that counts
    shards/<stage>/<fingerprint>.json       where a shard lies that other artifacts of the stage may take over

What was not committed does not exist.  Every commit is one exclusive creation of a complete file.
"""

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.artifact import create_exclusive, fsync_dir, open_artifact, read_json, write_json
from pipeline.errors import CorruptionError, LeaseLostError, UserError
from pipeline.stage import Shard, is_same_shard

HEARTBEAT_S = 10.0
STALE_AFTER_S = 120.0
FINGERPRINT_CHARS = 12
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class LeaseHeldError(RuntimeError):
    """Somebody else is at work here, and alive."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same number."""

    host: str
    pid: int
    started_at: float
    """By the kernel's own count where there is one: it does not move with the clock."""
    machine: str
    """The boot and the process namespace in which ``pid`` means something."""

    @staticmethod
    def this_process() -> "Owner":
        """The calling process."""
        return Owner(socket.gethostname(), os.getpid(), _started_at(os.getpid()), _machine())

    def is_dead(self) -> bool:
        """Whether the process is known to be gone; a process of another host is never known to be."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True  # ended, and not yet waited for by its parent
            return _started_at(self.pid) != self.started_at
        except psutil.NoSuchProcess:
            return True


def _machine() -> str:
    if not Path("/proc/self/ns/pid").exists():
        return f"{psutil.boot_time():.0f}"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"


def _started_at(pid: int) -> float:
    """When a process started; psutil.NoSuchProcess if there is none."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return psutil.Process(pid).create_time()
    try:
        return float(stat.read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None


@dataclass(frozen=True)
class Lease:
    """The right to write in a directory, fenced by an epoch: a higher one ends it."""

    directory: Path
    epoch: int

    @property
    def _heartbeat(self) -> Path:
        return self.directory / f"{self.epoch:06d}.heartbeat"

    def heartbeat(self) -> None:
        """Show that the owner is alive; LeaseLostError once somebody took over."""
        self.check()
        self._heartbeat.touch()

    def check(self) -> None:
        """LeaseLostError if a higher epoch exists."""
        newest = max(_epochs(self.directory), default=0)
        if newest > self.epoch:
            raise LeaseLostError(f"{self.directory}: epoch {newest} took over from epoch {self.epoch}")

    def release(self) -> None:
        """Give the lease up."""
        (self.directory / f"{self.epoch:06d}.released").touch()


def _epochs(directory: Path) -> list[int]:
    return sorted(int(path.stem) for path in directory.glob("[0-9]*.json"))


def acquire_lease(directory: Path, purpose: str) -> Lease:
    """Take the lease on a directory by creating the next epoch.

    A lease is free when it was released, when its process is known to be dead, or when its heartbeat is older
    than STALE_AFTER_S by the clock of the storage.  Raises LeaseHeldError otherwise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    newest = max(_epochs(directory), default=0)
    if newest:
        _check_free(directory, newest)
    value = {**vars(Owner.this_process()), "purpose": purpose}
    if not create_exclusive(directory / f"{newest + 1:06d}.json", value):
        raise LeaseHeldError(f"{directory}: another process took the lease first")
    lease = Lease(directory, newest + 1)
    lease.heartbeat()
    return lease


def lease_is_free(directory: Path) -> bool:
    """Whether nobody alive holds the lease on a directory."""
    newest = max(_epochs(directory), default=0)
    try:
        if newest:
            _check_free(directory, newest)
    except LeaseHeldError:
        return False
    return True


def _check_free(directory: Path, epoch: int) -> None:
    if (directory / f"{epoch:06d}.released").exists():
        return
    value = read_json(directory / f"{epoch:06d}.json")
    owner = Owner(value["host"], value["pid"], value["started_at"], value["machine"])
    if owner.is_dead():
        return
    heartbeat = directory / f"{epoch:06d}.heartbeat"
    shown = heartbeat if heartbeat.exists() else directory / f"{epoch:06d}.json"
    age_s = _storage_now(directory) - shown.stat().st_mtime
    if age_s <= STALE_AFTER_S:
        raise LeaseHeldError(
            f"process {owner.pid} on {owner.host} is at work ({value['purpose']}), last heard of {age_s:.0f} s ago"
        )


def _storage_now(directory: Path) -> float:
    """Time by the clock of the storage, which heartbeats are stamped with."""
    probe = directory / f".clock-{secrets.token_hex(4)}"
    try:
        probe.touch()
    except PermissionError:
        return time.time()  # a store that can only be looked at
    now = probe.stat().st_mtime
    probe.unlink()
    return now


@dataclass(frozen=True)
class ArtifactPlace:
    """The directory of one artifact, committed or not."""

    directory: Path

    @property
    def state(self) -> Path:
        """What survives attempts."""
        return self.directory / "state"

    @property
    def lease_dir(self) -> Path:
        """Leases of those who build it."""
        return self.directory / "lease"

    def committed(self) -> Path | None:
        """Directory of the committed attempt, complete by its manifest; None if there is none.

        Raises CorruptionError if it was committed and is no longer whole.
        """
        commit = self.directory / "COMMIT.json"
        if not commit.exists():
            return None
        try:
            attempt = self.attempt(_value(commit, "attempt"))
            found = open_artifact(attempt).fingerprint
            if not found.startswith(self.directory.name):
                raise CorruptionError(
                    f"{attempt} is the artifact {found[:FINGERPRINT_CHARS]}, filed in the wrong place"
                )
        except (CorruptionError, UserError) as error:
            raise CorruptionError(
                f"{error}. The artifact was committed and has been damaged since; delete {self.directory} to "
                "build it again"
            ) from None
        return attempt

    def attempt(self, name: Any) -> Path:
        """Directory below attempts/ that a commit names; nothing outside it is believed."""
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or not name:
            raise CorruptionError(f"{self.directory}: a commit names {name!r}, which is no attempt")
        return self.directory / "attempts" / name

    def new_attempt(self, lease: Lease) -> Path:
        """An empty directory that only the holder of the lease writes to."""
        attempt = self.directory / "attempts" / f"{lease.epoch:06d}-{secrets.token_hex(4)}"
        attempt.mkdir(parents=True)
        return attempt

    def commit(self, attempt: Path, lease: Lease, run_id: str) -> Path:
        """Publish an attempt whose manifest is written; the first to commit wins, and is returned."""
        open_artifact(attempt)
        fsync_dir(attempt.parent)
        lease.check()
        value = {"attempt": attempt.name, "run": run_id, "epoch": lease.epoch, "committed_at": time.time()}
        create_exclusive(self.directory / "COMMIT.json", value)
        committed = self.committed()
        assert committed is not None
        return committed

    def committed_shards(self) -> dict[str, Path]:
        """Directories of the committed pieces of a map stage, by name; a record of a damaged one is dropped."""
        return {name: directory for name, directory, _ in self._open_shards()}

    def kept_shards(self, listed: Sequence[Shard]) -> dict[str, Path]:
        """Directories of the listed shards that are committed; a record of another shard of the name is dropped."""
        wanted = {shard["name"]: shard for shard in listed}
        found: dict[str, Path] = {}
        for name, directory, shard in self._open_shards():
            if name in wanted and is_same_shard(shard, wanted[name]):
                found[name] = directory
            elif name in wanted:
                self._shard_record(name).unlink()
        return found

    def _open_shards(self) -> Iterator[tuple[str, Path, Shard]]:
        for record in sorted((self.directory / "shards").glob("*.json")):
            try:
                directory = self.attempt(_value(record, "directory"))
                manifest = open_artifact(directory)
            except (CorruptionError, UserError):
                record.unlink()  # not committed after all: it will be made again
                continue
            yield record.stem, directory, manifest.shard

    def _shard_record(self, name: str) -> Path:
        return self.directory / "shards" / f"{name}.json"

    def commit_shard(self, name: str, directory: Path, lease: Lease) -> Path:
        """Publish one piece whose manifest is written; the first of the same shard counts, and is returned.

        Another shard under the name was published by a coordinator that had lost its lease and not noticed yet: it
        gives way to the holder of the newest lease.
        """
        lease.check()
        shard = open_artifact(directory).shard
        (self.directory / "shards").mkdir(exist_ok=True)
        relative = directory.relative_to(self.directory / "attempts").as_posix()
        record = self._shard_record(name)
        if create_exclusive(record, {"directory": relative}):
            return directory
        first = self.attempt(_value(record, "directory"))
        if is_same_shard(open_artifact(first).shard, shard):
            return first
        lease.check()
        write_json(record, {"directory": relative})
        return directory


def _value(record: Path, key: str) -> Any:
    """A value of a record on disk, which may be damaged."""
    value = read_json(record)
    if not isinstance(value, dict) or key not in value:
        raise CorruptionError(f"{record} names no {key}")
    return value[key]  # pyright: ignore[reportUnknownVariableType]


@dataclass(frozen=True)
class RunPlace:
    """The directory of one run."""

    run_id: str
    directory: Path

    @property
    def lease_dir(self) -> Path:
        """Leases of its coordinators."""
        return self.directory / "lease"

    @property
    def cancel_file(self) -> Path:
        """Exists once the run was asked to stop."""
        return self.directory / "cancel"

    def work_dir(self, attempt: int, step: str) -> Path:
        """Logs, progress and failures of a step in one attempt."""
        return self.directory / "work" / f"{attempt:03d}" / step

    def plan(self) -> Any:
        """The frozen plan as JSON."""
        return read_json(self.directory / "run.json")

    def events(self) -> Iterator[dict[str, Any]]:
        """All events in the order of attempts and sequence numbers."""
        for path in sorted((self.directory / "events").glob("*.json")):
            yield read_json(path)


class EventLog:
    """Append-only events of one run attempt, each under a name of its own."""

    def __init__(self, run: RunPlace, attempt: int) -> None:
        self._directory = run.directory / "events"
        self._directory.mkdir(exist_ok=True)
        self._attempt, self._sequence = attempt, 0

    def write(self, kind: str, step: str = "", **details: Any) -> None:
        """Record that something happened."""
        event = {"time": time.time(), "attempt": self._attempt, "kind": kind, "step": step, **details}
        name = f"{self._attempt:03d}-{self._sequence:06d}.json"
        if not create_exclusive(self._directory / name, event):
            raise LeaseLostError(f"event {name} was written by another coordinator of this run")
        self._sequence += 1


@dataclass(frozen=True)
class Store:
    """A directory with runs and artifacts, on a local or shared file system."""

    root: Path

    def artifact(self, stage: str, fingerprint: str) -> ArtifactPlace:
        """Place of an artifact by what it is."""
        return ArtifactPlace(self.root / "artifacts" / stage / fingerprint[:FINGERPRINT_CHARS])

    def artifacts(self, stage: str) -> list[ArtifactPlace]:
        """All places of a stage's artifacts, newest first."""
        found = [p for p in (self.root / "artifacts" / stage).glob("*") if p.is_dir()]
        return [ArtifactPlace(p) for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]

    def create_run(self, run_id: str, plan: Any) -> RunPlace:
        """Freeze a plan under a new run id."""
        run = self._run_place(run_id)
        run.directory.mkdir(parents=True, exist_ok=True)
        if not create_exclusive(run.directory / "run.json", plan):
            raise UserError(
                f"there is a run {run_id!r} already; continue it with: dlm resume {run_id}. "
                "For other settings leave --run-id out, or give another"
            )
        return run

    def run(self, run_id: str) -> RunPlace:
        """An existing run; UserError naming the latest ones otherwise."""
        run = self._run_place(run_id)
        if not (run.directory / "run.json").exists():
            known = [r.run_id for r in self.runs()][:5]
            hint = f"the latest are: {', '.join(known)}" if known else "there are none in this store"
            raise UserError(f"there is no run {run_id!r} in {self.root}; {hint}")
        return run

    def runs(self) -> list[RunPlace]:
        """All runs, newest first."""
        plans = (self.root / "runs").glob("*/run.json")
        newest_first = sorted(plans, key=lambda p: p.stat().st_mtime, reverse=True)
        return [RunPlace(path.parent.name, path.parent) for path in newest_first]

    def _run_place(self, run_id: str) -> RunPlace:
        if not _RUN_ID.fullmatch(run_id):
            raise UserError(
                f"{run_id!r} is no run id: letters, digits, '.', '_' and '-', at most 128, the first a letter or digit"
            )
        return RunPlace(run_id, self.root / "runs" / run_id)
