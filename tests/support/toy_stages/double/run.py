"""Twice the input plus the number of the shard, in each shard; their sum at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.stage import Shard, StageContext, Stats
from tests.support.toy_stages.trouble import ToyConfig, execute, toy_inputs


def list_shards(config: ToyConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """Three shards."""
    execute("double-list", config, context)
    return [{"name": f"{place}", "place": place} for place in range(3)]


def run_shard(config: ToyConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats:
    """One number."""
    execute(f"double-{shard['name']}", config, context)
    value = 2 * toy_inputs(inputs) * config.number + shard["place"]
    (context.out / "value.txt").write_text(str(value))
    return {"value": value}


def finish(config: ToyConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext) -> Stats:
    """The sum of the shards."""
    execute("double-finish", config, context)
    value = sum(int((path / "value.txt").read_text()) for path in shard_dirs)
    (context.out / "value.txt").write_text(str(value))
    return {"value": value}
