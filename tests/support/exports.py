"""Pairs of a model of ours and a family that is the same function, and what transformers makes of them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dlm_core.models.config import Architecture
from pipeline.artifact import load_manifest
from pipeline.data.special_tokens import load_special_tokens
from pipeline.export.config import STAGE, ExportConfig
from tests.support.interchange import drawn, random_model, save_model
from tests.support.tiny_families import EXPERTS, GROUPED, LLAMA3, YARN
from tests.support.tiny_run import run_stage

ROOT = Path(__file__).parents[2]
TEXTS = (
    "the token learns",
    "e\u0301 \u212b \ufb01 \u202e \u200b\u200d",
    "tabs\t\tand\r\nold\r\n\n   spaces   ",
    "nul \x00 🙂",
)
LLAMA = drawn(
    Architecture(d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=24, norm_eps=1e-2, rope_base=500.0),
    tied_head=False,
)
QWEN2 = replace(LLAMA, qkv_bias=True)
QWEN3 = replace(LLAMA, qk_norm=True, head_dim=6)
QWEN3_MOE = replace(LLAMA, qk_norm=True, d_ff=None, moe=EXPERTS)
LLADA2 = replace(LLAMA, qk_norm=True, head_dim=8, rope_fraction=0.5, moe=GROUPED)
_ONE_EXPERT = replace(GROUPED, num_groups=1, top_groups=1, top_k=1, renormalise=False, selection_bias=False)
NEXT_TOKEN = {"objective": "autoregressive_nll"}
SHIFTED = {"target_offset": 1}
BLOCKS = {"objective": "block_nelbo", "block_size": 4}


@dataclass(frozen=True)
class Pair:
    """A model of ours, and how it is exported."""

    family: str
    architecture: Architecture
    record: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    max_shard_bytes: int = 10**9


PAIRS = {
    "llama-llada": Pair("llada", LLAMA),
    "llama-tied-llada": Pair("llada", replace(LLAMA, tied_head=True, num_kv_heads=None), dtype="bfloat16"),
    "qwen2-llada": Pair("llada", QWEN2, max_shard_bytes=4000),
    "qwen2-dream": Pair("dream", QWEN2, SHIFTED),
    "llama-tied-dream": Pair("dream", replace(LLAMA, tied_head=True, rope_scaling=YARN), SHIFTED, "bfloat16"),
    "qwen3_moe-llada_moe": Pair("llada_moe", QWEN3_MOE, max_shard_bytes=4000),
    "own-llada_moe": Pair(
        "llada_moe",
        replace(LLAMA, moe=replace(EXPERTS, num_shared_experts=2, first_k_dense=1), tied_head=True),
        dtype="bfloat16",
    ),
    "own-llada2": Pair("llada2", LLADA2, BLOCKS, "bfloat16"),
    "own-llada2-whole-rows": Pair(
        "llada2", replace(LLADA2, moe=_ONE_EXPERT, qkv_bias=True, tied_head=True, rope_scaling=LLAMA3)
    ),
    "llama-llama": Pair("llama", replace(LLAMA, rope_scaling=LLAMA3), NEXT_TOKEN),
    "qwen2-tied-qwen2": Pair("qwen2", replace(QWEN2, tied_head=True), NEXT_TOKEN, "bfloat16"),
    "qwen3-qwen3": Pair("qwen3", replace(QWEN3, rope_scaling=YARN), NEXT_TOKEN),
    "qwen3_moe-qwen3_moe": Pair(
        "qwen3_moe", replace(QWEN3_MOE, head_dim=6, moe=replace(EXPERTS, renormalise=True)), NEXT_TOKEN, "float16"
    ),
    "llada-llama": Pair("llama", LLAMA),
    "dream-qwen2": Pair("qwen2", QWEN2, SHIFTED),
    "diffusion-qwen3": Pair("qwen3", QWEN3, BLOCKS),
}
"""The table of exact conversions, and every option that a family has."""


def weights_of(pair: Pair, tokenizer: Path, out: Path) -> Path:
    """An artifact with the weights of a pair, which speaks the vocabulary of a tokenizer."""
    special = load_special_tokens(tokenizer)
    model = random_model(pair.architecture, special.vocab_size + 3, special.mask_token_id)
    return save_model(out, model, tokenizer=load_manifest(tokenizer).fingerprint, **pair.record)


def export(pair: Pair, tokenizer: Path, root: Path) -> tuple[Path, Path]:
    """(weights, directory) of a pair, without the proof by logits: that is of a process for all of them."""
    weights = weights_of(pair, tokenizer, root / "weights")
    config = ExportConfig(pair.family, pair.dtype, pair.max_shard_bytes, proof="tensors")  # type: ignore[arg-type]
    return weights, run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer}, root / "exported")


def ask_transformers(made: Mapping[str, tuple[Path, Path]], scratch: Path, folder: Path | None = None) -> Any:
    """What a fresh process says of exported pairs; ``folder`` has another version of transformers."""
    jobs = {
        name: {
            "folder": str(exported),
            "weights": str(weights),
            "family": PAIRS[name].family,
            "dtype": PAIRS[name].dtype,
            "texts": TEXTS,
        }
        for name, (weights, exported) in made.items()
    }
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    paths = [str(path) for path in (folder, ROOT) if path is not None]
    command = [
        sys.executable,
        "-m",
        "tests.support.prove_exports",
        str(scratch / "jobs.json"),
        str(scratch / "answers"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads((scratch / "answers").read_text())
