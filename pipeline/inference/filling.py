"""Masks become text: canvases of any lengths, filled together by a model of any kind.

A canvas is a row of token ids, of which those that are masks are drawn and all others stay: a prompt, a suffix, text
between several gaps.  What a canvas becomes depends on the canvas alone: noise is addressed by its sample id, and
neither the others, nor their order, nor batches change it.

    masked diffusion    by the sampler of the settings; every token of the row is seen
    block diffusion     block by block; what stands behind the block of the last mask is not seen, and refused
    next tokens         from left to right; what stands behind a mask is not seen, and refused
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.loop import Sampled
from dlm_core.samplers.next_tokens import sample_next_tokens
from dlm_core.samplers.padding import Padding
from dlm_core.samplers.proposal import Proposal
from pipeline.errors import UserError
from pipeline.inference.model import OpenModel
from pipeline.inference.rules import check_sampling, has_windows, make_context, make_proposal, make_rule, window_of
from pipeline.inference.sampling import SamplingConfig


@dataclass(frozen=True)
class Canvas:
    """A row whose masks are to be filled."""

    ids: Sequence[int]
    sample_id: int
    """Addresses the noise."""
    num_cut: int = 0
    """Tokens at the beginning of its prompt for which there was no room."""
    before: int | None = None
    """Token before the row, of a model of next tokens; None: the end of a text."""


@dataclass(frozen=True)
class Filled:
    """A canvas without masks."""

    ids: list[int]
    nfe: int
    """Forward passes of the row; those under guidance count twice."""
    num_cut: int
    frames: list[list[int]]
    """The row before each pass that it needed, and at the end; empty unless they were to be kept."""


OnPass = Callable[[int, Mapping[int, list[int]]], None]
"""(passes so far, {place in the list of canvases: ids}) of those that are being filled together."""
Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [M, V], sample ids [M], positions in their rows [M]) -> other logits: a constraint, a bonus, a penalty."""


def prompted(model: OpenModel, prompt: Sequence[int], length: int, sample_id: int) -> Canvas:
    """A prompt and ``length`` masks behind it, cut from the left where it leaves no room for them.

    A shifted model's empty prompt gets the end of a text, as nothing predicts its first token.  Raises UserError for a
    length that leaves none for what must be given.
    """
    needed = model.record.target_offset
    room = model.record.seq_len - length
    if length < 0 or room < needed:
        raise UserError(
            f"{length} tokens are to be drawn, but rows of the model have {model.record.seq_len}"
            f"{', of which the first must be given' if needed else ''}; ask for fewer"
        )
    given = list(prompt) or [model.vocabulary.special.eos_token_id] * needed
    kept = given[max(0, len(given) - room) :]
    return Canvas([*kept, *[model.mask_token_id] * length], sample_id, len(given) - len(kept))


def room_behind(model: OpenModel, prompt: Sequence[int]) -> int:
    """Tokens that a prompt leaves of a row; UserError for a prompt that leaves none."""
    left = model.record.seq_len - max(len(prompt), model.record.target_offset)
    if left < 1:
        raise UserError(
            f"a prompt has {len(prompt)} tokens, which leaves nothing to draw of rows of {model.record.seq_len}; say "
            "how many tokens are to be drawn (length), and it is cut from the left"
        )
    return left


def patterned(model: OpenModel, parts: Sequence[Sequence[int] | int], sample_id: int) -> Canvas:
    """Pieces of text, as ids, and gaps between them, as numbers of masks: nothing is cut.

    Where a gap comes first, a shifted model gets the end of a text before it.
    """
    ids = [i for part in parts for i in ([model.mask_token_id] * part if isinstance(part, int) else part)]
    if model.record.target_offset and ids[:1] == [model.mask_token_id]:
        ids.insert(0, model.vocabulary.special.eos_token_id)
    return Canvas(ids, sample_id)


def drawn_ids(model: OpenModel, canvas: Canvas, filled: Filled) -> list[int]:
    """What the masks of a canvas became, an id for each."""
    return [new for new, old in zip(filled.ids, canvas.ids, strict=True) if old == model.mask_token_id]


def fill(
    model: OpenModel,
    canvases: Sequence[Canvas],
    config: SamplingConfig,
    *,
    keep_frames: bool = False,
    on_pass: OnPass | None = None,
    change: Change | None = None,
    done: Container[int] = (),
) -> Iterator[tuple[int, Filled]]:
    """Fill all canvases, each told by its place in the list as it is done; one without a mask costs no pass.

    Those at the places ``done`` are not told, and not drawn where a whole batch is of them.
    Rows of like lengths go together, the shortest first (``_batches``).  Raises UserError, before the first pass, for
    settings that the model has no use for, and for a canvas that it cannot fill.
    """
    check_sampling(config, model.record, model.vocabulary.special)
    proposal = make_proposal(config, model)
    rows = {number: row for number, canvas in enumerate(canvases) if (row := _row(model, canvas, config))}
    for number, canvas in enumerate(canvases):
        if number not in rows and number not in done:
            ids = list(canvas.ids)
            yield number, Filled(ids, 0, canvas.num_cut, [ids] if keep_frames else [])
    for batch in _batches(rows, has_windows(config, model.record), config.batch_rows):
        if any(number not in done for number in batch.rows):
            sampled = _draw(model, batch, config, proposal, keep_frames, on_pass, change)
            yield from (one for one in _told(canvases, batch, sampled) if one[0] not in done)


def why_not(model: OpenModel, canvas: Canvas, config: SamplingConfig) -> str:
    """Why ``fill`` would refuse a canvas, or nothing."""
    try:
        _row(model, canvas, config)
    except UserError as error:
        return str(error)
    return ""


# Rows as the samplers of the core want them


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    """Up to the end of what is drawn: a model of blocks fills whole ones, and what is too much is cut off again."""
    start: int
    """Where the first window begins."""
    length: int
    """Of the canvas."""
    sample_id: int
    before: int
    """Token before it, which a model of next tokens sees."""


@dataclass(frozen=True)
class _Batch:
    """Rows that go through the model together."""

    rows: Mapping[int, _Row]
    """By their places in the list of canvases."""
    before: Mapping[int, int]
    """Tokens of padding before each."""

    @property
    def start(self) -> int:
        """Where the first window of the batch begins."""
        return min(self.before[number] + row.start for number, row in self.rows.items())

    @property
    def width(self) -> int:
        """Tokens of a row and its padding."""
        return max(self.before[number] + len(row.ids) for number, row in self.rows.items())

    def own(self, number: int, ids: list[int]) -> list[int]:
        """What of a row of the batch is the canvas."""
        return ids[self.before[number] : self.before[number] + self.rows[number].length]

    def tokens(self, padding_id: int) -> Tensor:
        """All rows, with their padding."""
        tokens = torch.full((len(self.rows), self.width), padding_id)
        for place, (number, row) in enumerate(self.rows.items()):
            tokens[place, self.before[number] : self.before[number] + len(row.ids)] = torch.tensor(row.ids)
        return tokens

    def padding(self, device: torch.device) -> Padding | None:
        """None where all rows are of one length."""
        lengths = torch.tensor([len(row.ids) for row in self.rows.values()])
        if bool((lengths == self.width).all()):
            return None
        before = torch.tensor([self.before[number] for number in self.rows])
        return Padding.around(before, lengths, self.width, device)


_MOST_PADDING = 0.25
"""Of the tokens of a batch: more would cost more than fewer passes save."""


def _batches(rows: Mapping[int, _Row], has_windows: bool, batch_rows: int) -> Iterator[_Batch]:
    """Rows of like lengths, padded behind; with windows rows of as many tokens from their first on, padded before."""
    groups: dict[int, list[int]] = {}
    for number, row in rows.items():
        groups.setdefault(len(row.ids) - row.start if has_windows else 0, []).append(number)
    for _, group in sorted(groups.items()):
        for numbers in _cut(sorted(group, key=lambda n: len(rows[n].ids)), rows, batch_rows):
            last = max(rows[number].start for number in numbers)
            before = {number: last - rows[number].start if has_windows else 0 for number in numbers}
            yield _Batch({number: rows[number] for number in numbers}, before)


def _cut(numbers: Sequence[int], rows: Mapping[int, _Row], batch_rows: int) -> Iterator[list[int]]:
    some: list[int] = []
    total = 0
    for number in numbers:
        length = len(rows[number].ids)
        if some and (len(some) == batch_rows or total + length < (1 - _MOST_PADDING) * length * (len(some) + 1)):
            yield some
            some, total = [], 0
        some.append(number)
        total += length
    if some:
        yield some


def _row(model: OpenModel, canvas: Canvas, config: SamplingConfig) -> _Row | None:
    """None for a canvas without a mask; UserError for one that the model cannot fill."""
    ids, mask, record = list(canvas.ids), model.mask_token_id, model.record
    if len(ids) > record.seq_len:
        raise UserError(f"a row has {len(ids)} tokens, those of the model have {record.seq_len}; shorten it")
    if mask not in ids:
        return None
    start, end = ids.index(mask), len(ids) - ids[::-1].index(mask)
    before = model.vocabulary.special.eos_token_id if canvas.before is None else canvas.before
    if start < record.target_offset:
        raise UserError("the first token of a row is masked, which a shifted model cannot predict; give it")
    if model.is_autoregressive:
        if start + ids.count(mask) < len(ids):
            raise UserError(
                "text stands behind a mask, which a model that predicts the next token does not see: it can go on "
                "with a prompt, but not fill a gap. Use a model of masked diffusion"
            )
        return _Row(ids, start, len(ids), canvas.sample_id, before)
    if config.guidance and start == record.target_offset and ids.count(mask) == len(ids) - start:
        raise UserError(
            f"guidance is {config.guidance}, but nothing is given that it could strengthen; set it to 0, or give a "
            "prompt"
        )
    if not (size := record.block_size):
        window_of(config, record, len(ids) - start)
        return _Row(ids, start, len(ids), canvas.sample_id, before)
    stop = -(-end // size) * size
    if len(ids) > stop:
        raise UserError(
            f"{len(ids) - stop} tokens stand behind the block of the last mask, which a model of blocks does not see; "
            "leave them out, or use a model of full attention"
        )
    return _Row([*ids, *[mask] * (stop - len(ids))], start // size * size, len(ids), canvas.sample_id, before)


def _draw(
    model: OpenModel,
    batch: _Batch,
    config: SamplingConfig,
    proposal: Proposal,
    keep_frames: bool,
    on_pass: OnPass | None,
    change: Change | None,
) -> Sampled:
    special, width, padding = model.vocabulary.special, batch.width, batch.padding(model.device)
    xt = batch.tokens(special.eos_token_id).to(model.device)
    sample_ids = torch.tensor([row.sample_id for row in batch.rows.values()])
    before = torch.tensor([batch.before[number] for number in batch.rows])

    def look(num_passes: int, now: Tensor) -> None:
        assert on_pass is not None
        on_pass(num_passes, {n: batch.own(n, ids) for n, ids in zip(batch.rows, now.tolist(), strict=True)})

    def changed(logits: Tensor, places: Tensor) -> Tensor:
        assert change is not None
        rows, device = places // width, places.device
        return change(logits, sample_ids.to(device)[rows], places % width - before.to(device)[rows])

    common: dict[str, Any] = {
        "start": batch.start,
        "mask_token_id": special.mask_token_id,
        "noise_seed": config.noise_seed,
        "sample_ids": sample_ids,
        "eos_token_id": special.eos_token_id if config.ends_at_eos else None,
        "change": None if change is None else changed,
        "on_pass": None if on_pass is None else look,
        "keep_frames": keep_frames,
    }
    with torch.inference_mode():
        if model.is_autoregressive:
            first = torch.tensor([row.before for row in batch.rows.values()], device=model.device)
            common |= {"first_token_ids": first, "before": None if padding is None else before}
            return sample_next_tokens(model.denoiser, xt, proposal, **common)
        context, rule = make_context(config, model, padding), make_rule(config.sampler, special)
        size = window_of(config, model.record, width - batch.start)
        return sample_blocks(context, xt, rule, proposal, block_size=size, **common)


def _told(canvases: Sequence[Canvas], batch: _Batch, sampled: Sampled) -> Iterator[tuple[int, Filled]]:
    """Each row with the frames that are its own: those of the passes that it needed."""
    frames = [frame.tolist() for frame in sampled.frames[:-1]]
    busy = [needed.tolist() for needed in sampled.is_busy]
    for place, (number, ids, nfe) in enumerate(zip(batch.rows, sampled.x0.tolist(), sampled.nfe.tolist(), strict=True)):
        own = [batch.own(number, frame[place]) for frame, needed in zip(frames, busy, strict=True) if needed[place]]
        filled = batch.own(number, ids)
        yield number, Filled(filled, nfe, canvases[number].num_cut, [*own, filled] if sampled.frames else [])
