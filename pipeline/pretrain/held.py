"""What of an engine a checkpoint holds: tensors, by the plain model's parameters, and the counts that go with them."""

from dataclasses import replace
from typing import Any

from pipeline.pretrain.fragments import LocalTensor, Run, local_tensors, owned, persistent_buffers, push_masters
from pipeline.pretrain.writer import Held
from pipeline.training_state import MASTER


class EngineState:
    """The state of an engine, as it is now."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def held(self) -> list[Held]:
        """All that this rank holds, and has to be given back after a resume."""
        return [*self._of_optimizer(local_tensors(self._engine)), *self._of_buffers()]

    def written(self, rank: int) -> list[Held]:
        """The part of it that this rank writes: of all ranks' parts, each element is in one."""
        buffers = [held if rank == 0 else replace(held, runs=()) for held in self._of_buffers()]
        return [*self._of_optimizer(owned(local_tensors(self._engine))), *buffers]

    def _of_optimizer(self, tensors: list[LocalTensor]) -> list[Held]:
        optimizer = self._optimizer
        return [Held({MASTER: local.tensor, **optimizer.state_tensors(local.tensor)}, local.runs) for local in tensors]

    def _of_buffers(self) -> list[Held]:
        """They are the same on every rank."""
        buffers = persistent_buffers(self._engine)
        return [Held({MASTER: buffer}, (Run(name, 0, buffer.numel(), 0),)) for name, buffer in buffers.items()]

    @property
    def _optimizer(self) -> Any:
        """The one that DeepSpeed was given, which it may have wrapped."""
        return self._engine.basic_optimizer

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has applied."""
        return self._optimizer.steps_taken

    @property
    def skipped_steps(self) -> int:
        """Steps that DeepSpeed has counted as skipped; the guard counts those that it refused."""
        return self._engine.skipped_steps

    def go_on(self, step: int, optimizer_steps: int, skipped_steps: int) -> None:
        """After ``held`` was filled: let the model agree with its masters, and all count on from there."""
        push_masters(self._engine)
        self._optimizer.steps_taken = optimizer_steps
        self._engine.global_steps, self._engine.skipped_steps = step, skipped_steps
