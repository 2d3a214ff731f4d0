"""The denoiser: a bidirectional transformer with RMSNorm, RoPE and SwiGLU, all in this file.

Shapes: B batch, L seq_len, D d_model, H heads, C head_dim, F d_ff, V vocab, M selected positions.
It knows nothing of devices, workers or checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlm_core.cross_entropy import HeadLoss, exclude_token, masked_cross_entropy
from dlm_core.models.config import Architecture, ModelConfig


def rope_tables(seq_len: int, head_dim: int, base: float) -> tuple[Float[Tensor, "L C"], Float[Tensor, "L C"]]:
    """Cosine and sine of the rotary angles  position * base ** (-2 i / head_dim), halves repeated.

    RoFormer (arXiv 2104.09864) eq. 34, with the pairing (i, i + head_dim / 2) that Llama checkpoints use.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def apply_rope(
    x: Float[Tensor, "B H L C"], cos: Float[Tensor, "L C"], sin: Float[Tensor, "L C"]
) -> Float[Tensor, "B H L C"]:
    """Rotate each pair (x_i, x_{i + C/2}) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


class Attention(nn.Module):
    """Full (bidirectional) multi-head attention with rotary positions."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.num_heads = a.num_heads
        self.qkv = nn.Linear(a.d_model, 3 * a.d_model, bias=False)
        self.out = nn.Linear(a.d_model, a.d_model, bias=False)
        self.q_norm = nn.RMSNorm(a.head_dim, eps=a.norm_eps) if a.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(a.head_dim, eps=a.norm_eps) if a.qk_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B L D"], cos: Float[Tensor, "L C"], sin: Float[Tensor, "L C"]
    ) -> Float[Tensor, "B L D"]:
        """Every position attends to every position."""
        q, k, v = rearrange(self.qkv(x), "b l (n h c) -> n b h l c", n=3, h=self.num_heads)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "b h l c -> b l (h c)"))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202):  down(silu(gate(x)) * up(x))."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_up = nn.Linear(a.d_model, 2 * a.d_ff, bias=False)
        self.down = nn.Linear(a.d_ff, a.d_model, bias=False)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Map each position by itself."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm residual block: attention, then the feed-forward network."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(a.d_model, eps=a.norm_eps)
        self.attention = Attention(a)
        self.feed_forward_norm = nn.RMSNorm(a.d_model, eps=a.norm_eps)
        self.feed_forward = FeedForward(a)

    def forward(
        self, x: Float[Tensor, "B L D"], cos: Float[Tensor, "L C"], sin: Float[Tensor, "L C"]
    ) -> Float[Tensor, "B L D"]:
        """Add both branches to the residual stream."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Denoiser(nn.Module):
    """p(x0 | xt): logits over the real vocabulary for chosen positions of a noised sequence.

    There is no time input: the number of masks says how noisy a sequence is (MDLM, arXiv 2406.07524,
    table 12, finds conditioning on t of no use).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a = config.architecture
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, a.d_model)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.num_layers))
        self.norm = nn.RMSNorm(a.d_model, eps=a.norm_eps)

    def init_weights(self, init_seed: int) -> None:
        """Draw every matrix from N(0, init_std^2), in a fixed order and on the CPU, from init_seed.

        The two matrices that write into the residual stream are scaled by 1 / sqrt(2 num_layers), as in
        GPT-2; norms are set to 1.
        """
        a = self.config.architecture
        generator = torch.Generator().manual_seed(init_seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim < 2:
                    parameter.fill_(1.0)
                    continue
                writes_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                std = a.init_std / math.sqrt(2 * a.num_layers) if writes_residual else a.init_std
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(drawn * std)

    def forward(
        self,
        xt: Int[Tensor, "B L"],
        select: Int[Tensor, " M"] | None = None,
        targets: Int[Tensor, " M"] | None = None,
        weight: Float[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M V"] | HeadLoss:
        """Logits at the flat positions ``select`` of xt (all by default), -inf for the mask token; or the loss there.

        ``select`` indexes xt.flatten(); the head, the widest product of a small model, runs on those rows alone.  With
        ``targets`` and ``weight`` their weighted cross-entropy is returned (``masked_cross_entropy``) and the logits of
        all rows are never held.  Raises ValueError for one without the other.
        """
        a = self.config.architecture
        cos, sin = rope_tables(xt.shape[1], a.head_dim, a.rope_base)
        cos, sin = cos.to(xt.device), sin.to(xt.device)
        x = self.embedding(xt)
        for block in self.blocks:
            x = block(x, cos, sin)
        rows = rearrange(x, "b l d -> (b l) d")
        hidden = self.norm(rows if select is None else rows[select])
        head, mask_token_id = self.embedding.weight, self.config.mask_token_id
        if targets is None and weight is None:
            return exclude_token(F.linear(hidden, head), mask_token_id)
        if targets is None or weight is None:
            raise ValueError("targets and weight come together, for a loss, or both stay out, for logits")
        return masked_cross_entropy(hidden, head, targets, weight, mask_token_id=mask_token_id)
