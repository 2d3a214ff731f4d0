"""Commands that look at the data of a run."""

from typing import Annotated

import typer

from workflows import runs
from workflows.commands.common import (
    DEFAULT_STORE,
    DataOfOption,
    JsonOption,
    OptionalRun,
    StoreOption,
    console,
    find_store,
    print_json,
)


def show(
    run_id: OptionalRun = "",
    store: StoreOption = DEFAULT_STORE,
    sample: Annotated[
        int, typer.Option(min=0, max=2**62, help="First global sample id whose row is shown as text.")
    ] = 0,
    number: Annotated[int, typer.Option(min=0, max=1000, help="How many rows are shown.")] = 1,
    step: DataOfOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show documents, tokens, lengths and shares by source, and rows as training sees them."""
    from workflows import data_commands

    place = find_store(store)
    data = data_commands.prepared_data(place, runs.require_run_id(place, run_id), step)
    shown = data_commands.show(data, list(range(sample, sample + number)))
    if as_json:
        print_json(shown)
    else:
        data_commands.print_shown(console, shown)


def verify(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE, step: DataOfOption = "") -> None:
    """Check every byte, id and count of the data, and that the rows hold every document once; exit code 3 if not."""
    from workflows import data_commands

    place = find_store(store)
    for line in data_commands.verify(data_commands.prepared_data(place, runs.require_run_id(place, run_id), step)):
        console.print(line, highlight=False, soft_wrap=True)
