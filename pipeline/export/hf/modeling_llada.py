"""LLaDA (arXiv 2502.09992) for transformers 4.57 and 5, with the tensors of its published checkpoints."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_llada import LLaDAConfig
from .diffusion_generation import DiffusionGenerationMixin
from .diffusion_modules import attend, run_layers


class LLaDABlock(nn.Module):
    """A layer; ``ff_proj`` is the gate of its network, ``ff_out`` what writes back."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, width, bias = config.d_model, config.mlp_hidden_size, config.include_qkv_bias
        self.head_dim = size // config.n_heads
        kv_heads = config.n_kv_heads or (1 if config.multi_query_attention else config.n_heads)
        kv_size = kv_heads * self.head_dim
        self.attn_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, kv_size, bias=bias)
        self.v_proj = nn.Linear(size, kv_size, bias=bias)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.ff_out = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pairs: Tensor | None) -> Tensor:
        """Add both branches to [B, L, D]."""
        normed = self.attn_norm(x)
        q, k, v = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        x = x + self.attn_out(attend(q, k, v, self.head_dim, rope, pairs))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class TiedEmbedding(nn.Embedding):
    """An embedding that is the head as well."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows [B, L, D] of tokens [B, L], or logits [B, L, V] of hidden states [B, L, D], which are floating."""
        return F.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class LLaDATransformer(nn.Module):
    """The trunk, and the head where it is not the embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        rows = config.embedding_size or config.vocab_size
        self.wte = (TiedEmbedding if config.weight_tying else nn.Embedding)(rows, config.d_model)
        self.blocks = nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers))
        self.ln_f = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.ff_out = None if config.weight_tying else nn.Linear(config.d_model, rows, bias=False)


class LLaDAModel(nn.Module):
    """What holds the trunk."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transformer = LLaDATransformer(config)


class LLaDAModelLM(DiffusionGenerationMixin, PreTrainedModel):
    """LLaDA with its head: the output of a position says that position's token."""

    config_class = LLaDAConfig
    model: Any
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding, to which nothing has to be tied then."""
        return self.model.transformer.ff_out

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.transformer.ff_out = new_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of tokens [B, L]; ``attention_mask`` as ``attention_pairs`` takes it."""
        parts, head_dim = self.model.transformer, self.config.d_model // self.config.n_heads
        x = parts.wte(input_ids)
        x = parts.ln_f(run_layers(parts.blocks, x, self.config, head_dim, attention_mask, position_ids))
        return MaskedLMOutput(logits=(parts.ff_out or parts.wte)(x))
