"""What a shell offers after Tab: run ids, recipes, steps.

Nothing is raised here: a message would land in the line that is being typed.
"""

import os

import typer

from pipeline.errors import CorruptionError, UserError
from workflows import runs
from workflows.recipes import RECIPES, load_recipe
from workflows.store import Store, open_store

DEFAULT_STORE = "dlm-store"
_MOST = 100


def complete_runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """The newest runs of the store that is meant."""
    try:
        return [run.run_id for run in _store(ctx).runs() if run.run_id.startswith(incomplete)][:_MOST]
    except (CorruptionError, UserError, OSError):
        return []


def complete_recipes(incomplete: str) -> list[str]:
    """The recipes that come with the program."""
    return [name for name in RECIPES if name.startswith(incomplete)]


def complete_runs_and_recipes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Both."""
    return complete_recipes(incomplete) + complete_runs(ctx, incomplete)


def complete_steps(ctx: typer.Context, incomplete: str) -> list[str]:
    """The steps of the run or recipe that was named before, or of the newest run."""
    name = ctx.params.get("what") or ctx.params.get("run_id") or ""
    try:
        if name in RECIPES:
            steps = [step.name for step in load_recipe(name).steps]
        else:
            steps = [step.name for step in runs.frozen_plan(runs.require_run_id(_store(ctx), name)).steps]
    except (CorruptionError, UserError, OSError):
        return []
    return [step for step in steps if step.startswith(incomplete)]


def _store(ctx: typer.Context) -> Store:
    return open_store(ctx.params.get("store") or os.environ.get("DLM_STORE") or DEFAULT_STORE)
