"""Recipes: values only.  A recipe is a function that returns a Workflow."""

import difflib
from collections.abc import Callable

from pipeline.errors import UserError
from workflows.own_recipe import own_recipe
from workflows.recipes.ask import ask
from workflows.recipes.bd3lm import bd3lm_owt, bd3lm_tiny
from workflows.recipes.dream import dream_7b, dream_tiny
from workflows.recipes.llada import llada_8b, llada_tiny
from workflows.recipes.llada2 import llada2_mini, llada2_tiny
from workflows.recipes.llada_moe import llada_moe_7b, llada_moe_tiny
from workflows.recipes.mdlm import ar_tiny, mdlm_lm1b, mdlm_owt, mdlm_tiny
from workflows.recipes.quickstart import quickstart
from workflows.recipes.smollm2 import smollm2_to_diffusion
from workflows.step import Workflow

_MAKERS: tuple[Callable[[], Workflow], ...] = (
    quickstart,
    ar_tiny,
    mdlm_tiny,
    mdlm_lm1b,
    mdlm_owt,
    bd3lm_tiny,
    bd3lm_owt,
    dream_tiny,
    dream_7b,
    smollm2_to_diffusion,
    llada_tiny,
    llada_8b,
    llada_moe_tiny,
    llada_moe_7b,
    llada2_tiny,
    llada2_mini,
    ask,
)
RECIPES: dict[str, Callable[[], Workflow]] = {make.__name__: make for make in _MAKERS}


def load_recipe(name: str) -> Workflow:
    """The workflow of a recipe, ours by its name or anybody's as ``module:function``; UserError otherwise."""
    if ":" in name:
        return own_recipe(name)
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}? One" if close else f"the recipes are: {', '.join(RECIPES)}; one"
        raise UserError(f"there is no recipe {name!r}; {hint} of your own is given as module:function")
    return RECIPES[name]()
