"""Mixtures of experts by loops over lists of Python floats: independent of dlm_core but for the sizes."""

import math
from collections.abc import Sequence

from dlm_core.models.config import MoE

Vector = Sequence[float]
Matrix = Sequence[Vector]


def scores(logits: Vector, moe: MoE) -> list[float]:
    """Softmax, or a sigmoid each."""
    if moe.router_score == "sigmoid":
        return [1.0 / (1.0 + math.exp(-z)) for z in logits]
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def chosen(logits: Vector, moe: MoE, bias: Vector | None) -> list[int]:
    """Ids of a token's experts: by biased score, from the groups with the largest sum of two."""
    biased = [s + b for s, b in zip(scores(logits, moe), bias or [0.0] * len(logits), strict=True)]
    size = len(logits) // moe.num_groups
    rank = {g: sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(moe.num_groups)}
    groups = sorted(rank, key=lambda g: -rank[g])[: moe.top_groups]
    allowed = [e for e in range(len(logits)) if e // size in groups]
    return sorted(allowed, key=lambda e: -biased[e])[: moe.top_k]


def routed(logits: Vector, moe: MoE, bias: Vector | None) -> dict[int, float]:
    """Expert -> weight."""
    unbiased = scores(logits, moe)
    ids = chosen(logits, moe, bias)
    total = sum(unbiased[e] for e in ids) if moe.renormalise else 1.0
    return {e: moe.routed_scale * unbiased[e] / total for e in ids}


def times(matrix: Matrix, x: Vector) -> list[float]:
    """Matrix times vector."""
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in matrix]


def swiglu(x: Vector, gate_up: Matrix, down: Matrix) -> list[float]:
    """The first half of the rows is the gate."""
    both = times(gate_up, x)
    half = len(both) // 2
    hidden = [g / (1.0 + math.exp(-g)) * u for g, u in zip(both[:half], both[half:], strict=True)]
    return times(down, hidden)


def mixture(x: Vector, weights: dict[int, float], gate_up: Sequence[Matrix], down: Sequence[Matrix]) -> list[float]:
    """Weighted sum over the experts of one token."""
    total = [0.0] * len(x)
    for expert, weight in weights.items():
        for i, value in enumerate(swiglu(x, gate_up[expert], down[expert])):
            total[i] += weight * value
    return total


def balance(logits: Sequence[Matrix], valid: Sequence[Sequence[bool]], moe: MoE, bias: Vector | None) -> float:
    """The balance loss of all rows as one group; 0 without a valid token."""
    tokens = [z for row, keep in zip(logits, valid, strict=True) for z, k in zip(row, keep, strict=True) if k]
    if not tokens:
        return 0.0
    total = 0.0
    for expert in range(moe.num_experts):
        share = sum(expert in chosen(z, moe, bias) for z in tokens) / (len(tokens) * moe.top_k)
        probs = [scores(z, moe)[expert] / sum(scores(z, moe)) for z in tokens]
        total += share * sum(probs) / len(tokens)
    return moe.num_experts * total


def z(logits: Matrix) -> float:
    """Sum of squared log partition functions."""
    return sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits)
