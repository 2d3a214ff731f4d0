"""The contract of a stage: what it declares, what it is given, and how it runs by itself.

A stage is a folder with ``config.py`` (its configuration and its ``STAGE`` declaration, light to import) and
``run.py`` (the work).  ``run.py`` offers, by kind,

    task   run(config, inputs, context)
    map    list_shards(config, inputs, context) -> list[Shard]
           run_shard(config, inputs, shard, context)
           finish(config, inputs, shard_dirs, context)
    gang   run(config, inputs, context), on every rank, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

and writes only below ``context.out``.  Each returns the stats for the manifest, or None: what ``run_shard`` returns
is found by ``finish`` as ``load_manifest(shard_dir).stats``.
"""

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import MANIFEST, Manifest, checked_files, fsync_dir, open_artifact, record_files, write_json
from pipeline.config import apply_settings, fingerprint, from_json, identity, parse_json, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.mirror import Mirror

Shard = dict[str, Any]
"""One piece of a map stage, as JSON values, with a unique "name" that can name a directory.

It may have an "identity": a JSON value that determines the files of the shard, together with the stage, its code
version and the identity of its configuration (without ``Stage.not_of_shards``), but whatever the inputs are.  The
engine then takes the shard over from another artifact of the stage instead of running it; the other values (where
something lies, when it was changed) may differ.  Counts in its stats follow from the files; others may tell how these
were made, such as the name of a backend that gives the same files as any other, and are then those of the shard that
was taken over.  A shard that reads data which may change meanwhile (outside the store) must check that what it read is
what its identity says.
"""

Stats = dict[str, Any]


def _no_progress(done: int, total: int, **figures: Any) -> None:
    """The default of StageContext.progress: keep quiet."""


@dataclass(frozen=True)
class Stage:
    """Declaration of a stage."""

    name: str
    kind: Literal["task", "map", "gang"]
    config: type
    module: str
    """Import path of the module with the work; imported only where it runs."""
    inputs: tuple[str, ...] = ()
    optional_inputs: tuple[str, ...] = ()
    """Inputs that some configurations need; ``check`` says which."""
    code_version: int = 1
    """Raised when the same configuration would give another result."""
    external: str = ""
    """``module:function`` of (config) -> JSON that identifies data from outside the store, or empty."""
    not_of_shards: tuple[str, ...] = ()
    """Fields of the configuration that decide nothing of a shard but what its own "identity" says of them."""
    check: Callable[[Any, Mapping[str, Any], str], None] | None = None
    """check(config, upstream, step) raises UserError if the configuration does not fit those it depends on.

    They are JSON values by path of inputs: upstream["rows.tokens"] is that of the stage which makes the input "tokens"
    of the stage which makes the input "rows".  Called when a workflow is planned.
    """
    ready: Callable[[Any, str], None] | None = None
    """ready(config, step) raises NotGivenError for what a recipe leaves to its user, and UserError for what else keeps
    it from running here: asked before a run, not for a plan."""
    advice: Callable[[Any], list[str]] | None = None
    """advice(config) -> sentences that begin with the name of a field, on what is allowed and hardly ever meant."""
    cpus: float = 1.0
    """CPU cores of a task, of one shard, or of one rank."""

    def takes(self, inputs: Collection[str]) -> bool:
        """Whether these are all the inputs that the stage needs, and none that it does not know."""
        return set(self.inputs) <= set(inputs) <= {*self.inputs, *self.optional_inputs}


@dataclass(frozen=True)
class StageContext:
    """What a stage is given besides its configuration and inputs."""

    out: Path
    """Empty directory that only this attempt writes to."""
    state: Path
    """Directory that survives attempts: checkpoints and logs of unfinished work."""
    fingerprint: str
    progress: Callable[..., None] = _no_progress
    """progress(done, total, **figures): cheap, may be called at every step."""
    should_stop: Callable[[], bool] = lambda: False
    """True once the run was asked to stop: save and raise Stopped at the next boundary."""
    fence: Callable[[], None] = lambda: None
    """Raises once another attempt has taken over: called before anything is published in ``state``."""
    failed: Callable[[BaseException], None] = lambda error: None
    """Writes down why this process is about to end, for a watchdog that ends it without raising."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """``run_id`` and the like, for tracking."""
    mirror: Mirror | None = None
    """Of ``state``, where that is a directory of this machine which goes with it: what is to survive is published."""


class Stopped(Exception):
    """A stage ended early on request, its state saved."""


PERMISSION = "allow_unsandboxed"
"""The setting of a stage that runs programs which a model wrote, on the command line --allow-unsandboxed."""

PACKAGES = ("torch", "deepspeed", "ray", "pyarrow", "tokenizers", "numpy")


def environment() -> dict[str, str]:
    """Versions and machine, as recorded in manifests."""
    return dict(_environment())


@cache
def _environment() -> Mapping[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def external_identity(stage: Stage, config: Any) -> Any:
    """What identifies the data a stage reads from outside the store (None for most stages)."""
    if not stage.external:
        return None
    module, function = stage.external.split(":")
    return getattr(importlib.import_module(module), function)(config)


def check_external(stage: Stage, config: Any, planned: Any) -> None:
    """UserError if data from outside the store are no longer what the fingerprint was made from."""
    if external_identity(stage, config) != planned:
        raise UserError(
            f"the files that {stage.name} reads have changed since the run was planned, so its output would be filed "
            "under the wrong fingerprint. Start a new run once they are complete"
        )


def stage_identity(stage: Stage, config: Any, inputs: Mapping[str, str], external: Any = None) -> dict[str, Any]:
    """What determines a stage's output: code version, identity fields, input fingerprints, outside data."""
    return {
        "stage": stage.name,
        "code_version": stage.code_version,
        "config": identity(config),
        "inputs": dict(inputs),
        "external": external,
    }


def stage_fingerprint(stage: Stage, config: Any, inputs: Mapping[str, str], external: Any = None) -> str:
    """Hash of the identity of a stage's output."""
    return fingerprint(stage_identity(stage, config, inputs, external))


def shard_fingerprint(stage: Stage, config: Any, shard: Shard) -> str:
    """Identity of the files of a shard that declares what determines them."""
    return fingerprint(
        {
            "stage": stage.name,
            "code_version": stage.code_version,
            "config": {name: value for name, value in identity(config).items() if name not in stage.not_of_shards},
            "shard": shard["identity"],
        }
    )


def build_manifest(
    stage: Stage,
    config: Any,
    fingerprint_: str,
    inputs: Mapping[str, Path],
    out: Path,
    stats: Stats | None,
    started_at: float,
    elapsed_s: float,
    shard: Shard | None = None,
    external: Any = None,
) -> Manifest:
    """Hash what a stage wrote below ``out`` and describe it."""
    return Manifest(
        stage=stage.name,
        fingerprint=fingerprint_,
        code_version=stage.code_version,
        config=to_json(config),
        inputs={name: open_artifact(path).fingerprint for name, path in inputs.items()},
        files=record_files(out),
        stats=stats or {},
        started_at=started_at,
        elapsed_s=elapsed_s,
        environment=environment(),
        shard=shard or {},
        external=external,
    )


def list_shards(stage: Stage, config: Any, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """The shards of a map stage as JSON values, their names unique and fit for directories."""
    shards: list[Shard] = to_json(importlib.import_module(stage.module).list_shards(config, inputs, context))
    fault = fault_of_shards(shards)
    assert not fault, f"{stage.name}: {fault}"
    return shards


def fault_of_shards(shards: Any) -> str:
    """What keeps a JSON value from being a list of shards, or nothing."""
    if not isinstance(shards, list):
        return f"{type(shards).__name__} is no list of shards"
    names: set[str] = set()
    for shard in shards:
        match shard:
            case {"name": str(name)} if name and name == Path(name).name and name[0] != "." and "\0" not in name:
                if name in names:
                    return f"the name {name!r} is given to more than one shard"
                names.add(name)
            case _:
                return f"the shard {shard!r} has no name that can be the name of a directory"
    return ""


def is_same_shard(one: Shard, other: Shard) -> bool:
    """Whether two shards have the same name and files: by their identities, or by all values where one has none."""
    if "identity" in one and "identity" in other:
        return (one["name"], one["identity"]) == (other["name"], other["identity"])
    return one == other


def run_shard(stage: Stage, config: Any, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> None:
    """Run one shard into ``context.out`` and write its manifest, whose stats are what the shard returned.

    The manifest names no inputs: they are in the fingerprint of the stage.
    """
    started_at, start_s = time.time(), time.monotonic()
    stats: Stats | None = importlib.import_module(stage.module).run_shard(config, inputs, shard, context)
    elapsed_s = time.monotonic() - start_s
    manifest = build_manifest(stage, config, context.fingerprint, {}, context.out, stats, started_at, elapsed_s, shard)
    write_json(context.out / MANIFEST, manifest)


def run_here(stage: Stage, config: Any, inputs: Mapping[str, Path], context: StageContext) -> Stats | None:
    """Run a whole stage in this process (for a gang: this rank of it).

    Shards that an earlier, killed call finished in ``context.state`` are not run again.
    """
    work = importlib.import_module(stage.module)
    if stage.kind != "map":
        return work.run(config, inputs, context)
    shards = list_shards(stage, config, inputs, context)
    parts: list[Path] = []
    for number, shard in enumerate(shards):
        part = context.state / "shards" / shard["name"]
        if not _is_finished(part, shard, context.fingerprint):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            run_shard(stage, config, inputs, shard, shard_context(context, part))
        parts.append(part)
        context.progress(number + 1, len(shards))
    return work.finish(config, inputs, parts, context)


def _is_finished(directory: Path, shard: Shard, fingerprint_: str) -> bool:
    """Whether a directory holds this shard of this stage, every byte of it."""
    try:
        manifest = open_artifact(directory)
        checked_files(directory, "*")
    except (UserError, CorruptionError):
        return False
    return manifest.fingerprint == fingerprint_ and is_same_shard(manifest.shard, shard)


def shard_context(context: StageContext, out: Path) -> StageContext:
    """The context of one shard, which writes to its own directory and reports no progress of its own."""
    return StageContext(out, context.state, context.fingerprint, should_stop=context.should_stop)


def main(stage: Stage) -> None:
    """``python -m pipeline.STAGE --config c.json --input NAME=DIR --out DIR``: a stage without the engine.

    A gang of several ranks is started with torchrun.  Exit code 2 for what the user did wrong, 75 for a gang that was
    asked to stop (SIGTERM or Ctrl-C, which a second one does not wait for) and has saved its state.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {stage.module.rsplit('.', 1)[0]}")
    parser.add_argument("--config", help="JSON file with the configuration (default: all defaults)")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--out", required=True, help="directory of the artifact to make")
    if has_permission(stage.config):
        parser.add_argument(
            "--allow-unsandboxed",
            action="store_true",
            help="run what a model wrote with rlimits alone where the kernel allows no namespaces",
        )
    arguments = parser.parse_args()
    try:
        _run_alone(stage, arguments)
    except (UserError, CorruptionError) as error:
        print(f"{stage.name}: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except Stopped as stopped:
        print(f"{stage.name}: {stopped}; the same command goes on from there", file=sys.stderr)  # noqa: T201
        sys.exit(75)
    except Exception:  # noqa: BLE001 - the end of the program: any other failure is exit code 3
        traceback.print_exc()
        sys.exit(3)


def has_permission(config: Any) -> bool:
    """Whether a configuration, or its type, has the setting ``PERMISSION``."""
    return PERMISSION in {field.name for field in fields(config)}


def _run_alone(stage: Stage, arguments: argparse.Namespace) -> None:
    value: Any = {}
    if arguments.config:
        try:
            value = parse_json(Path(arguments.config).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"--config {arguments.config}: {error}") from None
    config = from_json(stage.config, value, where=stage.name)
    if getattr(arguments, PERMISSION, False):
        config = apply_settings({stage.name: config}, [(f"{stage.name}.{PERMISSION}", True)])[stage.name]
    if stage.ready is not None:
        stage.ready(config, stage.name)
    pairs = [item.partition("=")[::2] for item in arguments.input]
    inputs = {name: Path(path) for name, path in pairs}
    if len(pairs) != len(inputs) or not stage.takes(inputs):
        wanted = " ".join(
            [f"--input {name}=DIR" for name in stage.inputs] + [f"[--input {n}=DIR]" for n in stage.optional_inputs]
        )
        wanted = wanted or "no --input"
        raise UserError(f"this stage takes {wanted}; found {sorted(name for name, _ in pairs) or 'none'}")
    fingerprints = {name: open_artifact(path).fingerprint for name, path in inputs.items()}
    external = external_identity(stage, config)
    own = stage_fingerprint(stage, config, fingerprints, external)
    out = Path(arguments.out).resolve()
    if _is_complete(stage, out, own):
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} holds something else; choose a new or an empty directory")
    state = out.with_name(out.name + ".state")
    state.mkdir(parents=True, exist_ok=True)
    if len({path.stat().st_dev for path in (out.parent, state, out) if path.exists()}) > 1:
        raise UserError(f"--out {out} and {state} must lie on one file system; choose a directory below --out")
    attempt = state / "attempt"
    should_stop = _stop_requests() if stage.kind == "gang" else (lambda: False)
    context = StageContext(attempt, state, own, progress=_print_progress, should_stop=should_stop)
    if not _is_first_rank():
        run_here(stage, config, inputs, context)
        check_external(stage, config, external)
        return
    with nobody_else(out, state):
        if _is_complete(stage, out, own):  # by a call that held the lock until now
            return
        # Whatever lies in --out may be somebody's: the artifact is made aside, and takes the place of nothing.
        shutil.rmtree(attempt, ignore_errors=True)
        attempt.mkdir()
        started_at, start_s = time.time(), time.monotonic()
        stats = run_here(stage, config, inputs, context)
        check_external(stage, config, external)
        elapsed_s = time.monotonic() - start_s
        manifest = build_manifest(stage, config, own, inputs, attempt, stats, started_at, elapsed_s, external=external)
        write_json(attempt / MANIFEST, manifest)
        attempt.rename(out)
        fsync_dir(out.parent)
        print(f"{stage.name}: {out} complete in {elapsed_s:.1f} s")  # noqa: T201


def _stop_requests() -> Callable[[], bool]:
    """Whether this process was asked to end; asked again, it ends at once, whatever it waits for."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        words = f"{signal.Signals(number).name}: ends after this step; once more ends at once\n"
        os.write(2, words.encode())  # print may be what was interrupted

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return lambda: asked


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_complete(stage: Stage, out: Path, own: str) -> bool:
    """Whether the artifact is there, which is then told; UserError if it is another one."""
    if not (out / MANIFEST).exists():
        return False
    if open_artifact(out).fingerprint != own:
        raise UserError(f"--out {out} holds another artifact; choose another directory or delete it")
    print(f"{stage.name}: {out} is already complete")  # noqa: T201
    return True


@contextlib.contextmanager
def scratch(context: StageContext) -> Iterator[Path]:
    """An empty directory for what goes when the stage is done; what killed attempts left goes first.

    Its name is new: a process that outlived its attempt writes nothing into it.
    """
    beside = context.state / "scratch"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=beside))
    try:
        yield directory
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def nobody_else(out: Path, state: Path) -> Iterator[None]:
    """Keep other calls, by a lock in ``state``, away from a directory while it is made; UserError says who is at it."""
    with (state / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read() or "another process"
            raise UserError(f"{out} is being made by {owner}; wait for it, or choose another directory") from None
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}")
            lock.flush()
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child may have inherited the file


def _print_progress(done: int, total: int, **figures: Any) -> None:
    if _is_first_rank() and (done == total or done % max(1, total // 20) == 0):
        details = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
        print(f"{done}/{total} {details}", flush=True)  # noqa: T201
