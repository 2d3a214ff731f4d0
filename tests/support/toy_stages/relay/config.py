"""A gang that counts, and goes on counting with fewer ranks."""

from dataclasses import dataclass

from pipeline.config import execution
from pipeline.stage import Stage


@dataclass(frozen=True)
class RelayConfig:
    """How far to count, and how."""

    ticks: int = 20
    tick_s: float = execution(0.1)
    log: str = execution("")
    """Directory with a line a start, of rank, ranks, process and where the count stood, and a line a tick."""
    workers: int = execution(2)
    min_workers: int = execution(0)


STAGE = Stage(name="toy-relay", kind="gang", config=RelayConfig, module="tests.support.toy_stages.relay.run", cpus=1.0)
