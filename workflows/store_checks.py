"""Whether a store can carry runs: seen by every node as one, written, and refusing to create a file twice.

All of it happens in one folder of the store, which is removed again.
"""

import os
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.everywhere import Machine, Machines, Question
from cluster.preflight import Check, existing
from pipeline.errors import CorruptionError, UserError
from pipeline.storage import FileStorage, Place, Storage, open_storage
from workflows.lease import STALE_AFTER_S
from workflows.store import open_store

_LOOK_S, _RACE_S = 60.0, 60.0
_START_S = 20.0
"""How long a contestant waits for the others, in all."""
_PRIZES = 10
_ALONE_CONTESTANTS = 4
_POLL_S, _AGAIN_S = 0.002, 0.1
_LATE_S, _CLEAR_S = 3.0, 60.0
"""A write that was under way when what it belongs to was removed is through after this; how long one is waited for."""
_RACE = "race"
_WORD = "word"
"""Lies in the folder for as long as there is something to try in it."""
_CLOCK_WARNING_S, _CLOCK_FAILURE_S = 5.0, 60.0
_WHY_CLOCKS = (
    "synchronise it (chrony, ntpd). Leases are judged by the storage's clock, so one node that is off takes no run "
    "from another; but times of events and costs are wrong, and S3 refuses requests that are 15 minutes off"
)
_WHY_LATE = (
    "not tried, and not found wanting: either the nodes are too busy (run this again when they have less to do), or "
    "they list folders as they were a while ago (NFS: mount it with actimeo=1 to try, at other times that only delays)"
)
_WHY_DISTANT = f"a lease is free {STALE_AFTER_S:.0f} s after its last heartbeat by the storage's clock: " + _WHY_CLOCKS


@dataclass(frozen=True)
class Raced:
    """How a contestant for exclusive creation fared."""

    won: tuple[int, ...] = ()
    """Numbers of the prizes that it got."""
    met: int = 0
    """For how many of them it saw all the others there."""


@dataclass(frozen=True)
class View:
    """The store as one node sees it."""

    checks: tuple[Check, ...]
    offset_s: float | None = None
    """The storage's clock less that of the node; None where it cannot be asked."""


def store_checks(machines: Machines, who: Sequence[Machine], url: str) -> list[Check]:
    """Look at the store at a path or URL from this process and from some machines."""
    storage = open_storage(url)
    first = who[0].name
    checks = [_kind_check(first, storage)]
    all_answered = False
    base = _base(storage)
    place = Place(open_storage(base) if base != storage.url else storage, f".dlm-doctor-{secrets.token_hex(6)}")
    word = secrets.token_hex(8)
    try:
        (place / _WORD).write(word.encode())
    except (OSError, UserError) as error:
        todo = "choose another --store, or give this user the right to write there"
        return [*checks, Check("store", first, "failure", f"{base} cannot be written: {error}", todo)]
    try:
        seen, has_seen = _look(machines, who, base, place.key, word)
        raced, has_raced = _race(machines, who, base, place)
        checks += seen + raced
        all_answered = has_seen and has_raced
    finally:
        checks += _clear(first, place, 0.0 if all_answered else _LATE_S)
    return checks


def _clear(node: str, place: Place, late_s: float) -> list[Check]:
    """Remove the folder until nothing has come into it for a while: who is silent goes on while its word is there."""
    begun_s = empty_since_s = time.monotonic()
    why = ""
    while True:
        try:
            is_there = place.exists()
            (place / _WORD).remove()
            place.remove()
        except OSError as error:  # something came into it while it was emptied, or a listing is late
            is_there, why = True, str(error)
        now = time.monotonic()
        if is_there:
            empty_since_s = now
        elif now - empty_since_s >= late_s:
            return []
        if now - begun_s >= _CLEAR_S:
            told = f"{place} is still written to, and could not be removed{': ' if why else ''}{why}"
            return [Check("store", node, "warning", told, "delete it once the nodes that did not answer are at rest")]
        time.sleep(_AGAIN_S)


def _base(storage: Storage) -> str:
    """Where to try: the store, or the folder in which it would be made."""
    root = storage.path("")
    return storage.url if root is None else str(existing(root))


def _kind_check(node: str, storage: Storage) -> Check:
    try:
        store = open_store(storage.url)
        name = store.store_id
    except FileNotFoundError:
        return Check("store", node, "ok", f"there is none at {storage.url} yet; the first run makes it")
    except (UserError, CorruptionError, OSError, KeyError) as error:
        return Check("store", node, "failure", f"{storage.url}: {error}", "choose another --store")
    return Check("store", node, "ok", f"{storage.url}, store {name}")


# --- what each node sees ----------------------------------------------------------------------------------------------


def _look(machines: Machines, who: Sequence[Machine], base: str, key: str, word: str) -> tuple[list[Check], bool]:
    """What they see; and whether all have answered."""
    asked = [Question(machine, view, (base, key, machine.name, word)) for machine in who]
    checks: list[Check] = []
    offsets: dict[str, float] = {}
    all_answered = True
    for reply in machines.ask(asked, _LOOK_S):
        if reply.value is None:
            all_answered = False
            todo = "look whether the file system hangs there (df), or the object store is reachable"
            checks.append(Check("store", reply.machine.name, "failure", reply.error, todo))
            continue
        checks += reply.value.checks
        if reply.value.offset_s is not None:
            offsets[reply.machine.name] = reply.value.offset_s
    return checks + clock_checks(offsets), all_answered


def view(base: str, key: str, node: str, word: str) -> View:
    """Look at the store from this node."""
    place = Place(open_storage(base), key)
    try:
        found = (place / _WORD).read_bytes().decode(errors="replace")
    except FileNotFoundError:
        found = ""
    except (OSError, UserError) as error:
        todo = "give this node the same rights and credentials as the others"
        return View((Check("store", node, "failure", f"{base} cannot be read: {error}", todo),))
    if found != word:
        todo = "mount the same file system at the same path on every node, or use s3:// or gs://"
        return View((Check("store", node, "failure", f"{base} is another folder here than on the first node", todo),))
    try:
        return View((_use(place, base, node), *_link_checks(place, node)), _offset_s(place))
    except (OSError, UserError) as error:
        todo = "give this node the same rights as the others"
        return View((Check("store", node, "failure", f"{base} cannot be written: {error}", todo),))


def _use(place: Place, base: str, node: str) -> Check:
    """Write, read, list, put another in its place and remove."""
    start_s = time.perf_counter()
    name = f"used-{secrets.token_hex(4)}"
    file = place / name
    for text in (b"one", b"another"):
        file.write(text)
        if (found := file.read_bytes()) != text:
            told = f"{base}: what was written as {text!r} was read as {found!r}"
            return Check("store", node, "failure", told, "use a store that shows what was written, at once")
    is_listed = name in place.names()
    file.remove()
    if not is_listed or file.exists() or name in place.names():
        told = f"{base} lists files that are gone, or lacks files that are there"
        return Check("store", node, "failure", told, "use a store whose listings are up to date; turn caches of it off")
    told = f"seen as the same; written, read, listed and removed in {time.perf_counter() - start_s:.2g} s"
    return Check("store", node, "ok", told)


def _link_checks(place: Place, node: str) -> list[Check]:
    """Hard links, which a file system creates files and shares shards by; an object store needs none."""
    if not place.is_local:
        return []
    source = place / f"linked-{secrets.token_hex(4)}"
    source.write(b"one")
    to = Path(f"{source.path}-again")
    try:
        os.link(source.path, to)
        is_linked = to.stat().st_nlink == 2
    except OSError as error:
        return [_no_links(node, error.strerror or str(error))]
    return [] if is_linked else [_no_links(node, "a link is a copy there")]


def _no_links(node: str, why: str) -> Check:
    todo = "use a file system with hard links (ext4, xfs, NFS, Lustre); a bucket is used as s3:// or gs://, not mounted"
    return Check("hard links", node, "failure", f"the file system of the store has none: {why}", todo)


def _offset_s(place: Place) -> float:
    before_s = time.time()
    there_s = place.now()
    return there_s - (before_s + time.time()) / 2


def clock_checks(offsets_s: dict[str, float]) -> list[Check]:
    """The clocks of nodes against that of the storage, and against each other."""
    checks: list[Check] = []
    for node, offset_s in offsets_s.items():
        if abs(offset_s) > _CLOCK_WARNING_S:
            status = "failure" if abs(offset_s) > _CLOCK_FAILURE_S else "warning"
            told = f"{abs(offset_s):.0f} s {'behind' if offset_s > 0 else 'ahead of'} the storage's"
            why = _WHY_DISTANT if status == "failure" else _WHY_CLOCKS
            checks.append(Check("clock", node, status, told, why))
    if not checks and offsets_s:
        far_s = max(abs(offset_s) for offset_s in offsets_s.values())
        apart_s = max(offsets_s.values()) - min(offsets_s.values())
        told = f"at most {far_s:.1f} s from the storage's" + (f", {apart_s:.1f} s apart" if len(offsets_s) > 1 else "")
        return [Check("clock", "all" if len(offsets_s) > 1 else next(iter(offsets_s)), "ok", told)]
    return checks


# --- exclusive creation -----------------------------------------------------------------------------------------------


def _race(machines: Machines, who: Sequence[Machine], base: str, place: Place) -> tuple[list[Check], bool]:
    """All nodes create the same files at once: exactly one may succeed with each.  And whether all have answered."""
    runners = list(who) * (_ALONE_CONTESTANTS if len(who) == 1 else 1)
    asked = [
        Question(machine, compete, (base, place.key, str(number), len(runners)))
        for number, machine in enumerate(runners)
    ]
    replies = machines.ask(asked, _RACE_S)
    if failed := [reply for reply in replies if reply.value is None]:
        todo = "exclusive creation is what commits rest on: mend the store, or use another"
        return [Check("exclusive create", one.machine.name, "failure", one.error, todo) for one in failed[:1]], False
    raced = [reply.value or Raced() for reply in replies]
    return [race_check("all" if len(who) > 1 else who[0].name, raced, place / _RACE)], True


def compete(base: str, key: str, name: str, contestants: int) -> Raced:
    """Create every prize, each once all contestants are there for it, or have not come for too long."""
    folder = Place(open_storage(base), key)
    place, word = folder / _RACE, folder / _WORD
    deadline = time.monotonic() + _START_S
    won: list[int] = []
    met = 0
    for number in range(_PRIZES):
        if not word.exists():
            break
        here = f"here-{number}-"
        (place / f"{here}{name}").write(b"", is_durable=False)
        while not (all_here := sum(found.startswith(here) for found in place.names()) >= contestants):
            if time.monotonic() >= deadline or not word.exists():
                break
            time.sleep(_POLL_S)
        met += all_here
        if word.exists() and (place / f"prize-{number}").create(name.encode()):
            won.append(number)
    return Raced(tuple(won), met)


def race_check(node: str, raced: Sequence[Raced], place: Place) -> Check:
    """Whether each prize went to exactly one, whose name it bears, while all wanted it."""
    winners = Counter(number for one in raced for number in one.won)
    if twice := [number for number in range(_PRIZES) if winners[number] > 1]:
        told = f"{len(twice)} of {_PRIZES} files were created by several at once: two coordinators could both commit"
        todo = "use a store that heeds conditions (If-None-Match), or a file system with hard links"
        return Check("exclusive create", node, "failure", told, todo)
    names = {str(name): one.won for name, one in enumerate(raced)}
    if lost := [number for number in range(_PRIZES) if number not in names.get(_bearer(place, number), ())]:
        told = f"{len(lost)} of {_PRIZES} files do not bear the name of whoever created them"
        return Check("exclusive create", node, "failure", told, "use another store: this one loses what was written")
    if (met := min(one.met for one in raced)) < _PRIZES:
        told = f"only {met} of {_PRIZES} files were wanted by all {len(raced)} at once: the others came late"
        return Check("exclusive create", node, "warning", told, _WHY_LATE)
    told = f"{len(raced)} at once, {_PRIZES} files: each went to exactly one"
    return Check("exclusive create", node, "ok", told)


def _bearer(place: Place, number: int) -> str:
    try:
        return (place / f"prize-{number}").read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def local_root(url: str) -> Path | None:
    """The folder of a store in a file system."""
    storage = open_storage(url)
    return storage.root if isinstance(storage, FileStorage) else None
