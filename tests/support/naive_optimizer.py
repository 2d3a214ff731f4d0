"""AdamW, Muon and the average of weights on a whole model, one parameter after the other, from their papers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dlm_core.models.config import ModelConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig


@dataclass
class NaiveOptimizer:
    """All state by the name of the parameter."""

    config: OptimizerConfig
    model_config: ModelConfig
    masters: dict[str, Tensor]
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        """One update of ``masters`` in place."""
        c, self.count = self.config, self.count + 1
        for name, p in self.masters.items():
            g = gradients[name]
            rate = lr * self._scale(name, p)
            old = p.clone()
            m = self.first.setdefault(name, torch.zeros_like(p))
            if c.kind == "muon" and is_hidden_matrix(name):
                m.copy_(c.muon_momentum * m + g)
                update = torch.zeros_like(p)
                for part in linear_maps(name, self.model_config):
                    update[part] = orthogonal(g[part] + c.muon_momentum * m[part], c.muon_iterations)
            else:
                v = self.second.setdefault(name, torch.zeros_like(p))
                m.copy_(c.beta1 * m + (1 - c.beta1) * g)
                v.copy_(c.beta2 * v + (1 - c.beta2) * g * g)
                update = (m / (1 - c.beta1**self.count)) / ((v / (1 - c.beta2**self.count)).sqrt() + c.eps)
            decay = c.weight_decay if p.ndim >= 2 else 0.0
            p.copy_(old - rate * decay * old - rate * update)
            d = min(c.ema_decay, (1 + self.count) / (10 + self.count))
            self.ema[name] = d * self.ema.get(name, old) + (1 - d) * p

    def _scale(self, name: str, p: Tensor) -> Tensor:
        scales, found = self.config.lr_scale, torch.ones_like(p)
        if name == "embedding.weight":
            found *= scales.embedding
            found[self.model_config.mask_token_id] *= scales.mask_embedding
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found *= scales.experts
        return found


def is_hidden_matrix(name: str) -> bool:
    """Whether Muon takes it, by a list of endings."""
    return name.endswith(
        ("qkv.weight", "out.weight", "gate_up.weight", "up.weight", "down.weight", "gate_up_proj", "down_proj")
    )


def linear_maps(name: str, config: ModelConfig) -> Iterator[tuple[int | slice, ...]]:
    """Indices of the parts of a parameter that are linear maps."""
    a = config.architecture
    if name.endswith("qkv.weight"):
        queries, keys = a.num_heads * a.head_size, a.kv_heads * a.head_size
        yield (slice(0, queries),)
        yield (slice(queries, queries + keys),)
        yield (slice(queries + keys, None),)
    elif name.endswith("gate_up.weight"):
        width = (a.d_ff or 0) if "shared_experts" not in name else a.moe.num_shared_experts * a.moe.d_ff_expert
        yield (slice(0, width),)
        yield (slice(width, 2 * width),)
    elif name.endswith("gate_up_proj"):
        for expert in range(a.moe.num_experts):
            yield expert, slice(0, a.moe.d_ff_expert)
            yield expert, slice(a.moe.d_ff_expert, None)
    elif name.endswith("down_proj"):
        yield from ((expert, slice(None)) for expert in range(a.moe.num_experts))
    else:
        yield (slice(None),)


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """The quintic of Newton and Schulz on the singular values alone, in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-30)
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (0.2 * math.sqrt(max(matrix.shape)) * (u * s) @ vt).to(matrix.dtype)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the last backward; zeros where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
