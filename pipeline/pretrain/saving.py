"""Checkpoints of a gang: restored by all ranks from one choice, saved by all of them or by none.

A thread of each rank copies its state, while training goes on to the gradients of the next step, and writes its file;
at a later step boundary, when all have ended, rank 0 publishes.
"""

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline.artifact import FileRecord
from pipeline.config import to_json
from pipeline.errors import CorruptionError, is_disk_full
from pipeline.pretrain.checkpoint import (
    changes_of_identity,
    clear_staging,
    folder_of,
    free_bytes,
    newest_mirrored,
    newest_valid,
    publish,
    retain,
    retain_mirrored,
    settle,
)
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.meter import Stopwatch
from pipeline.pretrain.ranks import Ranks, done_by_all, done_by_first, outcome_of
from pipeline.pretrain.writer import Aside, Held, Snapshot, stretches_of, write_file
from pipeline.stage import StageContext, environment
from pipeline.tracking import MetricsLog
from pipeline.training_state import (
    CheckpointManifest,
    StateFiles,
    Topology,
    check_coverage,
    checkpoint_name,
    file_name,
)

_SPACE_FACTOR = 1.1
"""Free space wanted before a save, in sizes of a checkpoint."""
_WAIT_S = 0.05


def warn(message: str) -> None:
    """Say something on the stage's log that a person should read."""
    print(f"warning: {message}", flush=True)  # noqa: T201


def topology_of(config: PretrainConfig) -> Topology:
    """How the ranks of a configuration share the work."""
    return Topology(config.workers, config.zero_stage, max(1, config.ep_size), config.precision, config.rows_per_pass)


@dataclass
class _Saving:
    """A checkpoint on its way: every rank writes its file, then rank 0 publishes."""

    manifest: CheckpointManifest
    """Complete but for the files."""
    staging: Path
    is_last: bool
    begun_s: float
    stall_before_s: float
    """For which training had waited for the checkpoints before it."""
    work: Aside | None
    """What this rank does for it at present."""
    is_copied: threading.Event
    """Whether this rank's state may change again."""
    is_written: bool = False
    """Whether all ranks have written."""

    @property
    def is_busy(self) -> bool:
        """Whether this rank has something to do still."""
        return self.work is not None and self.work.is_alive()


@dataclass(frozen=True)
class Belonging:
    """What a checkpoint has to agree with to be continued."""

    fingerprint: str
    identity: Mapping[str, Any]
    """What the fingerprint was made of."""
    shapes: Mapping[str, Sequence[int]]
    """Of the plain model's ``state_dict()``."""


class State(Protocol):
    """What is saved and restored; of an engine: pipeline/pretrain/held.py."""

    def held(self) -> list[Held]:
        """All that this rank holds."""
        ...

    def written(self, rank: int) -> list[Held]:
        """The part that this rank writes."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has applied."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Steps that the engine has counted as skipped."""
        ...

    def go_on(self, step: int, optimizer_steps: int, skipped_steps: int) -> None:
        """Take up what was filled into ``held``."""
        ...


class Checkpointer:
    """Restores and saves the state of a gang; every method is called by all ranks alike."""

    def __init__(
        self, config: PretrainConfig, context: StageContext, state: State, ranks: Ranks, belonging: Belonging
    ) -> None:
        import torch

        self.config, self.context, self.ranks, self.belonging = config, context, ranks, belonging
        self._state, self._mirror = state, context.mirror
        self._is_first_here = ranks.rank == 0 if context.mirror is None else context.mirror.is_first_here
        self.log: MetricsLog | None = None
        """Brought to the disk before a checkpoint is published, which must not outlive the metrics of its steps."""
        self.last_saved = -1
        """Step of the newest checkpoint that is published."""
        self.extras: dict[str, Any] = {}
        """JSON values, the same on all ranks, that ``save`` keeps and ``restore`` gives back."""
        self.stall = Stopwatch()
        """On while training waits for checkpoints: the one measure of that."""
        self.beside: list[Path] = []
        """Files of rank 0 in the state that have to come along where a mirror takes the checkpoints."""
        self.pinned: frozenset[int] = frozenset()
        """Steps whose checkpoints are never deleted."""
        written = state.written(ranks.rank)
        stretches = [stretch for of_rank in ranks.of_all(stretches_of(written)) for stretch in of_rank]
        check_coverage(stretches, belonging.shapes, "what the ranks hold of the model")
        self._snapshot = Snapshot(written)
        self._size_bytes = int(ranks.sum(torch.tensor([self._snapshot.size_bytes], dtype=torch.float64)))
        self._lineage: list[dict[str, Any]] = []
        self._saving: _Saving | None = None
        self._deletion: Aside | None = None
        self._failures = 0
        self._figures: dict[str, float] = {}

    def restore(self) -> int:
        """Load the newest valid checkpoint, which all ranks verify together; returns the step to go on with.

        Raises UserError if it is of another training.
        """
        found = self._newest()
        if found is None:
            return 0
        path, manifest = found
        self._lineage = done_by_first(self.ranks, lambda: self._lineage_from(path, manifest))
        done_by_all(self.ranks, lambda: self._fill(StateFiles(path, manifest)))
        self._state.go_on(manifest.step, manifest.optimizer_steps, manifest.skipped_steps)
        self.extras, self.last_saved = manifest.extras, manifest.step
        if self.ranks.rank == 0:
            steps = f"{manifest.step} of {self.config.num_steps} steps are done"
            print(f"continuing from checkpoint {path.name}: {steps}", flush=True)  # noqa: T201
        return manifest.step

    def _newest(self) -> tuple[Path, CheckpointManifest] | None:
        if self._mirror is not None:
            return newest_mirrored(self._mirror, self.ranks, warn, self._changes)
        done_by_first(self.ranks, lambda: clear_staging(self.context.state))
        return newest_valid(self.context.state, self.ranks, warn, self._changes)

    def gather(self, steps: Collection[int], beat: Callable[[], None]) -> None:
        """Bring the checkpoints of all machines, whole, to that of rank 0; there they are without a mirror."""
        if (mirror := self._mirror) is not None:
            done_by_first(self.ranks, lambda: [mirror.pull(checkpoint_name(step), beat) for step in sorted(steps)])

    def make_room(self) -> None:
        """Delete old checkpoints where there is no room for the next one; OSError on all ranks if there still is none.

        To be called after ``restore``, once ``pinned`` is known.  Nothing is asked of a training that is over.
        """
        if self.last_saved < self.config.num_steps:
            done_by_first(self.ranks, self._make_room)

    def _changes(self, checkpoint: Path, manifest: CheckpointManifest) -> dict[str, list[Any]]:
        """What was changed since a checkpoint and accepted.  UserError if it was not."""
        own, is_accepted = self.belonging, self.config.accept_changed_identity
        return changes_of_identity(checkpoint, manifest, own.fingerprint, own.identity, own.shapes, is_accepted)

    def _lineage_from(self, checkpoint: Path, manifest: CheckpointManifest) -> list[dict[str, Any]]:
        """Changes that were accepted up to now, for the checkpoints to come."""
        changes = self._changes(checkpoint, manifest)
        if not changes:
            return manifest.lineage
        told = json.dumps(changes)
        warn(f"{checkpoint.name} is continued although its identity has changed, as accepted: {told}")
        return [*manifest.lineage, {"step": manifest.step, "fingerprint": manifest.fingerprint, "changed": changes}]

    def _fill(self, files: StateFiles) -> None:
        """Give this rank's tensors the numbers of a checkpoint."""
        for held in self._state.held():
            for which, tensor in held.tensors.items():
                flat = tensor.detach().view(-1)
                for run in held.runs:
                    files.read(which, run.name, run.start, flat[run.offset : run.offset + run.numel])

    def save(self, step: int, is_last: bool = False) -> None:
        """Begin a checkpoint of the state after ``step`` steps; the last one is published before this returns.

        Waits for the one before.  Call ``release_state`` before the state changes.  A save that fails costs its
        checkpoint and a warning, unless it is the last or one too many in a row.
        """
        with self.stall:
            self.wait()
            if step != self.last_saved:
                self._begin(step, is_last)
            if is_last:
                self.wait()

    def _begin(self, step: int, is_last: bool) -> None:
        """Begin to copy and write, unless something stands in the way."""
        begun_s, stall_before_s = time.monotonic(), self.stall.spent_s
        name = self.ranks.from_first(outcome_of(lambda: self._plan_save(step)) if self.ranks.rank == 0 else None)
        if isinstance(name, Exception):
            self._failed(step, name, is_last)
            return
        staging = self.context.state / name
        path, snapshot, is_copied = staging / file_name(self.ranks.rank), self._snapshot, threading.Event()
        mirror = self._mirror
        manifest = CheckpointManifest(
            step=step,
            fingerprint=self.belonging.fingerprint,
            identity=dict(self.belonging.identity),
            topology=topology_of(self.config),
            shapes={name: list(shape) for name, shape in self.belonging.shapes.items()},
            optimizer_steps=self._state.optimizer_steps,
            skipped_steps=self._state.skipped_steps,
            extras=to_json(self.extras),
            lineage=self._lineage,
            files=[],
            versions=environment(),
        )

        def copy_and_write() -> FileRecord:
            try:
                snapshot.take()
            finally:
                is_copied.set()
            record = write_file(path, snapshot.header, snapshot.data)
            if mirror is not None:
                mirror.upload(path, folder_of(staging))
            return record

        work = Aside(copy_and_write)
        self._saving = _Saving(manifest, staging, is_last, begun_s, stall_before_s, work, is_copied)

    def release_state(self) -> None:
        """To be called before the state changes: waits until this rank has copied it."""
        with self.stall:
            if self._saving is not None:
                self._saving.is_copied.wait()

    def poll(self) -> dict[str, float]:
        """At each step boundary: bring the checkpoint under way on, if all ranks are ready for that.

        Costs one small sum over the ranks while there is one.  Returns a figure for the metrics after one was
        published: "checkpoint_s", from its begin to its publication.
        """
        with self.stall:
            if (saving := self._saving) is not None and not self.ranks.any(saving.is_busy):
                self._bring_on(saving)
        figures, self._figures = self._figures, {}
        return figures

    def wait(self) -> None:
        """Publish the checkpoint under way, if there is one, as soon as all ranks have written."""
        with self.stall:
            while (saving := self._saving) is not None:
                if not self.ranks.any(saving.is_busy):
                    self._bring_on(saving)
                elif saving.work is not None:  # many short sums over the ranks: one that waits long would time out
                    saving.work.join(_WAIT_S)
            self._end_deletion()

    def _bring_on(self, saving: _Saving) -> None:
        """All have written: let rank 0 publish.  It has: the checkpoint is there.  If one has failed, it never is."""
        outcomes = self.ranks.of_all(None if saving.work is None else saving.work.outcome)
        saving.work = None
        problem = next((found for found in outcomes if isinstance(found, Exception)), None)
        step = saving.manifest.step
        if problem is not None:
            self._saving = None
            if self._is_first_here:
                shutil.rmtree(saving.staging, ignore_errors=True)
            self._failed(step, problem, saving.is_last)
        elif not saving.is_written:
            saving.is_written = True
            if self.ranks.rank == 0:
                manifest = replace(saving.manifest, files=outcomes)
                saving.work = Aside(lambda: self._publish(saving.staging, manifest))
        else:
            self._saving, self.last_saved, self._failures = None, step, 0
            self._tell(saving)
            if self._is_first_here:
                if self._mirror is not None:
                    settle(saving.staging, step)
                self._deletion = Aside(lambda: self._retain(step))

    def _tell(self, saving: _Saving) -> None:
        """What a checkpoint that was published has cost."""
        total_s, stall_s = time.monotonic() - saving.begun_s, self.stall.spent_s - saving.stall_before_s
        self._figures = {"checkpoint_s": round(total_s, 4)}
        if self.ranks.rank == 0:
            name = checkpoint_name(self.last_saved)
            told = f"checkpoint {name} in {total_s:.2f} s, of which training waited {stall_s:.2f} s"
            print(told, flush=True)  # noqa: T201

    def _publish(self, staging: Path, manifest: CheckpointManifest) -> None:
        self.context.fence()
        if self.log is not None:
            self.log.sync()
        publish(staging, manifest, self._mirror, [path for path in self.beside if path.exists()])

    def _retain(self, verified: int) -> None:
        keep = self.config.keep_checkpoints
        if self._mirror is not None and self.ranks.rank == 0:
            retain_mirrored(self._mirror, keep, verified=verified, pinned=self.pinned)
        retain(self.context.state, keep, warn, verified=verified, pinned=self.pinned)

    def _end_deletion(self) -> None:
        if self._deletion is not None:
            self._deletion.join()
            outcome, self._deletion = self._deletion.outcome, None
            if isinstance(outcome, OSError):
                warn(f"old checkpoints could not be deleted ({outcome}); tried again after the next one")
            elif isinstance(outcome, Exception):
                raise outcome

    def _failed(self, step: int, problem: Exception, is_last: bool) -> None:
        """Raise for the last save, a lost lease, and one failure too many; after any other go on."""
        self._failures += 1
        may_fail = not is_last and isinstance(problem, OSError | MemoryError | CorruptionError)
        if may_fail and self._failures < self.config.max_failed_saves:
            self._warn_once(f"checkpoint {checkpoint_name(step)} failed ({problem}); training goes on from memory")
            return
        last = max(self.last_saved, 0)
        if may_fail:
            newest = f"the newest is {checkpoint_name(last)}" if last else "there is none"
            self._warn_once(f"{self._failures} checkpoints in a row have failed (pretrain.max_failed_saves); {newest}")
        if is_disk_full(problem):
            raise OSError(
                errno.ENOSPC,
                f"checkpoint {checkpoint_name(step)} does not fit on the disk of {self.context.state} ({problem}); "
                f"free some space and resume: training goes on after {last} steps",
            ) from problem
        raise problem

    def _warn_once(self, message: str) -> None:
        """Of what all ranks know alike, one tells."""
        if self.ranks.rank == 0:
            warn(message)

    def _plan_save(self, step: int) -> str:
        """Name of the staging directory, once old checkpoints were deleted where there was no room without."""
        self.context.fence()  # whoever lost the right to publish must not fill the disk of its successor
        self._end_deletion()  # it may be what makes room
        self._make_room()
        return f"staging-{step:08d}-{time.time_ns()}"

    def _make_room(self) -> None:
        try:
            self._check_space()
        except OSError as problem:
            if not is_disk_full(problem):
                raise
            self._retain(self.last_saved)
            self._check_space()

    def _check_space(self) -> None:
        wanted, free = _SPACE_FACTOR * self._size_bytes, free_bytes(self.context.state)
        if free < wanted:
            raise OSError(
                errno.ENOSPC,
                f"{free / 1e6:.1f} MB are free, {wanted / 1e6:.1f} MB are wanted for a checkpoint",
            )
