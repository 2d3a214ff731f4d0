"""Tasks: questions from files, asked of a model."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from pipeline.config import execution
from pipeline.errors import UserError
from pipeline.inference.likelihood import LikelihoodConfig
from pipeline.inference.places import check_places
from pipeline.stage import Stage

Kind = Literal["multiple_choice", "text"]
TAKES: Mapping[Kind, tuple[str, ...]] = {
    "multiple_choice": ("file", "limit"),
    "text": ("file", "limit"),
}
"""The settings that each kind has a use for."""
BY_LIKELIHOOD: tuple[Kind, ...] = ("multiple_choice", "text")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_SUFFIXES = (".jsonl", ".jsonl.gz")


def _absolute(value: Any) -> Any:
    """A path made absolute, so that a plan means the same from anywhere."""
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) and value else value


@dataclass(frozen=True)
class TaskConfig:
    """One task.  pipeline/README.md has the formats of the files.

    multiple_choice: which of several answers does the model hold to be the likeliest?  text: how likely are texts?
    """

    kind: Kind
    file: Annotated[str, BeforeValidator(_absolute)] = execution("")
    """.jsonl or .jsonl.gz, a question a line; it is identified by its bytes, wherever it lies."""
    limit: int | None = None
    """Only so many questions, from the beginning of the file; null: all."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):  # asked here too: recipes are not parsed
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        given = [f.name for f in fields(self) if f.name != "kind" and getattr(self, f.name) not in (None, "")]
        if idle := [name for name in given if name not in TAKES[self.kind]]:
            raise ValueError(
                f"{idle[0]} is {getattr(self, idle[0])!r}, but kind {self.kind!r} has no use for it; it takes "
                f"{', '.join(TAKES[self.kind])}"
            )
        if "file" in TAKES[self.kind] and not self.file.endswith(_SUFFIXES):
            raise ValueError(f"file is {self.file!r}; kind {self.kind!r} needs a file of {' or '.join(_SUFFIXES)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1, or null for all questions")


@dataclass(frozen=True)
class TasksConfig:
    """The tasks of one model."""

    tasks: dict[str, TaskConfig] = field(default_factory=dict[str, TaskConfig])
    """By name.  Empty: they are to be given before a run."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """How answers and texts are scored."""
    num_shards: int = execution(16)
    """About so many pieces of like cost that the questions are cut into; no effect on the masks."""
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    """auto: a GPU where there is one."""
    gpus: float = execution(0.0)
    """GPUs that a piece waits for, up to 1; parts of one share it.  0: it takes what is where it runs."""
    track: bool = execution(True)
    """Results go to Weights & Biases too, online if you are logged in, offline otherwise."""

    def __post_init__(self) -> None:
        if unusable := [name for name in self.tasks if not _NAME.fullmatch(name)]:
            raise ValueError(
                f"the task name {unusable[0]!r} cannot stand in file names; a name is a letter and up to 63 letters, "
                "digits and underscores"
            )
        if self.num_shards < 1:
            raise ValueError(f"num_shards is {self.num_shards}; it must be at least 1")
        check_places(self.device, self.gpus)
        _refuse_idle_likelihood(self)


def _refuse_idle_likelihood(config: TasksConfig) -> None:
    """ValueError for settings of the likelihood that no task heeds."""
    if not config.tasks:
        return
    if config.likelihood.guidance and (texts := [n for n, task in config.tasks.items() if task.kind == "text"]):
        raise ValueError(
            f"likelihood.guidance is {config.likelihood.guidance}, but {texts[0]!r} is of kind 'text', which has no "
            "context to be guided by; put it into a step of its own"
        )


def check_ready(config: TasksConfig, step: str) -> None:
    """UserError if there is no task yet: a plan can be looked at without, but not run."""
    if not config.tasks:
        raise UserError(
            f"{step}.tasks is empty; give tasks, as in --set "
            f'{step}.tasks.NAME=\'{{"kind": "multiple_choice", "file": "PATH.jsonl"}}\''
        )


STAGE = Stage(
    name="tasks",
    kind="map",
    config=TasksConfig,
    module="pipeline.tasks.run",
    inputs=("weights", "tokenizer"),
    external="pipeline.tasks.questions:external_data",
    ready=check_ready,
)
