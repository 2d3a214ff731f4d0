"""A task without inputs; it may read a file from outside the store."""

from pathlib import Path
from typing import Any

from pipeline.stage import Stage
from tests.support.toy_stages.trouble import ToyConfig


def external_data(config: ToyConfig) -> Any:
    """Size of the outside file, or None without one."""
    return {"bytes": Path(config.path).stat().st_size} if config.path else None


STAGE = Stage(
    name="toy-source",
    kind="task",
    config=ToyConfig,
    module="tests.support.toy_stages.source.run",
    external="tests.support.toy_stages.source.config:external_data",
    cpus=0.5,
)
