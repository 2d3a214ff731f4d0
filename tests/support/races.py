"""What several processes do to one store at the same time; each function runs in a process of its own."""

import hashlib
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, FileRecord, Manifest, json_bytes
from pipeline.errors import LeaseLostError
from pipeline.stage import Shard
from pipeline.storage import Place, open_storage
from workflows.lease import Lease, LeaseHeldError, acquire_lease
from workflows.store import ArtifactPlace, open_attempt

NUM_ROUNDS = 15
NUM_PLACES = 15


def place_at(path: Path | str) -> Place:
    """A directory or a URL as a place of the store."""
    return Place(open_storage(str(path)))


def race_for_lease(directory: Path | str, barrier: Barrier, answers: Any) -> None:
    """In every round, try once; the winner releases before the next round."""
    barrier.wait()
    for number in range(NUM_ROUNDS):
        try:
            lease = acquire_lease(place_at(directory), "race")
        except LeaseHeldError:
            lease = None
        barrier.wait()
        if lease is not None:
            lease.heartbeat()
            answers.put((number, lease.epoch))
            lease.release()
        barrier.wait()


def finished_attempt(place: ArtifactPlace, lease: Lease, text: str, shard: Shard | None = None) -> Place:
    """An attempt that is ready to be committed."""
    attempt = place.new_attempt(lease)
    (attempt / "value.txt").write(text.encode())
    files = [FileRecord("value.txt", len(text.encode()), hashlib.sha256(text.encode()).hexdigest())]
    fingerprint = f"{place.directory.name}{64 * 'f'}"[:64]
    manifest = Manifest("toy", fingerprint, 1, {}, {}, files, {"text": text}, shard=shard or {})
    (attempt / MANIFEST).write(json_bytes(manifest))
    return attempt


def race_to_create(root: Path | str, name: str, barrier: Barrier, answers: Any) -> None:
    """Create the same files with bytes of its own; tell which it was given to create, and what lies there then."""
    folder = place_at(root)
    for number in range(NUM_ROUNDS):
        barrier.wait()
        is_first = (folder / str(number)).create(name.encode() * 100)
        answers.put((number, (name, is_first, (folder / str(number)).read_bytes().decode())))


def race_to_commit(root: Path | str, name: str, barrier: Barrier, answers: Any) -> None:
    """Commit an attempt of its own in every place, all under the same lease."""
    for number in range(NUM_PLACES):
        place = ArtifactPlace(place_at(root) / str(number))
        lease = Lease(place.lease_dir, 1, "of both")
        (place.lease_dir / "000001.json").create(json_bytes({"token": lease.token}))  # by either of them
        attempt = finished_attempt(place, lease, name * 1000)
        barrier.wait()
        answers.put((number, str(place.commit(attempt, lease, name))))


def read_all_the_time(root: Path | str, barrier: Barrier, answers: Any) -> None:
    """Wait for the commit in every place by asking without a pause; whatever shows up must be whole."""
    for number in range(NUM_PLACES):
        place = ArtifactPlace(place_at(root) / str(number))
        barrier.wait()
        deadline = time.monotonic() + 30.0
        while (committed := place.committed()) is None:
            assert time.monotonic() < deadline, f"nothing was committed in {place.directory}"
        text = open_attempt(committed).stats["text"]
        assert (committed / "value.txt").read_bytes().decode() == text
        answers.put((number, str(committed)))


def hold_and_vanish(directory: Place) -> None:
    """Take a lease and end without giving it up."""
    acquire_lease(directory, "vanish")


def is_fenced(action: Any) -> bool:
    """Whether an action is refused because somebody took over."""
    try:
        action()
    except LeaseLostError:
        return True
    return False
