"""Recipes: values only.  A recipe is a function that returns a Workflow."""

import difflib
from collections.abc import Callable

from pipeline.errors import UserError
from workflows.recipes.bd3lm import bd3lm_owt, bd3lm_tiny
from workflows.recipes.llada import llada_8b, llada_tiny
from workflows.recipes.llada2 import llada2_mini, llada2_tiny
from workflows.recipes.llada_moe import llada_moe_7b, llada_moe_tiny
from workflows.recipes.mdlm import ar_tiny, mdlm_lm1b, mdlm_owt, mdlm_tiny
from workflows.recipes.quickstart import quickstart
from workflows.step import Workflow

_MAKERS: tuple[Callable[[], Workflow], ...] = (
    quickstart,
    ar_tiny,
    mdlm_tiny,
    mdlm_lm1b,
    mdlm_owt,
    bd3lm_tiny,
    bd3lm_owt,
    llada_tiny,
    llada_8b,
    llada_moe_tiny,
    llada_moe_7b,
    llada2_tiny,
    llada2_mini,
)
RECIPES: dict[str, Callable[[], Workflow]] = {make.__name__: make for make in _MAKERS}


def load_recipe(name: str) -> Workflow:
    """The workflow of a recipe; UserError with the known names otherwise."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the recipes are: {', '.join(RECIPES)}"
        raise UserError(f"there is no recipe {name!r}; {hint}")
    return RECIPES[name]()
