"""Commands about what can be run: recipes, models, plans."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from dlm_core.models.presets import PRESETS
from pipeline.config import flatten, to_json
from pipeline.errors import UserError
from workflows import listings, runs
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    RecipeArgument,
    SetOption,
    StoreOption,
    console,
    find_store,
    find_writable_store,
    parse_settings,
    print_json,
    say,
    store_option,
    typed_command,
)
from workflows.plan import Action, explain
from workflows.recipes import RECIPES
from workflows.report.text import scaled


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes."""
    workflows = [make() for make in RECIPES.values()]
    if as_json:
        print_json([listings.recipe(workflow) for workflow in workflows])
        return
    for workflow in workflows:
        console.print(f"[bold]{workflow.name}[/bold]  {workflow.summary}", highlight=False)


def models(as_json: JsonOption = False) -> None:
    """List the sizes of published models and what a token costs in training, with half of all positions masked.

    Active are the parameters that one token's logits pass through: some experts, the head, but no embedding.
    """
    rows = [listings.model(name, preset) for name, preset in PRESETS.items()]
    if as_json:
        print_json(rows)
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


def plan(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody changes it
    store: StoreOption = DEFAULT_STORE,
    show_settings: Annotated[bool, typer.Option("--settings", help="Print every setting and its value.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build the model without numbers; memory, operations and hours on GPUs.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="For --dry-run: kind of GPU, or its memory, as 48GB; h100 by default.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="For --dry-run: share of the GPU's peak; 0.35 by default.")] = None,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Print the generated DeepSpeed configuration.")
    ] = False,
    show_diff: Annotated[
        bool, typer.Option("--diff", help="Print every field in which a step differs from the nearest that was made.")
    ] = False,
    freeze: Annotated[
        str | None,
        typer.Option(
            "--freeze",
            metavar="RUN",
            help="Write the plan into the store as a run of this name, which a RayJob or a Slurm job then begins.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would do and why, without doing it."""
    if dry_run + deepspeed + show_settings + show_diff + (freeze is not None) > 1:
        raise UserError(
            "--dry-run, --deepspeed, --settings, --diff and --freeze each do something else; give one of them"
        )
    idle = [name for name, value in (("--gpu", gpu), ("--mfu", mfu)) if value is not None and not dry_run]
    if idle:
        options, have = " and ".join(idle), "have" if len(idle) > 1 else "has"
        raise UserError(f"{options} {have} no effect without --dry-run; add --dry-run, or leave {options} out")
    if show_settings:
        _print_settings(runs.merged_values(recipe, parse_settings(settings)), as_json)
    plan = runs.plan_recipe(recipe, parse_settings(settings))
    if show_settings:
        return
    for line in runs.advice(plan):
        say(f"warning: {line}")
    if dry_run or deepspeed:
        from workflows import sizing

        if deepspeed:
            print_json(sizing.deepspeed_configs(plan))
        else:
            sized = sizing.dry_run(plan, gpu or sizing.DEFAULT_GPU, sizing.DEFAULT_MFU if mfu is None else mfu)
            if as_json:
                print_json([sizing.as_json(one) for one in sized])
            else:
                sizing.print_sizings(console, sized)
        return
    if freeze is not None:
        place = find_writable_store(store)
        is_new = not (place.run_place(freeze).directory / "run.json").exists()
        runs.create_run(place, plan, "ray", freeze, settings, typed_command())
        say(
            f"run {freeze} is written down, and nothing works on it yet"
            if is_new
            else f"run {freeze} was written down before, with this plan: dlm status {freeze}{store_option(place)}"
        )
    actions = explain(plan, find_store(store))
    if as_json:
        print_json(actions)
        return
    if show_diff:
        _print_changes(actions)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", "action", "why", "address"):
        table.add_column(column, no_wrap=column in ("step", "action"), overflow="fold")
    for action in actions:
        style = "green" if action.action == "cached" else "bold cyan"
        table.add_row(action.step, f"[{style}]{action.action}[/]", action.reason, action.fingerprint[:12])
    console.print(table)


def _print_settings(values: dict[str, Any], as_json: bool) -> None:
    """As they would be set, also where they do not fit each other: the error then comes after them."""
    flat = flatten(values)
    if as_json:
        print_json(flat)
        return
    for path, value in flat.items():
        print(f"{path}={json.dumps(value)}")


def _print_changes(actions: list[Action]) -> None:
    for action in actions:
        print(f"{action.step}: {action.action}, {action.reason}")
        for field, (old, new) in action.changes.items():
            print(f"  {field}: {json.dumps(to_json(old))} -> {json.dumps(to_json(new))}")
