"""Training checkpoint to portable weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import execution
from pipeline.errors import UserError
from pipeline.stage import Stage

Weights = Literal["last", "ema", "average"]


@dataclass(frozen=True)
class ConvertConfig:
    """Which of the weights that a training has kept."""

    weights: Weights = "last"
    """last: the float32 masters after the last step.  ema: their running average, if the optimizer kept one.
    average: the mean of the masters of the checkpoints that the training has kept for it (``pretrain.average``)."""
    proof: Literal["logits", "tensors"] = execution("logits")
    """What is compared before the weights are committed.  tensors: every number on the disk with those in the files of
    the training.  logits: these too, and the logits of both in a process of its own, which holds the model once."""


def check_upstream(config: ConvertConfig, upstream: Mapping[str, Any], step: str) -> None:
    """UserError for averages that the training before would not keep: said before it starts, not when it has ended."""
    training = upstream["pretrain"]
    if config.weights == "ema" and not training["optimizer"]["ema_decay"]:
        raise UserError(
            f'{step}.weights is "ema", but pretrain.optimizer.ema_decay is 0: the training keeps no running average. '
            f"Set pretrain.optimizer.ema_decay, or {step}.weights=last"
        )
    if config.weights == "average" and training["average"]["keep"] == "none":
        raise UserError(
            f'{step}.weights is "average", but pretrain.average.keep is "none": the training keeps no checkpoints '
            f"to be averaged. Set pretrain.average, or {step}.weights=last"
        )


STAGE = Stage(
    name="convert",
    kind="task",
    config=ConvertConfig,
    module="pipeline.convert.run",
    inputs=("pretrain",),
    check=check_upstream,
    code_version=2,
)
