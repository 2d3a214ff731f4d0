"""The graph as plain Ray tasks, each of which writes its result to a file and flushes it to the disk.

``bare_ray.py stages|shards``, in an empty directory; the sizes stand in the environment.
"""

import os
import sys
from pathlib import Path
from typing import Any

import ray


def write(name: str, value: int) -> int:
    """Count the body that was executed, and leave a result that survives a power cut."""
    with Path(os.environ["BENCH_BODIES"]).open("a") as bodies:
        bodies.write("1\n")
    with Path(f"value-{name}.txt").open("w") as file:
        file.write(str(value))
        file.flush()
        os.fsync(file.fileno())
    return value


@ray.remote
def add(name: str, *before: int) -> int:
    """One more than the sum."""
    return write(name, 1 + sum(before))


@ray.remote
def shard(number: int) -> int:
    """Its number."""
    return write(str(number), number)


@ray.remote
def total(*values: int) -> int:
    """The sum."""
    return write("sum", sum(values))


def stages() -> Any:
    """A first task, chains, and a last one."""
    submit: Any = add.remote  # Ray's annotations know nothing of *before
    first, ends = submit("first"), []
    for chain in range(int(os.environ["BENCH_CHAINS"])):
        before = first
        for place in range(int(os.environ["BENCH_LENGTH"])):
            before = submit(f"{chain}-{place}", before)
        ends.append(before)
    return submit("last", *ends)


def shards() -> Any:
    """A fan-out."""
    return total.remote(*[shard.remote(number) for number in range(int(os.environ["BENCH_SHARDS"]))])


if __name__ == "__main__":
    ray.init(address="local", num_cpus=int(os.environ["BENCH_CORES"]), include_dashboard=False, log_to_driver=False)
    ray.get({"stages": stages, "shards": shards}[sys.argv[1]]())
