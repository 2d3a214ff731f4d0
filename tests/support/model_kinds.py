"""Random models of every kind, whose rows have 32 tokens."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

from pipeline.artifact import load_manifest
from pipeline.data.vocabulary import load_vocabulary
from pipeline.inference.model import OpenModel
from tests.support.exports import LLAMA
from tests.support.interchange import drawn, random_model, save_model

BLOCK = 4
KINDS: Mapping[str, dict[str, Any]] = {
    "masked": {},
    "shifted": {"target_offset": 1},
    "blocks": {"objective": "block_nelbo", "block_size": BLOCK},
    "next": {"objective": "autoregressive_nll"},
}
"""Fields of the record of each."""


def save_models(root: Path, tokenizer: Path, *kinds: str) -> dict[str, Path]:
    """The same random tensors as weights of the kinds, by default of all."""
    special, own = load_vocabulary(tokenizer).special, load_manifest(tokenizer).fingerprint
    model = random_model(drawn(LLAMA), special.vocab_size, special.mask_token_id)
    return {kind: save_model(root / kind, model, tokenizer=own, **KINDS[kind]) for kind in kinds or KINDS}


def spoilt(model: OpenModel, text: str) -> OpenModel:
    """The model with nan for what it sees of the only token of a text."""
    (token,) = model.encode(text)
    denoiser = deepcopy(model.denoiser)
    denoiser.embedding.weight[token] = nan
    return replace(model, denoiser=denoiser)
