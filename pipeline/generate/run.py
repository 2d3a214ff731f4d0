"""Draw samples and keep frames of how each emerged from masks."""

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import UserError
from pipeline.generate.config import GenerateConfig
from pipeline.stage import StageContext, Stats
from pipeline.weights import check_tokenizer, load_denoiser

SAMPLES_FILE = "samples.jsonl"


def run(config: GenerateConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write samples.jsonl: the text, and frames of pieces (null where still masked)."""
    import torch

    from dlm_core.ar_init import shifted
    from dlm_core.samplers.ancestral import sample_ancestral

    torch.set_num_threads(1)
    model, record = load_denoiser(inputs["weights"])
    if record.objective != "masked_nelbo":
        raise UserError(
            f"the model was trained for {record.objective}; samples are drawn from models of masked diffusion over "
            "whole rows (masked_nelbo) so far. Leave this stage out"
        )
    if config.length > record.seq_len:
        raise UserError(
            f"generate.length is {config.length}, the model was trained on rows of {record.seq_len} tokens; "
            "longer samples need a model trained on longer rows"
        )
    check_tokenizer(record, inputs["weights"], inputs["tokenizer"])
    vocabulary = load_vocabulary(inputs["tokenizer"])
    mask_token_id = vocabulary.special.mask_token_id
    frames = [round(i * config.num_steps / (config.num_frames - 1)) for i in range(config.num_frames)]
    context.progress(0, 1)
    start = torch.full((config.num_samples, config.length or record.seq_len), mask_token_id)
    if record.target_offset:
        start[:, 0] = vocabulary.special.eos_token_id  # nothing predicts the first token of a shifted model
    with torch.inference_mode():
        sampled = sample_ancestral(
            shifted(model) if record.target_offset else model,
            start,
            mask_token_id=mask_token_id,
            num_steps=config.num_steps,
            noise_seed=config.noise_seed,
            temperature=config.temperature,
            record_steps=frozenset(frames),
        )
    decoder = vocabulary.tokenizer
    with (context.out / SAMPLES_FILE).open("w") as handle:
        for row in range(config.num_samples):
            ids = sampled.x0[row].tolist()
            pieces = [decoder.decode([i], skip_special_tokens=False) for i in ids]
            shown = [
                [piece if i != mask_token_id else None for piece, i in zip(pieces, frame, strict=True)]
                for frame in (frame[row].tolist() for frame in sampled.trajectory)
            ]
            line = {"text": vocabulary.decode(ids), "ids": ids, "steps": frames, "frames": shown}
            handle.write(json.dumps(line) + "\n")
    return {"nfe": sampled.nfe, "num_samples": config.num_samples}
