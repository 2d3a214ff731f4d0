"""What a reader would write without us: the same architectures in plain torch, and transformers' own.

Each takes (xt [B, L], targets [B, L], weight [B, L], 0 where nothing is predicted) and returns the loss sum, from the
logits of every position in the dtype of the weights, softmax in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_core.models.config import Architecture, ModelConfig


def full_logits_loss(logits: Tensor, targets: Tensor, weight: Tensor, excluded: int | None) -> Tensor:
    """Weighted cross-entropy at every position; an ``excluded`` id has no probability, which costs a copy."""
    logits = logits.flatten(0, 1).float()
    if excluded is not None:
        logits = logits.index_fill(-1, torch.tensor([excluded], device=logits.device), -torch.inf)
    nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (nats * weight.flatten()).sum()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Attention(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.num_heads = a.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(a.d_model, a.d_model, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return self.o(y.transpose(1, 2).flatten(2))


class _SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(d_model, d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LoopMoE(nn.Module):
    """Experts that each own their parameters, one after the other on the tokens that chose them."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        assert a.moe is not None
        self.top_k = a.moe.top_k
        self.gate = nn.Linear(a.d_model, a.moe.num_experts, bias=False)
        self.experts = nn.ModuleList(_SwiGLU(a.d_model, a.moe.d_ff_expert) for _ in range(a.moe.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Each token's weighted sum over its experts."""
        flat = x.flatten(0, 1)
        scores, chosen = F.linear(flat.float(), self.gate.weight.float()).softmax(-1).topk(self.top_k, dim=-1)
        scores = scores / scores.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat.index_select(0, token)) * scores[token, slot, None].to(x.dtype))
        return out.view_as(x)


class _Layer(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.RMSNorm(a.d_model, eps=a.norm_eps) for _ in range(2))
        self.attention = _Attention(a)
        self.mlp = LoopMoE(a) if a.moe is not None else _SwiGLU(a.d_model, a.d_ff or 0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class PlainModel(nn.Module):
    """A textbook bidirectional transformer of an architecture, dense or with a loop over experts; untied head."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        a = config.architecture
        self.excluded: int | None = None
        self.embedding = nn.Embedding(config.vocab_size, a.d_model)
        self.layers = nn.ModuleList(_Layer(a) for _ in range(a.num_layers))
        self.norm = nn.RMSNorm(a.d_model, eps=a.norm_eps)
        self.head = nn.Linear(a.d_model, config.vocab_size, bias=False)
        frequency = a.rope_base ** (-torch.arange(0, a.head_size, 2) / a.head_size)
        angle = torch.outer(torch.arange(seq_len), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, xt: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """The loss sum."""
        x = self.embedding(xt)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return full_logits_loss(self.head(self.norm(x)), targets, weight, self.excluded)


class TransformersModel(nn.Module):
    """transformers' Llama made bidirectional, as LLaDA's users have it: its own logits, then the weighted loss."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        a = config.architecture
        self.excluded: int | None = None
        make: Any = LlamaConfig
        self.model: Any = LlamaForCausalLM(
            make(
                vocab_size=config.vocab_size,
                hidden_size=a.d_model,
                intermediate_size=a.d_ff,
                num_hidden_layers=a.num_layers,
                num_attention_heads=a.num_heads,
                num_key_value_heads=a.num_heads,
                rms_norm_eps=a.norm_eps,
                max_position_embeddings=seq_len,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False

    def forward(self, xt: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """The loss sum."""
        logits = self.model(input_ids=xt, attention_mask=None).logits
        return full_logits_loss(logits, targets, weight, self.excluded)
