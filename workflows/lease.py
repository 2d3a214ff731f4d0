"""Leases: who may write in a folder of the store, fenced by epochs.

    lease/<epoch>.json       created once: the process that took the lease
          <epoch>.heartbeat  rewritten while it lives
          <epoch>.released   it gave the lease up

Taking over is the exclusive creation of the next epoch, so nothing is ever compared and swapped.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.artifact import json_bytes, read_json
from pipeline.errors import LeaseLostError, classify
from pipeline.storage import Place

HEARTBEAT_S = 10.0
STALE_AFTER_S = 120.0
_LOOK_S = 1.0
_AGAIN_S, _VANISHED_S = 0.1, 60.0
"""How often, and for how long at most, somebody looks again for a lease that was listed and is not there."""


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

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def is_dead(self) -> bool:
        """Whether the process is known to be gone; a process of another host is never known to be."""
        if not self.is_here:
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
    """The right to write in a folder: a higher epoch ends it."""

    folder: Place
    epoch: int
    token: str
    """Tells it from one of the same epoch: where a folder was deleted, epochs begin anew."""

    @property
    def _heartbeat(self) -> Place:
        return self.folder / f"{self.epoch:06d}.heartbeat"

    def heartbeat(self) -> None:
        """Show that the owner is alive; LeaseLostError once somebody took over."""
        self.check()
        self._heartbeat.touch()

    def check(self) -> None:
        """LeaseLostError if a higher epoch exists, or this one does not any more."""
        newest = _newest_epoch(self.folder)
        if newest > self.epoch:
            raise LeaseLostError(f"{self.folder}: epoch {newest} took over from epoch {self.epoch}")
        # A machine of a shared file system may list a folder as it was, but reads a file as it is.
        try:
            token = read_json(self.folder / f"{self.epoch:06d}.json")["token"]
        except FileNotFoundError:
            token = ""
        if token != self.token:
            raise LeaseLostError(f"{self.folder}: epoch {self.epoch} was deleted, with what it was the lease of")

    def release(self) -> None:
        """Give the lease up; nothing happens if somebody took over, or it was deleted: the next one is not its own."""
        with suppress(LeaseLostError):
            self.check()
            (self.folder / f"{self.epoch:06d}.released").touch()


@dataclass(frozen=True)
class Holder:
    """Who took a lease last, and whether it counts."""

    epoch: int
    owner: Owner
    purpose: str
    token: str
    """Of the lease that it took."""
    age_s: float | None
    """Since its last heartbeat, by the clock of the storage; None once it was released or its process is known to be
    dead."""

    @property
    def is_free(self) -> bool:
        """Whether anybody may take over."""
        return self.age_s is None or self.age_s > STALE_AFTER_S

    def __str__(self) -> str:
        heard = "gone" if self.age_s is None else f"last heard of {self.age_s:.0f} s ago"
        return f"process {self.owner.pid} on {self.owner.host} is at work ({self.purpose}), {heard}"


def _newest_epoch(folder: Place) -> int:
    return max((int(name[:-5]) for name in folder.names() if name.endswith(".json")), default=0)


def find_holder(folder: Place) -> Holder | None:
    """Who took the lease on a folder last; None if nobody ever did.

    A lease is free when it was released, when its process is known to be dead, or when its heartbeat is older than
    STALE_AFTER_S by the clock of the storage.
    """
    until_s = time.monotonic() + _VANISHED_S
    while True:
        try:
            return _find_holder(folder)
        except FileNotFoundError:  # deleted since it was listed; a shared file system may go on listing it for a while
            if time.monotonic() >= until_s:
                raise
            time.sleep(_AGAIN_S)


def _find_holder(folder: Place) -> Holder | None:
    epoch = _newest_epoch(folder)
    if not epoch:
        return None
    value = read_json(folder / f"{epoch:06d}.json")
    owner = Owner(value["host"], value["pid"], value["started_at"], value["machine"])
    names = folder.names()
    if f"{epoch:06d}.released" in names or owner.is_dead():
        return Holder(epoch, owner, value["purpose"], value["token"], None)
    heartbeat = f"{epoch:06d}.heartbeat"
    shown = folder / (heartbeat if heartbeat in names else f"{epoch:06d}.json")
    return Holder(epoch, owner, value["purpose"], value["token"], folder.now() - shown.modified())


def acquire_lease(
    folder: Place,
    purpose: str,
    give_up: Callable[[Callable[[], None]], None] = lambda release: release(),
) -> Lease:
    """Take the lease on a folder by creating the next epoch.  LeaseHeldError unless it is free.

    What failed with an OSError may have been done all the same, and the lease would be held by nobody: ``give_up`` is
    given what releases it, to be done now or as soon as the storage answers.
    """
    holder = find_holder(folder)
    if holder is not None and not holder.is_free:
        raise LeaseHeldError(str(holder))
    epoch = holder.epoch + 1 if holder else 1
    lease = Lease(folder, epoch, secrets.token_hex(8))
    value = {**vars(Owner.this_process()), "purpose": purpose, "token": lease.token}
    try:
        if not (folder / f"{epoch:06d}.json").create(json_bytes(value)):
            raise LeaseHeldError(f"{folder}: another process took the lease first")
        lease.heartbeat()
    except OSError:
        give_up(lease.release)
        raise
    return lease


def lease_is_free(folder: Place) -> bool:
    """Whether nobody alive holds the lease on a folder."""
    holder = find_holder(folder)
    return holder is None or holder.is_free


class Patience:
    """Lets errors of a storage that may be gone at the next try go by, for as long as ``Beating`` does."""

    def __init__(self) -> None:
        self._failing_since_s: float | None = None

    def tried(self, action: Callable[[], None]) -> OSError | None:
        """Do something that can be done again; the error for which it is to be, raised after too long a row of them."""
        begun_s = time.monotonic()
        try:
            action()
        except OSError as error:
            if self._failing_since_s is None:
                self._failing_since_s = begun_s
            if classify(error) != "transient" or begun_s - self._failing_since_s > STALE_AFTER_S / 2:
                raise
            return error
        self._failing_since_s = None
        return None


class Beating:
    """Keeps leases alive; a storage that cannot be reached for a while is no reason to give up."""

    def __init__(self) -> None:
        self._next_s, self._last_s = 0.0, time.monotonic()

    def beat(self, own: Lease, others: Sequence[Lease]) -> list[Lease]:
        """Send heartbeats if it is time; which of the others were lost.

        LeaseLostError once somebody took over one's own, OSError before anybody could.
        """
        now, lost = time.monotonic(), list[Lease]()
        if now < self._next_s:
            return lost
        self._next_s = now + HEARTBEAT_S
        try:
            own.heartbeat()
            for lease in others:
                try:
                    lease.heartbeat()
                except LeaseLostError:
                    lost.append(lease)
            self._last_s = now
        except OSError:
            if time.monotonic() - self._last_s > STALE_AFTER_S / 2:
                raise
        return lost

    @contextmanager
    def meanwhile(self, own: Lease, others: Sequence[Lease]) -> Generator[None]:
        """Beats from a thread while the caller does something that takes long."""
        is_over = threading.Event()

        def work() -> None:
            while not is_over.wait(_LOOK_S):
                with suppress(LeaseLostError, OSError):  # the next beat of the caller meets them again
                    self.beat(own, others)

        thread = threading.Thread(target=work, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
