# pyright: reportMissingImports=false, reportFunctionMemberAccess=false
"""The graph as Prefect flows with results kept on disk and found again by their inputs.

``prefect_flow.py stages|shards`` runs in an environment of its own, with the default backend: a server of its own
beside it, SQLite, threads.  The sizes stand in the environment.
"""

import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import INPUTS, TASK_SOURCE
from prefect.task_runners import ThreadPoolTaskRunner

NUM_CORES = int(os.environ["BENCH_CORES"])
kept = {"persist_result": True, "cache_policy": INPUTS + TASK_SOURCE}


def count() -> None:
    """Leave a line for every body that is executed."""
    with Path(os.environ["BENCH_BODIES"]).open("a") as file:
        file.write("1\n")


@task(**kept)
def add(place: int, before: list[int]) -> int:
    """One more than the sum."""
    count()
    return 1 + sum(before)


@task(**kept)
def shard(number: int) -> int:
    """Its number."""
    count()
    return number


@task(**kept)
def total(values: list[int]) -> int:
    """The sum."""
    count()
    return sum(values)


@flow(task_runner=ThreadPoolTaskRunner(max_workers=NUM_CORES))
def stages() -> int:
    """A first task, chains, and a last one."""
    first: Any = add.submit(0, [])
    ends, count = [], 1
    for _ in range(int(os.environ["BENCH_CHAINS"])):
        before = first
        for _ in range(int(os.environ["BENCH_LENGTH"])):
            before = add.submit(count, [before])
            count += 1
        ends.append(before)
    return add.submit(count, ends).result()


@flow(task_runner=ThreadPoolTaskRunner(max_workers=NUM_CORES))
def shards() -> int:
    """A fan-out."""
    return total.submit(shard.map(range(int(os.environ["BENCH_SHARDS"])))).result()


if __name__ == "__main__":
    Path("value.txt").write_text(str({"stages": stages, "shards": shards}[sys.argv[1]]()))
