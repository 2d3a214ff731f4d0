"""The vocabulary of a workflow: steps, and the graph they form by naming each other's outputs."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Workflow:
    """A named graph of steps."""

    name: str
    summary: str
    steps: tuple[Step, ...]


def load_stage(package: str) -> Stage:
    """The declaration of a stage, without importing its work."""
    return importlib.import_module(f"{package}.config").STAGE
