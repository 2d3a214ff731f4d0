"""The one loop of all samplers: a rule asks for positions, the denoiser predicts, tokens are drawn, the rule writes.

A rule is a generator over a ``Canvas``: it yields an ``Ask`` (these positions of these rows) and is sent the ``Drawn``
tokens, of which it writes those it takes, where it also puts masks back if it remasks.  So each published sampler reads
like its pseudo-code, in a file of its own:

    planned.py      ancestral, first-hitting, random order: which position comes when is known before the first pass
    confident.py    low confidence, margin, entropy, with quotas, thresholds or a bound on entropy
    remask.py       ReMDM and path planning, which take tokens back
    speculative.py  several steps of a greedy sampler verified in one pass
    blocks.py       the outer loop: windows of a row, one after another, and their caches

What a rule asks for depends on no number on the device, and all that it sends there goes before its first pass: from
then to the last one the host waits for nothing.  Three rules wait by nature, as how many they take is known there
alone: ``Confident`` with a ``Count`` (every look_every passes), ``SelfSpeculative`` (once a pass) and ``ReMDM`` of the
kind "confidence" (in each pass).  Windows (blocks.py) wait once each, at their start, and where texts end.

Shapes: B rows, L seq_len, R rows of one pass, M positions asked for in it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dlm_core.cross_entropy import Denoise, exclude_token
from dlm_core.noise import Stream, as_uniform, extend_hash, hash_words
from dlm_core.samplers.proposal import Drawn, Proposal, Score, draw


class Pass(NamedTuple):
    """What a denoiser may want to know of the rows of one pass."""

    rows: Int[Tensor, " R"]
    """Which rows of the batch they are."""
    t: Float[Tensor, " R"] | None
    """Time of each, for models that are conditioned on it; None where the rule has no time."""
    turn: int | None = None
    """Step of the rule, the same for a row in any batch: by it caches are renewed.  None: they are renewed for this."""


Predict = Callable[[Tensor, Tensor, Pass], Tensor]
"""(xt [R, L], select [M], pass) -> logits [M, V] of the tokens at the flat positions ``select`` of xt."""
Change = Callable[[Tensor, Tensor], Tensor]
"""(logits [M, V], flat positions [M] in the batch) -> other logits: a constraint, a bonus, a penalty.

A rule that adds rows asks for a position several times in a pass, once for each state of its row.
"""
OnPass = Callable[[int, Tensor], None]
"""(passes so far, the rows [B, L] after the last of them), to look at and not to change."""


class Ask(NamedTuple):
    """One pass that a rule wants."""

    select: Int[Tensor, " M"]
    """Flat positions of ``xt``."""
    xt: Int[Tensor, "R L"]
    rows: Int[Tensor, " R"]
    """Rows of the batch that those of xt are, or are states of."""
    step: int | Int[Tensor, " M"]
    """Addresses the draws, with the row and the position."""
    turn: int | None
    """Number of the step, for ``Pass``."""
    t: Float[Tensor, " R"] | None = None
    score: Score | None = None
    is_tempered: bool = False
    with_entropy: bool = False
    """Whether the rule wants the entropy beside another score."""
    held: Int[Tensor, " M"] | None = None
    """Tokens that are scored in place of the drawn ones, where they are no mask."""
    is_greedy: bool = False
    """Takes the most likely tokens, whatever the proposal says."""
    is_busy: Bool[Tensor, " R"] | None = None
    """Rows that still need the pass, where others go through it only because nobody looked; None for all."""


class Rule(ABC):
    """How a sampler goes about a row."""

    adds_rows: ClassVar[bool] = False
    """Whether a pass may have several states of a row, which a cache of keys and values has no place for."""
    changes_between: ClassVar[bool] = False
    """Whether a row may change between its passes, which a cache that is renewed now and then would miss."""

    @abstractmethod
    def turns(self, canvas: "Canvas") -> Generator[Ask, Drawn, None]:
        """Ask, and write what was drawn, until no mask is left."""


@dataclass
class Canvas:
    """The rows while they are filled; what is no mask at first is never changed."""

    xt: Int[Tensor, "B L"]
    mask_token_id: int
    noise_seed: int
    sample_ids: Int[Tensor, " B"]
    """Address the noise of the rows; on the host."""
    first_position: int | Int[Tensor, " B"] = 0
    """Of the window in its row, or in each: noise is addressed by places in the row; on the host."""
    keeps_rows: bool = False
    """Every pass has every row, as a cache of keys and values wants it."""
    is_open: Bool[Tensor, "B L"] = field(init=False)
    """What is to be filled, on the host: looked at once, before the first pass."""
    rows: Int[Tensor, " B"] = field(init=False)
    _hashes: dict[Stream, Int[Tensor, " BL"]] = field(init=False)
    """By stream, of (noise_seed, stream, sample id, position), on the device."""

    def __post_init__(self) -> None:
        self.xt = self.xt.clone(memory_format=torch.contiguous_format)
        self.is_open = (self.xt == self.mask_token_id).cpu()
        self.rows = torch.arange(len(self.xt), device=self.xt.device)
        streams = (Stream.CATEGORICAL, Stream.ORDER)  # of what is drawn on the device, sent before the first pass
        self._hashes = {stream: self._addresses(stream).to(self.device).flatten() for stream in streams}

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.xt.device

    def uniforms(self, stream: Stream, step: int | Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """One number for every position, on the host."""
        return as_uniform(extend_hash(self._addresses(stream), step))

    def draws(
        self, places: Int[Tensor, " M"], step: int | Int[Tensor, " M"], stream: Stream = Stream.CATEGORICAL
    ) -> Float[Tensor, " M"]:
        """One number for each flat position of the batch, on the device."""
        return as_uniform(extend_hash(self._hashes[stream][places], step))

    def _addresses(self, stream: Stream) -> Int[Tensor, "B L"]:
        positions = torch.as_tensor(self.first_position).reshape(-1, 1) + torch.arange(self.xt.shape[1])
        return hash_words(self.noise_seed, stream, self.sample_ids[:, None], positions)

    def ask(
        self,
        places: Int[Tensor, " M"],
        rows: Int[Tensor, " R"],
        step: int,
        turn: int | None,
        t: Float[Tensor, " R"] | None = None,
    ) -> Ask:
        """A pass of some rows, for flat positions of the batch that lie in them; of all, where a canvas keeps them."""
        if len(rows) == len(self.rows):
            return Ask(places, self.xt, self.rows, step, turn, t)
        if not self.keeps_rows:
            return Ask(within(places, rows, self.xt), self.xt[rows], rows, step, turn, t)
        is_busy = torch.zeros(len(self.rows), dtype=torch.bool, device=self.device).index_fill(0, rows, True)
        times = None if t is None else torch.ones(len(self.rows), dtype=t.dtype, device=t.device).index_copy(0, rows, t)
        return Ask(places, self.xt, self.rows, step, turn, times, is_busy=is_busy)

    def place(self, ask: Ask) -> Int[Tensor, " M"]:
        """Flat positions in the batch of those that were asked for."""
        seq_len = self.xt.shape[1]
        return ask.rows[ask.select // seq_len] * seq_len + ask.select % seq_len

    def write(self, places: Int[Tensor, " M"], tokens: Int[Tensor, " M"]) -> None:
        """Put tokens, or the mask, at flat positions of the batch."""
        self.xt.view(-1)[places] = tokens


# Positions of rows without a wait for the device: how many there are is known on the host


def open_places(is_open: Bool[Tensor, "B L"], size: int) -> Int[Tensor, " size"]:
    """Flat positions of what is open, row by row: the first ``size``; B L, which is no place, where there are fewer."""
    flat = is_open.flatten()
    slots = torch.where(flat, flat.cumsum(dim=0) - 1, size).clamp(max=size)
    places = torch.full((size + 1,), len(flat), device=flat.device)
    return places.scatter_(0, slots, torch.arange(len(flat), device=flat.device))[:-1]


def within(places: Int[Tensor, " M"], rows: Int[Tensor, " R"], grid: Shaped[Tensor, "B L"]) -> Int[Tensor, " M"]:
    """Flat positions of a grid as those of some of its rows, in which they lie."""
    rank = torch.zeros(len(grid), dtype=torch.int64, device=rows.device)
    rank = rank.index_copy(0, rows, torch.arange(len(rows), device=rows.device))
    return rank[places // grid.shape[1]] * grid.shape[1] + places % grid.shape[1]


def put(grid: Shaped[Tensor, "B L"], places: Int[Tensor, " M"], values: Shaped[Tensor, " M"]) -> Shaped[Tensor, "B L"]:
    """The grid with values at flat positions; one for the position B L is dropped."""
    return torch.cat([grid.flatten(), values.new_zeros(1)]).scatter(0, places, values)[:-1].view_as(grid)


def by_score(
    shape: torch.Size, places: Int[Tensor, " M"], score: Float[Tensor, " M"]
) -> tuple[Float[Tensor, "B L"], Int[Tensor, "B L"]]:
    """The scores of each row of a grid, falling, and where they stand: the left one of equals first, no score last.

    A score of -inf counts as the lowest number, so that no place without a score comes before it.
    """
    lowest = torch.finfo(score.dtype).min
    grid = torch.full(shape, -torch.inf, dtype=score.dtype, device=score.device)
    ordered, order = put(grid, places, score.clamp(min=lowest)).sort(dim=1, descending=True, stable=True)
    return ordered, order


def first_of(order: Int[Tensor, "B L"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """Which are among the first ``count`` of ``order``, a permutation of 0..L - 1 in each row."""
    ranks = torch.arange(order.shape[1], device=order.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, ranks < count[:, None])


def sent_together(parts: Sequence[Shaped[Tensor, " _"]], device: torch.device) -> tuple[Shaped[Tensor, " _"], ...]:
    """Tensors of any lengths on the device, for one wait."""
    return torch.cat(list(parts)).to(device).split([len(part) for part in parts]) if parts else ()


@dataclass(frozen=True)
class Sampled:
    """What a sampler returns."""

    x0: Int[Tensor, "B L"]
    nfe: Int[Tensor, " B"]
    """Forward passes that each row needed."""
    num_passes: int
    """Forward passes of the denoiser, each of some of the rows."""
    frames: list[Int[Tensor, "B L"]]
    """The rows before the first pass and after each, if they were to be kept."""
    is_busy: list[Bool[Tensor, " B"]]
    """Rows that needed each pass, kept with the frames: what such a row was before it is the same in any batch."""


def without_pass(denoise: Denoise) -> Predict:
    """A denoiser to which all rows are alike."""
    return lambda xt, select, which: denoise(xt, select)


def sample(
    predict: Predict,
    xt: Int[Tensor, "B L"],
    rule: Rule,
    proposal: Proposal,
    *,
    mask_token_id: int,
    noise_seed: int,
    sample_ids: Int[Tensor, " B"] | None = None,
    first_position: int | Int[Tensor, " B"] = 0,
    keeps_rows: bool = False,
    change: Change | None = None,
    on_pass: OnPass | None = None,
    keep_frames: bool = False,
) -> Sampled:
    """Fill the masks of xt by a rule.

    ``sample_ids`` address the noise of the rows, 0.. by default: a row is the same in any batch.  ``first_position``
    is that of xt in its row, or in each, where xt is a window.  ``keeps_rows`` puts every row into every pass.
    ``change`` is called with the logits of each pass, and ``on_pass`` after it.  Raises ValueError for suppressed ids
    that the logits lack or that leave none, and for logits that give no distribution, after the last pass.
    """
    ids = torch.arange(len(xt)) if sample_ids is None else sample_ids.cpu()
    canvas = Canvas(xt, mask_token_id, noise_seed, ids, first_position, keeps_rows)
    nfe = torch.zeros(len(xt), dtype=torch.int64, device=canvas.device)
    is_usable = torch.ones((), dtype=torch.bool, device=canvas.device)
    frames = [canvas.xt.clone()] if keep_frames else []
    is_busy: list[Tensor] = []
    proposal = replace(proposal, suppressed=(mask_token_id, *proposal.suppressed))
    greedy, num_passes = Proposal(temperature=0.0, suppressed=proposal.suppressed), 0
    turns = rule.turns(canvas)
    ask = next(turns, None)
    while ask is not None:
        logits = predict(ask.xt, ask.select, Pass(ask.rows, ask.t, ask.turn))
        places = canvas.place(ask)
        logits = logits if change is None else change(exclude_token(logits, mask_token_id), places)
        drawn = draw(
            greedy if ask.is_greedy else proposal,
            logits,
            canvas.draws(places, ask.step),
            ask.score,
            is_tempered=ask.is_tempered,
            held=None if ask.held is None else torch.where(ask.held == mask_token_id, -1, ask.held),
            with_entropy=ask.with_entropy,
        )
        is_usable &= drawn.is_usable.all()
        before = nfe.clone() if keep_frames else nfe
        nfe.index_add_(0, ask.rows, torch.ones_like(ask.rows) if ask.is_busy is None else ask.is_busy.long())
        num_passes += 1
        try:
            ask = turns.send(drawn)
        except StopIteration:
            ask = None
        if keep_frames:
            frames.append(canvas.xt.clone())
            is_busy.append(nfe > before)
        if on_pass is not None:
            on_pass(num_passes, canvas.xt)
    if not is_usable:
        raise ValueError(
            "the denoiser's logits hold nan or inf, or are -inf for every id that is not suppressed; no id can be drawn"
        )
    return Sampled(canvas.xt, nfe, num_passes, frames, is_busy)
