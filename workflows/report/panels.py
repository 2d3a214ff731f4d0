"""Small charts of what a training measured beside its loss: every figure of its metrics, those of one kind together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workflows.report.chart import Band, Line, Points, Size, line_chart, phase_bands, thin, visible_range
from workflows.report.loss import BOUND, WEIGHTED, drawn_loss, trailing_mean
from workflows.report.svg import Drawing

NUM_T_BINS = 4
"""Bins of t that training tells its loss by."""

_TITLES = {
    "val_nelbo": "Validation NELBO (nats/token)",
    "val_nll": "Validation loss (nats/token)",
    "val_bpb_bound": "Validation bound (bits/byte)",
    "val_bpb": "Validation loss (bits/byte)",
    "loss": WEIGHTED,
    "nelbo": BOUND,
    "ce_t": "Cross-entropy of masked tokens by t (nats/token)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "weight_norm": "Norm of the weights",
    "masked_fraction": "Masked share of the tokens",
    "mask_rate_low": "Lowest mask rate trained on",
    "mask_rate_high": "Highest mask rate trained on",
    "router_balance": "Balance loss of the routers (an even spread gives 1, but 1 is no proof of it)",
    "router_z": "z-loss of the routers",
    "expert_load_max": "Busiest expert's tokens over an even share",
    "expert_load_min": "Idlest expert's tokens over an even share",
    "experts_idle": "Experts without a token",
    "skipped": "Updates refused so far",
    "spike": "Spikes",
    "tokens_per_s": "Tokens a second",
    "mfu": "Model FLOPs utilisation, of the peak",
    "data_wait_s": "Waited for data (s)",
    "checkpoint_stall_s": "Waited for checkpoints (s)",
    "checkpoint_s": "Checkpoints, until published (s)",
    "validation_s": "Validation (s)",
    "peak_resident_bytes": "Most memory of a rank (bytes)",
    "peak_gpu_bytes": "Most memory of a GPU (bytes)",
}
"""What stands first, in this order; any other figure has its own name for a title."""
_NOT_SHOWN = re.compile(r"step|loss|nelbo|tokens|step_s|epochs(_.*)?|.*_se")
"""The x axis, the chart above, what can be told from another figure, and error bars."""
_SMOOTH_ALREADY = ("lr", "weight_norm")
_NUMBERED = re.compile(r"(?P<kind>.*?)_?(?P<mark>L?)(?P<number>\d+)")
_SIZE = Size(width=520.0, height=210.0, left=54.0, right=12.0, top=28.0, bottom=26.0)
_POINTS = 400
_MOST_COLOURS = 6
_SMOOTH_SHARE = 50
"""Of a figure of every step, the smooth line is a mean over this fraction of the training (one over)."""


@dataclass(frozen=True)
class Panel:
    """One small chart."""

    title: str
    drawing: Drawing


def panels(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A chart of every figure in the metrics that is a number; those whose names differ in a number share one."""
    kinds: dict[str, dict[str, str]] = {}
    for key in _figures(metrics):
        match = _NUMBERED.fullmatch(key)
        kind, label = (match["kind"], match["mark"] + match["number"]) if match else (key, "")
        kinds.setdefault(kind, {})[key] = label
    order = sorted(kinds, key=lambda kind: (list(_TITLES).index(kind) if kind in _TITLES else len(_TITLES), kind))
    bands = phase_bands(metrics)
    found = [_panel(kind, kinds[kind], metrics, bands) for kind in order]
    return [panel for panel in found if panel is not None]


def _figures(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for line in metrics for key, value in line.items() if _is_number(value))
    rest = drawn_loss(metrics).rest
    return [key for key in keys if key == rest or not _NOT_SHOWN.fullmatch(key)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _panel(
    kind: str, labels: Mapping[str, str], metrics: Sequence[Mapping[str, Any]], bands: Sequence[Band]
) -> Panel | None:
    by_key = {key: [(line["step"], line[key]) for line in metrics if key in line] for key in labels}
    keys = sorted(labels, key=lambda key: int(labels[key].lstrip("L") or 0))
    if len(keys) == 1:
        points, errors = by_key[keys[0]], _errors(keys[0], metrics)
        lines = _lines_of_one(points, errors, 1 if keys[0] in _SMOOTH_ALREADY else len(points) // _SMOOTH_SHARE)
        title = _TITLES.get(keys[0], keys[0])
    else:
        lines = _lines_of_many(by_key, [(key, _label(kind, labels[key])) for key in keys])
        title = _TITLES.get(kind, kind)
    raw = [y for line in lines if line.css_class == "raw" for _, y in line.points if y is not None]
    whole = [end for line in lines if line.css_class != "raw" for end in _ends(line)]
    if not whole:
        return None
    y_range = visible_range(raw or whole, whole)
    steps = metrics[0]["step"], metrics[-1]["step"]
    drawing = line_chart(lines, [], x_label="", y_label="", y_range=y_range, x_range=steps, bands=bands, size=_SIZE)
    return Panel(title, drawing)


def _errors(key: str, metrics: Sequence[Mapping[str, Any]]) -> dict[float, float] | None:
    """Standard errors by step of a figure that has them."""
    name = next((name for name in (f"{key}_mc_se", f"{key}_se") if any(name in line for line in metrics)), None)
    return {line["step"]: line.get(name) or 0.0 for line in metrics if key in line} if name else None


def _ends(line: Line) -> list[float]:
    """What must be visible of a line: its points, and the ends of their error bars."""
    errors = line.errors or {}
    return [y + sign * errors.get(x, 0.0) for x, y in line.points if y is not None for sign in (-1, 1)]


def _lines_of_one(points: Points, errors: Mapping[float, float] | None, window: int) -> list[Line]:
    """A figure of few steps as it is; of many steps faint, with a mean over it."""
    if errors is not None or window < 2:
        return [Line(thin(points, _POINTS) if errors is None else points, "", "smooth", errors)]
    smooth = _smooth(points, window)
    return [Line(thin(points, 2 * _POINTS), "each step", "raw"), Line(smooth, f"mean of {window}", "smooth")]


def _lines_of_many(by_key: Mapping[str, Points], labelled: Sequence[tuple[str, str]]) -> list[Line]:
    """Figures of one kind, each smooth: in colours, or, if these would not do, all alike."""
    few = len(labelled) <= _MOST_COLOURS
    lines: list[Line] = []
    for place, (key, label) in enumerate(labelled):
        points = _smooth(by_key[key], max(1, len(by_key[key]) // _SMOOTH_SHARE))
        alike = f"each of {len(labelled)}" if place == 0 else ""
        lines.append(Line(points, label if few else alike, f"series series{place}" if few else "many"))
    return lines


def _smooth(points: Points, window: int) -> Points:
    means = trailing_mean([y for _, y in points], window)
    return thin([(x, y) for (x, _), y in zip(points, means, strict=True)], _POINTS)


def _label(kind: str, number: str) -> str:
    if kind == "ce_t":
        return f"t < {(int(number) + 1) / NUM_T_BINS:g}"
    return number.replace("L", "layer ")
