"""Interchange weights made by hand, as a committed artifact: random models of any architecture."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import MANIFEST, Manifest, record_files, write_json
from pipeline.config import fingerprint
from pipeline.weights import ModelRecord, Origin, save_weights

VOCAB_SIZE, MASK, SEQ_LEN = 300, 0, 32
TRAINED = Origin("trained", {"objective": "masked_nelbo", "steps": [20], "tokens": 5120, "weights": "last"})


def random_model(a: Architecture, vocab_size: int = VOCAB_SIZE, mask: int | None = MASK) -> Denoiser:
    """Norms and biases are away from 1 and 0, so that their order and place matter."""
    model = Denoiser(ModelConfig(a, vocab_size, mask))
    model.init_weights(3)
    with torch.no_grad():
        for index, (_, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if tensor.ndim < 2:
                tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
    return model.eval()


def save_model(root: Path, model: Denoiser, *, stage: str = "convert", stats: Any = None, **record: Any) -> Path:
    """An artifact with the weights of a model; ``record`` are fields of its ModelRecord."""
    root.mkdir(parents=True)
    fields = {"seq_len": SEQ_LEN, "objective": "masked_nelbo", "lineage": [TRAINED]} | record
    save_weights(root, model.state_dict(), ModelRecord(model.config, **fields))
    return commit(root, stage, stats or {})


def commit(root: Path, stage: str, stats: Mapping[str, Any]) -> Path:
    """Write the manifest of what lies there."""
    files = record_files(root)
    own = fingerprint([(file.path, file.sha256) for file in files])
    write_json(root / MANIFEST, Manifest(stage, own, 1, {}, {}, files, dict(stats)))
    return root


def drawn(a: Architecture, **changes: Any) -> Architecture:
    """The architecture with other values, drawn so widely that what goes wrong is seen in the logits."""
    return replace(a, init="normal", init_std=0.25, **changes)
