"""A step of training without all that stands around it: forward, backward, step on one batch held in memory."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from dlm_core.cross_entropy import HeadLoss
from pipeline.pretrain.batches import Batch
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.engine import loss_scale, set_lr
from pipeline.pretrain.routers import Globals, Routers


class BareStep:
    """The steps of an engine on the micro batches of one step, which lie on its device; no weight moves."""

    def __init__(self, config: PretrainConfig, engine: Any, routers: Routers | None, batches: Sequence[Batch]) -> None:
        """``batches`` are those of a step of the one rank."""
        self._engine, self._routers = engine, routers
        self._batches = [(batch, *batch.arguments(engine.device)) for batch in batches]
        self.num_tokens = sum(int(batch.targets.num_tokens) for batch in batches)
        self.masked_share = sum(len(batch.targets.select) for batch in batches) / max(1, self.num_tokens)
        self._totals = Globals(self.num_tokens, sum(int(batch.is_text.sum()) for batch in batches))
        self._scale = loss_scale(config, self.num_tokens)

    def run(self, num_steps: int) -> None:
        """So many steps at a learning rate of 0; returns when the device has done them."""
        engine, routers = self._engine, self._routers
        set_lr(engine, 0.0)
        for _ in range(num_steps):
            for batch, columns, named in self._batches:
                with nullcontext() if routers is None else routers.tap:
                    answers = engine(*columns, **named)
                loss = HeadLoss(*answers).loss_sum * self._scale
                if routers is not None:
                    router_loss, _ = routers.loss_and_sums(batch, self._totals)
                    loss = loss + router_loss * (self._scale * self.num_tokens)
                engine.backward(loss)
                engine.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
