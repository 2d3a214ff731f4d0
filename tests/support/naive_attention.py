"""Attention query by query, over the keys that a mask lists: no hidden key takes part in any sum."""

import torch
from torch import Tensor

from tests.support.attention import Mask


def attend(q: Tensor, k: Tensor, v: Tensor, masks: list[Mask], scale: float | None = None) -> Tensor:
    """softmax(scale q k) v for q [B, H, q, C] and k, v [B, G, k, C]; masks[b][query][key] lists who is seen.

    Head h of q belongs to head h // (H / G) of k and v.  Gradients flow as autograd has them.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    heads_per_group = q.shape[1] // k.shape[1]
    rows = []
    for b, mask in enumerate(masks):
        for h in range(q.shape[1]):
            for query, seen in enumerate(mask):
                group = h // heads_per_group
                keys = [key for key, is_seen in enumerate(seen) if is_seen]
                weights = torch.exp(scale * (k[b, group, keys] @ q[b, h, query]))
                rows.append(weights @ v[b, group, keys] / sum(weights))
    return torch.stack(rows).unflatten(0, q.shape[:3])


def gradients(out: Tensor, inputs: tuple[Tensor, ...], seed: int = 7) -> tuple[Tensor, ...]:
    """Of a fixed random projection of ``out``: the same for any two outputs of one shape."""
    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, inputs, direction)
