"""Held-out text in rows of seq_len, and the questions whose answers add up to a model's loss on it.

What is asked of a row depends on (noise_seed, replicate, number of the row) alone: neither batches nor workers change
it.  Used by evaluation, and by training to validate.
"""

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

    def length(self, index: int) -> int:
        """Tokens of a row, padding not counted."""
        return min(self.seq_len, self.stream.num_tokens - index * self.seq_len)

    def row(self, index: int, pad_token_id: int) -> tuple[np.ndarray, int]:
        """One row, padded at the end, and the number of its real tokens."""
        tokens = self.stream[index * self.seq_len : (index + 1) * self.seq_len]
        padded = np.full(self.seq_len, pad_token_id, dtype=np.int64)
        padded[: len(tokens)] = tokens
        return padded, len(tokens)

    def before(self, index: int, eos_token_id: int) -> int:
        """The token before a row, which a next-token model is given; the end of a document before the first."""
        start = index * self.seq_len
        return int(self.stream[start - 1 : start][0]) if start else eos_token_id

    def doc_ids(self, index: int) -> np.ndarray:
        """Document of every real token of a row, numbered from 0 over the whole stream."""
        start = index * self.seq_len
        return np.searchsorted(self.stream.doc_starts, np.arange(start, start + self.length(index)), side="right") - 1


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
        from dlm_core.cross_entropy import token_cross_entropy

        named = {"mask": self.mask} if self.x0 is None else {"mask": self.mask, "x0": self.x0.to(device)}
        logits = model(self.xt.to(device), self.select.to(device), **named)
        return token_cross_entropy(logits, self.targets.to(device)).double().cpu() * self.weight


class Questions:
    """What is asked of held-out rows, by replicate."""

    def __init__(self, rows: HeldOutRows, scoring: Scoring, special: SpecialTokens) -> None:
        import torch

        from dlm_core.blocks import num_blocks

        self.rows, self._scoring, self._special = rows, scoring, special
        size = scoring.block_size or rows.seq_len
        starts = torch.arange(num_blocks(rows.seq_len, size)) * size
        lengths = torch.tensor([rows.length(index) for index in range(rows.num_rows)])
        self._lengths = (lengths[:, None] - starts).clamp(0, size)
        self._lengths[:, 0] -= scoring.target_offset
        """Tokens that may be masked in each block of each row, one block a row where rows are masked as a whole."""
        self._counts: dict[int, Any] = {}

    def ask(self, indices: list[int], replicate: int) -> Question:
        """Of some rows: every token after those before it, or an exact count of masks in each row or block.

        Counts are uniform on 1..n and stratified over all rows (or blocks) of the text.
        """
        import torch

        from dlm_core.models.attention import AttentionMask

        x0 = torch.from_numpy(np.stack([self.rows.row(index, self._special.pad_token_id)[0] for index in indices]))
        places, lengths = torch.arange(self.rows.seq_len), torch.tensor([self.rows.length(index) for index in indices])
        valid = (places < lengths[:, None]) & (places >= self._scoring.target_offset)
        if self._scoring.is_exact:
            before = torch.tensor([[self.rows.before(index, self._special.eos_token_id)] for index in indices])
            select = valid.flatten().nonzero().squeeze(1)
            ones = torch.ones(len(select), dtype=torch.float64)
            seen = torch.cat([before, x0[:, :-1]], dim=1)
            return Question(seen, None, AttentionMask("causal"), select, x0.flatten()[select], ones)
        return self._masked(x0, valid, indices, replicate)

    def _masked(self, x0: Any, valid: Any, indices: list[int], replicate: int) -> Question:
        import torch

        from dlm_core.corpus_bound import exact_count_weight, stratified_counts
        from dlm_core.corruption import mask_exact_count
        from dlm_core.models.attention import AttentionMask

        s, special = self._scoring, self._special
        if replicate not in self._counts:
            flat = stratified_counts(s.noise_seed, replicate, self._lengths.flatten())
            self._counts[replicate] = flat.view_as(self._lengths)
        counts = self._counts[replicate][indices]
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
        weight = exact_count_weight(self._lengths[indices], counts).flatten()[select // group_len]
        targets, select = x0.flatten()[select], select - s.target_offset
        if s.likelihood == "block_nelbo":
            mask = AttentionMask("block_diffusion", block_size=s.block_size)
            return Question(xt, x0, mask, select, targets, weight)
        return Question(xt, None, AttentionMask("full"), select, targets, weight)
