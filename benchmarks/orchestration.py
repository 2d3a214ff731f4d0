"""What a workflow engine adds to each stage and shard: ours, bare Ray tasks and other orchestrators on the same graph.

Every side is a program started by its command line, on all cores, with results that last; see README.md for the method.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    num_bodies,
    peer,
    python_of,
    results,
)
from benchmarks.process import ROOT, run_command

START, CHAIN, CHAINS, SHARDS = "start", "chain", "chains", "shards"
LAYOUTS = (CHAIN, CHAINS)
FAR = 2.0
"""A peer that takes so many times as long as ours in the first round, or as little, is not measured again."""


@dataclass(frozen=True)
class Size:
    """What is run, and how often."""

    graphs: Mapping[str, Graph]
    num_rounds: int
    fan_out_limit_s: float = 180.0
    """A peer's fan-out is stopped then, and counts by the shards that it has done."""


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
    stopped: dict[str, int] = field(default_factory=dict)
    """Shards that were done by graph, where the program was not let to its end."""

    @property
    def num_rounds(self) -> int:
        """How often the layouts were run."""
        return len(self.first[START])

    def whole_s(self, name: str, graph: Graph) -> list[float]:
        """Seconds of the whole program for each of its stages or shards."""
        number = self.stopped.get(name, graph.num_shards or graph.num_results)
        return [s / number for s in self.first[name]]

    def steady_s(self, name: str, graph: Graph) -> list[float]:
        """The same without the start: what each stage or shard takes beyond the graph of two stages."""
        number = self.stopped.get(name, graph.num_shards or graph.num_results - Graph().num_results)
        start_s = statistics.median(self.first[START])
        return [(s - start_s) / number for s in self.first[name]]


@dataclass(frozen=True)
class _Timed:
    """Seconds of a graph, and of the same once more."""

    first_s: float
    again_s: float | None
    num_done: int | None = None
    """Bodies executed when it was stopped, if it was."""


def _time_graph(name: str, side: Side, graph: Graph, folder: Path, limit_s: float | None = None) -> _Timed:
    """Run it, and once more; RefusedError if a result is wrong or the second run executed anything."""
    folder.mkdir(parents=True)
    # Whatever else is there must not be imported by a peer; ours finds the benchmark's stages.
    env = env_of(folder) | graph.env | {"PYTHONPATH": str(ROOT) if name in BASE else ""}
    log, again_log = folder / "0.log", folder / "1.log"

    first = run_command(side.command(graph, folder), log=log, name=name, env=env, cwd=folder, limit_s=limit_s)
    if first.is_stopped:
        num_done = num_bodies(folder)
        if not num_done:
            raise RefusedError(f"{name}: nothing of {graph} was executed in {limit_s} s")
        return _Timed(first.wall_s, None, num_done)
    _check(name, graph, folder, "one run")
    if side.again is None:
        return _Timed(first.wall_s, None)

    again = run_command(side.again(graph, folder), log=again_log, name=name, env=env, cwd=folder)
    _check(name, graph, folder, "two runs")
    if side.again_says not in again_log.read_text(errors="replace"):
        raise RefusedError(f"{name}: the log of the second run says nowhere {side.again_says!r}")
    return _Timed(first.wall_s, again.wall_s)


def _check(name: str, graph: Graph, folder: Path, runs: str) -> None:
    """RefusedError if the end is wrong or anything was executed more than once."""
    values = results(folder)
    if max(values, default=None) != graph.value or len(values) != (graph.num_results if name in BASE else 1):
        raise RefusedError(f"{name}: {len(values)} results, the largest {values[-1:]}; expected {graph}")
    if num_bodies(folder) != graph.num_results:
        found = f"{num_bodies(folder)} bodies were executed in {runs}"
        raise RefusedError(f"{name}: {found}; expected {graph.num_results}, each once")


def measure_sides(sides: Mapping[str, Side], size: Size, root: Path) -> dict[str, Times]:
    """Every side with every graph in every round, in turn, but for what takes long and would change nothing.

    The fan-out of a peer has no key and is run in the first round alone.  A peer that is far off then, in both layouts,
    is not run again: more rounds narrow a ratio, but move none from 2 to below 1.
    """
    times = {name: Times({g: [] for g in size.graphs}, {g: [] for g in size.graphs}) for name in sides}
    names = list(sides)
    for number in range(size.num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if number > 0 and name not in BASE and _is_far(times[name], times[OURS]):
                continue
            for what, graph in size.graphs.items():
                is_fan_out = what == SHARDS and name not in BASE
                if is_fan_out and number > 0:
                    continue
                folder = root / f"{name}-{what}-{number}".replace(" ", "-")
                limit_s = size.fan_out_limit_s if is_fan_out else None
                timed = _time_graph(name, sides[name], graph, folder, limit_s)
                times[name].first[what].append(timed.first_s)
                if timed.again_s is not None:
                    times[name].again[what].append(timed.again_s)
                if timed.num_done is not None:
                    times[name].stopped[what] = timed.num_done
    return times


def _is_far(theirs: Times, ours: Times) -> bool:
    """The first round alone decides, so that no later one is left out for what it would have said."""
    ratios = [theirs.first[what][0] / ours.first[what][0] for what in LAYOUTS]
    return min(ratios) >= FAR or max(ratios) <= 1 / FAR


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
        row[1:] = [f"> {cell}" if what in one.stopped else cell for what, cell in zip(graphs, row[1:], strict=True)]
        row += [f"{statistics.median(one.first[START]):.1f}", str(one.num_rounds)]
    again = rows(lambda one, what, graph: one.again[what], 1, 2)
    for row, name in zip(again, times, strict=True):
        row.append(sides[name].again_is or "has nothing")
    tables = (
        table([f"seconds in all, {NUM_CORES} cores", *names, "two stages", "rounds"], whole),
        table(["ms a stage or shard, start included", *names], rows(Times.whole_s, 1e3, 1)),
        table(["ms a stage or shard, beyond two stages", *names], rows(Times.steady_s, 1e3, 1)),
        table(["seconds when all is done already", *names, "is"], again),
    )
    notes = [
        f"{name} was stopped after {one.first[what][0]:.0f} s, {done} of {graphs[what].num_results} done ({what})"
        for name, one in times.items()
        for what, done in one.stopped.items()
    ]
    few = [name for name, one in times.items() if one.num_rounds < size.num_rounds]
    if few:
        notes.append(f"not run again, {FAR:g} times as long or as short as ours in the first round: {', '.join(few)}")
    return "\n\n".join([*tables, *notes, *(f"{name} is absent: {reason}" for name, reason in absent.items())])


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
        "rounds": {name: found.num_rounds for name, found in times.items()},
        "stopped_with_done": {name: found.stopped for name, found in times.items() if found.stopped},
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
