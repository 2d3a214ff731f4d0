"""Counts, and keeps the count in the state, from where another attempt goes on."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import write_atomic
from pipeline.stage import StageContext, Stats, Stopped
from tests.support.toy_stages.relay.config import RelayConfig


def run(config: RelayConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats | None:
    """The count, by rank 0; the others keep it company."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert size == config.workers, "the configuration tells how many ranks there are"
    kept, log = context.state / "count.txt", Path(config.log)
    count = int(kept.read_text()) if kept.exists() else 0
    _note(log / "starts", f"{rank} {size} {os.getpid()} {count}")
    while count < config.ticks:
        time.sleep(config.tick_s)
        if context.should_stop():
            raise Stopped(f"stopped at {count}")
        if rank:
            if not kept.exists() or (count := int(kept.read_text())) < config.ticks:
                continue
            break
        count += 1
        _note(log / "ticks", str(count))
        context.fence()
        write_atomic(kept, str(count).encode())
        context.progress(count, config.ticks)
    if rank:
        return None
    (context.out / "value.txt").write_text(str(count))
    return {"value": count}


def _note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
