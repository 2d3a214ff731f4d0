"""Sizes of a denoiser, their validation, and what they cost, all without building the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Shape of the trunk: a pre-norm transformer with RMSNorm, RoPE and SwiGLU."""

    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    d_ff: int = 704
    qk_norm: bool = False
    """RMSNorm of every query and key head, as in Qwen3: lets a small model learn at a high rate."""
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim = d_model / num_heads is {self.head_dim}; rotary embeddings need an even number"
            )
        for name in ("rope_base", "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.d_model // self.num_heads


@dataclass(frozen=True)
class ModelConfig:
    """A denoiser: its trunk and the vocabulary it speaks.  The output head shares the embedding."""

    architecture: Architecture
    vocab_size: int
    """Rows of the embedding, the mask token and any padding rows included."""
    mask_token_id: int

    def __post_init__(self) -> None:
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}")

    def num_params(self) -> int:
        """Number of parameters, the shared embedding counted once."""
        a = self.architecture
        attention = 4 * a.d_model * a.d_model
        feed_forward = 3 * a.d_model * a.d_ff
        norms = 2 * a.d_model + (2 * a.head_dim if a.qk_norm else 0)
        return a.num_layers * (attention + feed_forward + norms) + a.d_model + self.vocab_size * a.d_model

    def flops_per_token(self, seq_len: int, head_fraction: float = 1.0) -> int:
        """Floating-point operations of one training step, forward and backward, a token.

        6 FLOP a weight that takes part in a matrix product, and 12 * seq_len * d_model a layer for full
        attention.  ``head_fraction`` is the share of positions whose logits are computed.
        """
        a = self.architecture
        trunk = a.num_layers * (4 * a.d_model * a.d_model + 3 * a.d_model * a.d_ff)
        head = head_fraction * self.vocab_size * a.d_model
        return int(6 * (trunk + head) + 12 * a.num_layers * seq_len * a.d_model)
