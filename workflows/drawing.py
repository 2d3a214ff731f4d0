"""Samples of ``dlm generate``, drawn by an open model: importing this imports torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from pipeline.inference.filling import Canvas, Filled, fill, patterned, prompted, room_behind
from pipeline.inference.model import OpenModel
from pipeline.inference.sampling import SamplingConfig
from workflows.generation import Sample
from workflows.report.film_page import Film
from workflows.requests import parse_pattern


def canvas_of(model: OpenModel, sample: Sample) -> Canvas:
    """The row that a sample begins as; the pieces of a pattern are encoded each by itself."""
    request = sample.request
    if request.kind == "infill":
        parts = parse_pattern(request.text, request.id or "--infill")
        encoded = [part if isinstance(part, int) else model.encode(part) for part in parts]
        return patterned(model, encoded, sample.sample_id)
    ids = model.encode(request.text)
    return prompted(model, ids, request.length or room_behind(model, ids), sample.sample_id)


def draw(
    model: OpenModel,
    samples: Sequence[Sample],
    canvases: Sequence[Canvas],
    config: SamplingConfig,
    done: set[Sample],
    *,
    keep_frames: bool = False,
    on_pass: Callable[[int, Mapping[int, list[int]]], None] | None = None,
) -> Iterator[tuple[Sample, Canvas, Filled]]:
    """Those that are not done, as they are finished: in batches that are the same whatever is done already."""
    places = {place for place, sample in enumerate(samples) if sample in done}
    for place, filled in fill(model, canvases, config, keep_frames=keep_frames, on_pass=on_pass, done=places):
        yield samples[place], canvases[place], filled


def record_of(model: OpenModel, sample: Sample, canvas: Canvas, filled: Filled, settings: str) -> dict[str, Any]:
    """A line of a file of samples."""
    request = sample.request
    asked = {} if request.kind == "nothing" else {request.kind: request.text}
    return {
        "id": request.id,
        "sample": sample.number,
        "settings": settings,
        **asked,
        "length": request.length,
        "text": model.vocabulary.decode(filled.ids),
        "drawn": [model.vocabulary.decode(ids) for ids in gaps(model, canvas, filled)],
        "ids": filled.ids,
        "nfe": filled.nfe,
        "num_cut": filled.num_cut,
    }


def gaps(model: OpenModel, canvas: Canvas, filled: Filled) -> list[list[int]]:
    """What was drawn, gap by gap."""
    pairs = zip(canvas.ids, filled.ids, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[0] == model.mask_token_id)
    return [[new for _, new in run] for is_gap, run in runs if is_gap]


def film_of(model: OpenModel, sample: Sample, filled: Filled) -> Film:
    """Its frames as pieces of text."""
    pieces: dict[int, str | None] = {model.mask_token_id: None}
    for frame in filled.frames:
        for token_id in frame:
            if token_id not in pieces:
                pieces[token_id] = model.literal([token_id])
    name = f"{sample.request.id}, sample {sample.number + 1}" if sample.request.id else f"Sample {sample.number + 1}"
    frames = [[pieces[token_id] for token_id in frame] for frame in filled.frames]
    return Film(
        f"{name}: {filled.nfe} forward passes", sample.request.text, model.vocabulary.decode(filled.ids), frames
    )
