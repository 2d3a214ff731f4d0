"""What a report is about, read from committed artifacts.  Rendering happens elsewhere."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifact import Manifest, checked, open_artifact, read_json
from pipeline.config import from_json
from pipeline.errors import CorruptionError
from pipeline.lineage import tokens_trained
from pipeline.weights import Origin, load_record
from workflows.report.config import STAGE


@dataclass(frozen=True)
class Metrics:
    """What a training measured by step."""

    lines: tuple[dict[str, Any], ...] = ()
    """One record a step, or one every so many."""
    num_steps: int = 0
    """Steps that were measured, whether their records are here or not."""
    num_not_finite: int = 0
    """Of those, without a finite loss."""
    every: int = 1
    """Of so many steps one is here, and those with a figure that most do not have."""


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows; what belongs to a missing artifact is empty."""

    title: str
    manifests: Mapping[str, Manifest]
    """Name of each artifact that is there -> its manifest."""
    missing: tuple[str, ...] = ()
    """Names of artifacts that a whole report needs and that are not there."""
    metrics: Metrics = Metrics()
    results: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The evaluation's results.json."""
    tasks: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Name of each task -> its table."""
    samples: tuple[dict[str, Any], ...] = ()
    """One record a sample."""
    lineage: tuple[Origin, ...] = ()
    """What happened to the weights, oldest first."""

    def stats(self, name: str) -> Mapping[str, Any]:
        """Stats of an artifact, empty if it is missing."""
        return self.manifests[name].stats if name in self.manifests else {}


class LikelihoodFigures(NamedTuple):
    """Names of an evaluation's figures: a bound is called one."""

    nll: str
    ppl: str
    bpb: str
    is_exact: bool


def likelihood_figures(results: Mapping[str, Any]) -> LikelihoodFigures:
    """Under which names an evaluation's results.json has its likelihood, a bound or exact."""
    if "nll" in results:
        return LikelihoodFigures("nll", "ppl", "bpb", True)
    return LikelihoodFigures("nelbo", "ppl_bound", "bpb_bound", False)


_WEIGHTS = {
    "last": "the last weights",
    "ema": "the running average of the weights (EMA)",
    "average": "the mean of several checkpoints",
}


def weights_evaluated(data: ReportData) -> str:
    """In words, which of a training's weights the figures are of; empty where that is not known."""
    made = data.manifests.get("weights")
    return "" if made is None else _WEIGHTS.get(made.config.get("weights", ""), "")


def tokens_before(stats: Mapping[str, Any]) -> int | None:
    """Tokens that are known to have been trained on before a training; None if it did not begin from given weights."""
    lineage = [from_json(Origin, value) for value in stats.get("lineage", [])]  # absent from earlier versions
    return tokens_trained(lineage) if lineage else None


INPUTS = (*STAGE.inputs, *STAGE.optional_inputs)


def collect(
    title: str, artifacts: Mapping[str, Path], wanted: Collection[str] = INPUTS, *, with_metrics: bool = True
) -> ReportData:
    """Read what the report needs, every file verified before it is parsed; ``wanted`` is all that the run makes."""
    lines = _lines(artifacts, "pretrain", "metrics.jsonl") if with_metrics else ()
    return ReportData(
        title=title,
        manifests={name: open_artifact(path) for name, path in artifacts.items()},
        missing=tuple(name for name in INPUTS if name in wanted and name not in artifacts),
        metrics=Metrics(lines, len(lines), sum(line["loss"] is None for line in lines)),
        results=read_json(checked(artifacts["evaluation"], "results.json")) if "evaluation" in artifacts else {},
        tasks=read_json(checked(artifacts["tasks"], "results.json"))["tasks"] if "tasks" in artifacts else {},
        samples=_lines(artifacts, "samples", "samples.jsonl"),
        lineage=tuple(load_record(artifacts["weights"]).lineage) if "weights" in artifacts else (),
    )


def _lines(artifacts: Mapping[str, Path], name: str, file: str) -> tuple[dict[str, Any], ...]:
    """Records of a JSON Lines file of one artifact, none if the artifact is missing."""
    if name not in artifacts:
        return ()
    path = checked(artifacts[name], file)
    try:
        # Not splitlines(): that also cuts at U+2028 and the like, which JSON allows inside a string.
        return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    except json.JSONDecodeError as error:
        raise CorruptionError(f"{path} is not JSON Lines: {error}") from error
