"""Tasks: questions from files, asked of a model."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from pipeline.config import diff, execution, identity
from pipeline.errors import NotGivenError, UserError
from pipeline.inference.likelihood import LikelihoodConfig
from pipeline.inference.places import check_places
from pipeline.inference.sampling import SamplingConfig
from pipeline.sandbox.humaneval import STOP_WORDS
from pipeline.stage import Stage

Kind = Literal["multiple_choice", "text", "match", "infill", "code", "samples"]
TAKES: Mapping[Kind, tuple[str, ...]] = {
    "multiple_choice": ("file", "limit"),
    "text": ("file", "limit"),
    "match": ("file", "limit", "length", "pattern", "stop", "sampling"),
    "infill": ("file", "limit", "sampling"),
    "code": ("file", "limit", "length", "stop", "num_samples", "ks", "sampling"),
    "samples": ("num_samples", "length", "sampling"),
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
    match: is the answer that it writes the right one?  infill: does it fill gaps as they were?  code: do the programs
    that it writes pass their checks?  samples: how likely and how varied is what it writes from nothing?
    null: the default of the kind.
    """

    kind: Kind
    file: Annotated[str, BeforeValidator(_absolute)] = execution("")
    """.jsonl or .jsonl.gz, a question a line; it is identified by its bytes, wherever it lies."""
    limit: int | None = None
    """Only so many questions, from the beginning of the file; null: all."""
    length: int | None = None
    """Tokens that are written: 128 by default, or half a row if that is less; of samples all that there is room for."""
    num_samples: int | None = None
    """Programs for each problem, 1 by default; or samples, 64 by default."""
    ks: tuple[int, ...] | None = None
    """pass@k is told for these k, each at most num_samples; 1 by default."""
    pattern: str | None = None
    """A regular expression that takes the answer out of what was written, and out of the right one: its first group, or
    all of the match.  null: everything.  Blanks around it, and commas that group digits, count for nothing."""
    stop: tuple[str, ...] | None = None
    """Texts at which what was written ends; none by default, for programs those of HumanEval."""
    sampling: SamplingConfig | None = None
    """How it is written."""

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
        for name, otherwise in (("limit", "all questions"), ("length", "the default"), ("num_samples", "the default")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or null for {otherwise}")
        if self.kind == "samples" and self.sampling is not None and self.sampling.guidance:
            raise ValueError(
                f"sampling.guidance is {self.sampling.guidance}, but kind 'samples' writes from nothing, which it "
                "could not strengthen; set it to 0"
            )
        self._check_written()

    def _check_written(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is {self.pattern!r}, which is no regular expression: {error}") from None
        if self.stop is not None and "" in self.stop:
            raise ValueError("stop has an empty text, at which everything would end; leave it out")
        if self.ks is not None and not self.ks:
            raise ValueError("ks is empty; give at least one k, or null for pass@1")
        for k in self.value("ks") if self.kind == "code" else ():
            if not 1 <= k <= self.value("num_samples"):
                raise ValueError(
                    f"ks has {k}, but num_samples is {self.value('num_samples')}; k must lie in [1, num_samples]"
                )

    def value(self, name: str) -> Any:
        """A setting, or its default for the kind."""
        given = getattr(self, name)
        return given if given is not None else _DEFAULTS.get((self.kind, name), _DEFAULTS.get(("", name)))


_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("code", "num_samples"): 1,
    ("samples", "num_samples"): 64,
    ("", "ks"): (1,),
    ("", "stop"): (),
    ("code", "stop"): STOP_WORDS,
    ("", "sampling"): SamplingConfig(),
}


@dataclass(frozen=True)
class TasksConfig:
    """The tasks of one model."""

    tasks: dict[str, TaskConfig] = field(default_factory=dict[str, TaskConfig])
    """By name.  Empty: they are to be given before a run."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """How answers and texts are scored."""
    allow_unsandboxed: bool = execution(False)
    """Programs are run where the kernel allows no namespaces too, with rlimits alone (--allow-unsandboxed)."""
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
        if self.allow_unsandboxed and self.tasks and not self.runs_programs:
            raise ValueError("allow_unsandboxed is true, but no task is of kind 'code', whose programs it is for")

    @property
    def runs_programs(self) -> bool:
        """Whether what a model wrote is run."""
        return any(task.kind == "code" for task in self.tasks.values())


def _refuse_idle_likelihood(config: TasksConfig) -> None:
    """ValueError for settings of the likelihood that no task heeds."""
    if not config.tasks:
        return
    kinds = {task.kind for task in config.tasks.values()}
    if kinds.isdisjoint(BY_LIKELIHOOD) and (given := diff(identity(LikelihoodConfig()), identity(config.likelihood))):
        name, (_, value) = next(iter(given.items()))
        raise ValueError(f"likelihood.{name} is {value}, but no task is scored by likelihood; leave it out")
    if config.likelihood.guidance and (texts := [n for n, task in config.tasks.items() if task.kind == "text"]):
        raise ValueError(
            f"likelihood.guidance is {config.likelihood.guidance}, but {texts[0]!r} is of kind 'text', which has no "
            "context to be guided by; put it into a step of its own"
        )


def check_ready(config: TasksConfig, step: str) -> None:
    """NotGivenError if there is no task yet: a plan can be looked at without, but not run."""
    if not config.tasks:
        raise NotGivenError(
            f"{step}.tasks is empty; give tasks, as in --set "
            f'{step}.tasks.NAME=\'{{"kind": "multiple_choice", "file": "PATH.jsonl"}}\''
        )


def check_scorer(config: TasksConfig, upstream: Mapping[str, Any], step: str) -> None:
    """UserError for a scorer that nothing is scored with, or that is seen not to be one before it is there."""
    if "scorer_tokenizer" in upstream and "scorer" not in upstream:
        raise UserError(f'{step} has the input "scorer_tokenizer" and no "scorer" that it could belong to; give both')
    if "scorer" not in upstream:
        return
    if all(task.kind != "samples" for task in config.tasks.values()):
        raise UserError(f'{step} has a "scorer", but no task of kind "samples" that it would score; leave it out')
    trained = upstream.get("scorer.pretrain") or {}
    objective = trained.get("objective", {}).get("kind", "autoregressive")
    if objective != "autoregressive":
        raise UserError(not_exact(step, objective))


def not_exact(step: str, objective: str) -> str:
    """What is said of a scorer that gives bounds."""
    return (
        f'the "scorer" of {step} was trained for {objective}, which gives bounds; what samples cost is told exactly, '
        "by a model of next tokens (autoregressive)"
    )


STAGE = Stage(
    name="tasks",
    kind="map",
    config=TasksConfig,
    module="pipeline.tasks.run",
    inputs=("weights", "tokenizer"),
    optional_inputs=("scorer", "scorer_tokenizer"),
    external="pipeline.tasks.questions:external_data",
    code_version=4,
    check=check_scorer,
    ready=check_ready,
)
