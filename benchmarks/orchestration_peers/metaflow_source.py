"""The graph as a Metaflow flow, which Metaflow reads from its source: so it is written for each size.

It runs in an environment of its own, a process for each task, its artifacts in a local datastore.
"""

_HEAD = """import os
from pathlib import Path

from metaflow import FlowSpec, step


def count():
    with Path(os.environ["BENCH_BODIES"]).open("a") as file:
        file.write("1\\n")


class Graph(FlowSpec):
"""
_FIRST = """    @step
    def start(self):
        count()
        self.value = 1
        self.next({then})

"""
_STEP = """    @step
    def {name}(self):
        count()
        self.value += 1
        self.next(self.{then})

"""
_LAST = """    @step
    def end(self):
        count()
        self.value += 1
        Path("value.txt").write_text(str(self.value))

"""
_LAST_JOIN = """    @step
    def last(self, inputs):
        count()
        self.value = 1 + sum(before.value for before in inputs)
        Path("value.txt").write_text(str(self.value))
        self.next(self.end)

    @step
    def end(self):
        pass

"""
_SHARDS = """    @step
    def start(self):
        self.numbers = list(range({num_shards}))
        self.next(self.shard, foreach="numbers")

    @step
    def shard(self):
        count()
        self.value = self.input
        self.next(self.join)

    @step
    def join(self, inputs):
        count()
        self.value = sum(before.value for before in inputs)
        Path("value.txt").write_text(str(self.value))
        self.next(self.end)

    @step
    def end(self):
        pass

"""
_TAIL = """
if __name__ == "__main__":
    Graph()
"""


def stages(num_chains: int, length: int) -> str:
    """A first step, chains, and a last one.  A join cannot be the end of a flow, so several chains have a step more."""
    last = "last" if num_chains > 1 else "end"
    starts = [f"self.chain_{chain}_0" if length else f"self.{last}" for chain in range(num_chains)]
    steps = [
        _STEP.format(name=f"chain_{chain}_{place}", then=f"chain_{chain}_{place + 1}" if place + 1 < length else last)
        for chain in range(num_chains)
        for place in range(length)
    ]
    end = _LAST_JOIN if num_chains > 1 else _LAST
    return "".join([_HEAD, _FIRST.format(then=", ".join(starts)), *steps, end, _TAIL])


def shards(num_shards: int) -> str:
    """A fan-out, its join and its end."""
    return _HEAD + _SHARDS.format(num_shards=num_shards) + _TAIL
