"""What a manifest is made from, read from JSON: a shape, and what one platform has to know beside it."""

import difflib
import json
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cluster.manifests.kuberay import Kubernetes
from cluster.manifests.launcher import Launcher
from cluster.manifests.slurm import Slurm
from cluster.shapes import ClusterShape, Head, WorkerGroup


@dataclass(frozen=True)
class Request:
    """A shape, and sections for platforms; a manifest is made from its own section alone."""

    shape: ClusterShape
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    launcher: Launcher | None = None
    slurm: Slurm | None = None


_SECTIONS: dict[str, type] = {
    "": Request, "shape": ClusterShape, "kubernetes": Kubernetes, "launcher": Launcher, "slurm": Slurm,
    "shape.head": Head, "shape.workers": WorkerGroup,
}  # fmt: skip
for _kind in _SECTIONS.values():
    _kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
_REQUEST = TypeAdapter(Request)


def read_request(text: str) -> Request:
    """Read a request strictly; ValueError names the path of the field, what was found and what is allowed."""
    try:
        values = json.loads(text, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    return make_request(values)


def make_request(values: Any) -> Request:
    """The same, of JSON values."""
    try:
        return _REQUEST.validate_json(json.dumps(values))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(cast("dict[str, Any]", item)) for item in error.errors())) from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} stands twice in one object: leave one of them out")
        found[key] = value
    return found


def _explain(item: dict[str, Any]) -> str:
    path = ".".join(map(str, item["loc"]))
    if item["type"] == "unexpected_keyword_argument":
        section = ".".join(part for part in item["loc"][:-1] if isinstance(part, str))
        names = list(_SECTIONS[section].__dataclass_fields__)
        close = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
        return f"unknown setting {path}; " + (f"did you mean {close[0]}?" if close else f"allowed: {', '.join(names)}")
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{path} is missing"
    return f"{path} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
