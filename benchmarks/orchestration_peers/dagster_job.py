# pyright: reportMissingImports=false
"""The graph as Dagster jobs, ``stages`` and ``shards``: results pickled into its storage, a process for each op.

It runs in an environment of its own with ``dagster job execute``, whose default executor that is.
"""

import os
from pathlib import Path
from typing import Any

from dagster import DynamicOut, DynamicOutput, In, job, op


def count() -> None:
    """Leave a line for every body that is executed."""
    with Path(os.environ["BENCH_BODIES"]).open("a") as file:
        file.write("1\n")


def make_op(name: str, num_inputs: int, *, is_last: bool = False) -> Any:
    """An op: one more than the sum of its inputs."""

    def add(**before: int) -> int:
        count()
        value = 1 + sum(before.values())
        if is_last:
            Path("value.txt").write_text(str(value))
        return value

    return op(name=name, ins={f"before_{number}": In(int) for number in range(num_inputs)})(add)


@job
def stages() -> None:
    """A first op, chains, and a last one."""
    first, ends = make_op("first", 0)(), []
    for chain in range(int(os.environ["BENCH_CHAINS"])):
        before = first
        for place in range(int(os.environ["BENCH_LENGTH"])):
            before = make_op(f"chain_{chain}_{place}", 1)(before_0=before)
        ends.append(before)
    make_op("last", len(ends), is_last=True)(**{f"before_{number}": end for number, end in enumerate(ends)})


@op(out=DynamicOut(int))
def numbers() -> Any:
    """The shards."""
    for number in range(int(os.environ["BENCH_SHARDS"])):
        yield DynamicOutput(number, mapping_key=str(number))


@op
def shard(number: int) -> int:
    """Its number."""
    count()
    return number


@op
def total(values: list[int]) -> int:
    """The sum."""
    count()
    Path("value.txt").write_text(str(sum(values)))
    return sum(values)


@job
def shards() -> None:
    """A fan-out."""
    total(numbers().map(shard).collect())
