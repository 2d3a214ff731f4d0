"""A recipe of the user's own, by import path: ``package.module:function``, a function that returns a Workflow."""

import difflib
import importlib
import inspect
import traceback
from pathlib import Path
from types import ModuleType

from pipeline.errors import UserError
from workflows.step import Workflow


def own_recipe(path: str) -> Workflow:
    """Import and call ``module:function``; UserError that says what is wrong with it otherwise."""
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise UserError(f"recipe {path!r} is not of the form package.module:function, as in my_recipes:notes")
    module = _import(path, module_name)
    make = getattr(module, name, None)
    if make is None:
        close = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"did you mean {close[0]}?" if close else "define it there, or name another"
        raise UserError(f"recipe {path!r}: {module.__file__} has no function {name!r}; {hint}")
    if not callable(make):
        raise UserError(f"recipe {path!r}: {name} is {_kind(make)}; it must be a function that returns a Workflow")
    if wanted := _wanted(make):
        raise UserError(f"recipe {path!r}: {name} wants {', '.join(wanted)}; a recipe takes no arguments")
    try:
        workflow = make()
    except Exception as error:
        raise UserError(f"recipe {path!r} failed: {_told(error)}; mend it there") from error
    if not isinstance(workflow, Workflow):
        raise UserError(f"recipe {path!r} returned {_kind(workflow)}; it must return a workflows.step.Workflow")
    return workflow


def _import(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"recipe {path!r} cannot be imported: {_told(error)}; install what is missing") from error
        raise UserError(
            f"recipe {path!r}: there is no module {error.name!r}, neither installed nor in the current directory "
            f"{Path.cwd()}; go to the directory that has it, or install it"
        ) from None
    except Exception as error:
        raise UserError(f"recipe {path!r} cannot be imported: {_told(error)}; mend it there") from error


def _wanted(function: object) -> list[str]:
    """Arguments without which a function cannot be called."""
    assert callable(function)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _kind(value: object) -> str:
    return "nothing" if value is None else f"something of type {type(value).__name__}"


def _told(error: Exception) -> str:
    """An error of the user's code with the place where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
