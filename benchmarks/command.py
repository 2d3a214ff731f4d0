"""What every benchmark does around its measurements: options, probes, refusal, the table, the last line."""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.machine import Probe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    quick: bool
    """A size that shows in seconds that the benchmark works; its numbers mean nothing."""
    text: tuple[Path, ...]
    """Files and folders; none for the standard library."""
    own: argparse.Namespace = field(default_factory=argparse.Namespace)
    """Options of this benchmark alone."""


@dataclass(frozen=True)
class Measured:
    """What a benchmark found."""

    table: str
    ratios: dict[str, float]
    """Theirs over ours of a time or a memory, or a cost named x_over_y."""
    figures: dict[str, Any]


class RefusedError(Exception):
    """A measurement that must not be reported."""


def run(
    name: str,
    measure: Callable[[Options], Measured],
    argv: Sequence[str] | None = None,
    probe: Callable[[], Probe] = machine.probe,
    *,
    is_timed: bool = True,
    own: argparse.ArgumentParser | None = None,
) -> int:
    """Probe, measure, probe, print; the exit status is 1 if there is nothing to report.

    What is no time can be measured on a busy machine: it is reported with the doubts.

    The last line printed is {"benchmark", "ratios", "figures", "machine"} as JSON.  A quick run is
    reported whatever the probes say, and cannot be saved.

    Args:
        own: options of this benchmark, made with add_help=False.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", parents=[own] if own else [])
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it works; not a measurement")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="PATH", help="default: standard library")
    parser.add_argument("--save", action="store_true", help=f"write the report to benchmarks/results/{name}.json")
    args = parser.parse_args(argv)
    if args.save and args.quick:
        parser.error("--save: a quick run is not a measurement; leave out --quick")
    try:
        options = Options(quick=args.quick, text=tuple(args.text), own=args)
        report, table = _report(name, measure, options, probe, may_refuse=is_timed and not args.quick)
    except (RefusedError, ValueError) as error:
        print(f"benchmarks.{name}: {error}", file=sys.stderr)
        return 1
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(legible(report) + "\n")
    print(table)
    print(json.dumps(report))
    return 0


def legible(report: Mapping[str, Any]) -> str:
    """A report as indented JSON, each list of numbers on one line."""
    spread = json.dumps(report, indent=2)
    return re.sub(r'\[\n([^][{}"]+?)\n\s*\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", spread)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _report(
    name: str, measure: Callable[[Options], Measured], options: Options, probe: Callable[[], Probe], *, may_refuse: bool
) -> tuple[dict[str, Any], str]:
    probes = [probe()]
    _refuse_if(machine.doubts(probes) if may_refuse else [])
    measured = measure(options)
    probes.append(probe())
    _refuse_if(machine.doubts(probes) if may_refuse else [], measured.table)
    report = {
        "benchmark": name,
        "ratios": {key: round(ratio, 3) for key, ratio in measured.ratios.items()},
        "figures": measured.figures,
        "machine": {
            **machine.describe(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "quick": options.quick,
            "probes": [{key: round(value, 1) for key, value in asdict(one).items()} for one in probes],
            "doubts": machine.doubts(probes),
        },
    }
    return report, measured.table


def _refuse_if(found: list[str], measured: str = "") -> None:
    if found:
        doubts = "\n  ".join(["the machine is not fit to measure on now:", *found])
        raise RefusedError(
            f"{doubts}\nmeasured all the same, and not to be reported:\n{measured}" if measured else doubts
        )
