"""How the weights of a model become the first weights of a diffusion model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dlm_core.models.config import MoE
from pipeline.errors import UserError
from pipeline.stage import Stage

MaskRow = Literal["mean", "keep"]


@dataclass(frozen=True)
class ArInitConfig:
    """What is made anew; everything else is copied.

    The shift, the opening of attention, growing blocks, noise on the mask and its frozen row belong to the training:
    ``pretrain.objective.target_offset``, ``pretrain.adaptation``, ``pretrain.phases``, ``pretrain.optimizer.lr_scale``.
    """

    mask_row: MaskRow = "mean"
    """The mask's row of the embedding, and of a head of its own.  mean: that of all rows the checkpoint has; keep: what
    the checkpoint has in that row, as in Dream (arXiv 2508.15487).  A row that is new is the mean."""
    upcycle: MoE | None = None
    """Experts for a dense model, each a copy of the network in whose place they stand (arXiv 2212.05055)."""
    router_std: float = 0.02
    """Standard deviation of the routers of these experts."""
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.mask_row not in get_args(MaskRow):
            raise ValueError(f"mask_row is {self.mask_row!r}; it must be one of {', '.join(get_args(MaskRow))}")
        if not 0.0 < self.router_std < math.inf:
            raise ValueError(f"router_std is {self.router_std}; it must be positive and finite")
        if not 0 <= self.init_seed < 1 << 63:
            raise ValueError(f"init_seed is {self.init_seed}; it must lie in [0, 2**63)")
        for name in ("router_std", "init_seed"):
            if self.upcycle is None and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}, but nothing is drawn without upcycle; leave it out")


def check_upstream(config: ArInitConfig, upstream: Mapping[str, Any], step: str) -> None:
    """UserError where a row is to be kept that the weights do not have."""
    if config.mask_row == "keep" and upstream["tokenizer"].get("mask_from") == "new_row":
        raise UserError(
            f'{step}.mask_row is keep, but tokenizer.mask_from is "new_row", of which the weights have nothing; set '
            f'{step}.mask_row="mean"'
        )


STAGE = Stage(
    name="ar_init",
    kind="task",
    config=ArInitConfig,
    module="pipeline.ar_init.run",
    inputs=("weights", "tokenizer"),
    check=check_upstream,
)
