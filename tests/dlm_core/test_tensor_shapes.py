"""Names and shapes that are told without a model are those of the model."""

from dataclasses import replace

import pytest
import torch

from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.presets import PRESETS
from dlm_core.models.tensor_shapes import is_buffer, tensor_shapes
from dlm_core.models.transformer import Denoiser

SMALL = Architecture(d_model=12, num_layers=3, num_heads=3, num_kv_heads=1, d_ff=10)
EXPERTS = MoE(4, 2, 5, num_shared_experts=2, selection_bias=True, first_k_dense=1, layer_frequency=2)
VARIANTS = {
    "dense": SMALL,
    "biases": replace(SMALL, qkv_bias=True, tied_head=False, head_bias=True),
    "norms": replace(SMALL, qk_norm=True, head_dim=6, norm="layer", tied_head=False),
    "dit": replace(SMALL, activation="gelu", cond_dim=7, time_conditioning=True),
    "experts": replace(SMALL, moe=EXPERTS),
    "experts alone": replace(SMALL, d_ff=None, moe=MoE(4, 2, 5)),
}


@pytest.mark.parametrize(
    "config",
    [*(ModelConfig(a, 11, 10) for a in VARIANTS.values()), *(preset.model for preset in PRESETS.values())],
    ids=[*VARIANTS, *PRESETS],
)
def test_shapes_are_those_of_the_model_in_its_order(config):
    with torch.device("meta"):
        model = Denoiser(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(tensor_shapes(config).items()) == list(wanted.items())
    assert {name for name in wanted if is_buffer(name)} == {name for name, _ in model.named_buffers()}
