"""Film strips: how a sample emerged from masks, one row a frame."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from workflows.report.text import plain

_LINE_END = "<b>⏎</b>"
_MASK = "<i></i>"

Frame = Sequence[str | None]
"""Piece of text at each position, None where it is still masked."""


def sample_strips(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each sample its strip and its text."""
    return [
        f'<div class="sample"><h3>Sample {number}</h3>{_prompt(sample)}{film_strip(sample["steps"], sample["frames"])}'
        f"<details><summary>Text with its line ends</summary><pre>{plain(sample['text'])}</pre></details></div>"
        for number, sample in enumerate(samples, start=1)
    ]


def _prompt(sample: Mapping[str, Any]) -> str:
    return f'<p class="note">Prompt: {plain(sample["prompt"])}</p>' if "prompt" in sample else ""


def film_strip(steps: Sequence[int], frames: Sequence[Frame]) -> str:
    """Rows of frames; what the row above still had masked is marked, in the first row nothing."""
    rows: list[str] = []
    before: Frame = frames[0] if frames else []
    for step, frame in zip(steps, frames, strict=True):
        rows.append(f"<dt>step {step}</dt><dd>{_frame(frame, before)}</dd>")
        before = frame
    return f'<dl class="film">{"".join(rows)}</dl>'


def _frame(frame: Frame, before: Frame) -> str:
    """One frame as runs of masked, new and old pieces."""
    parts: list[str] = []
    states = [
        "masked" if now is None else "new" if old is None else "old" for now, old in zip(frame, before, strict=True)
    ]
    for state, run in groupby(zip(states, frame, strict=True), key=lambda pair: pair[0]):
        pieces = [piece for _, piece in run]
        if state == "masked":
            parts.append(_MASK * len(pieces))
            continue
        content = plain("".join(piece or "" for piece in pieces)).replace("\n", _LINE_END)
        parts.append(f"<mark>{content}</mark>" if state == "new" else content)
    return "".join(parts)
