"""Directories that transformers loads, written by hand: tiny random models of the diffusion families."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dlm_core.models.config import Architecture, ModelConfig, RopeScaling
from dlm_core.models.transformer import Denoiser
from pipeline.export.code_files import code_files
from pipeline.hf_config import SpecialIds, write_config, write_generation_config
from pipeline.hf_names import Family, to_family
from pipeline.weights import ModelRecord
from tests.support.tiny_families import EXPERTS, GROUPED, LLAMA3, SMALL, YARN

V, MASK, PAD, EOS = 19, 4, 1, 2
SPECIAL = SpecialIds(eos_token_id=EOS, pad_token_id=PAD, mask_token_id=MASK)
SEQ_LEN, BLOCK_SIZE = 64, 4

_MIXED = replace(EXPERTS, num_shared_experts=2, first_k_dense=1)
_PLAIN = replace(GROUPED, num_shared_experts=0, num_groups=1, top_groups=1, top_k=1, renormalise=False)

EXPORTS: dict[str, tuple[Family, Architecture]] = {
    "llada": ("llada", SMALL),
    "llada-tied": ("llada", replace(SMALL, tied_head=True, num_kv_heads=None)),
    "llada-biases": ("llada", replace(SMALL, qkv_bias=True)),
    "dream": ("dream", replace(SMALL, qkv_bias=True)),
    "dream-tied-no-biases": ("dream", replace(SMALL, tied_head=True, rope_scaling=YARN)),
    "llada_moe": ("llada_moe", replace(SMALL, qk_norm=True, d_ff=None, moe=EXPERTS)),
    "llada_moe-dense-first": ("llada_moe", replace(SMALL, moe=_MIXED, rope_scaling=RopeScaling("linear", 2.0))),
    "llada2": ("llada2", replace(SMALL, qk_norm=True, head_dim=8, rope_fraction=0.5, moe=GROUPED)),
    "llada2-no-bias": (
        "llada2",
        replace(
            SMALL,
            qk_norm=True,
            qkv_bias=True,
            rope_scaling=LLAMA3,
            moe=replace(_PLAIN, selection_bias=False),
        ),
    ),
}
"""A model of every option that a family has."""


def random_model(a: Architecture) -> Denoiser:
    """Weights with norms and biases away from 1 and 0, so that their order and place matter."""
    model = Denoiser(ModelConfig(a, V, MASK))
    model.init_weights(3)
    with torch.no_grad():
        for index, (_, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if tensor.ndim < 2:
                tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
    return model.eval()


def write_export(folder: Path, family: Family, model: Denoiser) -> None:
    """config.json, generation_config.json, model.safetensors and the code that they name."""
    folder.mkdir(parents=True)
    state = {
        name: tensor.clone()
        for name, tensor in to_family(family, model.config.architecture, model.state_dict()).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(family, model.config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(write_generation_config(SPECIAL)))
    for path in code_files(config["auto_map"]):
        shutil.copy(path, folder)


def config_of(family: Family, config: ModelConfig) -> dict[str, Any]:
    """config.json of a family."""
    objective, block_size = ("block_nelbo", BLOCK_SIZE) if family == "llada2" else ("masked_nelbo", 0)
    record = ModelRecord(config, SEQ_LEN, objective, block_size, target_offset=1 if family == "dream" else 0)
    return write_config(family, record, SPECIAL)
