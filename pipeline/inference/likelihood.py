"""How likely a model holds an answer to be, given what stands before (and behind) it.

    masked diffusion    bound by exact counts of masks (dlm_core/answers.py); the context is never masked
    block diffusion     the sum of such bounds over the blocks, each given the clean ones before it
    next tokens         exact

A request's numbers depend on the request alone: neither the others, nor their order, nor batches change its masks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlm_core.intervals import effective_dof, error_of_difference
from pipeline.config import execution
from pipeline.errors import NumericsError, UserError
from pipeline.inference.model import OpenModel
from pipeline.weights import ModelRecord

if TYPE_CHECKING:
    from torch import Tensor

    from dlm_core.answers import CrossEntropy


@dataclass(frozen=True)
class LikelihoodConfig:
    """How answers are scored."""

    num_masks: int = 64
    """At most so many masked copies of a row; LLaDA (arXiv 2502.09992) takes 128, drawn one by one.  Of
    fewer than 64 an interval of a single answer is one of Student's t, with the dof of its score.  A model of next
    tokens, whose scores are exact, has no use for it."""
    guidance: float = 0.0
    """w of classifier-free guidance, logits c + w (c - u) with u from the row with its context masked; 0: none."""
    noise_seed: int = 2_000
    batch_rows: int = execution(32)
    """Copies that go through the model together; under guidance, which holds the logits of both sides, at most.  No
    effect on the masks."""

    def __post_init__(self) -> None:
        if self.num_masks < 8:
            raise ValueError(f"num_masks is {self.num_masks}; a standard error needs at least 8")
        if not 0.0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}; it must be 0 or more, and finite")
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows is {self.batch_rows}; it must be at least 1")


@dataclass(frozen=True)
class Request:
    """An answer to be scored between two pieces of text, all as token ids."""

    context: Sequence[int]
    answer: Sequence[int]
    mask_id: int
    """Addresses the masks.  Choices of one question share it, so that their differences are less noisy."""
    suffix: Sequence[int] = ()
    before: int | None = None
    """Token before the context, of a model of next tokens; None: the end of a text."""


@dataclass(frozen=True)
class Score:
    """-log p of an answer, or a bound on it."""

    nats: float
    deviations: tuple[float, ...]
    """Noise of the drawn masks by stratum, none where nothing was drawn or deviates.  Those of a sum are the sums."""
    num_passes: int
    num_cut: int
    """Tokens at the beginning of the context for which there was no room."""

    @property
    def mc_se(self) -> float:
        """Standard error of nats from the drawn masks."""
        return error_of_difference(self.deviations)

    @property
    def dof(self) -> float:
        """Degrees of freedom of mc_se, for an interval of a single answer; inf where nothing was drawn."""
        return effective_dof(self.deviations)


@dataclass(frozen=True)
class FittedRow:
    """What a model is shown of a request, and where the answer stands in it."""

    tokens: list[int]
    start: int
    size: int
    before: int
    """Token before the row, which a model of next tokens is given: the last that was cut, or the end of a text."""
    mask_id: int
    num_cut: int

    @property
    def stop(self) -> int:
        """Behind the answer."""
        return self.start + self.size


class ScoreError(NumericsError):
    """No finite score of ``request``, which its asker can name."""

    def __init__(self, request: Request, nats: float) -> None:
        super().__init__(request, nats)
        self.request, self.nats = request, nats

    def __str__(self) -> str:
        return f"a token costs {self.nats} nats: the weights give no finite loss"


def score(model: OpenModel, requests: Sequence[Request], config: LikelihoodConfig) -> list[Score]:
    """The score of every request, in their order.

    A context is cut from the left where a row would be longer than those that the model was trained on.  Raises
    UserError for an answer and suffix that have no room by themselves, for guidance that a model has no use for, and
    for a request on which it would have no effect; ScoreError where a loss is not finite.
    """
    if not requests:
        return []
    check_guidance(config, model.record)
    for request in requests:
        if reason := why_unguided(request, config, model.record):
            raise UserError(reason)
    from dlm_core.cross_entropy import LossError

    rows = [fitted(model, request) for request in requests]
    try:
        return _next_tokens(model, rows, config.batch_rows) if model.is_autoregressive else _bounds(model, rows, config)
    except LossError as error:
        raise ScoreError(requests[error.row], error.nats) from None


def fitted(model: OpenModel, request: Request) -> FittedRow:
    """A request as a row of at most the length that the model was trained on; raises UserError as ``score`` does."""
    room = model.record.seq_len - len(request.answer) - len(request.suffix)
    eos = model.vocabulary.special.eos_token_id
    context = list(request.context)
    if model.record.target_offset and not context:
        context = [eos]  # nothing predicts the first token of a shifted model
    needed = model.record.target_offset
    if room < needed:
        raise UserError(
            f"an answer has {len(request.answer)} tokens and {len(request.suffix)} follow it, but rows of the model "
            f"have {model.record.seq_len}{', of which the first must be given' if needed else ''}; shorten it"
        )
    num_cut = max(0, len(context) - room)
    tokens = [*context[num_cut:], *request.answer, *request.suffix]
    start, size = len(context) - num_cut, len(request.answer)
    if num_cut and model.is_autoregressive:
        num_lost = num_cut - (request.before is None)  # of a text what stood before it is lost too
        return FittedRow(tokens, start, size, context[num_cut - 1], request.mask_id, num_lost)
    return FittedRow(tokens, start, size, eos if request.before is None else request.before, request.mask_id, num_cut)


def check_guidance(config: LikelihoodConfig, record: ModelRecord) -> None:
    """UserError for guidance that a model has no use for."""
    reasons = {
        "autoregressive_nll": "predicts the next token",
        "block_nelbo": "is of blocks, for which it is not built yet",
    }
    if config.guidance and record.objective in reasons:
        raise UserError(f"guidance is {config.guidance}, but the model {reasons[record.objective]}; set it to 0")


def why_unguided(request: Request, config: LikelihoodConfig, record: ModelRecord) -> str:
    """Why guidance would have no effect on a score, or nothing: what is left of the context has no token to mask."""
    room = record.seq_len - len(request.answer) - len(request.suffix)
    if not config.guidance or min(len(request.context), room) > record.target_offset:
        return ""
    return (
        f"guidance is {config.guidance}, but no context stands before the answer that it could strengthen, or there is "
        "no room for one; set it to 0, or leave the question out"
    )


# Diffusion

_MAX_LOGITS = 1 << 25
"""That are held at once.  Of so few the last layer is computed where it is asked for alone; for a loss it is not."""


def most_asked(model: OpenModel) -> int:
    """Tokens whose logits may be held at once."""
    return max(1, _MAX_LOGITS // model.record.model.vocab_size)


def _bounds(model: OpenModel, rows: Sequence[FittedRow], config: LikelihoodConfig) -> list[Score]:
    import torch

    from dlm_core.answers import Answers, answer_bound

    answers = Answers(
        torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64),
        torch.tensor([len(row.tokens) for row in rows]),
        torch.tensor([row.start for row in rows]),
        torch.tensor([row.size for row in rows]),
        torch.tensor([row.mask_id for row in rows]),
        model.mask_token_id,
        config.noise_seed,
        model.record.block_size,
    )
    if answers.block_size:
        cross_entropy = _block_cross_entropy(model, answers)
    elif config.guidance:
        most = most_asked(model) // 2  # of either side
        cross_entropy = _in_parts(_guided_cross_entropy(model, answers, config.guidance), most)
    else:
        cross_entropy = _cross_entropy(model, answers)
    found = answer_bound(cross_entropy, answers, num_masks=config.num_masks, batch_rows=config.batch_rows)
    columns = (column.tolist() for column in (found.nats, found.deviations, found.num_passes))
    return [
        Score(nats, tuple(deviations) if any(deviations) else (), num_passes, row.num_cut)
        for row, nats, deviations, num_passes in zip(rows, *columns, strict=True)
    ]


def _in_parts(cross_entropy: "CrossEntropy", most: int) -> "CrossEntropy":
    """Batches are cut where more tokens are asked for than ``most``, but for those of a single row."""
    import torch

    def of_parts(xt: "Tensor", rows: "Tensor", select: "Tensor", targets: "Tensor") -> "Tensor":
        width = xt.shape[1]
        sizes: list[int] = torch.bincount(select // width, minlength=len(xt)).tolist()
        found: list[Tensor] = []
        first = 0
        for numbers in cut_by_size(range(len(xt)), sizes, len(xt), most):
            own = slice(numbers[0], numbers[-1] + 1)
            asked = slice(first, first + sum(sizes[own]))
            found.append(cross_entropy(xt[own], rows[own], select[asked] - numbers[0] * width, targets[asked]))
            first = asked.stop
        return torch.cat(found)

    return of_parts


def cut_by_size(numbers: Iterable[int], sizes: Sequence[int], most_rows: int, most: int) -> Iterator[list[int]]:
    """Neighbours of at most so many rows together, whose sizes add up to ``most`` at most; one row at least."""
    some: list[int] = []
    total = 0
    for number in numbers:
        if some and (len(some) == most_rows or total + sizes[number] > most):
            yield some
            some, total = [], 0
        some.append(number)
        total += sizes[number]
    if some:
        yield some


def _cross_entropy(model: OpenModel, answers: Any) -> "CrossEntropy":
    offset = model.record.target_offset

    def cross_entropy(xt: "Tensor", rows: "Tensor", select: "Tensor", targets: "Tensor") -> "Tensor":
        return _asked_losses(model, xt, select - offset, targets, mask=_of_lengths(xt, answers.lengths[rows]))

    return cross_entropy


def _asked_losses(
    model: OpenModel, xt: "Tensor", asked: "Tensor", targets: "Tensor", *, mask: Any, x0: "Tensor | None" = None
) -> "Tensor":
    """-log p of the targets, in the way that has no more logits at once than there is room for."""
    import torch

    from dlm_core.cross_entropy import HeadLoss, token_cross_entropy

    xt, asked, targets = (column.to(model.device) for column in (xt, asked, targets))
    named = {"mask": mask.to(model.device), "x0": None if x0 is None else x0.to(model.device)}
    if len(asked) <= most_asked(model):
        return token_cross_entropy(model.denoiser(xt, asked, **named), targets)
    ones = torch.ones(len(asked), device=model.device)
    return HeadLoss(*model.denoiser(xt, asked, targets, ones, **named)).cross_entropy


def _guided_cross_entropy(model: OpenModel, answers: Any, guidance: float) -> "CrossEntropy":
    import torch

    from dlm_core.cross_entropy import token_cross_entropy
    from dlm_core.samplers.guidance import guided_logits

    offset = model.record.target_offset

    def cross_entropy(xt: "Tensor", rows: "Tensor", select: "Tensor", targets: "Tensor") -> "Tensor":
        mask = _of_lengths(xt, answers.lengths[rows]).to(model.device)
        asked, wanted = (select - offset).to(model.device), targets.to(model.device)
        conditional = model.denoiser(xt.to(model.device), asked, mask=mask)
        places = torch.arange(xt.shape[1])
        is_context = (places >= offset) & (places < answers.starts[rows][:, None])
        unguided = xt.masked_fill(is_context, model.mask_token_id).to(model.device)
        unconditional = model.denoiser(unguided, asked, mask=mask)
        return token_cross_entropy(guided_logits(conditional, unconditional, guidance), wanted)

    return cross_entropy


def _of_lengths(xt: "Tensor", lengths: "Tensor", family: Any = "full", **fields: Any) -> Any:
    """A mask that parts rows from the padding behind them, where there is any."""
    import torch

    from dlm_core.models.attention import AttentionMask

    is_padding = torch.arange(xt.shape[1]) >= lengths[:, None]
    return AttentionMask(family, doc_ids=is_padding.long() if is_padding.any() else None, **fields)


def _block_cross_entropy(model: OpenModel, answers: Any) -> "CrossEntropy":
    """Rows in whole blocks, noised ones beside clean ones."""
    import torch

    offset, size = model.record.target_offset, answers.block_size

    def cross_entropy(xt: "Tensor", rows: "Tensor", select: "Tensor", targets: "Tensor") -> "Tensor":
        width = -(-xt.shape[1] // size) * size
        noised, clean = (
            torch.nn.functional.pad(half, (0, width - half.shape[1])) for half in (xt, answers.padded(rows))
        )
        asked = select // xt.shape[1] * width + select % xt.shape[1] - offset
        mask = _of_lengths(noised, answers.lengths[rows], "block_diffusion", block_size=size)
        return _asked_losses(model, noised, asked, targets, mask=mask, x0=clean)

    return cross_entropy


# Next tokens


def _next_tokens(model: OpenModel, rows: Sequence[FittedRow], batch_rows: int) -> list[Score]:
    """Each token given those before it; the first of a text given the end of one."""
    import torch

    from dlm_core.cross_entropy import HeadLoss, check_losses
    from dlm_core.models.attention import AttentionMask

    order = sorted(range(len(rows)), key=lambda number: len(rows[number].tokens))
    nats: dict[int, float] = {}
    with torch.no_grad():
        for first in range(0, len(order), batch_rows):
            some = order[first : first + batch_rows]
            width = max(len(rows[number].tokens) for number in some)
            seen, targets = torch.zeros(2, len(some), width, dtype=torch.int64)
            asked = torch.zeros(len(some), width, dtype=torch.bool)
            for place, number in enumerate(some):
                row = rows[number]
                targets[place, : len(row.tokens)] = torch.tensor(row.tokens)
                asked[place, row.start : row.start + row.size] = True
            seen[:, 0], seen[:, 1:] = torch.tensor([rows[number].before for number in some]), targets[:, :-1]
            select = asked.flatten().nonzero().squeeze(1)
            columns = (seen, select, targets.flatten()[select], torch.ones(len(select)))
            sent = (column.to(model.device) for column in columns)
            losses = HeadLoss(*model.denoiser(*sent, mask=AttentionMask("causal"))).cross_entropy.double().cpu()
            place = select // width
            check_losses(losses, torch.tensor(some)[place])
            sums = torch.zeros(len(some), dtype=torch.float64).index_add_(0, place, losses)
            nats.update(zip(some, sums.tolist(), strict=True))
    return [Score(nats[number], (), 1 if row.size else 0, row.num_cut) for number, row in enumerate(rows)]
