"""Dream (arXiv 2508.15487) for transformers 4.57 and 5, with the tensors of its published checkpoints."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_dream import DreamConfig
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_modules import GatedMLP, SelfAttention, Trunk


class DreamDecoderLayer(nn.Module):
    """A layer of Qwen2."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, qkv_bias=True)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pairs: Tensor | None) -> Tensor:
        """Add both branches to [B, L, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, pairs)
        return x + self.mlp(self.post_attention_layernorm(x))


class DreamModel(DiffusionGenerationMixin, PreTrainedModel):
    """Dream with its head: the output of a position says the NEXT position's token."""

    config_class = DreamConfig
    base_model_prefix = "model"
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    order = "entropy"
    predicts_next = True

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = Trunk(config, (DreamDecoderLayer(config) for _ in range(config.num_hidden_layers)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of tokens [B, L]; ``attention_mask`` as ``attention_pairs`` takes it."""
        return MaskedLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask, position_ids)))
