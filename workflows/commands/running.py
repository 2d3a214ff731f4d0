"""Commands that run: start, go on."""

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any

import typer

from cluster.jobs import Jobs
from pipeline.artifact import read_json
from pipeline.errors import CorruptionError, UserError
from workflows import runs
from workflows.amendments import Wishes, amend, prepare
from workflows.commands.common import (
    DEFAULT_STORE,
    EnvOption,
    ExecutorOption,
    FailFastOption,
    PythonOption,
    QueueOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    StepsFrom,
    StepsOnly,
    StepsUntil,
    StoreOption,
    UnsandboxedOption,
    console,
    executor_name,
    find_store,
    find_writable_store,
    option_words,
    parse_settings,
    queue_timeout,
    say,
    store_option,
    typed_command,
)
from workflows.coordinator import Coordinator
from workflows.copies import local_copy
from workflows.display import Display
from workflows.driver import Options
from workflows.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNSCHEDULABLE
from workflows.lease import HEARTBEAT_S, STALE_AFTER_S, find_holder
from workflows.live.writer import LiveReport
from workflows.plan import Plan
from workflows.selection import selection, selection_words
from workflows.state import StepState
from workflows.step import load_stage
from workflows.store import RunPlace, Store
from workflows.submit import last_submission
from workflows.summary import what_was_left_out

_WITHIN = "auto"
"""The address of the cluster that this machine is part of."""
_WITH_TRACEBACK = ("code", "transient", "infra")
"""Classes of errors that their message alone may not explain."""


def run(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - as above
    store: StoreOption = DEFAULT_STORE,
    executor: ExecutorOption = runs.DEFAULT_EXECUTOR,
    run_id: Annotated[
        str | None,
        typer.Option("--run-id", help="Name of the run; made up by default. One that exists is gone on with."),
    ] = None,
    from_: StepsFrom = [],  # noqa: B006 - as above
    until: StepsUntil = [],  # noqa: B006 - as above
    only: StepsOnly = [],  # noqa: B006 - as above
    queue_timeout_s: QueueOption = None,
    fail_fast: FailFastOption = False,
    allow_unsandboxed: UnsandboxedOption = False,
) -> None:
    """Run a recipe; steps whose output exists are not run again."""
    place = find_writable_store(store)
    name = executor_name(executor)
    if allow_unsandboxed:
        settings = [*settings, *runs.permission(runs.configured(recipe, parse_settings(settings)).steps)]
    plan = runs.plan_recipe(recipe, parse_settings(settings))
    selected = selection(plan, place, from_, until, only)
    made = runs.create_run(place, plan, name, run_id, settings, typed_command())
    plan = runs.frozen_plan(made)
    _warn(*runs.advice(plan), runs.code_change(made), *runs.crowding(plan))
    _drive(place, made, plan, name, Options(queue_timeout(queue_timeout_s), fail_fast, selected=selected))


def resume(
    run_id: RunArgument,
    store: StoreOption = DEFAULT_STORE,
    address: Annotated[
        str,
        typer.Option(
            "--address", help="http://HOST:8265 submits a job to that cluster; auto, within a cluster, runs on it."
        ),
    ] = "",
    settings: SetOption = [],  # noqa: B006 - as above
    accept_drift: Annotated[
        list[str],
        typer.Option("--accept-drift", metavar="STEP", help="Reuse a committed step, although it would now differ."),
    ] = [],  # noqa: B006 - as above
    rebuild: Annotated[
        list[str],
        typer.Option("--rebuild", metavar="STEP", help="Make a step anew, and all that depends on it."),
    ] = [],  # noqa: B006 - as above
    from_: StepsFrom = [],  # noqa: B006 - as above
    until: StepsUntil = [],  # noqa: B006 - as above
    only: StepsOnly = [],  # noqa: B006 - as above
    queue_timeout_s: QueueOption = None,
    fail_fast: FailFastOption = False,
    python: PythonOption = "",
    env: EnvOption = [],  # noqa: B006 - as above
    allow_unsandboxed: UnsandboxedOption = False,
) -> None:
    """Go on with a run that failed, was stopped or was killed: here, or with --address on a cluster.

    --set changes how it runs (workers, micro batch), never what comes out.
    """
    find_store(store).run(run_id)  # before a store is made
    place = find_writable_store(store)
    run = place.run(run_id)
    if (python or env) and address in ("", _WITHIN):
        option = "--env" if env else "--python"
        raise UserError(f"{option} is for a job on a cluster: add --address http://HOST:8265, or leave {option} out")
    if address == _WITHIN:
        wait_until_free(run)
    if allow_unsandboxed:
        settings = [*settings, *runs.permission(runs.frozen_plan(run).steps)]
    wishes = Wishes(parse_settings(settings), tuple(accept_drift), tuple(rebuild))
    amendment = prepare(place, run, wishes, runs.command_of(run, settings) + store_option(place))
    plan = amendment.plan
    selected = selection(plan, place, from_, until, only)
    amend(place, run, amendment, typed_command())
    _warn(runs.code_change(run), *([] if address else runs.crowding(plan)))
    if address and address != _WITHIN:
        from workflows.commands.submitting import hand_over

        words = [*selection_words(from_, until, only), *option_words(queue_timeout_s, fail_fast)]
        hand_over(place, run, Jobs(address), python, env, words)
        return
    if not address and (job := last_submission(run)) is not None:
        say(f"warning: the run was handed over to {job.address} before and goes on on this machine now, not there")
    options = Options(queue_timeout(queue_timeout_s), fail_fast, is_wanted_again=address != _WITHIN, selected=selected)
    _drive(place, run, plan, runs.frozen_executor(run), options, address)


def _warn(*lines: str) -> None:
    for line in filter(None, lines):
        say(f"warning: {line}")


def wait_until_free(run: RunPlace) -> None:
    """Wait for the lease of an attempt whose node is gone to become stale; one that is alive keeps it."""
    deadline = time.monotonic() + STALE_AFTER_S + HEARTBEAT_S
    while (holder := find_holder(run.lease_dir)) is not None and not holder.is_free:
        if time.monotonic() >= deadline:
            return  # whoever tries to take the lease now says who has it
        console.print(f"waiting: {holder}", highlight=False, markup=False, soft_wrap=True)
        time.sleep(HEARTBEAT_S / 2)


def _drive(
    store: Store, run: RunPlace, plan: Plan, executor: runs.ExecutorName, options: Options, address: str = ""
) -> None:
    _print_outcome(store, run, *drive(store, run, plan, executor, options, address))


def drive(
    store: Store, run: RunPlace, plan: Plan, executor: runs.ExecutorName, options: Options, address: str = ""
) -> tuple[list[StepState], str]:
    """Work on a run until its steps are over, in sight of the user; where they stand, and the run as a whole."""
    with Display(console, run.run_id) as display, LiveReport(store, run, plan) as page:

        def changed(states: list[StepState]) -> None:
            display.update(states)
            page.update(states)

        make = runs.executor_factory(executor, plan, address)
        about = {"executor": executor, "address": address, "job": os.environ.get("DLM_JOB_ID", "")}
        coordinator = Coordinator(store, run, plan, make, changed, options, **about)
        if not console.is_terminal:
            console.print(f"run {run.run_id}", highlight=False)
        with _stop_on_signal(coordinator):
            states = coordinator.run()
    if page.problem:
        say(page.problem)
    return states, coordinator.status


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
        first = "stages save first" if self._coordinator.is_at_work else "no step runs yet"
        with suppress(OSError):  # of a terminal that is gone
            say(f"stopping: {first}; interrupt again to stop at once")

    def __exit__(self, *details: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _print_outcome(store: Store, run: RunPlace, states: list[StepState], status: str) -> None:
    for state in states:
        if state.status == "failed" and state.failure is not None:
            is_gang = load_stage(state.step.stage).kind == "gang"
            where = f" on rank {state.failure.rank}" if is_gang and state.failure.traceback else ""
            say(f"\n{state.step.name} failed{where}: {state.failure.message}")
            if state.failure.error_class in _WITH_TRACEBACK and state.failure.type != CorruptionError.__name__:
                say(f"logs: {run.directory / 'work'}\n{state.failure.traceback}")
    if status == "failed":
        unschedulable = all(
            s.failure is None or s.failure.error_class == "unschedulable" for s in states if s.status == "failed"
        )
        where = store_option(store)
        say("\nwhat was finished is kept")
        say(f"with the same data and settings: dlm resume {run.run_id}{where}")
        say(f"with other data or settings:     {runs.command_of(run)}{where} [--set PATH=VALUE]")
        raise typer.Exit(EXIT_UNSCHEDULABLE if unschedulable else EXIT_FAILED)
    if status in ("stopped", "cancelled"):
        say(f"{status}; go on with: dlm resume {run.run_id}{store_option(store)}")
        raise typer.Exit(EXIT_INTERRUPTED)
    if status == "partial":
        left_out = [state.step.name for state in states if state.status == "skipped"]
        told = what_was_left_out(left_out, len(states))
        say(f"partial: {told}; go on with: dlm resume {run.run_id}{store_option(store)}")
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
    if "tasks" in outputs:
        tasks = read_json(outputs["tasks"] / "results.json")["tasks"]
        figures += [(name, _first_figure(found)) for name, found in tasks.items()]
        figures.append(("all figures of tasks", str(local_copy(outputs["tasks"]) / "results.json")))
    if "pretrain" in outputs:
        stats = read_json(outputs["pretrain"] / "manifest.json")["stats"]
        if stats["tokens_per_s"] is not None:
            figures.append(("training speed", f"{stats['tokens_per_s']:,.0f} tokens/s"))
    if "report" in outputs:
        figures.append(("report", str(local_copy(outputs["report"]) / "report.html")))
    console.print()
    for label, value in figures:
        console.print(f"{label:<21} {value}", highlight=False, markup=False, soft_wrap=True)


def _first_figure(task: Mapping[str, Any]) -> str:
    """What a task is about, with its interval, and how many questions it is from."""
    left_out = f", {task['num_failed']:,} left out" if task["num_failed"] else ""
    asked = f"{task['n']:,} {'question' if task['n'] == 1 else 'questions'}{left_out}"
    if not task["metrics"]:
        return f"no figure: {asked}"
    name, row = next(iter(task["metrics"].items()))
    interval = "" if row["interval"] is None else " ({:.4f} to {:.4f})".format(*row["interval"])
    return f"{name} {row['value']:.4f}{interval} {row['unit']}, {asked}"
