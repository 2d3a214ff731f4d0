"""The command that looks whether runs can work here."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from workflows.commands.common import DEFAULT_STORE, JsonOption, StoreOption, print_json, print_table, say
from workflows.exit_codes import EXIT_FAILED

_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def doctor(
    store: StoreOption = DEFAULT_STORE,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            envvar="RAY_ADDRESS",
            help="auto, within a cluster, looks at every node; http://HOST:8265 has a job of that cluster do it.",
        ),
    ] = "",
    as_json: JsonOption = False,
    all_reduce: Annotated[
        bool, typer.Option(help="Send data between the nodes, or between two processes of this machine.")
    ] = True,
) -> None:
    """Look whether this machine, or every node of a cluster, can carry runs, and say what to do where not."""
    from cluster.everywhere import ClusterNodes, ThisMachine
    from workflows.doctor import examine, examine_as_job, has_failed

    if address in ("", "auto"):
        machines = ClusterNodes() if address else ThisMachine()
        with _interrupted_by_sigterm():
            checks = examine(machines, store, all_reduce)
    else:
        checks = examine_as_job(address, store, all_reduce, say)
    if as_json:
        print_json({"checks": checks})
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("check", "node", "", "found"):
            table.add_column(column, overflow="fold")
        for check in checks:
            found = f"{check.found}\n{check.todo}" if check.todo else check.found
            table.add_row(check.name, check.node, Text(check.status, style=_STYLES[check.status]), Text(found))
        print_table(table)
        failures = sum(check.status == "failure" for check in checks)
        warnings = sum(check.status == "warning" for check in checks)
        say(f"{len(checks)} checks: {failures} failed, {warnings} with a warning")
    if has_failed(checks):
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def _interrupted_by_sigterm() -> Generator[None]:
    """Let a job that is stopped end as by Ctrl-C: what it has put into the store is removed first."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
