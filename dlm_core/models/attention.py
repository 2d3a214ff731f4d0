"""Attention under a mask: which product computes it, planned once a forward pass, and the cache of keys and values.

Shapes: B batch, L seq_len, H heads, G kv heads, R = H / G heads a kv head, C head_dim, q and k queries and keys.

What lives here: what lies between rotated queries, keys and values and the output of attention.  What must not:
parameters, rotation (transformer.py), who may attend to whom (dlm_core/masks.py).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dlm_core import masks
from dlm_core.blocks import num_blocks
from dlm_core.cross_entropy import compute_dtype
from dlm_core.models.config import MaskFamily
from dlm_core.models.precision import without_autocast

Backend = Literal["auto", "sdpa", "dense", "flex", "structured"]
Planned = Literal["sdpa", "flex", "structured", "dense"]

NUM_STRIPES = 8
"""Of rows of tokens, in the structured backend: more of them compute fewer hidden entries in more, smaller products."""

_FLEX_HEAD_DIM = 16
"""Least size of a head for which FlexAttention has a kernel (torch 2.13)."""
_FIELDS: dict[MaskFamily, tuple[str, ...]] = {
    "full": (),
    "causal": (),
    "annealed": ("ratio", "noise_seed", "step"),
    "block_causal": ("block_size",),
    "block_diffusion": ("block_size",),
}
_CACHEABLE: tuple[MaskFamily, ...] = ("full", "causal", "block_causal")


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Who may attend to whom in a batch: a family of dlm_core/masks.py, within documents if their ids are given.

    Raises ValueError for a field that the family lacks or ignores.
    """

    family: MaskFamily = "full"
    block_size: int | None = None
    ratio: float | None = None
    """Share of the future that ``annealed`` shows."""
    noise_seed: int | None = None
    step: int | None = None
    doc_ids: Int[Tensor, "B L"] | None = None
    """Of the seq_len tokens of the data, which both halves of block diffusion have; of the keys before them too, where
    there are any."""

    def __post_init__(self) -> None:
        if self.family not in _FIELDS:
            raise ValueError(f'mask family is "{self.family}"; it must be one of {", ".join(_FIELDS)}')
        for name in ("block_size", "ratio", "noise_seed", "step"):
            value, wanted = getattr(self, name), name in _FIELDS[self.family]
            if wanted and value is None:
                raise ValueError(f'{name} is None; mask family "{self.family}" needs it')
            if not wanted and value is not None:
                raise ValueError(f'{name} is {value}, which mask family "{self.family}" ignores; leave it out')

    def to(self, device: torch.device | str) -> "AttentionMask":
        """The same for a batch on a device."""
        return self if self.doc_ids is None else replace(self, doc_ids=self.doc_ids.to(device))

    def predicate(self, seq_len: int) -> masks.Predicate:
        """Of positions 0..seq_len - 1, or 0..2 seq_len - 1 for block diffusion, the noisy half first.

        Raises ValueError for a block_size or ratio that dlm_core/masks.py refuses.
        """
        family = self._family(seq_len)
        if self.doc_ids is None:
            return family
        same = masks.same_document(self.doc_ids)
        return masks.both(family, masks.on_both_halves(same, seq_len) if self.family == "block_diffusion" else same)

    def _family(self, seq_len: int) -> masks.Predicate:
        if self.family == "full":
            return masks.full()
        if self.family == "causal":
            return masks.causal()
        if self.family == "annealed":
            assert self.ratio is not None
            assert self.noise_seed is not None
            assert self.step is not None
            return masks.annealed(self.ratio, self.noise_seed, self.step)
        assert self.block_size is not None
        if self.family == "block_causal":
            return masks.block_causal(self.block_size)
        return masks.block_diffusion(seq_len, self.block_size)


@dataclass(frozen=True, eq=False)
class Attend:
    """Softmax attention under a planned mask:  softmax(scale q k^T, over the keys that a query may attend to) v.

    ``plan_attention`` makes one, which all layers share, and all passes under the same mask and sizes may.
    """

    backend: Planned
    family: MaskFamily
    num_rows: int
    seq_len: int
    num_queries: int
    num_keys: int
    predicate: masks.Predicate
    """Of a query's place 0..num_queries - 1 and a key's place 0..num_keys - 1."""
    mask_rows: int | None
    """Rows whose masks differ, None where all share one."""
    device: torch.device
    is_causal: bool
    """Whether torch's attention hides the future by itself."""
    tables: tuple[Bool[Tensor, "..."], ...] = ()
    """Entries [rows, q, k] of the predicate: all of them (dense), or those of each stripe (structured)."""
    block_mask: BlockMask | None = None

    def __call__(
        self,
        q: Float[Tensor, "B H q C"],
        k: Float[Tensor, "B G k C"],
        v: Float[Tensor, "B G k C"],
        scale: float | None = None,
    ) -> Float[Tensor, "B H q C"]:
        """Attend; scale is 1 / sqrt(C) by default.  H / G neighbouring heads of q share a head of k and v.

        Raises ValueError for a batch or lengths other than the planned ones, and unless H is a multiple of G.
        """
        self._check(q, k, v)
        if self.backend == "structured":
            return _structured(q, k, v, self.seq_len, self.tables, q.shape[-1] ** -0.5 if scale is None else scale)
        is_grouped = q.shape[1] != k.shape[1]
        if self.backend == "flex":
            flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
            out = flex(q, k, v, block_mask=self.block_mask, scale=scale, enable_gqa=is_grouped)
            assert isinstance(out, Tensor)
            return out
        if self.is_causal:  # no query sees what lies after the last one, and kernels are made for squares
            k, v = k[:, :, : self.num_queries], v[:, :, : self.num_queries]
        attn_mask = self.tables[0][:, None] if self.tables else None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=self.is_causal, scale=scale, enable_gqa=is_grouped
        )

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, x, length in (("q", q, self.num_queries), ("k", k, self.num_keys), ("v", v, self.num_keys)):
            if x.shape[0] != self.num_rows or x.shape[2] != length:
                raise ValueError(
                    f"{name} has {x.shape[0]} row(s) of {x.shape[2]}; attention was planned for {self.num_rows} of "
                    f"{length}"
                )
        if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
            raise ValueError(
                f"q, k and v have {q.shape[1]}, {k.shape[1]} and {v.shape[1]} heads; k and v must have the same "
                "number, which divides that of q"
            )

    def narrowed(self, num_queries: int) -> "Attend":
        """The plan for the first num_queries queries alone: tables are sliced, and only flex makes its mask anew.

        Raises ValueError for a number that the plan does not hold, or that its backend cannot cut.
        """
        _check_queries(self.backend, num_queries, self.num_queries, self.seq_len)
        if num_queries == self.num_queries:
            return self
        plan = replace(self, num_queries=num_queries)
        if self.backend == "dense":
            return replace(plan, tables=(self.tables[0][:, :num_queries],))
        if self.backend == "structured":  # the noisy rows of a stripe come first
            return replace(plan, tables=tuple(table[:, : table.shape[1] // 2] for table in self.tables))
        return _with_block_mask(plan) if self.backend == "flex" else plan

    @functools.cached_property
    def noisy_half(self) -> "Attend":
        """The plan for the queries of xt alone, which is all that the last layer of block diffusion has."""
        return self.narrowed(self.seq_len)


def plan_attention(
    mask: AttentionMask,
    num_rows: int,
    seq_len: int,
    *,
    device: str | torch.device,
    backend: Backend = "auto",
    num_queries: int | None = None,
    num_past: int = 0,
    head_dim: int = _FLEX_HEAD_DIM,
    dtype: torch.dtype = torch.float32,
) -> Attend:
    """Choose a backend for num_rows rows of seq_len tokens, and tabulate on the device what it needs of the mask.

    Queries and keys are 2 seq_len for block diffusion, seq_len otherwise; with ``num_queries`` only the first of them
    are queries, with ``num_past`` that many further keys come before them (``KVCache``).  They have ``head_dim``
    numbers of ``dtype``, of which flex can't do all.

    ``sdpa`` is torch's attention without a table, for masks that hide nothing or are plainly causal; ``dense`` is the
    same with a table, the reference of all others; ``flex`` skips what is hidden, block by block, on CUDA
    (FlexAttention, arXiv 2412.05496); ``structured`` computes block diffusion in stripes, on any device.  ``auto``
    takes the first that ``able_backends`` names.  Raises ValueError for a backend that cannot do the mask,
    and for sizes or a mask that do not fit.
    """
    device = torch.device(device)
    _check_sizes(mask, num_rows, seq_len, num_past)
    if mask.doc_ids is not None:
        mask = replace(mask, doc_ids=mask.doc_ids.to(device))
    length = 2 * seq_len if mask.family == "block_diffusion" else seq_len
    num_queries = length if num_queries is None else num_queries
    predicate = _after(mask.predicate(seq_len), num_past)
    able = able_backends(mask, seq_len, num_past, device, head_dim, dtype)
    is_whole = num_queries % seq_len == 0
    fitting: list[Planned] = [
        name for name in able if name == backend or (backend == "auto" and (is_whole or name != "structured"))
    ]
    if not fitting:
        raise ValueError(
            f'attention backend is "{backend}"; for mask family "{mask.family}" '
            f"{'without' if mask.doc_ids is None else 'with'} doc_ids, with num_past {num_past} and heads of "
            f"{head_dim} {dtype}, on {device.type}, it can be auto, {', '.join(able)}"
        )
    chosen = fitting[0]
    _check_queries(chosen, num_queries, length, seq_len)
    plan = Attend(
        backend=chosen,
        family=mask.family,
        num_rows=num_rows,
        seq_len=seq_len,
        num_queries=num_queries,
        num_keys=num_past + length,
        predicate=predicate,
        mask_rows=None if mask.doc_ids is None else num_rows,
        device=device,
        is_causal=chosen == "sdpa" and not _hides_nothing(mask, seq_len, num_past),
    )
    if chosen == "dense":
        queries, keys = (torch.arange(number, device=device) for number in (num_queries, plan.num_keys))
        return replace(plan, tables=(_tabulate(plan, queries, keys),))
    if chosen == "structured":
        assert mask.block_size is not None
        return replace(plan, tables=_stripe_tables(plan, mask.block_size))
    return _with_block_mask(plan) if chosen == "flex" else plan


def _check_sizes(mask: AttentionMask, num_rows: int, seq_len: int, num_past: int) -> None:
    for name, value, least in (("num_rows", num_rows, 1), ("seq_len", seq_len, 1), ("num_past", num_past, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if num_past and mask.family not in _CACHEABLE:
        raise ValueError(
            f'num_past is {num_past} for mask family "{mask.family}"; it goes with {", ".join(_CACHEABLE)}'
        )
    if mask.doc_ids is not None and mask.doc_ids.shape != (num_rows, num_past + seq_len):
        before = f" behind {num_past} keys, which have documents too" if num_past else ""
        raise ValueError(f"doc_ids are {list(mask.doc_ids.shape)}; the batch is [{num_rows}, {seq_len}]{before}")


def _check_queries(backend: Planned, num_queries: int, held: int, seq_len: int) -> None:
    if not 1 <= num_queries <= held:
        raise ValueError(f"num_queries is {num_queries}; it must lie in 1..{held}")
    if backend == "structured" and num_queries % seq_len:
        raise ValueError(
            f'num_queries is {num_queries}; backend "structured" has whole halves of {seq_len}; "dense" has any number'
        )


def _hides_nothing(mask: AttentionMask, seq_len: int, num_past: int) -> bool:
    """Whether every query sees every key: decoding, of a token or of a block, mostly does."""
    if mask.doc_ids is not None:
        return False
    if mask.family == "block_causal":
        assert mask.block_size is not None
        return num_past // mask.block_size == (num_past + seq_len - 1) // mask.block_size
    return mask.family == "full" or (mask.family == "causal" and seq_len == 1)


def able_backends(
    mask: AttentionMask,
    seq_len: int,
    num_past: int,
    device: torch.device,
    head_dim: int = _FLEX_HEAD_DIM,
    dtype: torch.dtype = torch.float32,
) -> tuple[Planned, ...]:
    """The backends that can do a mask, the one that ``auto`` prefers first."""
    is_plainly_causal = mask.family == "causal" and mask.doc_ids is None and num_past == 0
    able: list[Planned] = []
    if _hides_nothing(mask, seq_len, num_past) or is_plainly_causal:
        able.append("sdpa")
    # An annealed mask has no blocks to skip, and with a cache every length would be compiled anew.
    has_kernel = device.type == "cuda" and head_dim >= _FLEX_HEAD_DIM and dtype != torch.float64
    if has_kernel and mask.family != "annealed" and num_past == 0:
        able.append("flex")
    if mask.family == "block_diffusion":
        able.append("structured")
    return (*able, "dense")


def _after(predicate: masks.Predicate, num_past: int) -> masks.Predicate:
    """A predicate of positions as one of places: the first query stands at position num_past."""
    return predicate if num_past == 0 else lambda b, h, q, k: predicate(b, h, q + num_past, k)


def _tabulate(plan: Attend, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "b q k"]:
    """The predicate at some queries and keys, for one row where all rows share the mask."""
    b = torch.arange(plan.mask_rows or 1, device=plan.device)[:, None, None]
    return plan.predicate(b, torch.zeros_like(b), queries[:, None], keys).expand(len(b), len(queries), len(keys))


def _with_block_mask(plan: Attend) -> Attend:
    block_mask = create_block_mask(
        plan.predicate, plan.mask_rows, None, plan.num_queries, plan.num_keys, device=plan.device
    )
    return replace(plan, block_mask=block_mask)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention as one kernel: without a compiler torch computes every entry, hidden or not."""
    return torch.compile(flex_attention)


def _stripe_tables(plan: Attend, block_size: int) -> tuple[Bool[Tensor, "..."], ...]:
    """What the predicate says in each stripe; ``_structured`` has the order of its queries and keys."""
    seq_len, is_noisy_only = plan.seq_len, plan.num_queries == plan.seq_len
    width = block_size * -(-num_blocks(seq_len, block_size) // NUM_STRIPES)
    tables = []
    for start in range(0, seq_len, width):
        end = min(start + width, seq_len)
        noisy = torch.arange(start, end, device=plan.device)
        seen_clean = torch.arange(seq_len, seq_len + end, device=plan.device)
        queries = noisy if is_noisy_only else torch.cat([noisy, seq_len + noisy])
        tables.append(_tabulate(plan, queries, torch.cat([seen_clean, noisy])))
    return tuple(tables)


def _structured(
    q: Float[Tensor, "B H q C"],
    k: Float[Tensor, "B G k C"],
    v: Float[Tensor, "B G k C"],
    seq_len: int,
    tables: tuple[Bool[Tensor, "..."], ...],
    scale: float,
) -> Float[Tensor, "B H q C"]:
    """Block diffusion (BD3-LM, arXiv 2503.09573) in stripes of whole blocks: most hidden entries are never computed.

    The queries of a stripe, noisy then clean, see only clean keys up to its end and its own noisy keys: one softmax
    over these, under the table of the stripe.  The probabilities, in the dtype of q, are kept for the backward pass.
    """
    width = tables[0].shape[2] // 2  # the first stripe has as many clean keys as noisy ones
    dtype = compute_dtype(q.dtype)
    scaled = q.to(dtype) * scale
    split_q = rearrange(scaled, "b (g r) (half l) c -> b g r half l c", g=k.shape[1], l=seq_len).split(width, dim=4)
    noisy_k, clean_k = (half.split(width, dim=2) for half in k.split(seq_len, dim=2))
    noisy_v, clean_v = (half.split(width, dim=2) for half in v.split(seq_len, dim=2))
    stripes = []
    for stripe, (queries, table) in enumerate(zip(split_q, tables, strict=True)):
        keys = torch.cat([*clean_k[: stripe + 1], noisy_k[stripe]], dim=2)
        values = torch.cat([*clean_v[: stripe + 1], noisy_v[stripe]], dim=2)
        # heads that share keys become rows of one product, which repeats no key
        with without_autocast(q.device):  # it would round the scores
            scores = rearrange(queries, "b g r half l c -> b g (r half l) c") @ keys.to(dtype).mT
        scores = rearrange(scores, "b g (r q) k -> b g r q k", q=table.shape[1])
        # added, not filled in: the gradient of a sum costs nothing
        penalty = torch.zeros_like(table, dtype=scores.dtype).masked_fill_(~table, -torch.inf)
        weights = (scores + penalty[:, None, None]).softmax(dim=-1).to(v.dtype)
        out = rearrange(weights, "b g r q k -> b g (r q) k") @ values
        stripes.append(rearrange(out, "b g (r half l) c -> b g r half l c", r=queries.shape[2], l=queries.shape[4]))
    return rearrange(torch.cat(stripes, dim=4), "b g r half l c -> b (g r) (half l) c")


class KVCache:
    """Rotated keys and values of the committed positions of every layer, in buffers of fixed size.

    A pass appends at the end of what is committed; only ``advance`` commits.  So clean tokens are appended and
    advanced over, and a noisy block is appended, attended to and overwritten by the next pass.  After ``replace`` a
    pass overwrites a window of a full cache instead.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.max_len = max_len
        self.length = 0
        """Committed positions: ``num_past`` of the next pass."""
        shape = (num_layers, num_rows, num_kv_heads, max_len, head_dim)
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self._ends = [0] * num_layers
        self._window: slice | None = None

    def replace(self, start: int, stop: int) -> None:
        """From now on a pass writes the positions start..stop - 1 and sees all max_len, old ones beside them.

        For models of full attention, to which the order of keys is nothing; their positions must be given.  All
        positions have to be written before others are used.  Raises ValueError for a window outside the cache.
        """
        if not 0 <= start < stop <= self.max_len:
            raise ValueError(f"the window is {start}..{stop}; it must lie in the {self.max_len} positions of the cache")
        self._window = slice(start, stop)
        self.length = self.max_len - (stop - start)

    def append(
        self, layer: int, k: Float[Tensor, "B G L C"], v: Float[Tensor, "B G L C"]
    ) -> tuple[Float[Tensor, "B G k C"], Float[Tensor, "B G k C"]]:
        """Write k and v of a layer after its committed ones; views of all of them, the new ones last.

        The views change with the next ``append``.  Raises ValueError for more than max_len positions, for a layer that
        the cache lacks, for k and v of other sizes or another dtype than the cache's, and where they require gradients.
        """
        if not 0 <= layer < len(self._ends):
            raise ValueError(f"layer is {layer}; the cache has the layers 0..{len(self._ends) - 1}")
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.length} of {self.max_len} positions; {k.shape[2]} more don't fit")
        written = slice(self.length, end) if self._window is None else self._window
        all_k, all_v = self._k[layer, :, :, :end], self._v[layer, :, :, :end]
        for name, x, held in (("k", k, all_k), ("v", v, all_v)):
            place = held[:, :, written]
            if x.shape != place.shape or x.dtype != place.dtype:
                raise ValueError(
                    f"{name} is {x.dtype} {list(x.shape)}; the cache takes {place.dtype} {list(place.shape)} here"
                )
            if x.requires_grad:
                raise ValueError(f"{name} requires a gradient, which a cache can't carry; decode under torch.no_grad()")
            place.copy_(x)
        self._ends[layer] = end
        return all_k, all_v

    def advance(self, n: int) -> None:
        """Commit the first n of the positions that the last pass appended.

        Raises ValueError unless every layer has appended as many.
        """
        appended = min(self._ends) - self.length
        if not 0 <= n <= appended:
            raise ValueError(f"n is {n}; the last pass appended {appended} position(s) to every layer")
        self.length += n
