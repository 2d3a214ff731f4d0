"""Logits of what was written and of the source, in a process of its own: both in float32, one after the other."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.artifact import read_json
from pipeline.config import from_json
from pipeline.errors import CorruptionError
from pipeline.logits_proof import logits_of, pseudo_tokens
from pipeline.weights import MODEL_FILE, WEIGHTS_FILE, ModelRecord, read_denoiser

if TYPE_CHECKING:
    from torch import Tensor

MAX_LEN = 48


def difference(weights: str, peer: str, scratch: str, attention: Literal["causal", "full"]) -> float:
    """Largest difference of the logits, over the largest of theirs; inf where one of them is not finite.

    ``weights`` holds model.json and model.safetensors; ``peer`` is a directory that transformers loads, with no code in
    it but our own.  ``attention`` is that of the peer's class, whatever the model was trained with.
    """
    record = from_json(ModelRecord, read_json(Path(weights) / MODEL_FILE), where=MODEL_FILE)
    tokens = pseudo_tokens(record.model.vocab_size, length=min(MAX_LEN, record.seq_len))
    theirs = _peer_logits(Path(peer), Path(scratch), tokens)
    model = read_denoiser(record.model, Path(weights) / WEIGHTS_FILE, weights)
    ours = logits_of(model, tokens, attention)
    if ours.shape != theirs.shape:
        raise CorruptionError(f"logits have the shape {list(ours.shape)}, those of the source {list(theirs.shape)}")
    if (mask := record.model.mask_token_id) is not None:  # whose logit is -inf in ours
        rest = [token for token in range(record.model.vocab_size) if token != mask]
        ours, theirs = ours[..., rest], theirs[..., rest]
    if not bool(ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def _peer_logits(peer: Path, scratch: Path, tokens: "Tensor") -> "Tensor":
    """Of transformers' model, or of our own modeling file, which is the only code in ``peer``."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    import torch
    import transformers

    own_code = read_json(peer / "config.json").get("auto_map", {})
    kind = "AutoModelForCausalLM" if not own_code or "AutoModelForCausalLM" in own_code else "AutoModel"
    settings = {} if own_code else {"attn_implementation": "eager"}
    model = getattr(transformers, kind).from_pretrained(
        peer, dtype=torch.float32, trust_remote_code=bool(own_code), local_files_only=True, **settings
    )
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits.float()
