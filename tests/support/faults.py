"""Faults that a rank brings on itself, by name: see ``tests.support.tiny_run.start_gang``."""

import dataclasses
import os
import resource
import shutil
import signal
from typing import Any


def pause_at_step(step: int) -> None:
    """Train up to a step, then wait to be killed."""
    from pipeline.pretrain.run import Training

    guard = Training.guard

    def guard_and_pause(self: Training, at: int, loss_sum: float, grad_norm: float) -> None:
        if at == step:
            signal.pause()
        guard(self, at, loss_sum, grad_norm)

    Training.guard = guard_and_pause


def pause_before_publishing(step: int) -> None:
    """Wait to be killed when all files of a checkpoint are written and its manifest is not."""
    from pipeline.pretrain import run

    publish = run.publish

    def publish_or_pause(staging: Any, final: Any, at: int, *rest: Any) -> None:
        if at == step:
            signal.pause()
        publish(staging, final, at, *rest)

    run.publish = publish_or_pause


def kill_while_writing(step: int, rank: int) -> None:
    """SIGKILL this process, if it is the given rank, when it has written the half of a checkpoint file."""
    import torch

    if int(os.environ["RANK"]) != rank:
        return
    save = torch.save

    def save_half(value: Any, target: Any, *rest: Any, **more: Any) -> None:
        save(value, target, *rest, **more)
        if f"staging-{step:08d}" in str(target) and "optim_states" in str(target):
            os.truncate(target, os.path.getsize(target) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def fail_to_write(rank: int) -> None:
    """Every checkpoint file of one rank fails with an I/O error."""
    import torch

    if int(os.environ["RANK"]) != rank:
        return

    def refuse(value: Any, target: Any, *rest: Any, **more: Any) -> None:
        raise OSError(5, f"Input/output error: {target}")

    torch.save = refuse


def limit_file_size(num_bytes: int) -> None:
    """No file of this process may grow past a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def lose_lease(step: int) -> None:
    """Another attempt takes over before the checkpoint of a step is published."""
    from pipeline.errors import LeaseLostError
    from pipeline.pretrain.run import Training

    save = Training.save

    def fence() -> None:
        raise LeaseLostError("attempt 2 has taken over")

    def save_after_losing(self: Training, at: int) -> None:
        if at == step:
            self.context = dataclasses.replace(self.context, fence=fence)
        save(self, at)

    Training.save = save_after_losing


def make_gradients_nan(first: int, last: int) -> None:
    """The loss that is differentiated is not a number at steps first..last."""
    from pipeline.pretrain import run

    scale, set_lr, lr_at, calls = run.loss_scale, run.set_lr, [0.0], [-1]

    def count(engine: Any, lr: float) -> None:
        calls[0] += 1
        lr_at[0] = lr
        set_lr(engine, lr)

    def poisoned(config: Any, num_tokens: int) -> float:
        return float("nan") if first <= calls[0] <= last else scale(config, num_tokens)

    run.set_lr, run.loss_scale = count, poisoned


def fill_disk(step: int, leave_bytes: int) -> None:
    """Rank 0 fills the disk of the state: in step ``step``, or, for a step that saves, after its free-space check."""
    from pipeline.pretrain.run import Training

    if os.environ["RANK"] != "0":
        return

    def fill(self: Training) -> None:
        state = self.context.state
        spare = shutil.disk_usage(state).free - leave_bytes
        (state / "filler").write_bytes(bytes(max(0, spare)))

    guard, plan = Training.guard, Training._plan_save

    def guard_and_fill(self: Training, at: int, loss_sum: float, grad_norm: float) -> None:
        guard(self, at, loss_sum, grad_norm)
        if at == step:
            fill(self)

    def plan_and_fill(self: Training, at: int) -> Any:
        planned = plan(self, at)
        if at == step:
            fill(self)
        return planned

    Training.guard, Training._plan_save = guard_and_fill, plan_and_fill


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
