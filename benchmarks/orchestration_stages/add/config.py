"""A task that adds one to the sum of its inputs."""

from dataclasses import dataclass

from pipeline.stage import Stage

MAX_INPUTS = 16


@dataclass(frozen=True)
class AddConfig:
    """What makes a stage another one than its like."""

    place: int = 0
    """In the graph."""


STAGE = Stage(
    name="bench-add",
    kind="task",
    config=AddConfig,
    module="benchmarks.orchestration_stages.add.run",
    optional_inputs=tuple(f"before_{number}" for number in range(MAX_INPUTS)),
)
