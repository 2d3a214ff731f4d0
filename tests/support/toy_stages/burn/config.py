"""A task that uses a processor, and keeps its own account of how much."""

from dataclasses import dataclass

from pipeline.config import execution
from pipeline.stage import Stage


@dataclass(frozen=True)
class BurnConfig:
    """How much is used."""

    cpu_s: float = 1.0
    """By the execution that is allowed to end."""
    killed: int = 0
    """Executions before it, which stay until they are killed."""
    rests: bool = True
    """Whether those use no more than the last one; otherwise they go on."""
    log: str = execution("")
    """Folder of the accounts, one for each execution."""


STAGE = Stage(name="toy-burn", kind="task", config=BurnConfig, module="tests.support.toy_stages.burn.run")
