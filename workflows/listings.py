"""Rows of what can be chosen from: recipes, published models."""

from typing import Any

from dlm_core.models.config import MaskFamily
from dlm_core.models.presets import MEAN_MASKED_SHARE, Preset
from workflows.step import Workflow


def recipe(workflow: Workflow) -> dict[str, Any]:
    """A recipe, its settings that the work it follows does not say, and what it does otherwise."""
    ours = workflow.unpublished_settings()
    return {
        "name": workflow.name,
        "summary": workflow.summary,
        "steps": [step.name for step in workflow.steps],
        "settings": {path: {"value": value, "published": False} for path, value in ours.items()},
        "deviations": list(workflow.deviations),
    }


def model(name: str, preset: Preset) -> dict[str, Any]:
    """A published model: its counts, and what a token costs."""
    config, architecture = preset.model, preset.model.architecture
    family, block_size = preset.mask_family, preset.block_size
    decoding: MaskFamily = "block_causal" if family == "block_diffusion" else family
    return {
        "name": name,
        "num_params": config.num_params(),
        "num_active_params": config.num_active_params(),
        "num_non_embedding_params": config.num_non_embedding_params(),
        "training_flops_per_token": config.flops_per_token(
            preset.seq_len, MEAN_MASKED_SHARE, family=family, block_size=block_size
        ),
        "inference_flops_per_token": config.flops_per_token(
            preset.seq_len, family=decoding, block_size=block_size, training=False
        ),
        "masked_share": MEAN_MASKED_SHARE,
        "mask_family": family,
        "block_size": block_size,
        "seq_len": preset.seq_len,
        "num_layers": architecture.num_layers,
        "d_model": architecture.d_model,
        "num_experts": 0 if architecture.moe is None else architecture.moe.num_experts,
        "top_k": 0 if architecture.moe is None else architecture.moe.top_k,
        "vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "target_offset": preset.target_offset,
        "source": preset.source,
    }
