"""Write a number."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.stage import StageContext, Stats
from tests.support.toy_stages.trouble import ToyConfig, execute


def run(config: ToyConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """The configured number, and the size of the outside file on top."""
    execute(context.labels["step"], config, context)
    value = config.number + (Path(config.path).stat().st_size if config.path else 0)
    (context.out / "value.txt").write_text(str(value))
    return {"value": value}
