"""Whether an answer is what a model writes when it takes the most likely token, from left to right."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import NumericsError, UserError
from pipeline.inference.likelihood import FittedRow, LikelihoodConfig, Request, cut_by_size, fitted, most_asked
from pipeline.inference.model import OpenModel
from pipeline.weights import ModelRecord

if TYPE_CHECKING:
    from torch import Tensor


def are_greedy(model: OpenModel, requests: Sequence[Request], config: LikelihoodConfig) -> list[bool]:
    """Of every request in their order.

    An answer is one only if each token is the most likely after those before it, whatever the ones behind: a model of
    masked diffusion is asked with all of these masked, and what follows an answer shown, a row for each token.  Raises
    UserError as ``score`` does, for guidance, and for a model of blocks, and NumericsError for logits of nan.
    """
    import torch

    check_greedy(config, model.record)
    rows = [fitted(model, request) for request in requests]
    with torch.no_grad():
        if model.is_autoregressive:
            return _next_tokens(model, rows, config.batch_rows)
        return _masked(model, rows, config.batch_rows)


def check_greedy(config: LikelihoodConfig, record: ModelRecord) -> None:
    """UserError for what is not built."""
    if config.guidance:
        raise UserError(
            f"is_greedy is true, but guidance is {config.guidance}, with which it isn't built; leave one out"
        )
    if record.objective == "block_nelbo":
        raise UserError("is_greedy is true, but the model is of blocks, for which it isn't built yet; set it to false")


def _next_tokens(model: OpenModel, rows: Sequence[FittedRow], batch_rows: int) -> list[bool]:
    """One pass for all tokens of an answer; what pads a row stands behind it, where causal attention never looks."""
    import torch

    from dlm_core.models.attention import AttentionMask

    found = [True] * len(rows)
    lengths, sizes = [len(row.tokens) for row in rows], [row.size for row in rows]
    for some in _batches(lengths, sizes, batch_rows, most_asked(model)):
        width = len(rows[some[-1]].tokens)
        seen = torch.zeros(len(some), width, dtype=torch.int64)
        for place, number in enumerate(some):
            row = rows[number]
            seen[place, : len(row.tokens)] = torch.tensor([row.before, *row.tokens[:-1]])
        asked = [
            (place, at) for place, number in enumerate(some) for at in range(rows[number].start, rows[number].stop)
        ]
        select = torch.tensor([place * width + at for place, at in asked], dtype=torch.int64).to(model.device)
        logits = model.denoiser(seen.to(model.device), select, mask=AttentionMask("causal"))
        for (place, at), token in zip(asked, _most_likely(logits), strict=True):
            found[some[place]] &= rows[some[place]].tokens[at] == token
    return found


def _masked(model: OpenModel, rows: Sequence[FittedRow], batch_rows: int) -> list[bool]:
    """In rounds: of each answer the first token, then as many more as were right so far; most end with the first."""
    found, num_asked = [True] * len(rows), [0] * len(rows)
    while asked := [
        (number, place)
        for number, row in enumerate(rows)
        if found[number]
        for place in range(num_asked[number], min(row.size, 2 * num_asked[number] or 1))
    ]:
        for (number, place), is_right in zip(asked, _are_right(model, rows, asked, batch_rows), strict=True):
            found[number] &= is_right
            num_asked[number] = place + 1
    return found


def _are_right(
    model: OpenModel, rows: Sequence[FittedRow], asked: Sequence[tuple[int, int]], batch_rows: int
) -> list[bool]:
    """Whether these (row, place in its answer) have the most likely token, with all from it on masked."""
    import torch

    from dlm_core.models.transformer import FULL
    from dlm_core.samplers.loop import Pass
    from dlm_core.samplers.padding import Padding, whole_rows

    found = [False] * len(asked)
    sizes = [1] * len(asked)
    for some in _batches([len(rows[number].tokens) for number, _ in asked], sizes, batch_rows, most_asked(model)):
        own = [rows[asked[n][0]] for n in some]
        places = [row.start + asked[n][1] for n, row in zip(some, own, strict=True)]
        lengths = torch.tensor([len(row.tokens) for row in own])
        width = int(lengths.max())
        xt = torch.full((len(own), width), model.vocabulary.special.eos_token_id)
        for into, row, place in zip(xt, own, places, strict=True):
            into[: len(row.tokens)] = torch.tensor(row.tokens)
            into[place : row.stop] = model.mask_token_id
        is_padded = bool((lengths < width).any())
        padding = Padding.around(torch.zeros_like(lengths), lengths, width, model.device) if is_padded else None
        predict = whole_rows(model.denoiser, FULL, padding, model.record.target_offset)
        of = torch.arange(len(own))
        select = (of * width + torch.tensor(places)).to(model.device)
        logits = predict(xt.to(model.device), select, Pass(of.to(model.device), None))
        for n, row, place, token in zip(some, own, places, _most_likely(logits), strict=True):
            found[n] = row.tokens[place] == token
    return found


def _most_likely(logits: "Tensor") -> list[int]:
    most, ids = logits.max(dim=-1)
    if not most.isfinite().all():  # nan is the largest of all
        raise NumericsError(f"the largest logit of a token is {float(most[~most.isfinite()][0])}; it must be finite")
    return ids.tolist()


def _batches(lengths: Sequence[int], sizes: Sequence[int], batch_rows: int, most: int) -> Iterator[list[int]]:
    """Numbers of rows that go through the model together, the shortest first; ``sizes``: tokens they ask for."""
    return cut_by_size(sorted(range(len(lengths)), key=lengths.__getitem__), sizes, batch_rows, most)
