"""What a report is about, read from committed artifacts.  Rendering happens elsewhere."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifact import Manifest, checked, open_artifact, read_json
from pipeline.errors import CorruptionError
from workflows.report.config import STAGE


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows; what belongs to a missing artifact is empty."""

    title: str
    manifests: Mapping[str, Manifest]
    """Name of each artifact that is there -> its manifest."""
    missing: tuple[str, ...] = ()
    """Names of artifacts that a whole report needs and that are not there."""
    metrics: tuple[dict[str, Any], ...] = ()
    """One record a training step."""
    results: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The evaluation's results.json."""
    samples: tuple[dict[str, Any], ...] = ()
    """One record a sample."""

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


INPUTS = (*STAGE.inputs, *STAGE.optional_inputs)


def collect(title: str, artifacts: Mapping[str, Path], wanted: Collection[str] = INPUTS) -> ReportData:
    """Read what the report needs, every file verified before it is parsed; ``wanted`` is all that the run makes."""
    return ReportData(
        title=title,
        manifests={name: open_artifact(path) for name, path in artifacts.items()},
        missing=tuple(name for name in INPUTS if name in wanted and name not in artifacts),
        metrics=_lines(artifacts, "pretrain", "metrics.jsonl"),
        results=read_json(checked(artifacts["evaluation"], "results.json")) if "evaluation" in artifacts else {},
        samples=_lines(artifacts, "samples", "samples.jsonl"),
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
