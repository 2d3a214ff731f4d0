"""The command line.  It imports neither torch nor ray: only the workers of a stage that has to run do."""

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from cluster.auth import AuthError
from cluster.executor import ExecutorLostError
from cluster.jobs import ClusterError
from pipeline.errors import CorruptionError, LeaseLostError, UserError, classify, is_disk_full
from workflows import runs
from workflows.commands import (
    choosing,
    comparing,
    converting,
    costs,
    data,
    doctor,
    explaining,
    generating,
    inspecting,
    logs,
    looking,
    running,
    status,
    submitting,
    sweeping,
    upkeep,
    verifying,
)
from workflows.commands.common import say
from workflows.exit_codes import EXIT_DRIFT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNSCHEDULABLE, EXIT_USAGE
from workflows.lease import LeaseHeldError

_TYPER_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""

app = typer.Typer(
    help="Pretrain diffusion language models as durable workflows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at the data of a run, and verify it.", no_args_is_help=True)
app.add_typer(data_app, name="data")

app.command("recipes")(choosing.recipes)
app.command("models")(choosing.models)
app.command("plan")(choosing.plan)
app.command("run")(running.run)
app.command("resume")(running.resume)
app.command("submit")(submitting.submit)
app.command("cancel")(submitting.cancel)
app.command("status")(status.status)
app.command("logs")(logs.logs)
app.command("explain")(explaining.explain)
app.command("verify")(verifying.verify)
app.command("cost")(costs.cost)
app.command("list")(looking.list_runs)
app.command("sweep")(sweeping.sweep)
app.command("gc")(upkeep.gc)
app.command("unlock")(upkeep.unlock)
app.command("report")(looking.report)
app.command("doctor")(doctor.doctor)
app.command("generate")(generating.generate)
app.command("convert")(converting.convert)
app.command("inspect")(inspecting.inspect)
app.command("compare")(comparing.compare)
data_app.command("show")(data.show)
data_app.command("verify")(data.verify)

_ENDINGS: dict[type[Exception], tuple[int, str, str]] = {
    UserError: (EXIT_USAGE, "", ""),
    AuthError: (EXIT_USAGE, "", ""),
    ClusterError: (EXIT_UNSCHEDULABLE, "", ""),
    runs.DriftError: (EXIT_DRIFT, "", ""),
    runs.DoesNotFitError: (EXIT_UNSCHEDULABLE, "", ""),
    LeaseHeldError: (EXIT_UNSCHEDULABLE, "this run is being worked on: ", ""),
    LeaseLostError: (EXIT_INTERRUPTED, "another process took over, this one has stopped: ", ""),
    ExecutorLostError: (EXIT_INTERRUPTED, "", "; what was finished is kept, go on with: dlm resume RUN"),
    CorruptionError: (EXIT_FAILED, "", ""),
    OSError: (EXIT_FAILED, "the store or a file cannot be used: ", "; mend it, then: dlm resume RUN"),
}
"""What is not a bug -> exit code, and words around the message."""
EXPECTED = tuple(_ENDINGS)


def ending(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that is ``EXPECTED``."""
    code, before, after = next(ending for kind, ending in _ENDINGS.items() if isinstance(error, kind))
    if is_disk_full(error):
        before = "no space is left in the store: "
    elif isinstance(error, OSError) and classify(error) == "transient":
        code, before = EXIT_INTERRUPTED, "the store or a service does not answer: "
    return code, f"{before}{error}{after}"


def main(run: Callable[[], Any] = app) -> None:
    """Entry point: what the user did wrong ends in a message, not in a traceback.

    Recipes and stages of the user's own are found in the current directory, after everything that is installed.
    """
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        run()
    except EXPECTED as error:
        code, message = ending(error)
        say(f"error: {message}")
        sys.exit(code)
    except SystemExit as end:
        if end.code != _TYPER_INTERRUPTED:
            raise
        say(
            "interrupted; if a run had begun, dlm list shows it and dlm resume RUN goes on with it; dlm generate --out "
            "goes on by the same command"
        )
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
