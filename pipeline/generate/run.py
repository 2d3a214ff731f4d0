"""Draw samples and keep frames of how each emerged from masks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.generate.config import GenerateConfig
from pipeline.stage import StageContext, Stats

if TYPE_CHECKING:
    from pipeline.inference.filling import Canvas, Filled
    from pipeline.inference.model import OpenModel

SAMPLES_FILE = "samples.jsonl"


def run(config: GenerateConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write samples.jsonl: the text, and frames of pieces (null where still masked) after so many passes."""
    import torch

    from pipeline.inference.filling import fill
    from pipeline.inference.model import open_model

    torch.set_num_threads(1)
    model = open_model(inputs["weights"], inputs["tokenizer"], config.device)
    canvases = _canvases(model, config)
    found: dict[int, Filled] = {}
    context.progress(0, len(canvases))
    for number, filled in fill(model, canvases, config, keep_frames=True):
        found[number] = filled
        context.progress(len(found), len(canvases))
    with (context.out / SAMPLES_FILE).open("w") as handle:
        for number in range(len(canvases)):
            prompt = config.prompts[number // config.num_samples] if config.prompts else None
            handle.write(json.dumps(_line(model, found[number], config.num_frames, prompt)) + "\n")
    nfe = sum(filled.nfe for filled in found.values()) / len(found)
    return {"nfe": nfe, "num_samples": len(found), "num_cut": sum(filled.num_cut for filled in found.values())}


def _canvases(model: "OpenModel", config: GenerateConfig) -> "list[Canvas]":
    from pipeline.inference.filling import prompted, room_behind

    room = model.record.seq_len - model.record.target_offset
    if config.length > room:
        given = ", of which the first must be given" if model.record.target_offset else ""
        raise UserError(
            f"generate.length is {config.length}, the model was trained on rows of {model.record.seq_len} tokens"
            f"{given}; take at most {room}, or a model trained on longer rows"
        )
    if not config.prompts:
        length = config.length or room
        return [prompted(model, (), length, number) for number in range(config.num_samples)]
    canvases: list[Canvas] = []
    for prompt in config.prompts:
        ids = model.encode(prompt)
        length = config.length or room_behind(model, ids)
        for _ in range(config.num_samples):
            canvases.append(prompted(model, ids, length, len(canvases)))
    return canvases


def _line(model: "OpenModel", filled: "Filled", num_frames: int, prompt: str | None) -> dict[str, Any]:
    last = len(filled.frames) - 1
    passes = sorted({round(i * last / (num_frames - 1)) for i in range(num_frames)})

    def piece(token_id: int) -> str | None:
        return None if token_id == model.mask_token_id else model.literal([token_id])

    return {
        **({} if prompt is None else {"prompt": prompt}),
        "text": model.vocabulary.decode(filled.ids),
        "ids": filled.ids,
        "nfe": filled.nfe,
        "steps": passes,
        "frames": [[piece(token_id) for token_id in filled.frames[number]] for number in passes],
    }
