"""The denoiser: one pre-norm transformer whose options make every family of presets.py.

Shapes: B batch, L seq_len, S positions of the sequence (2 L for [xt ; x0], else L), Q query positions (S, or L in the
last layer), D d_model, H heads, G kv heads, C head_dim, F d_ff, V vocab, M selected positions, K noise levels a row,
U cond_dim.  It knows nothing of devices, workers or checkpoints.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlm_core.blocks import block_length
from dlm_core.cross_entropy import HeadLoss, compute_dtype, masked_cross_entropy
from dlm_core.models.attention import Attend, AttentionMask, Backend, KVCache, plan_attention
from dlm_core.models.config import NUM_TIME_FREQUENCIES, Architecture, ModelConfig
from dlm_core.models.feed_forward import FeedForward
from dlm_core.models.init import init_weights
from dlm_core.models.moe import SparseFeedForward
from dlm_core.models.precision import product_dtype
from dlm_core.models.rope import RopeTables, apply_rope, rope_tables

FULL = AttentionMask()

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(k, v) of new positions -> (k, v) of the past and the new ones: ``KVCache.append`` of one layer."""
Perturb = Callable[[Tensor], Tensor]
"""Embeddings [B, L, D] of a noised row -> the same with noise of their own."""


def _norm(a: Architecture, size: int) -> nn.Module:
    return nn.RMSNorm(size, eps=a.norm_eps) if a.norm == "rms" else nn.LayerNorm(size, eps=a.norm_eps, bias=False)


def _chosen(x: Float[Tensor, "B Q D"], select: Int[Tensor, " M"] | None) -> Float[Tensor, "B_or_1 Q_or_M D"]:
    """All positions, or the flat ones ``select`` of them as a single row."""
    return x if select is None else x.flatten(0, 1)[select][None]


class Attention(nn.Module):
    """Attention with grouped keys and values (arXiv 2305.13245) and rotary positions; who sees whom is the caller's."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.sizes = (a.num_heads * a.head_size, 2 * a.kv_heads * a.head_size)
        self.head_size, self.has_bias = a.head_size, a.qkv_bias
        self.qkv = nn.Linear(a.d_model, sum(self.sizes), bias=a.qkv_bias)
        self.out = nn.Linear(self.sizes[0], a.d_model, bias=False)
        self.q_norm = nn.RMSNorm(a.head_size, eps=a.norm_eps) if a.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(a.head_size, eps=a.norm_eps) if a.qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope: RopeTables,
        attend: Attend,
        num_queries: int,
        remember: Remember | None,
        select: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "B_or_1 Q_or_M D"]:
        """The first ``num_queries`` positions ask, all positions answer."""
        q, k, v = self._project(x, num_queries)
        q = apply_rope(self.q_norm(q), RopeTables(*(table[:, :num_queries] for table in rope)))
        k = apply_rope(self.k_norm(k), rope)
        k, v = (k, v) if remember is None else remember(k, v)
        return self.out(_chosen(rearrange(attend(q, k, v), "b h l c -> b l (h c)"), select))

    def _project(self, x: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        if num_queries == x.shape[1]:
            q, kv = self.qkv(x).split(self.sizes, dim=-1)
        else:
            q_weight, kv_weight = self.qkv.weight.split(self.sizes)
            q_bias, kv_bias = self.qkv.bias.split(self.sizes) if self.has_bias else (None, None)
            q, kv = F.linear(x[:, :num_queries], q_weight, q_bias), F.linear(x, kv_weight, kv_bias)
        k, v = rearrange(kv, "b l (n g c) -> n b g l c", n=2, c=self.head_size)
        return rearrange(q, "b l (h c) -> b h l c", c=self.head_size), k, v


class Conditioning(nn.Module):
    """From noise levels to the vector that modulates every layer:  silu(w2 silu(w1 [cos(level f); sin(level f)])).

    DiT (arXiv 2212.09748), as in MDLM (2406.07524).
    """

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(NUM_TIME_FREQUENCIES, cond_dim)
        self.out = nn.Linear(cond_dim, cond_dim)

    def forward(self, noise_level: Float[Tensor, "B K"]) -> Float[Tensor, "B K U"]:
        """Frequencies  f_i = 10000 ** (-i / 128)  (DiT, arXiv 2212.09748)."""
        half = NUM_TIME_FREQUENCIES // 2
        steps = torch.arange(half, dtype=noise_level.dtype, device=noise_level.device)
        angle = noise_level[..., None] * torch.exp(-math.log(10_000.0) * steps / half)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.up.weight.dtype)
        return F.silu(self.out(F.silu(self.up(waves))))


class Condition(NamedTuple):
    """The conditioning vectors of a batch, and which of them belongs to each position."""

    vectors: Float[Tensor, "B K U"]
    group: Int[Tensor, " S"] | None
    """None where a row has a single vector."""

    def modulate(self, modulation: nn.Linear) -> Float[Tensor, "B S_or_1 parts"]:
        """What a layer makes of the vectors, position by position."""
        made = modulation(self.vectors)
        return made if self.group is None else made[:, self.group]


class Block(nn.Module):
    """One pre-norm residual block: attention, then a dense network or experts; and adaLN-zero if conditioned.

    DiT (arXiv 2212.09748): shift, scale and gate of either branch, all 0 at first.
    """

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(a, a.d_model)
        self.attention = Attention(a)
        self.feed_forward_norm = _norm(a, a.d_model)
        self.feed_forward = (
            SparseFeedForward(a) if a.is_sparse(layer) else FeedForward(a.d_model, a.d_ff or 0, a.activation)
        )
        if a.cond_dim is not None:
            self.modulation = nn.Linear(a.cond_dim, 6 * a.d_model)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope: RopeTables,
        attend: Attend,
        *,
        num_queries: int,
        condition: Condition | None = None,
        remember: Remember | None = None,
        select: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "B_or_1 Q_or_M D"]:
        """Add both branches to the residual stream of the first ``num_queries`` positions.

        Without a condition, of the flat positions ``select`` of these alone, as a single row.
        """
        kept = x[:, :num_queries]
        if condition is None:
            kept = _chosen(kept, select)
            y = kept + self.attention(self.attention_norm(x), rope, attend, num_queries, remember, select)
            return y + self.feed_forward(self.feed_forward_norm(y))
        parts = condition.modulate(self.modulation)
        shift, scale, *_ = parts.chunk(6, dim=-1)
        parts = parts if condition.group is None else parts[:, :num_queries]
        _, _, gate, shift_2, scale_2, gate_2 = parts.chunk(6, dim=-1)
        normed = self.attention_norm(x) * (1 + scale) + shift
        y = kept + gate * self.attention(normed, rope, attend, num_queries, remember)
        return y + gate_2 * self.feed_forward(self.feed_forward_norm(y) * (1 + scale_2) + shift_2)


class Head(NamedTuple):
    """The output matrix, shared with the embedding or its own, and its bias."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None


class Denoiser(nn.Module):
    """p(x0 | xt): logits over the real vocabulary for chosen positions of a noised sequence.

    Without ``time_conditioning`` the number of masks alone says how noisy a sequence is (MDLM, arXiv 2406.07524, table
    12, finds conditioning on t of no use).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a = config.architecture
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, a.d_model)
        if a.cond_dim is not None:
            self.conditioning = Conditioning(a.cond_dim)
        self.blocks = nn.ModuleList(Block(a, layer) for layer in range(a.num_layers))
        self.norm = _norm(a, a.d_model)
        if a.cond_dim is not None:
            self.modulation = nn.Linear(a.cond_dim, 2 * a.d_model)
        if not a.tied_head:
            self.head = nn.Linear(a.d_model, config.vocab_size, bias=a.head_bias)

    def init_weights(self, init_seed: int) -> None:
        """Draw all parameters from init_seed, as ``architecture.init`` says (init.py)."""
        init_weights(self, self.config.architecture, init_seed)

    def forward(
        self,
        xt: Int[Tensor, "B L"],
        select: Int[Tensor, " M"] | None = None,
        targets: Int[Tensor, " M"] | None = None,
        weight: Float[Tensor, " M"] | None = None,
        *,
        x0: Int[Tensor, "B L"] | None = None,
        mask: AttentionMask | Attend = FULL,
        positions: Int[Tensor, "B L"] | None = None,
        noise_level: Float[Tensor, "B K"] | None = None,
        perturb: Perturb | None = None,
        cache: KVCache | None = None,
        backend: Backend = "auto",
    ) -> Float[Tensor, "M V"] | HeadLoss:
        """Logits at the flat positions ``select`` of xt (all by default), -inf for the mask token; or the loss there.

        ``select`` indexes xt.flatten(); the head, the widest product of a small model, runs on those rows alone.  With
        ``targets`` and ``weight`` their weighted cross-entropy is returned (``masked_cross_entropy``) and the logits of
        all rows are never held.

        ``mask`` is a mask, or its plan (``plan_attention``) for many passes of the same sizes; ``backend`` is then the
        plan's.  With the mask family "block_diffusion" the clean rows ``x0`` follow xt in the sequence (BD3-LM, arXiv
        2503.09573).  ``positions`` are those of the rotary embedding, 0..L-1 by default (from the length of the cache
        on).  ``noise_level`` is -log alpha_t of each of K equal parts of a row.  ``perturb`` changes the embeddings
        [B, L, D] of xt, as ``add_mask_noise`` does.  ``cache`` holds the keys and values of clean tokens before xt;
        those of xt are written behind them and count once ``cache.advance`` is called.

        Raises ValueError for targets without weight, x0 without block_diffusion, a noise_level that the model has no
        use for, and their opposites; for shapes that don't fit; for a cache with block_diffusion; for a backend beside
        a plan; and as ``plan_attention`` and ``Attend`` do.
        """
        if (targets is None) != (weight is None):
            raise ValueError("targets and weight come together, for a loss, or both stay out, for logits")
        # A loss keeps the layer whole: in training the number of positions changes with every batch, and a compiled
        # layer would be compiled anew.
        last_select = select if targets is None and self.config.is_last_selective else None
        hidden = self._trunk(xt, x0, mask, positions, noise_level, perturb, cache, backend, last_select)
        rows = rearrange(hidden, "b l d -> (b l) d")
        rows = rows if select is None or last_select is not None else rows[select]
        head, mask_token_id = self._head(), self.config.mask_token_id
        if targets is None or weight is None:
            logits = F.linear(rows, head.weight, head.bias)
            if mask_token_id is not None:
                logits[:, mask_token_id] = -torch.inf  # in place: nothing that a model makes is wider
            return logits
        return masked_cross_entropy(
            rows, head.weight, targets, weight, head_bias=head.bias, mask_token_id=mask_token_id
        )

    def make_cache(self, num_rows: int, max_len: int) -> KVCache:
        """An empty cache for num_rows rows of up to max_len tokens, on the weights' device and in their dtype.

        Or in that of autocast, where it is on: make it where it is used.
        """
        a, weight = self.config.architecture, self.embedding.weight
        sizes = (a.num_layers, num_rows, a.kv_heads, max_len, a.head_size)
        return KVCache(*sizes, dtype=product_dtype(weight.dtype, weight.device), device=weight.device)

    def _head(self) -> "Head":
        if self.config.architecture.tied_head:
            return Head(self.embedding.weight, None)
        return Head(self.head.weight, self.head.bias)

    def _trunk(
        self,
        xt: Tensor,
        x0: Tensor | None,
        mask: AttentionMask | Attend,
        positions: Tensor | None,
        noise_level: Tensor | None,
        perturb: Perturb | None,
        cache: KVCache | None,
        backend: Backend,
        last_select: Tensor | None,
    ) -> Float[Tensor, "B_or_1 L_or_M D"]:
        """Normalised hidden states of xt, or of its flat positions ``last_select`` as a single row."""
        if isinstance(mask, str):  # pyright: ignore[reportUnnecessaryIsInstance] - what a user would try
            raise ValueError(f"mask is {mask!r}; wanted an AttentionMask, as AttentionMask({mask!r}), or a plan of one")
        if xt.ndim != 2 or (x0 is not None and x0.shape != xt.shape):
            found = "" if x0 is None else f" and x0 {list(x0.shape)}"
            raise ValueError(f"xt is {list(xt.shape)}{found}; wanted [B, L]{'' if x0 is None else ' both'}")
        has_halves = mask.family == "block_diffusion"
        if has_halves != (x0 is not None):
            found = "missing" if has_halves else "given"
            raise ValueError(f'x0 is {found}, but the mask family is "{mask.family}"; "block_diffusion" alone takes x0')
        if has_halves and cache is not None:
            raise ValueError('cache is given, but the mask family is "block_diffusion"; decode with "block_causal"')
        (num_rows, seq_len), past = xt.shape, 0 if cache is None else cache.length
        if isinstance(mask, AttentionMask):
            attend = plan_attention(
                mask,
                num_rows,
                seq_len,
                device=xt.device,
                backend=backend,
                num_past=past,
                head_dim=self.config.architecture.head_size,
                dtype=self.embedding.weight.dtype,
            )
        elif backend != "auto":
            raise ValueError(f'backend is "{backend}", but mask is a plan, for "{mask.backend}"; leave backend out')
        else:
            attend = mask
        rope = self._rope(xt, positions, past, 2 if has_halves else 1)
        condition = self._condition(xt, noise_level, has_halves)
        x = self.embedding(xt if x0 is None else torch.cat([xt, x0], dim=1))
        if perturb is not None:
            x = torch.cat([perturb(x[:, :seq_len]), x[:, seq_len:]], dim=1)
        for layer, block in enumerate(self.blocks):
            is_last = layer == len(self.blocks) - 1
            num_queries = seq_len if is_last else x.shape[1]  # of the clean half the last layer gives keys and values
            x = block(
                x,
                rope,
                attend.noisy_half if is_last and has_halves else attend,
                num_queries=num_queries,
                condition=condition,
                remember=None if cache is None else partial(cache.append, layer),
                select=last_select if is_last else None,
            )
        x = self.norm(x)
        if condition is None:
            return x
        parts = condition.modulate(self.modulation)
        shift, scale = (parts if condition.group is None else parts[:, :seq_len]).chunk(2, dim=-1)
        return x * (1 + scale) + shift

    def _rope(self, xt: Tensor, positions: Tensor | None, past: int, halves: int) -> RopeTables:
        if positions is not None and positions.is_floating_point():
            raise ValueError(
                f"positions are {positions.dtype}; wanted integers, the places of tokens in their document"
            )
        if positions is not None and positions.shape not in (xt.shape, (1, xt.shape[1])):
            raise ValueError(f"positions are {list(positions.shape)}; wanted one a token of xt {list(xt.shape)}")
        if positions is None:
            positions = torch.arange(past, past + xt.shape[1], device=xt.device)[None]
        tables = rope_tables(positions.repeat(1, halves), self.config.architecture)
        dtype = compute_dtype(self.embedding.weight.dtype)
        return RopeTables(*(table.to(dtype) for table in tables))

    def _condition(self, xt: Tensor, noise_level: Tensor | None, has_halves: bool) -> Condition | None:
        a = self.config.architecture
        if a.time_conditioning != (noise_level is not None):
            raise ValueError(
                f"noise_level is {'missing' if noise_level is None else 'given'}, but time_conditioning is "
                f"{a.time_conditioning}"
            )
        if a.cond_dim is None:
            return None
        if noise_level is None:
            noise_level = torch.zeros(1, 1, device=xt.device)
        elif noise_level.ndim != 2 or len(noise_level) != len(xt) or xt.shape[1] % noise_level.shape[1]:
            raise ValueError(
                f"noise_level is {list(noise_level.shape)}; wanted [{len(xt)}, K] with K parts that divide a row of "
                f"{xt.shape[1]} tokens"
            )
        elif not ((noise_level >= 0) & noise_level.isfinite()).all():
            raise ValueError(
                f"noise_level runs from {float(noise_level.min())} to {float(noise_level.max())}; -log alpha_t is at "
                "least 0, and infinite only where alpha_t is 0: give -log of a least alpha_t"
            )
        num_groups, seq_len = noise_level.shape[1], xt.shape[1]
        if num_groups == 1 and not (has_halves and a.time_conditioning):
            return Condition(self.conditioning(noise_level), None)
        group = torch.arange(seq_len, device=xt.device) // block_length(num_groups, seq_len)
        if has_halves:  # the clean half has no noise
            noise_level = F.pad(noise_level, (0, 1))
            group = torch.cat([group, torch.full_like(group, num_groups)])
        return Condition(self.conditioning(noise_level), group)
