"""What runs in a worker process: one piece of a step, reported through files.

Executors call ``run_piece`` with a JSON payload; nothing comes back through them.  A piece that fails leaves
``failure-<rank>.json``; one that is done leaves ``done.json``, written last.
"""

import contextlib
import importlib
import json
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import MANIFEST, checked_files, read_json, write_json
from pipeline.config import from_json
from pipeline.errors import ErrorClass, HangError, classify, is_disk_full
from pipeline.stage import (
    StageContext,
    Stats,
    Stopped,
    build_manifest,
    check_external,
    list_shards,
    run_here,
    run_shard,
)
from workflows.step import load_stage
from workflows.store import Lease

_PROGRESS_EVERY_S = 0.5
_STOP_CHECK_EVERY_S = 0.5

_FAILURE_RANKING: tuple[ErrorClass, ...] = ("stopped", "user", "numerics", "memory", "code", "transient", "infra")
"""Of the failures of several ranks, the first of the first class explains the others."""
_LAST_BYTES = 4000
_RESERVE_BYTES = 64 * 1024
"""Space set aside while a piece runs, so that a full disk leaves room to write down that it is full."""


def _reserve_name(rank: int) -> str:
    return f".reserve-{rank}"


@dataclass(frozen=True)
class Piece:
    """One call to a worker."""

    what: Literal["whole", "list", "shard", "finish"]
    """A task or gang as a whole; or the parts of a map stage."""
    stage: str
    """Package of the stage."""
    step: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Input -> directory of the committed artifact."""
    out: str
    state: str
    work_dir: str
    """Where this piece reports."""
    fingerprint: str
    run_id: str
    lease_dir: str
    lease_epoch: int
    cancel_file: str
    external: Any = None
    """Identity of outside data as planned; checked once the stage has read them."""
    shard: dict[str, Any] = field(default_factory=dict[str, Any])
    shard_dirs: list[str] = field(default_factory=list[str])
    started_at: float = 0.0


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank."""

    error_class: ErrorClass
    type: str
    message: str
    traceback: str
    rank: int
    time: float


class _Throttled:
    """Calls a function at most once in a while; remembers its last answer."""

    def __init__(self, function: Callable[[], bool], every_s: float) -> None:
        self._function, self._every_s = function, every_s
        self._next_s, self._last = 0.0, False

    def __call__(self) -> bool:
        now = time.monotonic()
        if now >= self._next_s:
            self._last, self._next_s = self._function(), now + self._every_s
        return self._last


class _ProgressFile:
    """Writes progress.json, at most twice a second and always at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._next_s = path, 0.0
        self._started_s = time.monotonic()

    def __call__(self, done: int, total: int, **figures: Any) -> None:
        now = time.monotonic()
        if now < self._next_s and done != total:
            return
        self._next_s = now + _PROGRESS_EVERY_S
        shown = {k: v for k, v in figures.items() if not isinstance(v, float) or math.isfinite(v)}
        value = {"done": done, "total": total, "figures": shown, "time": time.time()}
        aside = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # for display only: never a reason to fail
            aside.write_text(json.dumps(value))
            aside.replace(self._path)


def run_piece(payload: dict[str, Any]) -> None:
    """Run one piece; raises what the stage raised, after writing it down."""
    piece = from_json(Piece, payload)
    rank = int(os.environ.get("RANK", "0"))
    work_dir = Path(piece.work_dir)
    lease = Lease(Path(piece.lease_dir), piece.lease_epoch)
    cancel_file = Path(piece.cancel_file)
    context = StageContext(
        out=Path(piece.out),
        state=Path(piece.state),
        fingerprint=piece.fingerprint,
        progress=_ProgressFile(work_dir / "progress.json"),
        should_stop=_Throttled(cancel_file.exists, _STOP_CHECK_EVERY_S),
        fence=lease.check,
        failed=lambda error: _write_failure(work_dir, error, rank),
        labels={"run_id": piece.run_id, "step": piece.step},
    )
    reserve = work_dir / _reserve_name(rank)
    try:
        reserve.write_bytes(bytes(_RESERVE_BYTES))
        lease.check()
        if cancel_file.exists():
            raise Stopped("the run was asked to stop")
        result = _work(piece, context)
        if rank == 0:
            write_json(work_dir / "done.json", result)
        reserve.unlink()
    except BaseException as error:
        _write_failure(work_dir, error, rank)
        raise


def _work(piece: Piece, context: StageContext) -> Any:
    stage = load_stage(piece.stage)
    kind: type[Any] = stage.config
    config = from_json(kind, piece.config, where=piece.step)
    inputs = {name: Path(path) for name, path in piece.inputs.items()}
    start_s = time.monotonic()
    if piece.what == "list":
        shards = list_shards(stage, config, inputs, context)
        check_external(stage, config, piece.external)
        return shards
    if piece.what == "shard":
        run_shard(stage, config, inputs, piece.shard, context)
        return None
    if piece.what == "finish":
        shard_dirs = [Path(path) for path in piece.shard_dirs]
        for directory in shard_dirs:
            checked_files(directory, "*")
        stats: Stats | None = importlib.import_module(stage.module).finish(config, inputs, shard_dirs, context)
    else:
        stats = run_here(stage, config, inputs, context)
    check_external(stage, config, piece.external)
    if os.environ.get("RANK", "0") == "0":
        elapsed_s = time.time() - piece.started_at if piece.started_at else time.monotonic() - start_s
        manifest = build_manifest(
            stage, config, piece.fingerprint, inputs, context.out, stats, piece.started_at, elapsed_s
        )
        write_json(context.out / MANIFEST, manifest)
    return None


def _write_failure(work_dir: Path, error: BaseException, rank: int) -> None:
    """Write the failure down; nothing if even that is impossible, since the error itself goes on."""
    (work_dir / _reserve_name(rank)).unlink(missing_ok=True)
    error_class: ErrorClass = "stopped" if isinstance(error, Stopped) else classify(error)
    message = str(error)
    if is_disk_full(error):
        message = f"no space is left on the disk of {work_dir}: {error}. Free some, then resume the run"
    elif error_class == "memory" and "RANK" in os.environ:
        message = (
            f"out of memory ({message or type(error).__name__}). Take fewer rows at a time "
            "(pretrain.micro_batch_seqs), more workers, or a machine with more memory"
        )
    trace = "".join(traceback.format_exception(error))
    failure = Failure(error_class, type(error).__name__, message, trace, rank, time.time())
    with contextlib.suppress(OSError):
        write_json(work_dir / f"failure-{rank}.json", failure)


def first_failure(work_dir: Path) -> Failure | None:
    """The failure that explains the others: ranks that lost a peer fail too, later and less tellingly.

    One that came first and is a hang explains all others, whatever collectives make of it.
    """
    found = [from_json(Failure, read_json(path)) for path in sorted(work_dir.glob("failure-*.json"))]
    if not found:
        return None
    earliest = min(found, key=lambda f: f.time)
    if earliest.type == HangError.__name__:
        return earliest
    return min(found, key=lambda f: (_FAILURE_RANKING.index(f.error_class), f.time))


def last_words(work_dir: Path) -> str:
    """The ends of the logs of processes that left no failure behind: a crash shows its stack there, if anywhere."""
    ends: list[str] = []
    for path in sorted(work_dir.glob("*.log")):
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _LAST_BYTES))
            if end := log.read().decode(errors="replace").strip():
                ends.append(f"the end of {path}:\n{end}\n")
    return "\n".join(ends)
