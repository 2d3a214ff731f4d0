"""Held-out likelihood bound and the yardsticks beside it."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config import execution
from pipeline.inference.places import check_places
from pipeline.scoring import MIN_REPLICATES
from pipeline.stage import Stage


@dataclass(frozen=True)
class EvaluateConfig:
    """Exact-count Monte Carlo estimate of the NELBO of the held-out documents."""

    num_replicates: int = MIN_REPLICATES
    """Independent stratified draws of masks; the standard error comes from their spread."""
    noise_seed: int = 1_000
    num_shards: int = execution(8)
    """Pieces that the rows are cut into and evaluated in parallel; no effect on the result."""
    batch_rows: int = execution(16)
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    """auto: a GPU where there is one."""
    gpus: float = execution(0.0)
    """GPUs that a piece waits for, up to 1; parts of one share it.  0: it takes what is where it runs."""

    def __post_init__(self) -> None:
        if self.num_replicates < MIN_REPLICATES:
            raise ValueError(
                f"num_replicates is {self.num_replicates}; a standard error needs at least {MIN_REPLICATES}"
            )
        for name in ("num_shards", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_places(self.device, self.gpus)


STAGE = Stage(
    name="evaluate",
    kind="map",
    config=EvaluateConfig,
    module="pipeline.evaluate.run",
    inputs=("weights", "tokens", "tokenizer", "corpus"),
    code_version=5,
)
