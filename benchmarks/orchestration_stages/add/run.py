"""One more than the sum of the inputs."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.orchestration_stages.add.config import AddConfig
from benchmarks.orchestration_stages.bodies import count
from pipeline.stage import StageContext


def run(config: AddConfig, inputs: Mapping[str, Path], context: StageContext) -> None:
    """One number in a file."""
    count()
    value = 1 + sum(int((directory / "value.txt").read_text()) for directory in inputs.values())
    (context.out / "value.txt").write_text(str(value))
