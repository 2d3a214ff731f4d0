"""What the commands have in common: options, the store that is meant, and how something is said."""

import difflib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config import parse_value, to_json
from pipeline.errors import UserError
from workflows import runs
from workflows.commands.completing import DEFAULT_STORE, complete_recipes, complete_runs, complete_steps
from workflows.driver import Options
from workflows.store import Store, open_store, open_writable_store

_ANY_WIDTH = 100_000
"""Into a pipe a table is as wide as it gets."""


class _Terminal(Console):
    """What is under way goes on without a word once whoever read along has left."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = _Terminal()
errors = _Terminal(stderr=True)
if not console.is_terminal:
    console.width = _ANY_WIDTH

SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, e.g. pretrain.num_steps=500."),
]
StoreOption = Annotated[str, typer.Option("--store", envvar="DLM_STORE", help="Directory of runs and artifacts.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="ray: an embedded Ray; local: subprocesses without Ray.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run id.", autocompletion=complete_runs)]
OptionalRun = Annotated[
    str, typer.Argument(metavar="[RUN]", help="Run id; the newest by default.", autocompletion=complete_runs)
]
RecipeArgument = Annotated[
    str,
    typer.Argument(help="Name of a recipe, or module:function of one of your own.", autocompletion=complete_recipes),
]
StepsFrom = Annotated[
    list[str],
    typer.Option(
        "--from",
        metavar="STEP",
        help="Work on this step and what comes after; all before must be there.",
        autocompletion=complete_steps,
    ),
]
StepsUntil = Annotated[
    list[str],
    typer.Option(
        "--until",
        metavar="STEP",
        help="Work on this step and what it needs, nothing more.",
        autocompletion=complete_steps,
    ),
]
StepsOnly = Annotated[
    list[str],
    typer.Option(
        "--only",
        metavar="STEP",
        help="Work on this step alone; what it needs must be there.",
        autocompletion=complete_steps,
    ),
]
DataOfOption = Annotated[
    str, typer.Option("--step", help="Training or packing whose data are meant; needed where a run has several.")
]

PythonOption = Annotated[
    str, typer.Option("--python", help="Interpreter on the cluster; python by default, on this machine its own.")
]
EnvOption = Annotated[
    list[str],
    typer.Option(
        "--env",
        metavar="NAME",
        help="Variable of this environment that the job gets; no secrets. A run that was submitted before keeps its "
        "names: giving any replaces them all, and --env '' drops them.",
    ),
]
QueueOption = Annotated[
    float | None,
    typer.Option(
        "--queue-timeout",
        min=0.0,
        help=f"Seconds to wait for what a step needs and nobody else uses; {Options.queue_timeout_s:.0f} by default.",
    ),
]
UnsandboxedOption = Annotated[
    bool,
    typer.Option(
        "--allow-unsandboxed",
        help="Run programs that a model wrote with rlimits alone where the kernel allows no namespaces.",
    ),
]
FailFastOption = Annotated[bool, typer.Option("--fail-fast", help="Stop everything at the first failure.")]


def say(message: str) -> None:
    """Print a message for the user on standard error, exactly as it is."""
    errors.print(message, highlight=False, markup=False, soft_wrap=True)


def page_width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere, and lines are not cut."""
    return console.width if console.is_terminal else None


def print_table(table: Table) -> None:
    """Print a table."""
    console.print(table, highlight=False, markup=False)


def print_line(line: str | Text) -> None:
    """Print a line exactly as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def found_or_suggested(what: str, name: str, known: Sequence[str]) -> str:
    """The name, if it is one of those known; UserError with the closest of them otherwise."""
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
    raise UserError(f"there is no {what} {name!r}; {hint}")


def find_store(url: str) -> Store:
    """A store to look at; it need not exist."""
    root = Path(url).expanduser().resolve()
    if "://" not in url and any(folder.is_file() for folder in (root, *root.parents)):
        raise UserError(f"--store {url} is or lies in a file; choose a directory")
    return open_store(url)


def find_existing_store(url: str) -> Store:
    """A store to look at as a whole; UserError if there is none."""
    store = find_store(url)
    if not (store.root / "store.json").exists():
        raise UserError(
            f"there is no store at {store.url}; name one with --store, or make one with: dlm run quickstart"
        )
    return store


def find_writable_store(url: str) -> Store:
    """A store to work in, made if it is not there."""
    store = find_store(url)
    if store.root.is_local:
        try:
            store.root.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--store {url}: {error.strerror}; choose a directory that can be written") from None
        if not os.access(store.root.path, os.W_OK):
            raise UserError(f"--store {url} cannot be written; choose another directory")
    return open_writable_store(url)


def typed_command() -> list[str]:
    """The command as it was typed."""
    return ["dlm", *sys.argv[1:]]


def parse_settings(items: list[str]) -> list[tuple[str, Any]]:
    """What --set was given, as paths and values."""
    settings: list[tuple[str, Any]] = []
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(f"--set {item!r} is not of the form PATH=VALUE, as in pretrain.num_steps=500")
        try:
            settings.append((path, parse_value(text)))
        except UserError as error:
            raise UserError(f"--set {path}: {error}") from None
    return settings


def executor_name(name: str) -> runs.ExecutorName:
    """What --executor was given."""
    if name not in ("ray", "local"):
        raise UserError(f"--executor is {name!r}; it is ray or local")
    return name


def print_json(value: Any) -> None:
    """Print a value for programs."""
    print(json.dumps(to_json(value), indent=1))


def store_option(store: Store) -> str:
    """The option that names this store in a command to copy; nothing for the default one."""
    default = Path(DEFAULT_STORE)
    # A job may outlive its working directory, so that is not asked for its name.
    is_default = store.root.is_local and default.exists() and store.root.path.exists()
    if is_default and default.samefile(store.root.path):
        return ""
    return f" --store {shlex.quote(store.url)}"


def queue_timeout(given_s: float | None) -> float:
    """What --queue-timeout was given, or its default."""
    return Options.queue_timeout_s if given_s is None else given_s


def option_words(queue_timeout_s: float | None, is_fail_fast: bool) -> list[str]:
    """The words that give a job's command the options of how it runs, if they were given."""
    words = ["--fail-fast"] if is_fail_fast else []
    return words if queue_timeout_s is None else [*words, "--queue-timeout", f"{queue_timeout_s:g}"]
