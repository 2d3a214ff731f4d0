"""The command line.  It imports neither torch nor ray: only the workers of a stage that has to run do."""

import json
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dlm_core.models.presets import PRESETS
from pipeline.artifact import read_json
from pipeline.config import flatten, parse_value, to_json
from pipeline.errors import CorruptionError, LeaseLostError, UserError, is_disk_full
from workflows import listings, runs
from workflows.coordinator import Coordinator
from workflows.copies import local_copy, scratch
from workflows.display import Display, duration
from workflows.lease import LeaseHeldError
from workflows.plan import Plan, explain
from workflows.recipes import RECIPES
from workflows.report.text import scaled
from workflows.state import StepState
from workflows.step import load_stage
from workflows.store import RunPlace, Store, open_store, open_writable_store

EXIT_USAGE, EXIT_FAILED, EXIT_DRIFT, EXIT_UNSCHEDULABLE, EXIT_INTERRUPTED = 2, 3, 4, 5, 75
_TYPER_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""
_WITH_TRACEBACK = ("code", "transient", "infra")
"""Classes of errors that their message alone may not explain."""

app = typer.Typer(
    help="Pretrain diffusion language models as durable workflows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at the data of a run, and verify it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console()
errors = Console(stderr=True)

DEFAULT_STORE = "dlm-store"

SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, e.g. pretrain.num_steps=500."),
]
StoreOption = Annotated[str, typer.Option("--store", envvar="DLM_STORE", help="Directory of runs and artifacts.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="ray: an embedded Ray; local: subprocesses without Ray.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run id.")]
OptionalRun = Annotated[str, typer.Argument(metavar="[RUN]", help="Run id; the newest by default.")]
DataOfOption = Annotated[
    str, typer.Option("--step", help="Training or packing whose data are meant; needed where a run has several.")
]


def _say(message: str) -> None:
    """Print a message for the user on standard error, exactly as it is."""
    errors.print(message, highlight=False, markup=False, soft_wrap=True)


def _store(url: str) -> Store:
    """A store to look at; it need not exist."""
    root = Path(url).expanduser().resolve()
    if "://" not in url and any(folder.is_file() for folder in (root, *root.parents)):
        raise UserError(f"--store {url} is or lies in a file; choose a directory")
    return open_store(url)


def _writable_store(url: str) -> Store:
    """A store to work in, made if it is not there."""
    store = _store(url)
    if store.root.is_local:
        try:
            store.root.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--store {url}: {error.strerror}; choose a directory that can be written") from None
        if not os.access(store.root.path, os.W_OK):
            raise UserError(f"--store {url} cannot be written; choose another directory")
    return open_writable_store(url)


def _settings(items: list[str]) -> list[tuple[str, Any]]:
    settings: list[tuple[str, Any]] = []
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(f"--set {item!r} is not of the form PATH=VALUE, as in pretrain.num_steps=500")
        settings.append((path, parse_value(text)))
    return settings


def _executor_name(name: str) -> runs.ExecutorName:
    if name not in ("ray", "local"):
        raise UserError(f"--executor is {name!r}; it is ray or local")
    return name


def _print_json(value: Any) -> None:
    print(json.dumps(to_json(value), indent=1))


@app.command("recipes")
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes."""
    workflows = [make() for make in RECIPES.values()]
    if as_json:
        _print_json([listings.recipe(workflow) for workflow in workflows])
        return
    for workflow in workflows:
        console.print(f"[bold]{workflow.name}[/bold]  {workflow.summary}", highlight=False)


@app.command("models")
def models(as_json: JsonOption = False) -> None:
    """List the sizes of published models and what a token costs in training, with half of all positions masked.

    Active are the parameters that one token's logits pass through: some experts, the head, but no embedding.
    """
    rows = [listings.model(name, preset) for name, preset in PRESETS.items()]
    if as_json:
        _print_json(rows)
        return
    table = Table(box=None)
    for column in ("model", "parameters", "active", "training, a token", "experts", "arXiv"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        counts = (scaled(row["num_params"]), scaled(row["num_active_params"]))
        cost = scaled(row["training_flops_per_token"], "FLOP")
        experts = f"{row['top_k']} of {row['num_experts']}" if row["num_experts"] else "dense"
        table.add_row(row["name"], *counts, cost, experts, row["source"].rpartition(" ")[2])
    console.print(table)


@app.command("plan")
def plan_command(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.")],
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody changes it
    store: StoreOption = DEFAULT_STORE,
    show_settings: Annotated[bool, typer.Option("--settings", help="Print every setting and its value.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build the model without numbers; memory, operations and hours on GPUs.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="For --dry-run: kind of GPU; h100 by default.")] = None,
    mfu: Annotated[float | None, typer.Option(help="For --dry-run: share of the GPU's peak; 0.35 by default.")] = None,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Print the generated DeepSpeed configuration.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would do and why, without doing it."""
    plan = runs.plan_recipe(recipe, _settings(settings))
    if dry_run + deepspeed + show_settings > 1:
        raise UserError("--dry-run, --deepspeed and --settings each print something else; give one of them")
    idle = [name for name, value in (("--gpu", gpu), ("--mfu", mfu)) if value is not None and not dry_run]
    if idle:
        options, have = " and ".join(idle), "have" if len(idle) > 1 else "has"
        raise UserError(f"{options} {have} no effect without --dry-run; add --dry-run, or leave {options} out")
    if dry_run or deepspeed:
        from workflows import sizing

        if deepspeed:
            _print_json(sizing.deepspeed_configs(plan))
        else:
            sized = sizing.dry_run(plan, gpu or sizing.DEFAULT_GPU, sizing.DEFAULT_MFU if mfu is None else mfu)
            if as_json:
                _print_json([sizing.as_json(one) for one in sized])
            else:
                sizing.print_sizings(console, sized)
        return
    if show_settings:
        values = {f"{step.name}.{path}": value for step in plan.steps for path, value in flatten(step.config).items()}
        if as_json:
            _print_json(values)
        else:
            for path, value in values.items():
                print(f"{path}={json.dumps(value)}")
        return
    actions = explain(plan, _store(store))
    if as_json:
        _print_json(actions)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", "action", "why", "address"):
        table.add_column(column, no_wrap=column in ("step", "action"), overflow="fold")
    for action in actions:
        style = "green" if action.action == "cached" else "bold cyan"
        table.add_row(action.step, f"[{style}]{action.action}[/]", action.reason, action.fingerprint[:12])
    console.print(table)


@app.command("run")
def run_command(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.")],
    settings: SetOption = [],  # noqa: B006 - as above
    store: StoreOption = DEFAULT_STORE,
    executor: ExecutorOption = runs.DEFAULT_EXECUTOR,
    run_id: Annotated[str, typer.Option("--run-id", help="Name of the run; made up by default.")] = "",
) -> None:
    """Run a recipe; steps whose output exists are not run again."""
    place = _writable_store(store)
    name = _executor_name(executor)
    plan = runs.plan_recipe(recipe, _settings(settings))
    _drive(place, runs.create_run(place, plan, name, run_id, settings), plan, name)


@app.command("resume")
def resume_command(run_id: RunArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Go on with a run that failed, was stopped or was killed, with the executor that it was started with."""
    place = _writable_store(store)
    run = place.run(run_id)
    plan = runs.frozen_plan(run)
    runs.refuse_drift(plan, runs.command_of(run) + _store_option(place))
    _drive(place, run, plan, runs.frozen_executor(run))


def _drive(store: Store, run: RunPlace, plan: Plan, executor: runs.ExecutorName) -> None:
    with Display(console, run.run_id) as display:
        coordinator = Coordinator(store, run, plan, runs.executor_factory(executor, plan), display.update)
        if not console.is_terminal:
            console.print(f"run {run.run_id}", highlight=False)
        with _stop_on_signal(coordinator):
            states = coordinator.run()
    _print_outcome(store, run, states, coordinator.status)


class _stop_on_signal:
    """The first SIGINT or SIGTERM asks the stages to save and stop; the second interrupts at once."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.default_int_handler)
        self._coordinator.request_stop()
        _say("stopping: stages save first; interrupt again to stop at once")

    def __exit__(self, *details: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _store_option(store: Store) -> str:
    """The option that names this store in a command to copy; nothing for the default one."""
    return "" if store.url == str(Path(DEFAULT_STORE).resolve()) else f" --store {shlex.quote(store.url)}"


def _print_outcome(store: Store, run: RunPlace, states: list[StepState], status: str) -> None:
    for state in states:
        if state.status == "failed" and state.failure is not None:
            is_gang = load_stage(state.step.stage).kind == "gang"
            where = f" on rank {state.failure.rank}" if is_gang and state.failure.traceback else ""
            _say(f"\n{state.step.name} failed{where}: {state.failure.message}")
            if state.failure.error_class in _WITH_TRACEBACK and state.failure.type != CorruptionError.__name__:
                _say(f"logs: {run.directory / 'work'}\n{state.failure.traceback}")
    if status == "failed":
        where = _store_option(store)
        _say("\nwhat was finished is kept")
        _say(f"with the same data and settings: dlm resume {run.run_id}{where}")
        _say(f"with other data or settings:     {runs.command_of(run)}{where} [--set PATH=VALUE]")
        raise typer.Exit(EXIT_FAILED)
    if status == "stopped":
        _say(f"stopped; go on with: dlm resume {run.run_id}{_store_option(store)}")
        raise typer.Exit(EXIT_INTERRUPTED)
    _print_figures(store, run)


def _print_figures(store: Store, run: RunPlace) -> None:
    """The results of a finished run, for the steps that have any."""
    outputs = runs.committed_outputs(store, run)
    figures: list[tuple[str, str]] = []
    if "evaluate" in outputs:
        r = read_json(outputs["evaluate"] / "results.json")
        if "nll" in r:
            nll = ("negative log-likelihood (exact)", f"{r['nll']:.4f} nats/token")
            bits = ("bits a byte (exact)", f"{r['bpb']:.4f}")
        else:
            nll = ("NELBO (bound)", f"{r['nelbo']:.4f} ± {r['nelbo_mc_se']:.4f} nats/token")
            bits = ("bits a byte (bound)", f"{r['bpb_bound']:.4f} ± {r['bpb_bound_mc_se']:.4f}")
        figures += [
            nll,
            ("unigram entropy", f"{r['unigram_entropy']:.4f} nats/token"),
            bits,
            ("unigram, bits a byte", f"{r['unigram_bpb']:.4f}"),
            ("xz -9, bits a byte", f"{r['xz_bpb']:.4f}  ({r['xz_bytes']:,} of {r['num_bytes']:,} bytes)"),
        ]
    if "corpus" in outputs:
        left_out = Counter[str]()
        for source in read_json(outputs["corpus"] / "manifest.json")["stats"]["sources"].values():
            left_out += Counter({"broken": source["broken"], **source["dropped"]})
        if left_out:
            what = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
            figures.append(("left out of the text", f"{what} (which: see the report)"))
    if "pretrain" in outputs:
        stats = read_json(outputs["pretrain"] / "manifest.json")["stats"]
        if stats["tokens_per_s"] is not None:
            figures.append(("training speed", f"{stats['tokens_per_s']:,.0f} tokens/s"))
    if "report" in outputs:
        figures.append(("report", str(local_copy(outputs["report"]) / "report.html")))
    console.print()
    for label, value in figures:
        console.print(f"{label:<21} {value}", highlight=False, markup=False, soft_wrap=True)


@app.command("status")
def status_command(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show where a run stands."""
    place = _store(store)
    summary = runs.summarise(place, runs.require_run_id(place, run_id))
    if as_json:
        _print_json(summary)
        return
    attempts = f"{summary.attempts} attempt{'s' if summary.attempts != 1 else ''}"
    console.print(f"run {summary.run_id}  [bold]{summary.status}[/bold]  {attempts}", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", "status", "time", "detail", "artifact"):
        table.add_column(column, overflow="fold")
    for step in summary.steps:
        elapsed = duration(step.elapsed_s) if step.elapsed_s is not None else ""
        table.add_row(step.step, step.status, elapsed, step.detail, step.artifact)
    console.print(table)


@app.command("list")
def list_command(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the runs of a store, newest first."""
    place = _store(store)
    summaries = [runs.summarise(place, run) for run in place.runs()]
    if as_json:
        _print_json(summaries)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", min_width=max((len(s.run_id) for s in summaries), default=0))
    for column in ("workflow", "status", "attempts", "started"):
        table.add_column(column)
    for s in summaries:
        started = f"{datetime.fromtimestamp(s.started_at):%Y-%m-%d %H:%M}" if s.started_at else ""
        table.add_row(s.run_id, s.workflow, s.status, str(s.attempts), started)
    console.print(table)


@app.command("report")
def report_command(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE) -> None:
    """Print the path of a run's report; an unfinished run gets one of what there is."""
    place = _store(store)
    run = runs.require_run_id(place, run_id)
    outputs = runs.committed_outputs(place, run)
    if "report" in outputs:
        print(local_copy(outputs["report"]) / "report.html")
        return
    from workflows.report.run import render_partial

    path = (run.directory.path if run.directory.is_local else scratch(run.directory)) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = runs.report_sources(run)
    there = {name: local_copy(outputs[source]) for name, source in sources.items() if source in outputs}
    render_partial(f"{run.run_id} (unfinished)", there, path, wanted=sources)
    print(path)


@data_app.command("show")
def data_show_command(
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

    place = _store(store)
    data = data_commands.prepared_data(place, runs.require_run_id(place, run_id), step)
    shown = data_commands.show(data, list(range(sample, sample + number)))
    if as_json:
        _print_json(shown)
    else:
        data_commands.print_shown(console, shown)


@data_app.command("verify")
def data_verify_command(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE, step: DataOfOption = "") -> None:
    """Check every byte, id and count of the data, and that the rows hold every document once; exit code 3 if not."""
    from workflows import data_commands

    place = _store(store)
    for line in data_commands.verify(data_commands.prepared_data(place, runs.require_run_id(place, run_id), step)):
        console.print(line, highlight=False, soft_wrap=True)


_ENDINGS: dict[type[Exception], tuple[int, str, str]] = {
    UserError: (EXIT_USAGE, "", ""),
    runs.DriftError: (EXIT_DRIFT, "", ""),
    runs.DoesNotFitError: (EXIT_UNSCHEDULABLE, "", ""),
    LeaseHeldError: (EXIT_UNSCHEDULABLE, "this run is being worked on: ", ""),
    LeaseLostError: (EXIT_INTERRUPTED, "another process took over, this one has stopped: ", ""),
    CorruptionError: (EXIT_FAILED, "", ""),
    OSError: (EXIT_FAILED, "the store or a file cannot be used: ", "; mend it, then: dlm resume RUN"),
}
"""What is not a bug -> exit code, and words around the message."""


def main(run: Callable[[], Any] = app) -> None:
    """Entry point: what the user did wrong ends in a message, not in a traceback."""
    try:
        run()
    except tuple(_ENDINGS) as error:
        code, before, after = next(ending for kind, ending in _ENDINGS.items() if isinstance(error, kind))
        if is_disk_full(error):
            before = "no space is left in the store: "
        _say(f"error: {before}{error}{after}")
        sys.exit(code)
    except SystemExit as end:
        if end.code != _TYPER_INTERRUPTED:
            raise
        _say("interrupted; dlm list shows the run, dlm resume RUN goes on with it")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
