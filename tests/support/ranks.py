"""Gangs of gloo ranks that run one function of the tests, as the training stage would start them."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_run import _free_port, rank_context

DEADLINE_S = 100.0


def run_ranks(work: Callable[[int], Any], folder: Path, num_ranks: int) -> list[Any]:
    """What a function of a module returns on each rank, made of tensors and plain values.

    AssertionError with the ranks' words if one fails.
    """
    context = rank_context()
    given = (num_ranks, _free_port(), folder, work)
    ranks = [context.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    deadline_s = time.monotonic() + DEADLINE_S
    for process in ranks:
        process.join(max(0.0, deadline_s - time.monotonic()))
    for process in ranks:
        process.kill()
        process.join()
    said = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
    assert [process.exitcode for process in ranks] == [0] * num_ranks, said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, port: int, folder: Path, work: Callable[[int], Any]) -> None:
    handle = (folder / f"{rank}.log").open("wb")
    os.dup2(handle.fileno(), 1)
    os.dup2(handle.fileno(), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    from pipeline.pretrain.engine import leave_process_group, prepare_process, start_process_group
    from pipeline.pretrain.watchdog import WatchdogLimits

    prepare_process(1)
    start_process_group(WatchdogLimits())
    gc.freeze()  # DeepSpeed collects garbage several times an engine: let it not search all that was imported
    torch.save(work(rank), folder / f"{rank}.pt")
    leave_process_group()
