"""Held-out likelihood bound and the yardsticks beside it."""

from dataclasses import dataclass

from pipeline.config import execution
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

    def __post_init__(self) -> None:
        if self.num_replicates < MIN_REPLICATES:
            raise ValueError(
                f"num_replicates is {self.num_replicates}; a standard error needs at least {MIN_REPLICATES}"
            )
        for name in ("num_shards", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


STAGE = Stage(
    name="evaluate",
    kind="map",
    config=EvaluateConfig,
    module="pipeline.evaluate.run",
    inputs=("weights", "tokens", "tokenizer", "corpus"),
    code_version=3,
)
