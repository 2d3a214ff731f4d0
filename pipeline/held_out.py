"""Held-out text in rows of seq_len, and the questions whose answers add up to a model's loss on it.

What is asked of a row depends on (noise_seed, replicate, number of the row) alone: neither batches nor workers change
it.  Used by evaluation, and by training to validate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifact import checked_files
from pipeline.data.shards import TokenStream, open_stream
from pipeline.data.special_tokens import SpecialTokens
from pipeline.scoring import Scoring

if TYPE_CHECKING:
    from dlm_core.models.transformer import Denoiser


def open_held_out(tokens: Path) -> TokenStream:
    """All held-out tokens of a tokenization artifact, verified."""
    return open_stream(checked_files(tokens, "held_out-*.arrow"))


@dataclass(frozen=True)
class HeldOutRows:
    """The stream of all documents cut every seq_len tokens; documents may straddle rows."""

    stream: TokenStream
    seq_len: int

    @property
    def num_rows(self) -> int:
        """All rows, a last partial one included."""
        return -(-self.stream.num_tokens // self.seq_len)

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """Tokens of every row, padding not counted."""
        return np.minimum(self.seq_len, self.stream.num_tokens - np.asarray(indices) * self.seq_len)

    def asked_of_documents(self, target_offset: int) -> np.ndarray:
        """Tokens of every document that a model is asked for: all, or all but each row's first (offset 1)."""
        given = np.arange(0, self.stream.num_tokens, self.seq_len)[: self.num_rows * target_offset]
        documents = np.searchsorted(self.stream.doc_starts, given, side="right") - 1
        return self.stream.doc_lengths - np.bincount(documents, minlength=len(self.stream.doc_lengths))

    def row(self, index: int, pad_token_id: int) -> np.ndarray:
        """One row, padded at the end."""
        tokens = self.stream[index * self.seq_len : (index + 1) * self.seq_len]
        padded = np.full(self.seq_len, pad_token_id, dtype=np.int64)
        padded[: len(tokens)] = tokens
        return padded

    def before(self, index: int, eos_token_id: int) -> int:
        """The token before a row, which a next-token model is given; the end of a document before the first."""
        start = index * self.seq_len
        return int(self.stream[start - 1 : start][0]) if start else eos_token_id

    def doc_ids(self, indices: Sequence[int], shift: int = 0) -> np.ndarray:
        """Document of every token of some rows, numbered from 0 over the whole stream; -1 for what is none.

        With a shift, of the tokens that stand so many places before them.
        """
        places = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len) - shift
        found = np.searchsorted(self.stream.doc_starts, places, side="right") - 1
        return np.where(places < self.stream.num_tokens, found, -1)


@dataclass(frozen=True)
class Question:
    """Some rows as a model sees them; their loss is the sum of weight * cross-entropy, in nats."""

    xt: Any
    x0: Any
    """The clean half, for blocks alone."""
    mask: Any
    """AttentionMask."""
    select: Any
    """Flat places [M] in [rows, seq_len] that the model is asked at."""
    targets: Any
    """The tokens to be predicted there."""
    weight: Any
    """float64 [M]."""

    def cross_entropy(self, model: "Denoiser | Any", device: Any = "cpu") -> Any:
        """Weighted cross-entropy of every token asked for, float64 [M], on the host."""
        from dlm_core.cross_entropy import HeadLoss

        named = {"mask": self.mask.to(device)}
        if self.x0 is not None:
            named["x0"] = self.x0.to(device)
        columns = (column.to(device) for column in (self.xt, self.select, self.targets, self.weight))
        # with targets, as in training: without them the logits of all tokens would be held at once
        return HeadLoss(*model(*columns, **named)).cross_entropy.double().cpu() * self.weight


class Questions:
    """What is asked of some held-out rows, by replicate."""

    def __init__(self, rows: HeldOutRows, chosen: Sequence[int], scoring: Scoring, special: SpecialTokens) -> None:
        """``chosen``: ascending, all rows that will be asked about; numbers of masks are in strata over them."""
        import torch

        from dlm_core.blocks import num_blocks

        self.rows, self._chosen, self._scoring, self._special = rows, np.asarray(chosen), scoring, special
        size = scoring.block_size or rows.seq_len
        starts = torch.arange(num_blocks(rows.seq_len, size)) * size
        self._lengths = (torch.from_numpy(rows.lengths(chosen))[:, None] - starts).clamp(0, size)
        self._lengths[:, 0] -= scoring.target_offset
        """Tokens that may be masked in each block of each row, one block a row where rows are masked as a whole."""
        self._counts: dict[int, Any] = {}

    def ask(self, indices: Sequence[int], replicate: int) -> Question:
        """Of some rows: every token after those before it, or an exact count of masks in each row or block.

        Counts are uniform on 1..n and stratified over all chosen rows (or their blocks).
        """
        import torch

        from dlm_core.models.attention import AttentionMask

        x0 = torch.from_numpy(np.stack([self.rows.row(index, self._special.pad_token_id) for index in indices]))
        places, lengths = torch.arange(self.rows.seq_len), torch.from_numpy(self.rows.lengths(indices))
        valid = (places < lengths[:, None]) & (places >= self._scoring.target_offset)
        if self._scoring.is_exact:
            before = torch.tensor([[self.rows.before(index, self._special.eos_token_id)] for index in indices])
            select = valid.flatten().nonzero().squeeze(1)
            ones = torch.ones(len(select), dtype=torch.float64)
            seen = torch.cat([before, x0[:, :-1]], dim=1)
            seen_ids = torch.from_numpy(self.rows.doc_ids(indices, shift=1)) if self._scoring.within_documents else None
            mask = AttentionMask("causal", doc_ids=seen_ids)
            return Question(seen, None, mask, select, x0.flatten()[select], ones)
        return self._masked(x0, valid, indices, replicate)

    def _masked(self, x0: Any, valid: Any, indices: Sequence[int], replicate: int) -> Question:
        import torch

        from dlm_core.corpus_bound import exact_count_weight, stratified_counts
        from dlm_core.corruption import mask_exact_count
        from dlm_core.models.attention import AttentionMask

        s, special = self._scoring, self._special
        if replicate not in self._counts:
            flat = stratified_counts(s.noise_seed, replicate, self._lengths.flatten())
            self._counts[replicate] = flat.view_as(self._lengths)
        here = torch.from_numpy(np.searchsorted(self._chosen, indices))
        counts = self._counts[replicate][here]
        xt = mask_exact_count(
            x0,
            counts,
            torch.tensor(indices),
            noise_seed=s.noise_seed,
            step=replicate,
            mask_token_id=special.mask_token_id,
            maskable=valid,
        )
        select = ((xt == special.mask_token_id) & valid).flatten().nonzero().squeeze(1)
        group_len = self.rows.seq_len // counts.shape[1]
        weight = exact_count_weight(self._lengths[here], counts).flatten()[select // group_len]
        targets, select = x0.flatten()[select], select - s.target_offset
        doc_ids = who_is_apart(self.rows, indices, s.within_documents)
        if s.likelihood == "block_nelbo":
            mask = AttentionMask("block_diffusion", block_size=s.block_size, doc_ids=doc_ids)
            return Question(xt, x0, mask, select, targets, weight)
        return Question(xt, None, AttentionMask("full", doc_ids=doc_ids), select, targets, weight)


def who_is_apart(rows: HeldOutRows, indices: Sequence[int], within_documents: bool) -> Any:
    """Numbers [rows, seq_len] of what may not attend to each other, as in training: documents, or text and padding.

    None where rows are all of one.
    """
    import torch

    if not within_documents and (rows.lengths(indices) == rows.seq_len).all():
        return None
    doc_ids = torch.from_numpy(rows.doc_ids(indices))
    return doc_ids if within_documents else (doc_ids >= 0).long()
