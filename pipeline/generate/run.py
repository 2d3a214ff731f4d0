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
    """Write samples.jsonl: the text, and frames of pieces (null where still masked) after so many passes."""
    import torch

    from dlm_core.samplers.blocks import sample_blocks
    from pipeline.generate.rules import make_context, make_proposal, make_rule, window_of

    torch.set_num_threads(1)
    model, record = load_denoiser(inputs["weights"])
    if record.objective == "autoregressive_nll":
        raise UserError(
            "the model was trained for autoregressive_nll; samples are drawn from models of masked diffusion so far. "
            "Leave this stage out"
        )
    if config.length > record.seq_len:
        raise UserError(
            f"generate.length is {config.length}, the model was trained on rows of {record.seq_len} tokens; "
            "longer samples need a model trained on longer rows"
        )
    check_tokenizer(record, inputs["weights"], inputs["tokenizer"])
    vocabulary = load_vocabulary(inputs["tokenizer"])
    mask_token_id = vocabulary.special.mask_token_id
    context.progress(0, 1)
    length = config.length or record.seq_len
    start = torch.full((config.num_samples, length), mask_token_id)
    if record.target_offset:
        start[:, 0] = vocabulary.special.eos_token_id  # nothing predicts the first token of a shifted model
    with torch.inference_mode():
        sampled = sample_blocks(
            make_context(config, model, record),
            start,
            make_rule(config.sampler),
            make_proposal(config),
            block_size=window_of(config, record, length),
            mask_token_id=mask_token_id,
            noise_seed=config.noise_seed,
            keep_frames=True,
        )
    last = len(sampled.frames) - 1
    passes = sorted({round(i * last / (config.num_frames - 1)) for i in range(config.num_frames)})
    decoder = vocabulary.tokenizer
    with (context.out / SAMPLES_FILE).open("w") as handle:
        for row in range(config.num_samples):
            ids = sampled.x0[row].tolist()
            pieces = {i: decoder.decode([i], skip_special_tokens=False) for i in ids}
            shown = [
                [
                    pieces.get(i) or decoder.decode([i], skip_special_tokens=False) if i != mask_token_id else None
                    for i in sampled.frames[number][row].tolist()
                ]
                for number in passes
            ]
            line = {
                "text": vocabulary.decode(ids),
                "ids": ids,
                "nfe": int(sampled.nfe[row]),
                "steps": passes,
                "frames": shown,
            }
            handle.write(json.dumps(line) + "\n")
    return {
        "nfe": float(sampled.nfe.double().mean()),
        "num_passes": sampled.num_passes,
        "num_samples": config.num_samples,
    }
