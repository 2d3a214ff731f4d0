"""The vocabulary of a workflow: steps, and the graph they form by naming each other's outputs."""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import flatten, to_json
from pipeline.errors import UserError
from pipeline.stage import Stage


@dataclass(frozen=True)
class Step:
    """One stage with its configuration, and where its inputs come from."""

    name: str
    stage: str
    """Package of the stage, such as "pipeline.corpus"."""
    config: Any
    """A frozen dataclass of the type that the stage declares."""
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Input of the stage -> name of the step whose output it is."""
    optional: bool = False
    """Left out of a run as long as what it leaves to its user, or the output of such a step, is not there."""


@dataclass(frozen=True)
class Workflow:
    """A named graph of steps.  Raises ValueError for an unpublished setting that no step has."""

    name: str
    summary: str
    steps: tuple[Step, ...]
    unpublished: tuple[str, ...] = ()
    """Settings such as "pretrain.optimizer.lr" whose values are ours because the work that the recipe follows does not
    say them."""
    deviations: tuple[str, ...] = ()
    """What is done otherwise than in that work, in words."""

    def __post_init__(self) -> None:
        settings = self._settings() if self.unpublished else {}
        for path in self.unpublished:
            if not any(name == path or name.startswith(f"{path}.") for name in settings):
                close = difflib.get_close_matches(path, settings, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"workflow {self.name}: no step has the unpublished setting {path!r}{hint}")

    def unpublished_settings(self) -> dict[str, Any]:
        """Dotted path -> value of every setting that was not published, those of a nested object one by one."""
        return {
            name: value
            for name, value in self._settings().items()
            if any(name == path or name.startswith(f"{path}.") for path in self.unpublished)
        }

    def _settings(self) -> dict[str, Any]:
        return flatten({step.name: to_json(step.config) for step in self.steps})


def load_stage(package: str) -> Stage:
    """The declaration of a stage, without importing its work; UserError if there is none."""
    name = f"{package}.config"
    try:
        stage = getattr(importlib.import_module(name), "STAGE", None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"stage {package!r}: there is no module {error.name!r}, neither installed nor in the current directory "
            f"{Path.cwd()}; go to the directory that has it, or install it"
        ) from None
    if not isinstance(stage, Stage):
        raise UserError(f"stage {package!r}: {name} declares no STAGE = Stage(...); see pipeline/stage.py")
    return stage
