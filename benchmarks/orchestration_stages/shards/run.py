"""A number in each shard; their sum at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.orchestration_stages.bodies import count
from benchmarks.orchestration_stages.shards.config import ShardsConfig
from pipeline.stage import Shard, StageContext


def list_shards(config: ShardsConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """As many as are asked for."""
    return [{"name": f"{number:06d}", "number": number} for number in range(config.num_shards)]


def run_shard(config: ShardsConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> None:
    """One number in a file."""
    count()
    (context.out / "value.txt").write_text(str(shard["number"]))


def finish(config: ShardsConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext) -> None:
    """The sum in a file."""
    count()
    value = sum(int((directory / "value.txt").read_text()) for directory in shard_dirs)
    (context.out / "value.txt").write_text(str(value))
