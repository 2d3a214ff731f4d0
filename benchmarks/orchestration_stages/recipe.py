"""The measured graph as a recipe, of the size that the environment says: ``dlm run`` takes it by its import path."""

import os

from benchmarks.orchestration_stages.add.config import AddConfig
from benchmarks.orchestration_stages.shards.config import ShardsConfig
from workflows.step import Step, Workflow

_PACKAGE = __name__.rpartition(".")[0]


def stages() -> Workflow:
    """A first stage, chains of so many stages each, and a last one."""
    num_chains, length = int(os.environ["BENCH_CHAINS"]), int(os.environ["BENCH_LENGTH"])
    steps = [_add("first", [], 0)]
    ends: list[str] = []
    for chain in range(num_chains):
        before = "first"
        for place in range(length):
            name = f"chain-{chain}-{place}"
            steps.append(_add(name, [before], len(steps)))
            before = name
        ends.append(before)
    return Workflow("stages", "no-op stages", (*steps, _add("last", ends, len(steps))))


def _add(name: str, before: list[str], place: int) -> Step:
    inputs = {f"before_{number}": source for number, source in enumerate(before)}
    return Step(name, f"{_PACKAGE}.add", AddConfig(place), inputs)


def shards() -> Workflow:
    """A fan-out over so many shards."""
    config = ShardsConfig(int(os.environ["BENCH_SHARDS"]))
    return Workflow("shards", "no-op shards", (Step("shards", f"{_PACKAGE}.shards", config),))
