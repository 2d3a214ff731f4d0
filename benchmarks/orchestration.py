"""What a workflow engine adds to each stage and shard: ours, bare Ray tasks and other orchestrators on the same graph.

Every side is a program started by its command line, on all cores, with results that last; see README.md for the method.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import median_ratio
from benchmarks.orchestration_sides import (
    BARE_RAY,
    BASE,
    DEFAULT_FOLDER,
    NUM_CORES,
    OURS,
    PEERS,
    Graph,
    Side,
    env_of,
    install,
    peer,
    python_of,
    results,
)
from benchmarks.process import ROOT, run_command

START, CHAIN, CHAINS, SHARDS = "start", "chain", "chains", "shards"
LAYOUTS = (CHAIN, CHAINS)


@dataclass(frozen=True)
class Size:
    """What is run, and how often."""

    graphs: Mapping[str, Graph]
    num_rounds: int


FULL = Size(
    {START: Graph(), CHAIN: Graph(1, 98), CHAINS: Graph(7, 14), SHARDS: Graph(num_shards=1000)},
    num_rounds=3,
)
QUICK = Size(
    {START: Graph(), CHAIN: Graph(1, 6), CHAINS: Graph(2, 3), SHARDS: Graph(num_shards=20)},
    num_rounds=1,
)


@dataclass(frozen=True)
class Times:
    """Seconds of a side's programs, from their start to their end, by graph and in the order of rounds."""

    first: dict[str, list[float]]
    again: dict[str, list[float]]

    def whole_s(self, name: str, graph: Graph) -> list[float]:
        """Seconds of the whole program for each of its stages or shards."""
        number = graph.num_shards or graph.num_results
        return [s / number for s in self.first[name]]

    def steady_s(self, name: str, graph: Graph) -> list[float]:
        """The same without the start: what each stage or shard takes beyond the graph of two stages."""
        number = graph.num_shards or graph.num_results - Graph().num_results
        start_s = statistics.median(self.first[START])
        return [(s - start_s) / number for s in self.first[name]]


def _time_graph(name: str, side: Side, graph: Graph, folder: Path) -> tuple[float, float | None]:
    """Seconds of the graph, and of the same once more; RefusedError if a result is wrong or was made again."""
    folder.mkdir(parents=True)
    found: list[float] = []
    for command in (side.command, side.again):
        if command is None:
            break
        words, log = command(graph, folder), folder / f"{len(found)}.log"
        # Whatever else is there must not be imported by a peer; ours finds the benchmark's stages.
        env = env_of(folder) | graph.env | {"PYTHONPATH": str(ROOT) if name in BASE else ""}
        found.append(run_command(words, log=log, name=name, env=env, cwd=folder).wall_s)
        values = results(folder)
        if max(values, default=None) != graph.value or len(values) != (graph.num_results if name in BASE else 1):
            raise RefusedError(f"{name}: {len(values)} results, the largest {values[-1:]}; expected {graph}")
        if len(found) == 2 and side.again_says not in log.read_text(errors="replace"):
            raise RefusedError(f"{name}: the log of the second run says nowhere {side.again_says!r}")
    return found[0], found[1] if len(found) == 2 else None


def measure_sides(sides: Mapping[str, Side], size: Size, root: Path) -> dict[str, Times]:
    """Every side with every graph in every round, in turn; the fan-out of a peer, which takes long, in the first."""
    times = {name: Times({g: [] for g in size.graphs}, {g: [] for g in size.graphs}) for name in sides}
    names = list(sides)
    for number in range(size.num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for what, graph in size.graphs.items():
                if what == SHARDS and name not in BASE and number > 0:
                    continue
                once_s, again_s = _time_graph(
                    name, sides[name], graph, root / f"{name}-{what}-{number}".replace(" ", "-")
                )
                times[name].first[what].append(once_s)
                if again_s is not None:
                    times[name].again[what].append(again_s)
    return times


def _find_peers(options: Options) -> tuple[dict[str, Side], dict[str, str]]:
    """Sides of the peers that are there, and why others are not."""
    sides: dict[str, Side] = {}
    absent: dict[str, str] = {}
    wanted = options.own.peers if options.own.peers is not None else [] if options.quick else list(PEERS)
    for name in PEERS:
        if name not in wanted:
            absent[name] = "not asked for (--peers)"
            continue
        folder = options.own.environments.resolve()
        failure = install(name, folder) if options.own.install and python_of(name, folder) is None else ""
        python = python_of(name, folder)
        if python is None:
            absent[name] = failure or f"not installed in {options.own.environments}; add --install"
        else:
            sides[name] = peer(name, python)
    return sides, absent


def _table(times: Mapping[str, Times], sides: Mapping[str, Side], absent: Mapping[str, str], size: Size) -> str:
    graphs = {what: graph for what, graph in size.graphs.items() if what != START}
    names = [
        f"chain of {graphs[CHAIN].num_results}",
        f"{graphs[CHAINS].num_chains} chains, {graphs[CHAINS].num_results}",
        f"{graphs[SHARDS].num_shards} shards",
    ]

    def rows(cells: Callable[[Times, str, Graph], Sequence[float]], scale: float, digits: int) -> list[list[str]]:
        found = {name: [cells(one, what, graph) for what, graph in graphs.items()] for name, one in times.items()}
        return [
            [name, *(f"{scale * statistics.median(values):.{digits}f}" if values else "-" for values in side)]
            for name, side in found.items()
        ]

    whole = rows(lambda one, what, graph: one.first[what], 1, 1)
    for row, one in zip(whole, times.values(), strict=True):
        row.append(f"{statistics.median(one.first[START]):.1f}")
    again = rows(lambda one, what, graph: one.again[what], 1, 2)
    for row, name in zip(again, times, strict=True):
        row.append(sides[name].again_is or "has nothing")
    tables = (
        table([f"seconds in all, {NUM_CORES} cores, rounds: {size.num_rounds}", *names, "two stages"], whole),
        table(["ms a stage or shard, start included", *names], rows(Times.whole_s, 1e3, 1)),
        table(["ms a stage or shard, beyond two stages", *names], rows(Times.steady_s, 1e3, 1)),
        table(["seconds when all is done already", *names, "is"], again),
    )
    return "\n\n".join([*tables, *(f"{name} is absent: {reason}" for name, reason in absent.items())])


def ratios_of(times: Mapping[str, Times], size: Size) -> dict[str, float]:
    """The keys; of the two layouts, always the one that is worse for us."""
    layouts = [(what, size.graphs[what]) for what in LAYOUTS]
    ours, ray = times[OURS], times[BARE_RAY]
    found = {
        "extra_over_ray_s": max(
            statistics.median(measured(ours, *layout)) - statistics.median(measured(ray, *layout))
            for layout in layouts
            for measured in (Times.whole_s, Times.steady_s)
        ),
        "cached_rerun_s": max(statistics.median(ours.again[what]) for what in size.graphs),
    }
    for name, theirs in times.items():
        if name not in BASE:
            found[name] = min(median_ratio(theirs.whole_s(*one), ours.whole_s(*one)) for one in layouts)
    return found


def _ms(
    times: Mapping[str, Times], size: Size, measured: Callable[[Times, str, Graph], list[float]]
) -> dict[str, dict[str, float]]:
    return {
        name: {
            what: round(1e3 * statistics.median(measured(one, what, graph)), 2)
            for what, graph in size.graphs.items()
            if what != START
        }
        for name, one in times.items()
    }


def measure(options: Options) -> Measured:
    """All sides that are there."""
    if options.text:
        raise ValueError("--text: no text is read here; leave it out")
    size = QUICK if options.quick else FULL
    peers, absent = _find_peers(options)
    sides = {**BASE, **peers}
    with tempfile.TemporaryDirectory(prefix="dlm-orchestration-") as folder:
        if not options.quick:
            # All sides work, and their programs are in the page cache, before anything long is begun.
            measure_sides(sides, QUICK, Path(folder) / "before")
        times = measure_sides(sides, size, Path(folder))
    figures: dict[str, Any] = {
        "wall_s": {
            name: {w: [round(s, 3) for s in v] for w, v in found.first.items()} for name, found in times.items()
        },
        "again_s": {
            name: {what: [round(s, 3) for s in v] for what, v in found.again.items() if v}
            for name, found in times.items()
        },
        "ms_a_stage": {
            "start included": _ms(times, size, Times.whole_s),
            "without start": _ms(times, size, Times.steady_s),
        },
        "versions": {name: list(PEERS[name]) for name in peers},
        "absent": absent,
    }
    return Measured(_table(times, sides, absent, size), ratios_of(times, size), figures)


def own_options() -> argparse.ArgumentParser:
    """Which peers, and where they live."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        help="default: all of them, with --quick none; the latter takes minutes",
    )
    parser.add_argument(
        "--environments",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="DIR",
        help=f"of the peers; default: {DEFAULT_FOLDER}",
    )
    parser.add_argument("--install", action="store_true", help="make the environments that are not there, with pip")
    return parser


if __name__ == "__main__":
    sys.exit(run("orchestration", measure, own=own_options()))
