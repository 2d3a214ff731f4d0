"""A task whose files are there already."""

from dataclasses import dataclass

from pipeline.stage import Stage


@dataclass(frozen=True)
class GivenConfig:
    """Where they lie."""

    path: str


STAGE = Stage(name="toy-given", kind="task", config=GivenConfig, module="tests.support.toy_stages.given.run", cpus=0.5)
