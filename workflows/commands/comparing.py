"""``dlm compare``: two runs on the same questions."""

from typing import Annotated

import typer

from workflows import comparison
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    find_store,
    page_width,
    print_json,
    print_line,
)
from workflows.commands.completing import complete_runs
from workflows.comparison import Difference
from workflows.display import columns

_ABSENT = "-"
FirstRun = Annotated[str, typer.Argument(metavar="RUN_A", help="Run id.", autocompletion=complete_runs)]
SecondRun = Annotated[str, typer.Argument(metavar="RUN_B", help="Run id.", autocompletion=complete_runs)]


def compare(run_a: FirstRun, run_b: SecondRun, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Compare the results of two runs question by question: tasks, and held-out text document by document."""
    place = find_store(store)
    found = comparison.compare(place, place.run(run_a), place.run(run_b))
    if as_json:
        print_json(comparison.as_json(found, run_a, run_b))
        return
    header = ("", "figure", "unit", run_a, run_b, "difference", "se", "95 %", "mc_se", "p", "n")
    for line in columns(header, [_cells(row) for row in found.differences], page_width()):
        print_line(line)
    for note in found.notes:
        print_line(f"note: {note}")
    print_line(
        "difference: the second less the first. se and 95 % are over questions, paired; mc_se is the noise of drawn "
        "masks; p is McNemar's, exact"
    )


def _cells(row: Difference) -> tuple[str, ...]:
    interval = _ABSENT if row.interval is None else f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}"
    errors = [_ABSENT if value is None else f"{value:.4f}" for value in (row.se, row.mc_se)]
    p = _ABSENT if row.p is None else f"{row.p:.3g}"
    values = (f"{row.a:.4f}", f"{row.b:.4f}", f"{row.difference:+.4f}")
    return (row.of, row.metric, row.unit, *values, errors[0], interval, errors[1], p, str(row.n))
