"""What several processes do to one store at the same time; each function runs in a process of its own."""

import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, Manifest, open_artifact, record_files, write_json
from pipeline.errors import LeaseLostError
from pipeline.stage import Shard
from pipeline.storage import Place, open_storage
from workflows.lease import Lease, LeaseHeldError, acquire_lease
from workflows.store import ArtifactPlace

NUM_ROUNDS = 15
NUM_PLACES = 15


def place_at(path: Path) -> Place:
    """A directory as a place of the store."""
    return Place(open_storage(str(path)))


def race_for_lease(directory: Path, barrier: Barrier, answers: Any) -> None:
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
    attempt.path.mkdir(parents=True)
    (attempt.path / "value.txt").write_text(text)
    fingerprint = f"{place.directory.name}{64 * 'f'}"[:64]
    manifest = Manifest("toy", fingerprint, 1, {}, {}, record_files(attempt.path), {"text": text}, shard=shard or {})
    write_json(attempt.path / MANIFEST, manifest)
    return attempt


def race_to_commit(root: Path, name: str, barrier: Barrier, answers: Any) -> None:
    """Commit an attempt of its own in every place, all under the same lease."""
    for number in range(NUM_PLACES):
        place = ArtifactPlace(place_at(root) / str(number))
        attempt = finished_attempt(place, Lease(place.lease_dir, 1), name * 1000)
        barrier.wait()
        answers.put((number, str(place.commit(attempt, Lease(place.lease_dir, 1), name))))


def read_all_the_time(root: Path, barrier: Barrier, answers: Any) -> None:
    """Wait for the commit in every place by asking without a pause; whatever shows up must be whole."""
    for number in range(NUM_PLACES):
        place = ArtifactPlace(place_at(root) / str(number))
        barrier.wait()
        deadline = time.monotonic() + 30.0
        while (committed := place.committed()) is None:
            assert time.monotonic() < deadline, f"nothing was committed in {place.directory.path}"
        text = open_artifact(committed.path).stats["text"]
        assert (committed.path / "value.txt").read_text() == text
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
