"""Faults that a rank brings on itself, by name: see ``tests.support.tiny_run.start_gang``."""

import ctypes
import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def pause_at_step(step: int) -> None:
    """Train up to a step, publish what is being saved, then wait to be killed."""
    from pipeline.pretrain.guards import Guard

    check, savers = Guard.check, _savers()

    def pause_and_check(self: Guard, at: int, *rest: Any) -> None:
        if at == step:
            savers[0].wait()
            print(f"paused in step {step}", flush=True)  # noqa: T201
            signal.pause()
        check(self, at, *rest)

    Guard.check = pause_and_check


def pause_with_environment(environment: dict[str, str], step: int) -> None:
    """Train with other environment variables, up to a step (to the end if there is no such step)."""
    os.environ.update(environment)
    pause_at_step(step)


def _savers() -> list[Any]:
    """The Checkpointers that will be made in this process."""
    from pipeline.pretrain.saving import Checkpointer

    made: list[Checkpointer] = []
    make = Checkpointer.__init__

    def make_and_remember(self: Checkpointer, *rest: Any) -> None:
        make(self, *rest)
        made.append(self)

    Checkpointer.__init__ = make_and_remember
    return made


def die_in_save(step: int, rank: int, phase: str) -> None:
    """SIGKILL this process, if it is the given rank, in a phase of the checkpoint of a step.

    By the main thread or the one that writes: copying, writing (half of the file), written, publishing (without a
    manifest), renaming (with one), published, deleting (a manifest is deleted, the files are not).
    """
    from pipeline.pretrain import checkpoint, saving

    if int(os.environ["RANK"]) != rank:
        return
    here = {phase}
    now = [0]
    save, write = saving.Checkpointer.save, saving.write_file

    def die_if(at: str) -> None:
        if now[0] == step and at in here:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_at(self: Any, at: int, *rest: Any, **more: Any) -> None:
        self.wait()
        now[0] = at
        save(self, at, *rest, **more)

    def write_and_die(path: Any, header: bytes, data: memoryview) -> Any:
        if now[0] == step and "writing" in here:
            write(path, header, data[: len(data) // 2])
        die_if("writing")
        record = write(path, header, data)
        die_if("written")
        return record

    def before(where: Any, name: str, at: str) -> None:
        function = getattr(where, name)

        def die_or_go_on(*given: Any, **more: Any) -> Any:
            die_if(at)
            return function(*given, **more)

        setattr(where, name, die_or_go_on)

    saving.Checkpointer.save, saving.write_file = save_at, write_and_die
    before(saving.Snapshot, "take", "copying")
    before(checkpoint, "write_manifest", "publishing")
    before(checkpoint, "remove_tree", "renaming")
    before(checkpoint, "fsync_dir", "published")
    rmtree = shutil.rmtree

    def delete(path: Any, *rest: Any, **more: Any) -> None:
        if os.path.exists(path):
            die_if("deleting")
        rmtree(path, *rest, **more)

    shutil.rmtree = delete


def die_in_phase(phase: str, step: int, rank: int, delay_s: float) -> None:
    """SIGKILL this process, if it is the given rank, so long after a phase of its watchdog began, in a step or later.

    Wherever it then is: in C or Python, in a collective, in the next steps or the checkpoint after them.
    """
    from pipeline.pretrain.watchdog import Watchdog

    if int(os.environ["RANK"]) != rank:
        return
    begin = Watchdog.phase

    def begin_and_die_soon(self: Any, name: Any, at: int = -1, kind: Any = None) -> None:
        begin(self, name, at, kind)
        if name == phase and at >= step:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    Watchdog.phase = begin_and_die_soon


def write_slowly(rank: int, until_step: int) -> None:
    """The storage of one rank takes no byte of a checkpoint until training has come to a step."""
    from pipeline.pretrain import saving

    write = saving.write_file

    def wait_and_write(path: Any, *rest: Any) -> Any:
        metrics = path.parent.parent / "metrics.jsonl"
        while int(os.environ["RANK"]) == rank and len(metrics.read_bytes().splitlines()) < until_step:
            time.sleep(0.005)
        return write(path, *rest)

    saving.write_file = wait_and_write


def copy_slowly(seconds: float) -> None:
    """The copy of a state begins late, while training goes on."""
    from pipeline.pretrain.saving import Snapshot

    take = Snapshot.take

    def wait_and_take(self: Snapshot) -> None:
        time.sleep(seconds)
        take(self)

    Snapshot.take = wait_and_take


def fail_to_write(rank: int) -> None:
    """Every checkpoint file of one rank fails with an I/O error."""
    from pipeline.pretrain import saving

    if int(os.environ["RANK"]) != rank:
        return

    def refuse(path: Any, *rest: Any) -> None:
        raise OSError(5, f"Input/output error: {path}")

    saving.write_file = refuse


def lose_lease(step: int) -> None:
    """Another attempt takes over before the checkpoint of a step is published."""
    from pipeline.errors import LeaseLostError
    from pipeline.pretrain.saving import Checkpointer

    save = Checkpointer.save

    def fence() -> None:
        raise LeaseLostError("attempt 2 has taken over")

    def save_after_losing(self: Checkpointer, at: int, is_last: bool = False) -> None:
        if at == step:
            self.context = dataclasses.replace(self.context, fence=fence)
        save(self, at, is_last)

    Checkpointer.save = save_after_losing


def make_gradients_nan(first: int, last: int) -> None:
    """The loss that is differentiated is not a number at steps first..last."""
    from pipeline.pretrain import loop

    scale, set_lr, lr_at, calls = loop.loss_scale, loop.set_lr, [0.0], [-1]

    def count(engine: Any, lr: float) -> None:
        calls[0] += 1
        lr_at[0] = lr
        set_lr(engine, lr)

    def poisoned(config: Any, num_tokens: int) -> float:
        return float("nan") if first <= calls[0] <= last else scale(config, num_tokens)

    loop.set_lr, loop.loss_scale = count, poisoned


def diverge_while_saving(first: int, write_s: float) -> None:
    """The loss that is differentiated is no number from a step on, while a slow disk still takes a checkpoint."""
    from pipeline.pretrain import saving

    make_gradients_nan(first, 10**9)
    write = saving.write_file

    def wait_and_write(*given: Any) -> Any:
        time.sleep(write_s)
        return write(*given)

    saving.write_file = wait_and_write


def multiply_losses(first: int, last: int, by: float, weights_by: float = 1.0) -> None:
    """The loss is multiplied at steps first..last of a training, and every parameter when it is drawn."""
    from pipeline.pretrain import loop

    scale_initial_weights(weights_by)
    set_lr, loss_output, calls = loop.set_lr, loop.loss_output, [-1]

    def count(engine: Any, lr: float) -> None:
        calls[0] += 1
        set_lr(engine, lr)

    def multiplied(*given: Any, **more: Any) -> Any:
        out = loss_output(*given, **more)
        if not first <= calls[0] <= last:
            return out
        return dataclasses.replace(out, loss_sum=out.loss_sum * by, bin_loss_sum=out.bin_loss_sum * by)

    loop.set_lr, loop.loss_output = count, multiplied


def _before_step(at: int, rank: int, act: Callable[[Any], None]) -> None:
    """Call act(engine) on a rank when the gradient of a step is there, and what was being saved is published."""
    from pipeline.pretrain.guards import Guard

    before_step, savers = Guard.before_step, _savers()

    def act_before(self: Guard, step: int, loss: float, **more: Any) -> None:
        if step == at:
            savers[0].wait()
            if int(os.environ["RANK"]) == rank:
                act(self._engine)
        before_step(self, step, loss, **more)

    Guard.before_step = act_before


def signal_in_step(step: int, rank: int, number: int) -> None:
    """One rank gets a signal in the middle of a step."""
    _before_step(step, rank, lambda engine: os.kill(os.getpid(), number))


def raise_in_step(step: int, rank: int) -> None:
    """One rank has a defect in the middle of a step."""

    def fail(engine: Any) -> None:
        raise KeyError("a defect of one rank")

    _before_step(step, rank, fail)


def hold_interpreter(step: int, rank: int) -> None:
    """One rank waits in C for ever and lets no other thread run Python."""
    _before_step(step, rank, lambda engine: ctypes.PyDLL(None).pause())


def disturb_weight(step: int, rank: int, name: str) -> None:
    """The copy of one weight on one rank is off by 1e-3."""

    def disturb(engine: Any) -> None:
        parameter = dict(engine.module.named_parameters())[name]
        parameter.data.view(-1)[3] += 1e-3

    _before_step(step, rank, disturb)


def disagree_on_saving(step: int, rank: int) -> None:
    """One rank takes the model for unhealthy after a step."""
    from pipeline.pretrain.guards import Guard

    if int(os.environ["RANK"]) == rank:
        Guard.is_healthy = property(lambda self: self._step != step)


def hang_in_data(step: int, rank: int) -> None:
    """The rows of a step never come on one rank."""
    from pipeline.pretrain.batches import PhasedLoader

    if int(os.environ["RANK"]) != rank:
        return
    right = PhasedLoader.rank_rows

    def rows_or_hang(self: PhasedLoader, at: int, own: int) -> Any:
        if at == step:
            time.sleep(1000)
        return right(self, at, own)

    PhasedLoader.rank_rows = rows_or_hang


def mask_nothing(everywhere: int, one_rank: int) -> None:
    """No token is masked in one step, and none of rank 1 in another."""
    from pipeline.pretrain import batches

    right = batches.mask_tokens
    empty = {everywhere, one_rank} if os.environ["RANK"] == "1" else {everywhere}

    def mask(x0: Any, mask_prob: Any, sample_ids: Any, *, step: int, **more: Any) -> Any:
        return x0.clone() if step in empty else right(x0, mask_prob, sample_ids, step=step, **more)

    batches.mask_tokens = mask


def scale_loss(first: int, factor: float) -> None:
    """The loss that is differentiated is too large by a factor from a step on; the one that is shown is not."""
    from pipeline.pretrain import loop

    scale, set_lr, steps = loop.loss_scale, loop.set_lr, [-1]

    def count(engine: Any, lr: float) -> None:
        steps[0] += 1
        set_lr(engine, lr)

    loop.set_lr = count
    loop.loss_scale = lambda config, tokens: scale(config, tokens) * (factor if steps[0] >= first else 1.0)


def hang_before_publishing(step: int) -> None:
    """All files of a checkpoint are written, and its manifest is not for a long time."""
    from pipeline.pretrain import saving

    publish = saving.publish

    def publish_late(staging: Any, manifest: Any, *rest: Any) -> None:
        if manifest.step == step:
            time.sleep(1000)
        publish(staging, manifest, *rest)

    saving.publish = publish_late


def fail_in_validation(rank: int) -> None:
    """One rank cannot ask the model for held-out text."""
    from pipeline.held_out import Questions

    if int(os.environ["RANK"]) == rank:

        def ask(self: Questions, indices: list[int], replicate: int) -> Any:
            raise RuntimeError("no text can be asked for")

        Questions.ask = ask


def stale_extension_locks(home: str) -> None:
    """A process that was killed while it compiled has left its locks; compilers do nothing but tell that they ran."""
    from torch.utils import cpp_extension

    for name in ("cc", "gcc", "c++", "g++", "clang"):
        compiler = Path(home) / name
        compiler.write_text(f"#!/bin/sh\n: > {home}/compiled\nexit 1\n")
        compiler.chmod(0o755)

    os.environ |= {"HOME": home, "PATH": home}
    os.environ.pop("TORCH_EXTENSIONS_DIR", None)
    for name in ("fused_adam", "cpu_adam", "deepspeed_shm_comm", "utils", "async_io"):
        lock = Path(home) / ".cache" / "torch_extensions" / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()

    def compile_nothing(*rest: Any, **more: Any) -> None:
        raise AssertionError("something is compiled at run time")

    cpp_extension.load = cpp_extension._jit_compile = compile_nothing


def fill_disk(step: int, leave_bytes: int) -> None:
    """Rank 0 fills the disk of the state: in step ``step``, or, for a step that saves, after its free-space check."""
    from pipeline.pretrain.guards import Guard
    from pipeline.pretrain.saving import Checkpointer

    savers = _savers()

    def fill() -> None:
        state = savers[0].context.state
        spare = shutil.disk_usage(state).free - leave_bytes
        (state / "filler").write_bytes(bytes(max(0, spare)))

    check, plan = Guard.check, Checkpointer._plan_save

    def check_and_fill(self: Guard, at: int, *rest: Any) -> None:
        check(self, at, *rest)
        if at == step:
            savers[0].wait()
            if os.environ["RANK"] == "0":
                fill()

    def plan_and_fill(self: Checkpointer, at: int) -> Any:
        planned = plan(self, at)
        if at == step:
            fill()
        return planned

    Guard.check, Checkpointer._plan_save = check_and_fill, plan_and_fill


def scale_initial_weights(factor: float) -> None:
    """Draw every parameter ``factor`` times too large."""
    import torch

    from dlm_core.models import transformer

    right = transformer.init_weights

    def wrong(model: Any, *rest: Any) -> None:
        right(model, *rest)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= factor

    transformer.init_weights = wrong
