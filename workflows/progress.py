"""How far a step has come and how long it takes, in the same words on the terminal, in dlm status and on every page."""

from collections.abc import Mapping
from typing import Any

_NOT_SHOWN = ("resumed_at",)
"""Figures that are told in a line of their own, once."""


def duration(seconds: float) -> str:
    """Seconds as 8.1s, 2m05s or 1h02m, rounded."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    if (whole := round(seconds)) < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m"


def progress_words(progress: Mapping[str, Any], left_s: float | None = None) -> list[str]:
    """What a worker reported last, in parts, with the time left if it is known; ``starting`` if it has not."""
    if not progress:
        return ["starting"]
    done, total, figures = progress.get("done", 0), progress.get("total", 0), progress.get("figures", {})
    parts = [f"{done:,}/{total:,}"] if total else []
    if "tokens_per_s" in figures:  # a training
        parts = [f"{done:,}/{total:,} steps", f"loss {figures['loss']:.3f}" if "loss" in figures else "loss not finite"]
        parts.append(f"{_scaled(figures['tokens_per_s'])} tokens/s")
    else:
        parts += [f"{name} {_figure(value)}" for name, value in figures.items() if name not in _NOT_SHOWN]
    if "wanted_workers" in progress:
        parts.append(f"{progress['workers']} of {progress['wanted_workers']} workers")
    return parts if left_s is None else [*parts, f"{duration(left_s)} left"]


def seconds_left(progress: Mapping[str, Any], first: tuple[float, float] | None) -> float | None:
    """Time until it is done, at the rate since ``first``: time and count of the first report of this attempt."""
    done, total = progress.get("done", 0), progress.get("total", 0)
    if not total or first is None or done <= first[1]:
        return None
    return (total - done) * max(1e-9, progress["time"] - first[0]) / (done - first[1])


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scaled(value: float) -> str:
    """A rate in few letters: 980, 12.3k, 4.56M."""
    for factor, prefix in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}" if value < 999.5 * factor else f"{value / factor:.0f}{prefix}"
    return f"{value:.0f}"
