"""LLaDA2 (arXiv 2512.15745) for transformers 4.57 and 5, with the tensors of its published checkpoints."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .configuration_llada2_moe import LLaDA2MoeConfig
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_modules import GatedMLP, Router, attend, mix_experts, run_layers


class LLaDA2MoeAttention(nn.Module):
    """Attention with a norm of every query and key head; queries, keys and values are rows of one matrix."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.sizes = [
            heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        ]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.use_qkv_bias)
        self.query_layernorm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.sizes[0], config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pairs: Tensor | None) -> Tensor:
        """Map [B, L, D]."""
        q, k, v = self.query_key_value(x).split(self.sizes, dim=-1)
        return self.dense(attend(q, k, v, self.head_dim, rope, pairs, self.query_layernorm, self.key_layernorm))


class LLaDA2MoeGate(Router):
    """Chooses the experts; ``expert_bias`` moves the choice alone and is in the checkpoint."""

    expert_bias: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_size, config.num_experts)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.num_groups, self.top_groups = config.n_group, config.topk_group

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Weights and ids [N, K] of each token's experts, which are those of its best groups."""
        scores = super().forward(tokens).sigmoid()
        choice = scores + self.expert_bias
        groups = choice.unflatten(1, (self.num_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(self.top_groups, dim=-1).indices
        is_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        expert_ids = groups.masked_fill(is_out[..., None], -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, expert_ids)
        if self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scale, expert_ids


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """Routed experts, and shared ones that every token goes to."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, width = config.hidden_size, config.moe_intermediate_size
        self.gate = LLaDA2MoeGate(config)
        self.experts = nn.ModuleList(GatedMLP(size, width) for _ in range(config.num_experts))
        shared = config.num_shared_experts
        self.shared_experts = GatedMLP(size, shared * width) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Map each token of [B, L, D] by itself."""
        tokens = x.flatten(0, 1)
        weights, expert_ids = self.gate(tokens)
        mixed = mix_experts(self.experts, tokens, expert_ids, weights).view_as(x)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


class LLaDA2MoeDecoderLayer(nn.Module):
    """A layer: the first ones are dense, the others have experts."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        is_dense = layer < config.first_k_dense_replace
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = LLaDA2MoeAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = (
            GatedMLP(config.hidden_size, config.intermediate_size) if is_dense else LLaDA2MoeSparseMoeBlock(config)
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pairs: Tensor | None) -> Tensor:
        """Add both branches to [B, L, D]."""
        x = x + self.attention(self.input_layernorm(x), rope, pairs)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def post_init(self) -> None:
        """Keep the bias of the choice in float32: rounded, it would choose other experts."""
        super().post_init()
        self._keep_in_fp32_modules_strict = {"expert_bias"}  # only now: 4.57 refuses names of buffers before

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            module.draw(self.config.initializer_range)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """The trunk."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> BaseModelOutput:
        """Normalised hidden states [B, L, D] of tokens [B, L]; ``attention_mask`` as ``attention_pairs`` takes it.

        Without a mask everyone sees everyone: a block-causal one is the caller's, as in ``diffusion_generate``.
        """
        x = self.word_embeddings(input_ids)
        head_dim, fraction = self.config.head_dim, self.config.partial_rotary_factor
        x = run_layers(self.layers, x, self.config, head_dim, attention_mask, position_ids, fraction)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class LLaDA2MoeModelLM(DiffusionGenerationMixin, LLaDA2MoePreTrainedModel):
    """LLaDA2 with its head: the output of a position says that position's token."""

    is_block_causal = True

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of tokens [B, L], as the trunk's hidden states."""
        hidden = self.model(input_ids, attention_mask, position_ids).last_hidden_state
        return MaskedLMOutput(logits=self.lm_head(hidden))
