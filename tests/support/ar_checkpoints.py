"""Next-token checkpoints as an import leaves them: drawn weights, and a tokenizer that may have no mask."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import MANIFEST, Manifest, record_files, write_json
from pipeline.config import fingerprint
from pipeline.weights import ModelRecord, Origin, save_weights

NONE = {"bos": None, "eos": None, "pad": None, "mask": None}
IMPORTED = Origin("imported", {"family": "qwen2", "sha256": "0" * 64})

_SMALL = Architecture(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, rope_base=100.0)
FAMILIES: dict[str, Architecture] = {
    "llama": replace(_SMALL, tied_head=False),
    "qwen2": replace(_SMALL, qkv_bias=True),
    "qwen3": replace(_SMALL, qk_norm=True, head_dim=16),
    "qwen3_moe": replace(_SMALL, qk_norm=True, d_ff=None, moe=MoE(4, 2, 16), tied_head=False),
}


def qwen_like(texts: Sequence[str], vocab_size: int = 300) -> Tokenizer:
    """Byte-level BPE whose special tokens come last, none of them a mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_end|>")])
    return tokenizer


def llama_like(texts: Sequence[str], vocab_size: int = 400) -> Tokenizer:
    """BPE over characters with one token a byte for the others: <unk>, <s>, </s>, the bytes, characters, merges."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, limit_alphabet=60, show_progress=False)
    words.train_from_iterator(texts, trainer)
    learned = json.loads(words.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tokens[:3]])
    return tokenizer


def drawn(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a size at which every part of the model counts; norms and biases too."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in Denoiser(model).state_dict().items():
        noise = torch.randn(value.shape, generator=draw)
        found[name] = 1.0 + 0.1 * noise if "norm" in name else (0.3 if value.ndim > 1 else 0.1) * noise
    return found


def committed(directory: Path, stage: str, stats: Mapping[str, Any], seed: int = 0) -> Path:
    """A directory made an artifact; its fingerprint is of its name and ``seed``."""
    own = fingerprint({"name": directory.name, "seed": seed})
    write_json(directory / MANIFEST, Manifest(stage, own, 1, {}, {}, record_files(directory), stats=dict(stats)))
    return directory


def weights(directory: Path, record: ModelRecord, stats: Mapping[str, Any] | None = None, seed: int = 0) -> Path:
    """Committed weights, drawn from a seed."""
    directory.mkdir(parents=True)
    save_weights(directory, drawn(record.model, seed), record)
    return committed(directory, "import_checkpoint", {} if stats is None else stats, seed)


def checkpoint(
    directory: Path,
    tokenizer: Tokenizer | None,
    num_rows: int,
    architecture: Architecture = FAMILIES["qwen2"],
    special_ids: Mapping[str, int | None] = NONE,
    mask_token_id: int | None = None,
    seed: int = 0,
    details: Mapping[str, str] | None = None,
) -> Path:
    """An imported checkpoint of so many rows; ``special_ids`` as its own configuration names them.

    ``details`` of its import besides those of IMPORTED.
    """
    directory.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    lineage = [replace(IMPORTED, details={**IMPORTED.details, **(details or {})})]
    record = ModelRecord(ModelConfig(architecture, num_rows, mask_token_id), 32, "autoregressive_nll", lineage=lineage)
    save_weights(directory, drawn(record.model, seed), record)
    return committed(directory, "import_checkpoint", {"special_ids": {**NONE, **special_ids}}, seed)
