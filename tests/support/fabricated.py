"""Runs whose events, leases and reports are written by hand, for the commands that look at them."""

import os
import time
from typing import Any

from pipeline.artifact import json_bytes
from pipeline.storage import Place
from workflows.lease import Lease, acquire_lease
from workflows.plan import Plan
from workflows.runs import create_run
from workflows.store import EventLog, RunPlace, Store

Step = tuple[str, str, dict[str, Any]]
"""Kind of an event, step, details."""


def fabricate_run(store: Store, plan: Plan, *attempts: list[Step], run_id: str = "r1") -> RunPlace:
    """A run with the events of each attempt, none of which is at work any more."""
    run = create_run(store, plan, "local", run_id)
    for events in attempts:
        lease = begin(run, events)
        lease.release()
    return run


def begin(run: RunPlace, events: list[Step]) -> Lease:
    """An attempt that is at work: its lease, held by this process."""
    lease = acquire_lease(run.lease_dir, "test")
    log = EventLog(run, lease.epoch)
    log.write("run_started")
    for kind, step, details in events:
        log.write(kind, step, **details)
    return lease


def end(run: RunPlace, attempt: int, status: str) -> None:
    """What a coordinator writes last."""
    value = {"time": time.time(), "attempt": attempt, "kind": "run_ended", "step": "", "status": status}
    (run.directory / "events" / f"{attempt:03d}-999999.json").write(json_bytes(value))


def age_lease(lease: Lease, seconds: float) -> None:
    """As if the holder were a process of another machine that was last heard of a while ago."""
    record = lease.folder.path / f"{lease.epoch:06d}.json"
    record.write_text(record.read_text().replace('"machine":', '"machine": "another", "was":'))
    then = time.time() - seconds
    os.utime(lease.folder.path / f"{lease.epoch:06d}.heartbeat", (then, then))


def fabricate_turn(run: RunPlace, attempt: int, call: str, turn: str = "000001", **files: Any) -> Place:
    """Reports of a call: usage_0={...} is usage-0.json, log_0="text" the output of rank 0, done=value done.json."""
    folder = run.work_dir(attempt, call) / turn
    for name, value in files.items():
        kind, _, rank = name.partition("_")
        if kind == "log":
            (folder / f"rank-{rank}.log").write(value.encode())
        else:
            (folder / (f"{kind}-{rank}.json" if rank else f"{kind}.json")).write(json_bytes(value))
    return folder


def failure(error_class: str = "code", message: str = "it broke", rank: int = 0, **other: Any) -> dict[str, Any]:
    """What a worker writes down when it fails."""
    value = {"error_class": error_class, "type": "RuntimeError", "message": message, "traceback": "", "rank": rank}
    return {**value, "time": time.time(), **other}


def usage(cpu_s: float, elapsed_s: float = 0.0, gpus: float = 0.0) -> dict[str, Any]:
    """What a worker writes down of what it used."""
    return {"cpu_s": cpu_s, "elapsed_s": elapsed_s, "gpus": gpus, "host": "node"}
