"""LLaDA-MoE (arXiv 2509.24389) for transformers 4.57 and 5, with the tensors of its published checkpoints."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_lladamoe import LLaDAMoEConfig
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_modules import GatedMLP, Router, SelfAttention, Trunk, mix_experts


class LLaDAMoESparseMoeBlock(nn.Module):
    """Experts with the largest softmax, weighted with it as it is: their weights do not sum to 1."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = Router(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, config.expert_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map each token of [B, L, D] by itself."""
        tokens = x.flatten(0, 1)
        weights, expert_ids = self.gate(tokens).softmax(dim=-1).topk(self.top_k, dim=-1)
        return mix_experts(self.experts, tokens, expert_ids, weights).view_as(x)


class LLaDAMoEDecoderLayer(nn.Module):
    """A layer with experts, and perhaps one that every token goes to, or with a dense network."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        has_experts = config.moe_layer_freq[layer] != 0
        shared = config.shared_expert_intermediate_size
        self.input_layernorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, qk_norm=config.qk_layernorm)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.mlp = LLaDAMoESparseMoeBlock(config) if has_experts else GatedMLP(size, config.dense_intermediate_size)
        self.shared_expert = GatedMLP(size, shared) if has_experts and shared else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pairs: Tensor | None) -> Tensor:
        """Add both branches to [B, L, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, pairs)
        normed = self.post_attention_layernorm(x)
        mixed = self.mlp(normed)
        return x + (mixed if self.shared_expert is None else mixed + self.shared_expert(normed))


class LLaDAMoEModelLM(DiffusionGenerationMixin, PreTrainedModel):
    """LLaDA-MoE with its head: the output of a position says that position's token."""

    config_class = LLaDAMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDAMoEDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.model = Trunk(config, (LLaDAMoEDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            module.draw(self.config.initializer_range)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of tokens [B, L]; ``attention_mask`` as ``attention_pairs`` takes it."""
        return MaskedLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask, position_ids)))
