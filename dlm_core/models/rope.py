"""Rotary positions: the frequencies of a model, stretched or not, and the rotation itself.

Shapes: B rows or 1, L positions, C head_dim, R rotary_dim (the first dimensions of a head, an even number).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlm_core.models.config import Architecture, RopeScaling


class RopeTables(NamedTuple):
    """Cosines and sines of the angles of every position, halves repeated."""

    cos: Float[Tensor, "B L R"]
    sin: Float[Tensor, "B L R"]


def rope_frequencies(a: Architecture, device: str | torch.device = "cpu") -> Float[Tensor, " R_2"]:
    """Angle a position of every rotated pair, float64:  base ** (-2 i / rotary_dim), stretched by ``rope_scaling``.

    RoFormer (arXiv 2104.09864) eq. 15.
    """
    pairs = torch.arange(0, a.rotary_dim, 2, dtype=torch.float64, device=device)
    frequency = a.rope_base ** (-pairs / a.rotary_dim)
    if a.rope_scaling is None:
        return frequency
    kept = _kept(frequency, a, a.rope_scaling)
    return kept * frequency + (1.0 - kept) * frequency / a.rope_scaling.factor


def _kept(frequency: Tensor, a: Architecture, scaling: RopeScaling) -> Tensor:
    """How much of each frequency stays as it is: 1 where it is fast, 0 where it is slow, a ramp between."""
    if scaling.original_seq_len is None or scaling.low_factor is None or scaling.high_factor is None:
        return torch.zeros_like(frequency)  # linear: everything is stretched
    if scaling.kind == "llama3":
        turns = scaling.original_seq_len * frequency / (2 * math.pi)
        return ((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)).clamp(0.0, 1.0)
    fast, slow = (
        a.rotary_dim * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(a.rope_base))
        for turns in (scaling.high_factor, scaling.low_factor)
    )
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), a.rotary_dim - 1)
    numbers = torch.arange(len(frequency), dtype=torch.float64, device=frequency.device)
    ramp = (numbers - first) / max(last - first, 1e-3)
    return 1.0 - ramp.clamp(0.0, 1.0)


def rope_tables(positions: Int[Tensor, "B L"], a: Architecture) -> RopeTables:
    """Cosine and sine of  position * frequency, in float64, times the attention factor of yarn.

    YaRN (arXiv 2309.00071) eq. 22 as its code has it: 0.1 ln(factor) + 1 on both, so on the rotated dimensions alone.
    """
    frequency = rope_frequencies(a, positions.device)
    angle = positions[..., None].to(torch.float64) * frequency
    angle = torch.cat([angle, angle], dim=-1)
    is_yarn = a.rope_scaling is not None and a.rope_scaling.kind == "yarn"
    factor = 0.1 * math.log(a.rope_scaling.factor) + 1.0 if a.rope_scaling is not None and is_yarn else 1.0
    return RopeTables(angle.cos() * factor, angle.sin() * factor)


def apply_rope(x: Float[Tensor, "B H L C"], tables: RopeTables) -> Float[Tensor, "B H L C"]:
    """Rotate each pair (x_i, x_{i + R/2}) of the first R dimensions by the angle of its position; the rest stays.

    RoFormer (arXiv 2104.09864) eq. 34, with the pairing of Llama checkpoints.  The tables' dtype decides the precision;
    the result has the dtype of x.
    """
    cos, sin = (table[:, None] for table in tables)
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = (rotated * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)
