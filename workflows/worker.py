"""What runs in a worker process: one piece of a step, reported through files.

Executors call ``run_piece`` with a JSON payload; nothing comes back through them.  A piece that fails leaves
``failure-<rank>.json``; one that is done leaves ``done.json``, written last.
"""

import contextlib
import importlib
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.auth import redacted
from cluster.executor import GPUS_ENV, CallStoppedError
from pipeline.artifact import MANIFEST, checked_files, json_bytes, read_json, write_json
from pipeline.config import from_json
from pipeline.errors import ErrorClass, HangError, UserError, classify, is_disk_full
from pipeline.mirror import Mirror
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
from pipeline.storage import Place, open_storage
from workflows.copies import local_copy, scratch, upload_artifact
from workflows.lease import Lease
from workflows.plan import with_workers
from workflows.step import load_stage
from workflows.usage import UsageMeter

_LOG_EVERY_S = 10.0
ON_GPUS = "on-gpus"
"""File of an artifact that a gang has begun to make on GPUs: it goes on there, however few are left."""
PREEMPTED = "Preempted"
"""Type of the failure of a piece whose node is taken away; it is nobody's fault and counts as no attempt."""

_FAILURE_RANKING: tuple[ErrorClass, ...] = ("stopped", "user", "numerics", "memory", "code", "transient", "infra")
"""Of the failures of several ranks, the first of the first class explains the others."""
_LAST_BYTES = 4000
_RESERVE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Piece:
    """One call to a worker.  What lies in the store is named by its key there."""

    what: Literal["whole", "list", "shard", "finish"]
    """A task or gang as a whole; or the parts of a map stage."""
    stage: str
    """Package of the stage."""
    step: str
    config: dict[str, Any]
    store: str
    """Path or URL."""
    store_id: str
    """What marks it, so that a node that sees another directory under the path is found out."""
    inputs: dict[str, str]
    """Input -> the committed artifact."""
    out: str
    state: str
    work: str
    """Where this piece reports."""
    log_dir: str
    """Directory of the worker's machine with its output."""
    fingerprint: str
    run_id: str
    lease: str
    lease_epoch: int
    lease_token: str
    cancel: str
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
    """Writes progress.json, now and then and always at the end; ``beside`` stands in it too."""

    def __init__(self, file: Place, beside: Mapping[str, Any]) -> None:
        self._file, self._beside, self._next_s = file, beside, 0.0
        self._unwritten: dict[str, Any] | None = None

    def __call__(self, done: int, total: int, **figures: Any) -> None:
        shown = {k: v for k, v in figures.items() if not isinstance(v, float) or math.isfinite(v)}
        self._unwritten = {"done": done, "total": total, "figures": shown, "time": time.time(), **self._beside}
        if done == total or time.monotonic() >= self._next_s:
            self.flush()

    def flush(self) -> None:
        """Write what was reported last: whether a step fails at the same point again is told from it."""
        value, self._unwritten = self._unwritten, None
        if value is not None:
            self._next_s = time.monotonic() + 2 * self._file.storage.poll_s
            with contextlib.suppress(OSError):  # never a reason to fail
                self._file.write(json_bytes(value), is_durable=False)


class _LogCopies:
    """Copies the output of this process to the store while it works, unless it is written there anyway."""

    def __init__(self, log: Path, work: Place) -> None:
        self._log, self._copy = log, work / log.name
        self._over = threading.Event()
        self._thread = None if work.is_local else threading.Thread(target=self._run, name="log", daemon=True)
        self._copied = -1

    def __enter__(self) -> "_LogCopies":
        if self._thread is not None:
            self._thread.start()
        return self

    def _run(self) -> None:
        while not self._over.wait(_LOG_EVERY_S):
            self._upload()

    def _upload(self) -> None:
        with contextlib.suppress(OSError):  # what cannot be shown is no reason to fail
            size = self._log.stat().st_size
            if size != self._copied:
                self._copy.storage.upload(self._log, self._copy.key)
                self._copied = size

    def __exit__(self, *details: object) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._upload()


def run_piece(payload: dict[str, Any], notice: Callable[[], str]) -> None:
    """Run one piece; raises what the stage raised, after writing it down, and CallStoppedError if it was stopped.

    ``notice`` tells why this process will soon be taken away, or nothing.
    """
    piece = from_json(Piece, payload)
    rank = int(os.environ.get("RANK", "0"))
    root = Place(open_storage(piece.store))
    work = root / piece.work
    log = Path(piece.log_dir) / f"rank-{rank}.log"
    with _LogCopies(log, work), UsageMeter(work, rank), _Reserve(work, rank) as reserve:
        cancel = _Throttled((root / piece.cancel).exists, 2 * root.storage.poll_s)
        progress = _ProgressFile(work / "progress.json", _fewer_workers(piece))

        def failed(error: BaseException, preempted: str = "") -> None:
            _write_failure(work, reserve, error, rank, preempted)
            progress.flush()

        try:
            _check_store(root, piece)
            lease = Lease(root / piece.lease, piece.lease_epoch, piece.lease_token)
            lease.check()
            if piece.what == "whole" and float(os.environ.get(GPUS_ENV, "0")) and rank == 0:
                ((root / piece.state).parent / ON_GPUS).touch()
            if cancel():
                raise Stopped("the run was asked to stop")
            state = _prepared(root / piece.state)
            is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
            context = StageContext(
                out=_prepared(root / piece.out),
                state=state,
                fingerprint=piece.fingerprint,
                progress=progress,
                should_stop=lambda: cancel() or bool(notice()),
                fence=lease.check,
                failed=failed,
                labels={"run_id": piece.run_id, "step": piece.step},
                mirror=None if root.is_local else Mirror(root / piece.state, state, is_first_here, lease.check),
            )
            result = _work(piece, root, context)
            if rank == 0:
                # Whoever loses this file in a power cut has lost the coordinator that waits for it too.
                (work / "done.json").write(json_bytes(result), is_durable=False)
        except Stopped as stopped:
            reason = "" if cancel() else notice()
            failed(stopped, reason)
            raise CallStoppedError(str(stopped)) from None
        except BaseException as error:
            failed(error)
            raise


def _fewer_workers(piece: Piece) -> dict[str, int]:
    """How many workers a gang has, where it was to have more."""
    wanted = int(piece.config.get("workers", 1))
    size = int(os.environ.get("WORLD_SIZE", str(wanted)))  # told to the ranks of a gang alone
    return {"workers": size, "wanted_workers": wanted} if size < wanted else {}


def _check_store(root: Place, piece: Piece) -> None:
    """UserError if what this machine finds under the store's name is another directory, or none."""
    try:
        found = read_json(root / "store.json")["id"]
    except (FileNotFoundError, KeyError):
        found = None
    if found != piece.store_id:
        raise UserError(
            f"{os.uname().nodename} does not see the store at {piece.store}: "
            + ("there is none" if found is None else "another one lies there")
            + ". Mount one directory on all nodes, or use s3:// or gs://"
        )


def _prepared(place: Place) -> Path:
    """A directory of this machine in the place of one in the store."""
    directory = place.path if place.is_local else scratch(place)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


class _Reserve:
    """Space set aside while a piece runs, so that a full disk leaves room to write down that it is full."""

    def __init__(self, work: Place, rank: int) -> None:
        self._path = work.path / f".reserve-{rank}" if work.is_local else None

    def __enter__(self) -> "_Reserve":
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(bytes(_RESERVE_BYTES))
        return self

    def release(self) -> None:
        """Give the space back."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __exit__(self, *details: object) -> None:
        self.release()


def _work(piece: Piece, root: Place, context: StageContext) -> Any:
    stage = load_stage(piece.stage)
    kind: type[Any] = stage.config
    config = from_json(kind, piece.config, where=piece.step)
    if stage.kind == "gang" and (size := int(os.environ.get("WORLD_SIZE", "1"))) != config.workers:
        config = with_workers(config, size)
    inputs = {name: local_copy(root / key) for name, key in piece.inputs.items()}
    start_s = time.monotonic()
    if piece.what == "list":
        shards = list_shards(stage, config, inputs, context)
        check_external(stage, config, piece.external)
        return shards
    if piece.what == "shard":
        run_shard(stage, config, inputs, piece.shard, context)
        _deliver(root / piece.out, context.out)
        return None
    if piece.what == "finish":
        shard_dirs = [local_copy(root / key) for key in piece.shard_dirs]
        for directory in shard_dirs:
            checked_files(directory, "*")
        stats: Stats | None = importlib.import_module(stage.module).finish(config, inputs, shard_dirs, context)
    else:
        stats = run_here(stage, config, inputs, context)
    check_external(stage, config, piece.external)
    if os.environ.get("RANK", "0") == "0":
        elapsed_s = time.time() - piece.started_at if piece.started_at else time.monotonic() - start_s
        manifest = build_manifest(
            stage,
            config,
            piece.fingerprint,
            inputs,
            context.out,
            stats,
            piece.started_at,
            elapsed_s,
            external=piece.external,
        )
        write_json(context.out / MANIFEST, manifest)
        _deliver(root / piece.out, context.out)
    return None


def _deliver(place: Place, directory: Path) -> None:
    """Bring what was made here to the store, where it was not made there."""
    if not place.is_local:
        upload_artifact(directory, place)
        shutil.rmtree(directory)


def _write_failure(work: Place, reserve: _Reserve, error: BaseException, rank: int, preempted: str = "") -> None:
    """Write the failure down; nothing if even that is impossible, since the error itself goes on."""
    reserve.release()
    error_class: ErrorClass = "stopped" if isinstance(error, Stopped) else classify(error)
    kind, message = type(error).__name__, str(error)
    if preempted:
        error_class, kind, message = "infra", PREEMPTED, f"{preempted}; {message}"
    elif is_disk_full(error):
        message = f"no space is left on the disk of {work}: {error}. Free some, then resume the run"
    elif error_class == "memory" and "RANK" in os.environ:
        message = (
            f"out of memory ({message or kind}). Take fewer rows at a time "
            "(pretrain.micro_batch_seqs), more workers, or a machine with more memory"
        )
    trace = redacted("".join(traceback.format_exception(error)))
    failure = Failure(error_class, kind, redacted(message), trace, rank, time.time())
    with contextlib.suppress(OSError):
        (work / f"failure-{rank}.json").write(json_bytes(failure))


def first_failure(work: Place) -> Failure | None:
    """The failure that explains the others: ranks that lost a peer fail too, later and less tellingly.

    One that came first and is a hang explains all others, whatever collectives make of it.
    """
    names = [name for name in work.names() if name.startswith("failure-")]
    found = [from_json(Failure, read_json(work / name)) for name in names]
    if not found:
        return None
    if taken_away := [f for f in found if f.type == PREEMPTED]:
        return taken_away[0]
    earliest = min(found, key=lambda f: f.time)
    if earliest.type == HangError.__name__:
        return earliest
    return min(found, key=lambda f: (_FAILURE_RANKING.index(f.error_class), f.time))


def last_words(work: Place) -> str:
    """The ends of the logs of processes that left no failure behind: a crash shows its stack there, if anywhere."""
    ends: list[str] = []
    for name in (name for name in work.names() if name.endswith(".log")):
        if end := (work / name).read_bytes()[-_LAST_BYTES:].decode(errors="replace").strip():
            ends.append(f"the end of {work / name}:\n{redacted(end)}\n")
    return "\n".join(ends)
