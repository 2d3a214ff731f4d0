"""What the diffusion models of this folder are made of, for transformers 4.57 and 5.

Shapes: B batch, L positions, N tokens, D hidden size, H heads, G key and value heads, C head size, R rotated
dimensions of a head, E experts, K experts a token.

Nothing here keeps a buffer that is not in the checkpoint: transformers 5 makes a model without memory and fills in what
the checkpoint holds, so that such a buffer would be left with whatever the memory holds.  And a weight is read in the
forward of its own module alone: what brings offloaded weights in hangs on the call of the module.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rotary positions

_LENGTH = "original_max_position_embeddings"
ROPE_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _LENGTH, "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
"""What each way to stretch is told, beside the base."""


def rope_frequencies(rope: dict[str, Any], rotary_dim: int, max_position_embeddings: int) -> Tensor:
    """Angle a position of every pair [R / 2], float64:  rope_theta ** (-2 i / R), stretched as ``rope_type`` says.

    RoFormer (arXiv 2104.09864) eq. 15; linear stretch (2306.15595); llama3; yarn (2309.00071).  Raises ValueError for a
    setting that is not computed here.
    """
    kind, base = rope["rope_type"], float(rope["rope_theta"])
    if kind not in ROPE_SETTINGS:
        raise ValueError(f'rope_type is "{kind}"; it must be one of {", ".join(ROPE_SETTINGS)}')
    known = ("rope_type", "rope_theta", "type", "partial_rotary_factor", *ROPE_SETTINGS[kind])
    if unknown := [name for name, value in rope.items() if value is not None and name not in known]:
        raise ValueError(f'rope_scaling has {", ".join(unknown)}, which is not computed for "{kind}"')
    frequency = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    if kind == "default":
        return frequency
    length = rope.get(_LENGTH) or max_position_embeddings
    kept = torch.zeros_like(frequency)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    elif kind == "yarn":
        fast, slow = (
            rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        )
        if rope.get("truncate", True):
            fast, slow = math.floor(fast), math.ceil(slow)
        first, last = max(fast, 0), min(slow, rotary_dim - 1)
        ramp = (torch.arange(len(frequency), dtype=torch.float64) - first) / max(last - first, 1e-3)
        kept = 1.0 - ramp.clamp(0.0, 1.0)
    return kept * frequency + (1.0 - kept) * frequency / rope["factor"]


def rope_tables(config: Any, position_ids: Tensor, head_dim: int, fraction: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, L, R] of every position, from the configuration and from nothing else."""
    rope, rotary_dim = config.rope_parameters, round(head_dim * fraction)
    device = position_ids.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which has no float64
    frequency = rope_frequencies(rope, rotary_dim, config.max_position_embeddings).to(device, dtype)
    angle = position_ids[:, None, :, None].to(dtype) * frequency
    angle = torch.cat([angle, angle], dim=-1)
    factor = 1.0
    if rope["rope_type"] == "yarn":
        factor = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0
    return angle.cos() * factor, angle.sin() * factor


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + R/2}) of the first R dimensions by the angle of its position."""
    cos, sin = (table.to(torch.promote_types(x.dtype, torch.float32)) for table in rope)
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


# Attention


def attention_pairs(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask in the form of ``scaled_dot_product_attention``: [B, 1, 1 or L, L], or None: everyone sees everyone.

    Takes [B, L] (1 or True: a token, 0: padding, which nobody sees), [B, L, L] or [B, 1, L, L], of the queries and the
    keys, as numbers to add where it is floating, else as what may attend.  Raises ValueError for another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        return attention_mask.bool()[:, None, None, :]
    pairs = attention_mask[:, None] if attention_mask.ndim == 3 else attention_mask
    if pairs.ndim != 4:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; wanted [B, L], [B, L, L] or [B, 1, L, L]")
    return pairs.to(dtype) if pairs.is_floating_point() else pairs.bool()


def attend(
    q: Tensor, k: Tensor, v: Tensor, head_dim: int, rope: tuple[Tensor, Tensor], pairs: Tensor | None, *norms: nn.Module
) -> Tensor:
    """Attention in both directions of projected [B, L, H C] and [B, L, G C]: split, norms of q and k, rotate, mix."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if norms:
        q, k = (norm(x) for norm, x in zip(norms, (q, k), strict=True))
    q, k = rotate(q, rope), rotate(k, rope)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention with Llama's names."""

    def __init__(self, config: Any, *, qkv_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, size, bias=qkv_bias)
        self.k_proj = nn.Linear(size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.has_norms = qk_norm
        if qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], pairs: Tensor | None) -> Tensor:
        """Map [B, L, D]."""
        norms = (self.q_norm, self.k_norm) if self.has_norms else ()
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(attend(q, k, v, self.head_dim, rope, pairs, *norms))


# Layers


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    config: Any,
    head_dim: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    fraction: float = 1.0,
) -> Tensor:
    """Map [B, L, D] by one layer after the other; positions are 0..L-1 by default."""
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=x.device)[None]
    rope = rope_tables(config, position_ids, head_dim, fraction)
    pairs = attention_pairs(attention_mask, x.dtype)
    for layer in layers:
        x = layer(x, rope, pairs)
    return x


class Trunk(nn.Module):
    """Embedding, layers and norm with Llama's names."""

    def __init__(self, config: Any, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Normalised hidden states [B, L, D] of tokens [B, L]."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        x = self.embed_tokens(input_ids)
        return self.norm(run_layers(self.layers, x, self.config, head_dim, attention_mask, position_ids))


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202):  down(silu(gate) * up)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map each position by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Logits of the experts, in float32 or more.

    It is no ``nn.Linear``: what makes 8 or 4 bits of a model's weights replaces those, and other experts would be
    chosen.  So transformers does not draw it by itself either: ``draw`` does.
    """

    def __init__(self, size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size))

    def draw(self, deviation: float) -> None:
        """Draw the weight, of a model that is made without one."""
        nn.init.normal_(self.weight, std=deviation)  # transformers 5 keeps this function off what was loaded

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, E] of tokens [N, D]."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return F.linear(tokens.to(dtype), self.weight.to(dtype))


def mix_experts(experts: Iterable[nn.Module], tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over a token's experts [N, K] of weight * expert(token), [N, D]: one expert after the other."""
    mixed = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, weights.dtype))
    for number, expert in enumerate(experts):
        token, slot = (expert_ids == number).nonzero(as_tuple=True)
        if len(token):
            mixed.index_add_(0, token, (expert(tokens[token]) * weights[token, slot, None]).to(mixed.dtype))
    return mixed.to(tokens.dtype)
