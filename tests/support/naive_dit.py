"""The DiT of MDLM once more, one row and one head at a time, straight from its description; float64."""

import math

import torch

from dlm_core.models.config import Architecture

Weights = dict[str, torch.Tensor]


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def condition(w: Weights, noise_level: float) -> torch.Tensor:
    """[cos; sin] of level * 10000^(-i / 128), then two matrices, each with a SiLU behind it."""
    angles = torch.tensor([noise_level * 10_000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    waves = torch.cat([torch.cos(angles), torch.sin(angles)])
    hidden = _silu(w["conditioning.up.weight"] @ waves + w["conditioning.up.bias"])
    return _silu(w["conditioning.out.weight"] @ hidden + w["conditioning.out.bias"])


def _rotate(x: torch.Tensor, position: int, base: float) -> torch.Tensor:
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * base ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def logits_of_row(
    w: Weights,
    a: Architecture,
    tokens: list[int],
    positions: list[int],
    conditions: list[torch.Tensor],
    may_attend: torch.Tensor,
) -> torch.Tensor:
    """[S, V] of one sequence; may_attend [S, S]; a conditioning vector a position."""
    head_dim, length = a.d_model // a.num_heads, len(tokens)
    x = w["embedding.weight"][tokens]
    for layer in range(a.num_layers):
        p = f"blocks.{layer}."
        parts = torch.stack([w[p + "modulation.weight"] @ c + w[p + "modulation.bias"] for c in conditions])
        shift, scale, gate, shift_2, scale_2, gate_2 = parts.split(a.d_model, dim=-1)
        h = _layer_norm(x, w[p + "attention_norm.weight"], a.norm_eps) * (1 + scale) + shift
        q, k, v = (h @ w[p + "attention.qkv.weight"].t()).split(a.d_model, dim=-1)
        heads = []
        for head in range(a.num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            turned_q = [_rotate(q[i, part], positions[i], a.rope_base) for i in range(length)]
            turned_k = [_rotate(k[i, part], positions[i], a.rope_base) for i in range(length)]
            rows = []
            for i in range(length):
                seen = [j for j in range(length) if may_attend[i, j]]
                scores = torch.stack([turned_q[i] @ turned_k[j] for j in seen]) / math.sqrt(head_dim)
                rows.append(sum(p_j * v[j, part] for p_j, j in zip(scores.softmax(0), seen, strict=True)))
            heads.append(torch.stack(rows))
        x = x + gate * (torch.cat(heads, dim=-1) @ w[p + "attention.out.weight"].t())
        h = _layer_norm(x, w[p + "feed_forward_norm.weight"], a.norm_eps) * (1 + scale_2) + shift_2
        up = _gelu(h @ w[p + "feed_forward.up.weight"].t() + w[p + "feed_forward.up.bias"])
        x = x + gate_2 * (up @ w[p + "feed_forward.down.weight"].t() + w[p + "feed_forward.down.bias"])
    parts = torch.stack([w["modulation.weight"] @ c + w["modulation.bias"] for c in conditions])
    shift, scale = parts.split(a.d_model, dim=-1)
    x = _layer_norm(x, w["norm.weight"], a.norm_eps) * (1 + scale) + shift
    return x @ w["head.weight"].t() + w["head.bias"]
