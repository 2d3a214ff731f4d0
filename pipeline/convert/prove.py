"""The logits of converted weights beside those of the training's own files, in a process of its own."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from pipeline.convert.config import Weights
from pipeline.convert.gather import Gathered, gather
from pipeline.logits_proof import check_equal, logits_of, pseudo_tokens
from pipeline.weights import MODEL_FILE, WEIGHTS_FILE, read_denoiser, read_record

if TYPE_CHECKING:
    from torch import Tensor


def prove_logits(out: str, source: str, weights: str) -> None:
    """CorruptionError unless the model on the disk and one filled from the ranks' files give the same logits."""
    record = read_record(Path(out) / MODEL_FILE)
    tokens = pseudo_tokens(record.model.vocab_size)
    found = logits_of(read_denoiser(record.model, Path(out) / WEIGHTS_FILE, out), tokens)
    check_equal(found, _logits_of_training(gather(cast("Weights", weights), Path(source)), tokens), WEIGHTS_FILE)


def _logits_of_training(weights: Gathered, tokens: "Tensor") -> "Tensor":
    from dlm_core.models.transformer import Denoiser

    model = Denoiser(weights.model).eval()
    for name, tensor in model.state_dict().items():
        flat, start = tensor.view(-1).numpy(), 0
        for values in weights.blocks(name):
            flat[start : start + values.size] = values
            start += values.size
    return logits_of(model, tokens)
