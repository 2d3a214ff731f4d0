"""The DiT of MDLM and BD3-LM in the names and the layout of their files, one position and one head at a time; float64.

Written from the formulas of their public model files (kuleshov-group/mdlm and bd3lms, models/dit.py and models/hf):
sigma -> [cos, sin] of sigma * exp(-ln(10000) i / 128) -> Linear, SiLU, Linear -> SiLU; a block modulates each branch
with shift, scale and gate of its own, attention first; queries, keys and values are rows (three, head, dim) of one
matrix; rotate-half positions of base 10000; LayerNorm of eps 1e-5 without a bias; GELU in its tanh form.
"""

import math

import torch
import torch.nn.functional as F

EPS = 1e-5


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + EPS) * weight


def _turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """x cos + rotate_half(x) sin, the angles repeated for both halves."""
    half = len(x) // 2
    angles = torch.tensor([position * 10_000 ** (-2 * i / len(x)) for i in range(half)] * 2, dtype=x.dtype)
    return x * angles.cos() + torch.cat([-x[half:], x[:half]]) * angles.sin()


def _linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def _condition(w: dict[str, torch.Tensor], sigma: float) -> torch.Tensor:
    angles = [sigma * math.exp(-math.log(10_000) * i / 128) for i in range(128)]
    waves = torch.tensor([math.cos(x) for x in angles] + [math.sin(x) for x in angles], dtype=torch.float64)
    return F.silu(_linear(w, "sigma_map.mlp.2", F.silu(_linear(w, "sigma_map.mlp.0", waves))))


def logits(
    state: dict[str, torch.Tensor],
    tokens: list[int],
    positions: list[int],
    may_attend: torch.Tensor,
    sigma: float,
    num_heads: int,
) -> torch.Tensor:
    """[S, V] of one sequence; may_attend [S, S]."""
    w = {name.removeprefix("backbone."): tensor.double() for name, tensor in state.items()}
    has_condition = "sigma_map.mlp.0.weight" in w
    c = _condition(w, sigma) if has_condition else torch.zeros(0)
    x = [w["vocab_embed.embedding"][token] for token in tokens]
    width = len(x[0])
    neutral = (torch.zeros(width), torch.zeros(width), torch.ones(width))
    size = width // num_heads
    layer = 0
    while f"blocks.{layer}.norm1.weight" in w:
        block = {name.removeprefix(f"blocks.{layer}."): tensor for name, tensor in w.items()}
        parts = _linear(block, "adaLN_modulation", c).chunk(6) if has_condition else (*neutral, *neutral)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        packed = [block["attn_qkv.weight"] @ (_norm(v, block["norm1.weight"]) * (1 + scale) + shift) for v in x]
        qkv = [row.view(3, num_heads, size) for row in packed]
        mixed = []
        for i in range(len(x)):
            heads = []
            for h in range(num_heads):
                seen = [j for j in range(len(x)) if may_attend[i, j]]
                q = _turned(qkv[i][0, h], positions[i])
                scores = torch.stack([q @ _turned(qkv[j][1, h], positions[j]) / math.sqrt(size) for j in seen])
                heads.append(sum(p * qkv[j][2, h] for p, j in zip(scores.softmax(0), seen, strict=True)))
            mixed.append(torch.cat(heads))
        x = [v + gate * (block["attn_out.weight"] @ m) for v, m in zip(x, mixed, strict=True)]
        hidden = [_norm(v, block["norm2.weight"]) * (1 + scale_mlp) + shift_mlp for v in x]
        hidden = [_linear(block, "mlp.2", F.gelu(_linear(block, "mlp.0", h), approximate="tanh")) for h in hidden]
        x = [v + gate_mlp * h for v, h in zip(x, hidden, strict=True)]
        layer += 1
    last = _linear(w, "output_layer.adaLN_modulation", c).chunk(2) if has_condition else neutral[:2]
    shift, scale = last
    x = [_norm(v, w["output_layer.norm_final.weight"]) * (1 + scale) + shift for v in x]
    return torch.stack([_linear(w, "output_layer.linear", v) for v in x])
