"""Compute nothing, and write down every few milliseconds how long."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.stage import StageContext
from tests.support.toy_stages.burn.config import BurnConfig

_EVERY_S = 0.005
_AT_MOST_S = 60.0


def run(config: BurnConfig, inputs: Mapping[str, Path], context: StageContext) -> None:
    """The account is the CPU time of this process since it began here, in the last line of its file."""
    execution = len(list(Path(config.log).iterdir())) + 1
    is_killed = execution <= config.killed
    until_s = _AT_MOST_S if is_killed and not config.rests else config.cpu_s
    start_s = time.process_time()
    account = os.open(Path(config.log) / f"{execution}", os.O_WRONLY | os.O_CREAT)
    used_s = 0.0
    while used_s < until_s:
        next_s = time.process_time() + _EVERY_S
        while time.process_time() < next_s:
            pass
        used_s = time.process_time() - start_s
        os.pwrite(account, f"{used_s:20.6f}".encode(), 0)
    if is_killed:
        time.sleep(_AT_MOST_S)
    (context.out / "value.txt").write_text("1")
