"""Published models by name, and a tiny one of each family: the same options, sizes for a test.

Sizes are those of the papers and of the released configurations; what a family is made of is a choice of the fields of
``Architecture``.
"""

from dataclasses import dataclass, replace
from typing import Any

from dlm_core.models.config import Architecture, MaskFamily, ModelConfig, MoE, RopeScaling

MEAN_MASKED_SHARE = 0.5
"""Of the positions of a batch, where alpha_t = 1 - t and t is uniform: what training computes the head for."""


@dataclass(frozen=True)
class Preset:
    """A published model: its configuration, the length it was trained on, and where its sizes are from."""

    model: ModelConfig
    seq_len: int
    source: str
    target_offset: int = 0
    """1 where position i predicts token i + 1, as the autoregressive model did that it began with."""
    mask_family: MaskFamily = "full"
    """Who attends to whom in training as a diffusion model."""
    block_size: int | None = None


def _dit(d_model: int, num_layers: int, num_heads: int, vocab_size: int = 50_258) -> ModelConfig:
    """The DiT of MDLM and BD3-LM: GPT-2's vocabulary and a mask, adaLN-zero that knows no time."""
    architecture = Architecture(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        d_ff=4 * d_model,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        cond_dim=128,
        tied_head=False,
        head_bias=True,
        init="mdlm",
        init_std=None,
    )
    return ModelConfig(architecture, vocab_size, vocab_size - 1)


_LLAMA = Architecture(
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    d_ff=14_336,
    rope_base=500_000.0,
    norm_eps=1e-5,
    tied_head=False,
    init="normal",
)
_SMOLLM2 = replace(
    _LLAMA,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    d_ff=1536,
    rope_base=100_000.0,
    tied_head=True,
)
_LLADA = replace(_LLAMA, num_kv_heads=None, d_ff=12_288, init="mitchell", init_std=None)
_QWEN2 = Architecture(
    d_model=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    d_ff=18_944,
    qkv_bias=True,
    rope_base=1_000_000.0,
    tied_head=False,
    init="normal",
)
_QWEN3 = Architecture(
    d_model=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    d_ff=3072,
    qk_norm=True,
    rope_base=1_000_000.0,
    init="normal",
)
_QWEN3_MOE = replace(
    _QWEN3,
    d_model=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    d_ff=None,
    tied_head=False,
    moe=MoE(num_experts=128, top_k=8, d_ff_expert=768),
)
_LLADA_MOE = Architecture(
    d_model=2048,
    num_layers=16,
    num_heads=16,
    d_ff=None,
    moe=MoE(num_experts=64, top_k=8, d_ff_expert=1024, renormalise=False),
    rope_base=50_000.0,
    norm_eps=1e-5,
    qk_norm=True,
    tied_head=False,
    init="normal",
)
_LLADA2 = Architecture(
    d_model=2048,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    d_ff=5120,
    moe=MoE(
        num_experts=256,
        top_k=8,
        d_ff_expert=512,
        num_shared_experts=1,
        router_score="sigmoid",
        routed_scale=2.5,
        num_groups=8,
        top_groups=4,
        selection_bias=True,
        first_k_dense=1,
    ),
    qk_norm=True,
    rope_base=600_000.0,
    rope_fraction=0.5,
    tied_head=False,
    init="normal",
)
_SMDM = Architecture(
    d_model=256, num_layers=6, num_heads=4, d_ff=1024, norm_eps=1e-5, tied_head=False, init="small", init_std=None
)
_LLAMA3_ROPE = RopeScaling("llama3", 8.0, original_seq_len=8192, low_factor=1.0, high_factor=4.0)


def _flash(a: Architecture) -> Architecture:
    """LLaDA2 flash beside mini."""
    assert a.moe is not None
    moe = replace(a.moe, d_ff_expert=1024)
    return replace(a, d_model=4096, num_layers=32, num_heads=32, d_ff=9216, moe=moe)


_LLADA2_RUN: Any = {
    "seq_len": 4096,
    "source": "LLaDA2.0, arXiv 2512.15745",
    "mask_family": "block_diffusion",
    "block_size": 32,
}

PRESETS: dict[str, Preset] = {
    "mdlm-tiny": Preset(_dit(512, 8, 8), 1024, "MDLM, arXiv 2406.07524"),
    "mdlm-small": Preset(_dit(768, 12, 12), 1024, "MDLM, arXiv 2406.07524"),
    "mdlm-medium": Preset(_dit(1024, 24, 16), 1024, "MDLM, arXiv 2406.07524"),
    "bd3lm-small": Preset(
        _dit(768, 12, 12), 1024, "BD3-LM, arXiv 2503.09573", mask_family="block_diffusion", block_size=16
    ),
    "smdm-6": Preset(ModelConfig(_SMDM, 32_001, 32_000), 2048, "SMDM, arXiv 2410.18514"),
    "llada-8b": Preset(ModelConfig(_LLADA, 126_464, 126_336), 4096, "LLaDA, arXiv 2502.09992"),
    "dream-7b": Preset(ModelConfig(_QWEN2, 152_064, 151_666), 2048, "Dream, arXiv 2508.15487", target_offset=1),
    "llada-moe-7b-a1b": Preset(ModelConfig(_LLADA_MOE, 157_184, 156_895), 8192, "LLaDA-MoE, arXiv 2509.24389"),
    "llada2-mini": Preset(ModelConfig(_LLADA2, 157_184, 156_895), **_LLADA2_RUN),
    "llada2-flash": Preset(ModelConfig(_flash(_LLADA2), 157_184, 156_895), **_LLADA2_RUN),
    "llama3.1-8b": Preset(
        ModelConfig(replace(_LLAMA, rope_scaling=_LLAMA3_ROPE), 128_256, 128_255), 8192, "Llama 3, arXiv 2407.21783"
    ),
    "smollm2-135m": Preset(ModelConfig(_SMOLLM2, 49_153, 49_152), 8192, "SmolLM2, arXiv 2502.02737"),
    "qwen2.5-7b": Preset(ModelConfig(_QWEN2, 152_064, 151_666), 4096, "Qwen2.5, arXiv 2412.15115"),
    "qwen3-0.6b": Preset(ModelConfig(_QWEN3, 151_936, 151_669), 4096, "Qwen3, arXiv 2505.09388"),
    "qwen3-30b-a3b": Preset(ModelConfig(_QWEN3_MOE, 151_936, 151_669), 4096, "Qwen3, arXiv 2505.09388"),
}
"""Every published model by name.  An autoregressive one stands here as what it becomes with a mask token."""


def tiny(preset: Preset, vocab_size: int = 64) -> ModelConfig:
    """A model of the same family that runs anywhere in milliseconds: all options kept, all sizes cut.

    The last id is the mask token.
    """
    a, m = preset.model.architecture, preset.model.architecture.moe
    groups = 1 if m is None or m.num_groups == 1 else 4
    moe = m and replace(m, num_experts=8, top_k=2, d_ff_expert=16, num_groups=groups, top_groups=min(m.top_groups, 2))
    architecture = replace(
        a,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=None if a.num_kv_heads is None else 2,
        head_dim=None if a.head_dim is None else 16,
        d_ff=None if a.d_ff is None else 48,
        cond_dim=None if a.cond_dim is None else 12,
        moe=moe,
    )
    return ModelConfig(architecture, vocab_size, vocab_size - 1)
