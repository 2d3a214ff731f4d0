"""Names and shapes of a denoiser's tensors, without building it: what a file of its weights has to hold."""

from collections.abc import Iterator

from dlm_core.models.config import NUM_TIME_FREQUENCIES, Architecture, ModelConfig

Shape = tuple[int, ...]
_BUFFER = "e_score_correction_bias"
"""Set from outside, to balance the experts."""


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every tensor of ``Denoiser(config).state_dict()``, in its order."""
    a = config.architecture
    return dict(_of_model(a, config.vocab_size))


def is_buffer(name: str) -> bool:
    """Whether a tensor is none that an optimizer trains."""
    return name.endswith("." + _BUFFER)


def _of_model(a: Architecture, vocab_size: int) -> Iterator[tuple[str, Shape]]:
    yield "embedding.weight", (vocab_size, a.d_model)
    if a.cond_dim is not None:
        yield from _linear("conditioning.up", NUM_TIME_FREQUENCIES, a.cond_dim, bias=True)
        yield from _linear("conditioning.out", a.cond_dim, a.cond_dim, bias=True)
    for layer in range(a.num_layers):
        yield from ((f"blocks.{layer}.{name}", shape) for name, shape in _of_block(a, layer))
    yield "norm.weight", (a.d_model,)
    if a.cond_dim is not None:
        yield from _linear("modulation", a.cond_dim, 2 * a.d_model, bias=True)
    if not a.tied_head:
        yield from _linear("head", a.d_model, vocab_size, bias=a.head_bias)


def _of_block(a: Architecture, layer: int) -> Iterator[tuple[str, Shape]]:
    queries, keys = a.num_heads * a.head_size, a.kv_heads * a.head_size
    yield "attention_norm.weight", (a.d_model,)
    yield from _linear("attention.qkv", a.d_model, queries + 2 * keys, bias=a.qkv_bias)
    yield from _linear("attention.out", queries, a.d_model)
    if a.qk_norm:
        yield "attention.q_norm.weight", (a.head_size,)
        yield "attention.k_norm.weight", (a.head_size,)
    yield "feed_forward_norm.weight", (a.d_model,)
    yield from ((f"feed_forward.{name}", shape) for name, shape in _of_feed_forward(a, layer))
    if a.cond_dim is not None:
        yield from _linear("modulation", a.cond_dim, 6 * a.d_model, bias=True)


def _of_feed_forward(a: Architecture, layer: int) -> Iterator[tuple[str, Shape]]:
    moe = a.moe
    if moe is None or not a.is_sparse(layer):
        yield from _dense(a.d_model, a.d_ff or 0, is_gated=a.activation == "swiglu")
        return
    yield "gate.weight", (moe.num_experts, a.d_model)
    if moe.selection_bias:
        yield f"gate.{_BUFFER}", (moe.num_experts,)
    yield "experts.gate_up_proj", (moe.num_experts, 2 * moe.d_ff_expert, a.d_model)
    yield "experts.down_proj", (moe.num_experts, a.d_model, moe.d_ff_expert)
    if moe.num_shared_experts:
        shared = _dense(a.d_model, moe.num_shared_experts * moe.d_ff_expert, is_gated=True)
        yield from ((f"shared_experts.{name}", shape) for name, shape in shared)


def _dense(d_model: int, d_ff: int, *, is_gated: bool) -> Iterator[tuple[str, Shape]]:
    yield from _linear("gate_up" if is_gated else "up", d_model, (2 if is_gated else 1) * d_ff, bias=not is_gated)
    yield from _linear("down", d_ff, d_model, bias=not is_gated)


def _linear(name: str, d_in: int, d_out: int, *, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (d_out, d_in)
    if bias:
        yield f"{name}.bias", (d_out,)
