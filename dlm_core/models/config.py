"""Shape of a denoiser, its validation, and what it costs, all without building the model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

MaskFamily = Literal["full", "causal", "annealed", "block_causal", "block_diffusion"]
Init = Literal["normal", "scaled_normal", "small", "mitchell", "mdlm"]

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu"]
RouterScore = Literal["softmax", "sigmoid"]
Stretch = Literal["linear", "llama3", "yarn"]

NUM_TIME_FREQUENCIES = 256
"""Numbers that tell the noise level to the network of the conditioning vector: cosines, then sines."""


def _check_choice(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f'{name} is "{value}"; it must be one of {", ".join(get_args(kind))}')


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for rows longer than those a model was first trained on.

    ``linear`` divides all of them by factor (arXiv 2306.15595); ``llama3`` only the slow ones, with a ramp between
    wavelengths of original_seq_len / high_factor and / low_factor; ``yarn`` ramps between the dimensions that turn
    high_factor and low_factor times over original_seq_len, and scales the attention by 0.1 ln(factor) + 1
    (arXiv 2309.00071).  Raises ValueError for values that make no ramp.
    """

    kind: Stretch
    factor: float
    original_seq_len: int | None = None
    low_factor: float | None = None
    high_factor: float | None = None

    def __post_init__(self) -> None:
        _check_choice("rope_scaling.kind", self.kind, Stretch)
        if not 1.0 < self.factor < math.inf:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be above 1, or rope_scaling None")
        ramp = {name: getattr(self, name) for name in ("original_seq_len", "low_factor", "high_factor")}
        for name, value in ramp.items():
            if self.kind == "linear" and value is not None:
                raise ValueError(f"rope_scaling.{name} is {value}, which linear scaling ignores; leave it out")
            if self.kind != "linear" and (value is None or value <= 0):
                raise ValueError(f"rope_scaling.{name} is {value}; {self.kind} scaling needs a number above 0")
        if self.low_factor is not None and self.high_factor is not None and self.low_factor >= self.high_factor:
            raise ValueError(
                f"rope_scaling runs from low_factor {self.low_factor} to high_factor {self.high_factor}; "
                "low_factor must be the smaller"
            )


@dataclass(frozen=True)
class MoE:
    """Mixture of experts in place of the dense network of some layers (DeepSeekMoE, arXiv 2401.06066); used by moe.py.

    Raises ValueError for sizes that don't fit, or a field that the others make idle.
    """

    num_experts: int
    top_k: int
    d_ff_expert: int
    num_shared_experts: int = 0
    """Experts that see every token, as one network num_shared_experts * d_ff_expert wide."""
    router_score: RouterScore = "softmax"
    renormalise: bool = True
    """Divide the chosen scores by their sum: true in Qwen3-MoE and LLaDA2, false in LLaDA-MoE."""
    routed_scale: float = 1.0
    num_groups: int = 1
    """Experts come in this many groups of equal size, and a token goes to experts of ``top_groups`` of them."""
    top_groups: int = 1
    selection_bias: bool = False
    """A bias an expert that moves the choice, not the weight (DeepSeek-V3, arXiv 2412.19437)."""
    first_k_dense: int = 0
    layer_frequency: int = 1
    """From layer first_k_dense on, one layer in layer_frequency has experts, the first of them among them."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "d_ff_expert", "num_groups", "top_groups", "layer_frequency"):
            if getattr(self, name) < 1:
                raise ValueError(f"moe.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_shared_experts", "first_k_dense"):
            if getattr(self, name) < 0:
                raise ValueError(f"moe.{name} is {getattr(self, name)}; it must not be negative")
        _check_choice("moe.router_score", self.router_score, RouterScore)
        if not 0 < self.routed_scale < math.inf:
            raise ValueError(f"moe.routed_scale is {self.routed_scale}; it must be positive and finite")
        if self.top_k > self.num_experts:
            raise ValueError(f"moe.top_k is {self.top_k}; there are only {self.num_experts} experts")
        if self.top_k == 1 and self.renormalise:
            raise ValueError(
                "moe.renormalise is true with top_k 1: every weight would be 1 and the router learn nothing; set it to "
                "false"
            )
        if self.top_k == self.num_experts and self.renormalise and self.router_score == "softmax":
            raise ValueError(
                f"moe.renormalise is true, but a softmax over all {self.num_experts} experts sums to 1; set it to false"
            )
        if self.top_k == self.num_experts and self.selection_bias:
            raise ValueError(f"moe.selection_bias is true, but top_k {self.top_k} takes every expert; set it to false")
        if self.num_experts % self.num_groups:
            raise ValueError(f"moe.num_groups is {self.num_groups}; it must divide num_experts {self.num_experts}")
        if self.top_groups > self.num_groups:
            raise ValueError(f"moe.top_groups is {self.top_groups}; there are only {self.num_groups} groups")
        if self.top_groups == self.num_groups > 1:
            raise ValueError(
                f"moe.top_groups is {self.top_groups} of {self.num_groups} groups, which limits nothing; lower it, or "
                "set both to 1"
            )
        if self.num_groups > 1 and self.experts_per_group < 2:
            raise ValueError(
                f"moe.num_groups is {self.num_groups} for {self.num_experts} experts; a group is ranked by its two "
                "best scores, so it needs at least 2 experts"
            )
        if self.top_k > self.top_groups * self.experts_per_group:
            raise ValueError(
                f"moe.top_k is {self.top_k}, but {self.top_groups} group(s) of {self.experts_per_group} experts hold "
                f"only {self.top_groups * self.experts_per_group}; raise top_groups or lower top_k"
            )

    @property
    def experts_per_group(self) -> int:
        """Experts in a group."""
        return self.num_experts // self.num_groups

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return layer >= self.first_k_dense and (layer - self.first_k_dense) % self.layer_frequency == 0


@dataclass(frozen=True)
class Architecture:
    """Shape of a pre-norm transformer: every model family here is a choice of these fields (presets.py).

    Raises ValueError, with field, value and what is allowed, for sizes that don't fit and for a field that the others
    make idle.
    """

    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Heads of keys and values; as many as num_heads by default."""
    head_dim: int | None = None
    """Size of a head; d_model / num_heads by default."""
    d_ff: int | None = 704
    """Width of the dense network; None where every layer has experts."""
    moe: MoE | None = None
    norm: Norm = "rms"
    """RMSNorm, or LayerNorm without a bias."""
    norm_eps: float = 1e-6
    activation: Activation = "swiglu"
    """A gated network (arXiv 2002.05202), or two matrices with biases around the tanh form of GELU."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of every query and key head before rotation, as in Qwen3: lets a small model learn at a high rate."""
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0
    """Share of a head's dimensions that is rotated, the first ones."""
    rope_scaling: RopeScaling | None = None
    cond_dim: int | None = None
    """Width of the conditioning vector of adaLN-zero (DiT, arXiv 2212.09748); no such modulation by default."""
    time_conditioning: bool = False
    """Whether that vector knows the noise level -log alpha_t; otherwise it is that of level 0."""
    tied_head: bool = True
    head_bias: bool = False
    init: Init = "scaled_normal"
    """How weights are drawn: init.py."""
    init_std: float | None = 0.02
    """Standard deviation of the two normal inits; None for the others, which have none."""

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "cond_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, kind in (("norm", Norm), ("activation", Activation), ("init", Init)):
            _check_choice(name, getattr(self, name), kind)
        if not 0 < self.norm_eps < math.inf:  # catches nan too
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be positive and finite")
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base is {self.rope_base}; it must be above 1 and finite")
        self._check_heads()
        self._check_feed_forward()
        self._check_rest()

    def _check_heads(self) -> None:
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}, or head_dim be given"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads {self.num_heads}")
        if not 0.0 < self.rope_fraction <= 1.0:
            raise ValueError(f"rope_fraction is {self.rope_fraction}; it must lie in (0, 1]")
        rotated = self.head_size * self.rope_fraction
        if self.rotary_dim % 2 or abs(rotated - self.rotary_dim) > 1e-6:
            raise ValueError(
                f"head_dim * rope_fraction is {self.head_size} * {self.rope_fraction} = {rotated:g}; rotary embeddings "
                "need an even number"
            )

    def _check_feed_forward(self) -> None:
        sparse = [self.is_sparse(layer) for layer in range(self.num_layers)]
        if self.moe is not None and not any(sparse):
            raise ValueError(
                f"moe.first_k_dense is {self.moe.first_k_dense}, so none of the {self.num_layers} layers has experts"
            )
        if self.moe is not None and self.moe.layer_frequency > max(1, self.num_layers - self.moe.first_k_dense):
            raise ValueError(
                f"moe.layer_frequency is {self.moe.layer_frequency}, more than the {self.num_layers} layers have after "
                f"first_k_dense {self.moe.first_k_dense}; lower it"
            )
        if self.moe is not None and self.activation != "swiglu":
            raise ValueError(f'activation is "{self.activation}"; experts are "swiglu"')
        if all(sparse) and self.d_ff is not None:
            raise ValueError(f"d_ff is {self.d_ff}, but every layer has experts, {self.moe}; set d_ff to None")
        if not all(sparse) and self.d_ff is None:
            raise ValueError(f"d_ff is None, but layer {sparse.index(False)} has no experts; give its width")

    def _check_rest(self) -> None:
        if self.time_conditioning and self.cond_dim is None:
            raise ValueError("time_conditioning is true without a cond_dim; give one, e.g. 128")
        if self.tied_head and self.init == "mdlm":
            raise ValueError('init "mdlm" begins with a head of zeros, so it needs tied_head false')
        if self.tied_head and self.head_bias:
            raise ValueError("head_bias is true, but a head that is the embedding has none; set tied_head to false")
        has_std = self.init in ("normal", "scaled_normal")
        if has_std and not (self.init_std is not None and 0 < self.init_std < math.inf):
            raise ValueError(f'init_std is {self.init_std}; init "{self.init}" needs a positive one')
        if not has_std and self.init_std is not None:
            raise ValueError(f'init_std is {self.init_std}, which init "{self.init}" ignores; set it to None')

    @property
    def head_size(self) -> int:
        """``head_dim``, with its default filled in."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """``num_kv_heads``, with its default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return round(self.head_size * self.rope_fraction)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts in place of a dense network."""
        return self.moe is not None and self.moe.is_sparse(layer)


@dataclass(frozen=True)
class ModelConfig:
    """A denoiser: its trunk and the vocabulary it speaks.

    Raises ValueError for a mask token outside the vocabulary, or a vocabulary without a real token.
    """

    architecture: Architecture
    vocab_size: int
    """Rows of the embedding, the mask token and any padding rows included."""
    mask_token_id: int | None
    """Whose logit is -inf; None: a next-token model that has no mask yet."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; there must be room for the mask and a real token")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}; "
                "enlarge vocab_size, or take an id that no text uses"
            )

    def num_params(self) -> int:
        """Number of parameters, a shared head counted once."""
        a = self.architecture
        tables = self.vocab_size * a.d_model * (1 if a.tied_head else 2) + (self.vocab_size if a.head_bias else 0)
        return self.num_non_embedding_params() + tables

    def num_non_embedding_params(self) -> int:
        """Number of parameters without the embedding and the head: the N of scaling laws (arXiv 2001.08361)."""
        return self._trunk(lambda moe: moe.num_experts)

    def num_active_params(self) -> int:
        """Parameters that one token's logits pass through: ``top_k`` experts a layer, and one vocabulary matrix.

        The row that an embedding looks up is no product, so that of the two vocabulary matrices the head counts.
        """
        a = self.architecture
        head = self.vocab_size * a.d_model + (self.vocab_size if a.head_bias else 0)
        return self._trunk(lambda moe: moe.top_k) + head

    def _trunk(self, experts: Callable[[MoE], int]) -> int:
        a = self.architecture
        total = a.d_model
        for layer in range(a.num_layers):
            total += self._layer_products(layer, experts) + 2 * a.d_model
            total += (a.num_heads + 2 * a.kv_heads) * a.head_size if a.qkv_bias else 0
            total += 2 * a.head_size if a.qk_norm else 0
            total += a.d_model + (a.d_ff or 0) if a.activation == "gelu" else 0
        if a.cond_dim is not None:
            modulations = 6 * a.num_layers + 2
            total += modulations * a.d_model * (a.cond_dim + 1)
            total += (NUM_TIME_FREQUENCIES + 1) * a.cond_dim + (a.cond_dim + 1) * a.cond_dim
        return total

    def _layer_products(self, layer: int, experts: Callable[[MoE], int]) -> int:
        """Weights of a layer that take part in a matrix product."""
        return self._key_value_weights() + self._query_weights() + self._feed_forward_weights(layer, experts)

    @property
    def is_last_selective(self) -> bool:
        """Whether logits need no more of the last layer than the positions asked for, beside keys and values."""
        a = self.architecture
        return a.cond_dim is None and not a.is_sparse(a.num_layers - 1)

    def _key_value_weights(self) -> int:
        a = self.architecture
        return 2 * a.d_model * a.kv_heads * a.head_size

    def _query_weights(self) -> int:
        """Of the queries and of what writes attention back."""
        a = self.architecture
        return 2 * a.d_model * a.num_heads * a.head_size

    def _feed_forward_weights(self, layer: int, experts: Callable[[MoE], int]) -> int:
        a = self.architecture
        if a.moe is not None and a.is_sparse(layer):
            width = (experts(a.moe) + a.moe.num_shared_experts) * a.moe.d_ff_expert
            return 3 * a.d_model * width + a.d_model * a.moe.num_experts
        return (3 if a.activation == "swiglu" else 2) * a.d_model * (a.d_ff or 0)

    def flops_per_token(
        self,
        seq_len: int,
        head_fraction: float = 1.0,
        *,
        family: MaskFamily = "full",
        block_size: int | None = None,
        training: bool = True,
    ) -> int:
        """Floating-point operations a token of the data, of a training step or of one forward pass (arXiv 2001.08361).

        Forward: 2 FLOP a weight of a matrix product, 4 * num_heads * head_dim a pair that may attend; in
        training three times that.  Pairs a token: seq_len (full, and annealed, where what is hidden is computed too),
        (seq_len + 1) / 2 (causal), (seq_len + block_size) / 2 (block_causal).  In block_diffusion a token of the data
        is one of each half of [xt ; x0], and together they have seq_len + block_size pairs; the last layer's clean half
        gives only keys and values.  ``head_fraction`` is the share of positions whose logits are computed, and out of
        training what follows attention in the last layer, where it can be left out elsewhere (``is_last_selective``).
        Recomputation and the modulation, once a row, don't count.

        Raises ValueError for an unknown family, a seq_len below 1, a head_fraction outside [0, 1], and a block_size
        that doesn't divide seq_len, is missing, or has no meaning for the family.
        """
        a = self.architecture
        _check_choice("family", family, MaskFamily)
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        if not 0.0 <= head_fraction <= 1.0:
            raise ValueError(f"head_fraction is {head_fraction}; it must lie in [0, 1]")
        blocks = family in ("block_causal", "block_diffusion")
        if not blocks and block_size is not None:
            raise ValueError(f'block_size is {block_size}, which the family "{family}" ignores; leave it out')
        if blocks and (block_size is None or block_size < 1 or seq_len % block_size):
            raise ValueError(f'block_size is {block_size}; "{family}" needs one that divides seq_len {seq_len}')
        size = block_size or 0
        halves = 2 if family == "block_diffusion" else 1
        pairs = {
            "full": seq_len,
            "annealed": seq_len,
            "causal": (seq_len + 1) / 2,
            "block_causal": (seq_len + size) / 2,
            "block_diffusion": seq_len + size,
        }[family]
        weights, attended = 0.0, 0.0
        for layer in range(a.num_layers):
            is_last = layer == a.num_layers - 1
            queries = 1 if is_last else halves
            feed_forward = self._feed_forward_weights(layer, lambda moe: moe.top_k)
            if is_last and not training and self.is_last_selective:
                rest = self._query_weights() / 2 + head_fraction * (self._query_weights() / 2 + feed_forward)
            else:
                rest = self._query_weights() + feed_forward
            weights += halves * self._key_value_weights() + queries * rest
            attended += (seq_len + size) / 2 if is_last and halves == 2 else pairs
        weights += head_fraction * self.vocab_size * a.d_model
        forward = 2 * weights + 4 * attended * a.num_heads * a.head_size
        return int((3 if training else 1) * forward)
