"""The order that is expected of models at equal tokens, and what was measured that may explain another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from benchmarks.quality_models import Model

SURE = 2.0
"""Standard errors beyond which a difference is not put down to the masks that were drawn."""


@dataclass(frozen=True)
class Validation:
    """The bound on some held-out rows after a step, in nats a token."""

    step: int
    nelbo: float
    mc_se: float


@dataclass(frozen=True)
class Result:
    """What came of one model."""

    model: Model
    lr: float
    total_params: int
    active_params: int
    bpb: float
    """Bits a byte of held-out text: exact, or a bound."""
    bpb_mc_se: float
    """Standard error from the masks drawn; 0 where exact."""
    bpb_doc_se: float
    """Standard error over documents; the models are scored on the same, so that it tells little of a difference."""
    nats: float
    """Nats a token."""
    is_exact: bool
    tokens: int
    """Of the rows that it was trained on."""
    train_s: float
    """Seconds of all steps, without checkpoints and validation."""
    phase_tokens_per_s: Mapping[str, float]
    last_phase: Sequence[Validation]
    """Validations of the last phase, in order."""
    evaluation: Mapping[str, Any]
    identity: Mapping[str, Any]
    """What must be equal for models to be compared."""

    @property
    def label(self) -> str:
        """Name in the table."""
        return self.model.label

    @property
    def tokens_per_s(self) -> float:
        """Over the whole training."""
        return self.tokens / self.train_s


def findings(results: Sequence[Result], learning_rates: Sequence[float]) -> list[str]:
    """Sentences about the order: fewest bits a byte for next tokens, then for smaller blocks, then for whole rows.

    One sentence where all is as expected; otherwise one for each pair that is not, with what was measured that may
    be why.
    """
    ordered = sorted(results, key=lambda result: result.model.place)
    odd = [
        _explained(first, second, learning_rates)
        for first, second in combinations(ordered, 2)
        if first.model.place < second.model.place and second.bpb - first.bpb <= SURE * _error(first, second)
    ]
    if odd:
        return odd
    places = sorted({result.model.place for result in results})
    groups = [" and ".join(r.label for r in ordered if r.model.place == place) for place in places]
    return [f"the order is the expected one, in bits a byte: {' < '.join(groups)}"]


def _error(first: Result, second: Result) -> float:
    return math.hypot(first.bpb_mc_se, second.bpb_mc_se)


def _explained(first: Result, second: Result, learning_rates: Sequence[float]) -> str:
    difference, error = second.bpb - first.bpb, _error(first, second)
    word = "above" if difference > 0 else "below"
    claim = (
        f"{second.label} was expected above {first.label} in bits a byte and lies {abs(difference):.4f} {word} "
        f"(± {error:.4f} from the masks)"
    )
    reasons = [f"within {SURE:g} standard errors, the masks drawn decide"] if abs(difference) <= SURE * error else []
    for result in (first, second):
        if len(learning_rates) > 1 and result.lr in (min(learning_rates), max(learning_rates)):
            end = "lowest" if result.lr == min(learning_rates) else "highest"
            reasons.append(f"the learning rate of {result.label}, {result.lr:g}, is the {end} that was tried")
    reasons += _blocks_unfinished(first)
    if second.total_params > first.total_params:
        factor = second.total_params / first.total_params
        reasons.append(f"{second.label} has {factor:.1f} times the parameters")
    return f"{claim}: {'; '.join(reasons) or 'nothing that was measured explains it'}"


def _blocks_unfinished(result: Result) -> list[str]:
    """Whether a model of blocks, which it was trained on last and shortly, was still getting better at the end."""
    if not result.model.block_size or len(result.last_phase) < 2:
        return []
    begin, before, end = result.last_phase[0], result.last_phase[-2], result.last_phase[-1]
    if before.nelbo - end.nelbo <= SURE * math.hypot(before.mc_se, end.mc_se):
        return []
    return [
        f"{result.label} had not settled in its blocks: their bound went from {begin.nelbo:.3f} to {end.nelbo:.3f} "
        f"nats a token between steps {begin.step} and {end.step}, by {before.nelbo - end.nelbo:.3f} of it since step "
        f"{before.step}"
    ]
