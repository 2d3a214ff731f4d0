"""Recipes: values only.  A recipe is a function that returns a Workflow."""

import difflib
from collections.abc import Callable

from pipeline.errors import UserError
from workflows.recipes.quickstart import quickstart
from workflows.step import Workflow

RECIPES: dict[str, Callable[[], Workflow]] = {"quickstart": quickstart}


def load_recipe(name: str) -> Workflow:
    """The workflow of a recipe; UserError with the known names otherwise."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the recipes are: {', '.join(RECIPES)}"
        raise UserError(f"there is no recipe {name!r}; {hint}")
    return RECIPES[name]()
