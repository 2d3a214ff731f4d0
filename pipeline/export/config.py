"""Into whose layout weights are written, and how that is proved."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dlm_core.models.config import Architecture
from pipeline.config import from_json
from pipeline.errors import UserError
from pipeline.export.fit import Exported, check_fit
from pipeline.hf_names import Family
from pipeline.stage import Stage

ExportFamily = Literal["llada", "dream", "llada_moe", "llada2", "llama", "qwen2", "qwen3", "qwen3_moe"]
Dtype = Literal["bfloat16", "float32", "float16"]


@dataclass(frozen=True)
class ExportConfig:
    """A directory that transformers loads."""

    family: ExportFamily = "llada"
    """llada, dream, llada_moe, llada2: diffusion models, with modeling files of our own.  llama, qwen2, qwen3,
    qwen3_moe: next-token models, or just the tensors of a diffusion model, for tools that switch the attention."""
    dtype: Dtype = "bfloat16"
    max_shard_bytes: int = 5_000_000_000
    """Weights of one file; a larger tensor has a file of its own."""
    without_tokenizer: bool = False
    """Allow a directory without a tokenizer, where there is none."""
    name: str = ""
    """Title of the model card; the family's by default."""
    license: str = ""
    """Of the weights, in the model card; by default that of the checkpoint they began with, if it is known."""
    proof: Literal["logits", "tensors"] = "logits"
    """tensors: what was written is read back, bit for bit.  logits: and transformers loads the directory in a process
    of its own, whose logits are compared with ours: it holds the model in float32 there.  What was proved stands in the
    model card, so it is part of the result."""

    def __post_init__(self) -> None:
        for name, kind in (("family", ExportFamily), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}")
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes is {self.max_shard_bytes}; it must be at least 1")
        for name in ("name", "license"):
            if "\n" in getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one line")


def check_upstream(config: ExportConfig, upstream: Mapping[str, Any], step: str) -> None:
    """UserError if the family cannot hold what the training before will train: said before it starts."""
    if config.without_tokenizer and "tokenizer" in upstream:
        raise UserError(f"{step}.without_tokenizer is true, but there is the input tokenizer; leave one of them out")
    if "weights.pretrain" not in upstream:
        return
    training: Mapping[str, Any] = upstream["weights.pretrain"]
    objective = training["objective"]
    sizes = [objective["block_size"], *(phase["block_size"] for phase in [*training["phases"].values()][-1:])]
    model = Exported(
        from_json(Architecture, training["architecture"], where="pretrain.architecture"),
        is_causal=objective["kind"] == "autoregressive",
        block_size=next(size for size in reversed(sizes) if size is not None),
        target_offset=objective["target_offset"],
    )
    check_fit(config.family, model, f"{step}.family")
    if not config.without_tokenizer and "tokenizer" not in upstream:
        raise UserError(
            f"{step} has no input tokenizer, and weights of a training bring none: give the one that they are trained "
            f"with, or set {step}.without_tokenizer=true"
        )


def check_ready(config: ExportConfig, step: str) -> None:
    """UserError if the proof cannot be made for want of a package: said before anything starts."""
    if config.proof == "logits" and importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{step}.proof is logits, which needs transformers, and that is not installed: pip install 'dlm[hf]', or "
            f"set {step}.proof=tensors"
        )


STAGE = Stage(
    name="export",
    kind="task",
    config=ExportConfig,
    module="pipeline.export.run",
    inputs=("weights",),
    optional_inputs=("tokenizer",),
    code_version=3,
    check=check_upstream,
    ready=check_ready,
)

assert set(get_args(ExportFamily)) <= set(get_args(Family))
