"""A map whose shards write their numbers."""

from dataclasses import dataclass

from pipeline.stage import Stage


@dataclass(frozen=True)
class ShardsConfig:
    """How wide it fans out."""

    num_shards: int


STAGE = Stage(
    name="bench-shards",
    kind="map",
    config=ShardsConfig,
    module="benchmarks.orchestration_stages.shards.run",
)
