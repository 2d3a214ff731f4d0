"""How a window of a row meets the rest of it: computed anew, from exact keys and values, or from older ones.

A context makes the ``Predict`` of a window and hears when the window is done.  W window, L seq_len; a window is
[start, stop) of every row.

    Whole        the whole row in every pass: any denoiser, no cache
    Guided       the same, beside the row with its prompt masked (guidance.py)
    ExactCache   block-causal models: what lies before the window is final, and its keys and values are kept
    PrefixCache  models of full attention: keys and values of what lies before, from the last pass of the whole row
    DualCache    the same for what lies before and behind: a pass computes the window alone

Rows of unlike lengths go together where a context is told of their ``padding``, which they then see nothing of.

The last two are approximations, since under full attention all keys and values change with every token: Fast-dLLM
(arXiv 2505.22618).  With ``refresh_every`` 1 every pass is of the whole row, and nothing is approximate.  Caches are
for models that are not conditioned on the time.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from dlm_core.models.attention import AttentionMask, KVCache
from dlm_core.models.transformer import FULL, Denoiser
from dlm_core.samplers.loop import Pass, Predict, Rule
from dlm_core.samplers.padding import Padding


class Context(ABC):
    """The rest of the rows, for one window after another, from left to right."""

    keeps_rows: bool
    """Whether every pass has to have every row."""
    padding: Padding | None = None
    """Where the rows lie in the batch; None where they fill it."""
    branches: ClassVar[int] = 1
    """Forward passes that one of a row counts for."""

    def check(self, rule: Rule) -> None:
        """Raises ValueError for a rule that adds rows where every pass has to have every row, once."""
        if rule.adds_rows and self.keeps_rows:
            raise ValueError(f"{rule} adds rows to a pass, for which {type(self).__name__} has no place; take Whole")

    @abstractmethod
    def begin(self, xt: Int[Tensor, "B L"], start: int) -> int:
        """Take in what lies before the first window; the passes that this took."""

    @abstractmethod
    def window(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> Predict:
        """The denoiser of the window [start, stop) of xt, whose positions count from its start."""

    @abstractmethod
    def finish(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> int:
        """The window is filled and another follows; the passes that taking it in took."""


@dataclass
class Whole(Context):
    """Every pass computes the whole row, padding included, from which ``predict`` keeps it apart (``whole_rows``)."""

    predict: Predict
    padding: Padding | None = None
    keeps_rows: bool = False

    def begin(self, xt: Int[Tensor, "B L"], start: int) -> int:
        """Nothing to do."""
        return 0

    def window(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> Predict:
        """The denoiser of the row with the window in its place."""

        def predict(window: Tensor, select: Tensor, which: Pass) -> Tensor:
            rows = xt[which.rows]
            whole = torch.cat([rows[:, :start], window, rows[:, stop:]], dim=1)
            return self.predict(whole, _in_row(select, stop - start, xt.shape[1], start), which)

        return predict

    def finish(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> int:
        """Nothing to do."""
        return 0


@dataclass
class ExactCache(Context):
    """Keys and values of the clean blocks before the window: exact for block diffusion (BD3-LM, arXiv 2503.09573).

    Windows are blocks of block_size tokens.  What lies before the first is taken in by one pass, each filled block by
    one more while there is something to fill behind it: without a prompt, steps + blocks - 1 passes.
    """

    model: Denoiser
    block_size: int
    padding: Padding | None = None
    """Before the rows alone, and of whole blocks."""
    keeps_rows: bool = True
    cache: KVCache = field(init=False)

    def begin(self, xt: Int[Tensor, "B L"], start: int) -> int:
        """One pass, if there is anything.  Raises ValueError for a start inside a block."""
        if start % self.block_size:
            raise ValueError(f"the first window begins at {start}, inside a block of {self.block_size}")
        self.cache = self.model.make_cache(len(xt), xt.shape[1])
        return self._take_in(xt[:, :start])

    def window(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> Predict:
        """The denoiser of one block behind the cache."""

        def predict(window: Tensor, select: Tensor, which: Pass) -> Tensor:
            return self._forward(window, select)

        return predict

    def finish(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> int:
        """One pass."""
        return self._take_in(xt[:, start:stop])

    def _take_in(self, tokens: Int[Tensor, "B n"]) -> int:
        if not tokens.shape[1]:
            return 0
        self._forward(tokens, torch.empty(0, dtype=torch.int64, device=tokens.device))
        self.cache.advance(tokens.shape[1])
        return 1

    def _forward(self, tokens: Tensor, select: Tensor) -> Tensor:
        mask, past = AttentionMask("block_causal", block_size=self.block_size), self.cache.length
        seen = {"mask": mask} if self.padding is None else self.padding.seen(mask, past, past + tokens.shape[1])
        logits = self.model(tokens, select, cache=self.cache, **seen)
        assert isinstance(logits, Tensor)
        return logits


@dataclass
class _Approximate(Context):
    """The whole row in the first pass of a window and of every so many steps; else a part of it among old keys.

    Of the steps of the rule, which are the same for a row in any batch, and not of the passes, of which others may need
    more.  A row is then what it is alone, but for rounding, unless it changes between its passes.
    """

    model: Denoiser
    refresh_every: int = 0
    """Steps of the rule in a window from one pass of the whole row to the next; 0 for one at its start alone."""
    target_offset: int = 0
    padding: Padding | None = None
    """Before the rows alone: what is computed in part stands at their end, where a mask of so few queries has it."""
    keeps_rows: bool = True
    cache: KVCache = field(init=False)
    reaches_end: ClassVar[bool]
    """Whether a pass of a part computes what follows the window as well."""

    def __post_init__(self) -> None:
        if self.refresh_every < 0:
            raise ValueError(f"refresh_every is {self.refresh_every}; it must be 0 or more")

    def check(self, rule: Rule) -> None:
        """Raises ValueError for a rule that adds rows, or whose rows would depend on when others renew the cache."""
        super().check(rule)
        if rule.changes_between and self.refresh_every > 1:
            raise ValueError(
                f"refresh_every is {self.refresh_every}, but rows of {rule} change between their passes, and would "
                "depend on when others renew the cache; take 0 or 1"
            )

    def begin(self, xt: Int[Tensor, "B L"], start: int) -> int:
        """No pass: the first one of each window takes in all."""
        if self.target_offset and (xt[:, 0] == self.model.config.mask_token_id).any():
            raise ValueError("position 0 is to be filled, which a shifted model can't predict; give it")
        self.cache = self.model.make_cache(*xt.shape)
        return 0

    def window(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> Predict:
        """The denoiser of the window, which remembers when it last computed the whole row."""
        seq_len, base = xt.shape[1], start - self.target_offset  # where the answer for the window's first token is
        part = (max(base, 0), seq_len if self.reaches_end else stop)
        last: int | None = None

        def predict(window: Tensor, select: Tensor, which: Pass) -> Tensor:
            nonlocal last
            is_whole = last is None or which.turn is None or self._period(which.turn) > self._period(last)
            last = which.turn
            left, right = (0, seq_len) if is_whole else part
            self.cache.replace(left, right)
            row = torch.cat([xt[:, :start], window, xt[:, stop:]], dim=1)
            places = _in_row(select, stop - start, right - left, base - left)
            if self.padding is None:
                seen = {"positions": torch.arange(left, right, device=xt.device).expand(len(xt), -1)}
            else:
                seen = self.padding.seen(FULL, left, right, num_keys=seq_len)
            logits = self.model(row[:, left:right], places, cache=self.cache, **seen)
            assert isinstance(logits, Tensor)
            return logits

        return predict

    def _period(self, turn: int) -> int:
        return turn // self.refresh_every if self.refresh_every else 0

    def finish(self, xt: Int[Tensor, "B L"], start: int, stop: int) -> int:
        """Nothing to do."""
        return 0


class PrefixCache(_Approximate):
    """A pass computes the window and what follows it; what lies before has keys and values of the last whole pass.

    Fast-dLLM (arXiv 2505.22618), prefix cache.
    """

    reaches_end = True


class DualCache(_Approximate):
    """A pass computes the window alone, among keys and values of the last pass of the whole row.

    Fast-dLLM (arXiv 2505.22618), dual cache.
    """

    reaches_end = False


def _in_row(select: Int[Tensor, " M"], width: int, seq_len: int, start: int) -> Int[Tensor, " M"]:
    """Flat positions of windows as flat positions of rows in which the window begins at ``start``."""
    return select // width * seq_len + select % width + start
