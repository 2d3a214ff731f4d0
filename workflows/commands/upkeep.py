"""Commands that keep a store in order: delete what is not needed, free what a dead process holds."""

import re
from collections import Counter
from datetime import datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table

from pipeline.errors import UserError
from pipeline.storage import Place
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    find_existing_store,
    find_store,
    find_writable_store,
    print_json,
    print_line,
    print_table,
    say,
)
from workflows.exit_codes import EXIT_UNSCHEDULABLE
from workflows.gc import DAY_S, collect, find_garbage
from workflows.lease import STALE_AFTER_S, Holder, Lease, find_holder
from workflows.store import ArtifactPlace, Store

_ADDRESS = re.compile(r"([A-Za-z0-9_-]+)/([0-9a-f]{12})")


def gc(
    store: StoreOption = DEFAULT_STORE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")
    ] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", min=0.0, metavar="DAYS", help="Leave what is younger than so many days.")
    ] = 7.0,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Keep checkpoints and logs of artifacts that are finished.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete what no run refers to. A run is dropped by deleting its folder, STORE/runs/RUN, before."""
    place = find_existing_store(store)
    if not dry_run:
        place = find_writable_store(store)
    found = find_garbage(place, older_than * DAY_S, keep_state)
    deleted = found if dry_run else collect(place, found)
    freed = sum(one.freed_bytes for one in deleted)
    if as_json:
        rows = [
            {"what": one.what, "place": one.place.key, "reason": one.reason, "bytes": one.freed_bytes}
            for one in deleted
        ]
        print_json({"is_dry_run": dry_run, "deleted": rows, "freed_bytes": freed})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("what", "bytes freed", "place", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "bytes freed" else "left")
    for one in deleted:
        table.add_row(one.what, f"{one.freed_bytes:,}", one.place.key, one.reason)
    if deleted:
        print_table(table)
    verb = "would be deleted, which gives back" if dry_run else "deleted, which gave back"
    kinds = ", ".join(f"{number} {what}" for what, number in Counter(one.what for one in deleted).most_common())
    print_line(f"{len(deleted)} {verb} {freed:,} bytes{f': {kinds}' if kinds else ''}")
    if any(not one.freed_bytes for one in deleted):
        print_line("a file that is linked from several places gives its bytes back with the last of them")
    if len(deleted) < len(found):
        say(f"{len(found) - len(deleted)} left, since somebody has begun to use them")


def unlock(
    what: Annotated[str, typer.Argument(metavar="RUN|STAGE/ADDRESS", help="Run, or artifact as dlm status names it.")],
    store: StoreOption = DEFAULT_STORE,
    force: Annotated[
        int | None, typer.Option("--force", metavar="EPOCH", help="Release a lease that is alive: its epoch, repeated.")
    ] = None,
) -> None:
    """Show who holds the lease on a run or an artifact, and release it if its holder is dead or silent for long."""
    folder = _lease_dir(find_store(store), what)
    holder = find_holder(folder)
    if holder is None:
        print_line(f"nobody ever held the lease on {what}")
        return
    lease = Lease(folder, holder.epoch, holder.token)
    if (folder / f"{holder.epoch:06d}.released").exists():
        was = f"epoch {holder.epoch}, process {holder.owner.pid} on {holder.owner.host} ({holder.purpose})"
        print_line(f"nothing to release: who held the lease on {what} gave it back ({was})")
        return
    print_line(f"the lease on {what}: epoch {holder.epoch}, {_who(holder)}")
    if holder.is_free:
        lease.release()
        print_line("released")
        return
    assert holder.age_s is not None
    if force is None:
        left_s = STALE_AFTER_S - holder.age_s
        until = f"{datetime.now() + timedelta(seconds=left_s):%H:%M:%S}"
        say(
            f"not released: the holder may be alive, and counts as gone after {STALE_AFTER_S:.0f} s of silence. Try "
            f"again at {until}, in {left_s:.0f} s: if it was not heard of until then, it is released without more; a "
            "holder that is alive is heard of again. To end one that is alive: dlm cancel RUN. Only where you have "
            f"seen that its process is gone and cannot wait: --force {holder.epoch}"
        )
        raise typer.Exit(EXIT_UNSCHEDULABLE)
    if force != holder.epoch:
        raise UserError(
            f"--force {force}: the lease has epoch {holder.epoch}; look again who holds it, and repeat that"
        )
    lease.release()
    print_line("released by force; a holder that still runs is kept from publishing once another takes over")


def _who(holder: Holder) -> str:
    heard = "" if holder.age_s is None else f"heard of {holder.age_s:.0f} s ago"
    if holder.owner.is_dead():
        heard = "it is dead"
    return f"process {holder.owner.pid} on {holder.owner.host} ({holder.purpose})" + (f", {heard}" if heard else "")


def _lease_dir(store: Store, what: str) -> Place:
    if "/" not in what:
        return store.run(what).lease_dir
    match = _ADDRESS.fullmatch(what)
    if match is None:
        raise UserError(f"{what!r} is no address of an artifact: STAGE/ and twelve of the digits 0-9a-f")
    artifact = ArtifactPlace(store.root / "artifacts" / match[1] / match[2])
    if not artifact.directory.exists():
        raise UserError(f"there is no artifact {what} in {store.url}; dlm status shows the addresses of a run")
    return artifact.lease_dir
