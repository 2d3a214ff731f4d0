"""What a training pass keeps for its way back, in bytes, counted from the shape of the model alone.  No torch here.

Shapes: d d_model, Q num_heads * head_dim, K num_kv_heads * head_dim, F d_ff, E experts, k top_k, V vocab_size; b bytes
of a number in the precision of the products.
"""

from dataclasses import dataclass
from typing import Literal

from dlm_core.models.config import Architecture, ModelConfig, MoE

Precision = Literal["fp32", "bf16"]
NUM_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
CHUNK_BYTES = 128 << 20
"""Logits in float32 that the head holds at once: ``dlm_core.cross_entropy.CHUNK_BYTES``, which can't be had without
torch."""
_INDEX = 8


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of one worker."""

    rows: int
    """Rows of the micro batch."""
    seq_len: int
    precision: Precision
    block_diffusion: bool = False
    """Whether the sequence is [xt ; x0], twice as long; the last layer's clean half gives keys and values alone."""
    ep_size: int = 0
    """Workers that share the experts of a layer through AutoEP, whose layers keep more; 0: ours."""
    on_gpu: bool = True
    """On a CPU torch has no fused RMSNorm."""

    @property
    def queries(self) -> int:
        """Positions that the last layer is asked for: those of the text."""
        return self.rows * self.seq_len

    @property
    def positions(self) -> int:
        """Positions of the sequence."""
        return self.queries * (2 if self.block_diffusion else 1)


def kept_by_layers(a: Architecture, p: Pass) -> list[int]:
    """Bytes that each layer keeps for its backward pass."""
    last = a.num_layers - 1
    return [kept_by_layer(a, layer, p, p.queries if layer == last else p.positions) for layer in range(a.num_layers)]


def kept_by_layer(a: Architecture, layer: int, p: Pass, queries: int) -> int:
    """What autograd saves of one block, of which the first ``queries`` positions ask and all answer.

    positions * (norm + d b + 3 K b)  for what makes keys and values, rotated keys, and the product that values lie in;
    queries * (3 Q b + norm + d b + network)  for that product's queries, rotated ones, and what attention gives.
    """
    b = NUM_BYTES[p.precision]
    q, kv = a.num_heads * a.head_size, a.kv_heads * a.head_size
    asked = _norm(a, p) + a.d_model * b + 2 * q * b + 4 * a.num_heads + network_kept(a, layer, p)
    answering = _norm(a, p) + a.d_model * b + 3 * kv * b
    if queries == p.positions or a.qk_norm:  # else rows of their own, of which nothing is kept
        asked += q * b
    if a.qk_norm or a.rope_fraction < 1.0:  # queries that lie otherwise in memory, and so a second copy of the output
        asked += q * b
    if a.qk_norm:
        asked += _head_norm(a.num_heads, a.head_size, p)
        answering += _head_norm(a.kv_heads, a.head_size, p)
    if a.cond_dim is not None:  # what is shifted and scaled twice, and what is gated twice
        asked += 3 * a.d_model * b
        answering += a.d_model * b
    once = 4 * a.d_model * a.moe.num_experts if a.moe is not None and a.is_sparse(layer) and b == 2 else 0
    return p.positions * answering + queries * asked + once


def _norm(a: Architecture, p: Pass) -> int:
    """Input and statistics of a norm; a CPU takes an RMSNorm apart, in float32, and keeps what is normed too."""
    if a.norm == "layer":
        return a.d_model * NUM_BYTES[p.precision] + 8
    return a.d_model * NUM_BYTES[p.precision] + 4 if p.on_gpu else 2 * a.d_model * 4 + 4


def _head_norm(heads: int, size: int, p: Pass) -> int:
    """Beyond its input, which is part of the product before it."""
    if p.on_gpu:
        return 4 * heads
    return (1 if p.precision == "fp32" else 2) * heads * size * 4 + 4 * heads


def network_kept(a: Architecture, layer: int, p: Pass) -> int:
    """Bytes a position of a dense network, 4 F b (gated) or 2 F b, or of experts."""
    b = NUM_BYTES[p.precision]
    if a.moe is None or not a.is_sparse(layer):
        return (4 if a.activation == "swiglu" else 2) * (a.d_ff or 0) * b
    m = a.moe
    shared = 4 * m.num_shared_experts * m.d_ff_expert * b
    return shared + _router_kept(a, m, p) + _experts_kept(a, m, p)


def _router_kept(a: Architecture, m: MoE, p: Pass) -> int:
    """Tokens in float32 unless they are, scores of the choice, logits and softmax of the losses, ids of the choice."""
    return (0 if p.precision == "fp32" else 4 * a.d_model) + 3 * 4 * m.num_experts + _INDEX * m.top_k


def _experts_kept(a: Architecture, m: MoE, p: Pass) -> int:
    """Gate and up of k experts, 2 F k b, and where each pair went; through AutoEP 4 F k b and each pair's token on its
    way in and out, 2 d k b."""
    b = NUM_BYTES[p.precision]
    if p.ep_size:
        return m.top_k * (b * (4 * m.d_ff_expert + 2 * a.d_model) + 4 + 2 * _INDEX)
    return m.top_k * (2 * m.d_ff_expert * b + 4 + 2 * _INDEX)


def passed_back(a: Architecture, p: Pass) -> int:
    """Gradients of the widest layer while it is passed back, beyond what it frees on the way.

    Gated network: gate and up (2 F b) and the stream on both sides (2 d b); experts: those of k experts and the tokens
    of the pairs, gathered again (k (5 F + 2 d) b).
    """
    b = NUM_BYTES[p.precision]
    widest = 0
    for layer in range(a.num_layers):
        if a.moe is not None and a.is_sparse(layer):
            width = a.moe.top_k * (5 * a.moe.d_ff_expert + 2 * a.d_model)
        else:
            width = 2 * (a.d_ff or 0)
        widest = max(widest, (width + 2 * a.d_model) * b)
    return widest * p.positions


def kept_outside(model: ModelConfig, p: Pass) -> int:
    """Ids, the last norm and its gradient for the head: what a pass keeps outside of its layers, but for the head."""
    a = model.architecture
    return p.positions * _INDEX + p.queries * (_norm(a, p) + 2 * _INDEX)


def head_bytes(model: ModelConfig, p: Pass, masked_share: float = 1.0) -> int:
    """The masked rows and their gradients, the gradient of the head, and the logits of a chunk of rows or, when that is
    over, what scales the gradient: the more of the two.

    fp32: 4 V d + 4 c V, or 8 V d; bf16: 6 V d + 6 c V, or 10 V d;  c rows a chunk.
    """
    b, table = NUM_BYTES[p.precision], model.vocab_size * model.architecture.d_model
    masked = int(p.queries * masked_share)
    chunk = min(masked, max(16, CHUNK_BYTES // (4 * model.vocab_size))) * model.vocab_size
    forward, backward = (4 * table + 4 * chunk, 8 * table) if b == 4 else (6 * table + 6 * chunk, 10 * table)
    return 3 * masked * model.architecture.d_model * b + max(forward, backward)
