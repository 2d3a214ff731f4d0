"""The benchmark of evaluation: its peer estimates what it should, and both sides score the same."""

import itertools
import math

import pytest
import torch

from benchmarks.command import RefusedError
from benchmarks.evaluation import MIN_DOF, _check_errors
from benchmarks.evaluation_peers import one_by_one

MASK, VOCAB = 7, 8
SIGMAS = 5.0


class Model(torch.nn.Module):
    """Logits that depend on the place and on how many masks there are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(6, 6, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def forward(self, xt: torch.Tensor) -> torch.Tensor:
        hidden = (xt == MASK).sum(dim=1)
        return self.table[:, hidden].movedim(1, 0).flatten(0, 1)


def test_one_by_one_has_the_mean_and_the_error_of_enumeration() -> None:
    model, context, answer = Model(), (1, 2), (3, 4, 5, 6)
    exact = 0.0
    for k in range(1, 5):
        losses = []
        for subset in itertools.combinations(range(4), k):
            xt = torch.tensor([[*context, *answer]])
            xt[0, [2 + i for i in subset]] = MASK
            log_probs = model(xt).log_softmax(-1)
            losses.append(-math.fsum(float(log_probs[2 + i, answer[i]]) for i in subset))
        exact += math.fsum(losses) / len(losses) / k
    generator = torch.Generator().manual_seed(1)
    found = [
        one_by_one(model, context, answer, mask_token_id=MASK, num_masks=32, batch_rows=8, generator=generator)
        for _ in range(200)
    ]
    nats = torch.tensor([one.nats for one in found], dtype=torch.float64)
    assert abs(float(nats.mean()) - exact) < SIGMAS * float(nats.std()) / math.sqrt(200)
    told = math.sqrt(math.fsum(one.mc_se**2 for one in found) / 200)
    assert told == pytest.approx(float(nats.std()), rel=0.25)


def test_one_by_one_reads_a_shifted_model_one_place_to_the_left() -> None:
    class Shifted(Model):
        def forward(self, xt: torch.Tensor) -> torch.Tensor:
            return super().forward(xt).view(*xt.shape, -1).roll(-1, dims=1).flatten(0, 1)

    def of(model: Model, offset: int) -> float:
        generator = torch.Generator().manual_seed(1)
        found = one_by_one(
            model,
            (1, 2),
            (3, 4, 5, 6),
            mask_token_id=MASK,
            num_masks=32,
            batch_rows=8,
            generator=generator,
            target_offset=offset,
        )
        return found.nats

    assert of(Shifted(), 1) == of(Model(), 0)
    assert of(Shifted(), 0) != of(Model(), 0)


@pytest.mark.parametrize(
    ("told", "spread", "words"),
    [
        ({"theirs": 1.0, "ours": 1.1}, {"theirs": 1.0, "ours": 1.1}, "our error of 1.1000 nats is larger than theirs"),
        ({"theirs": 1.0, "ours": 0.5}, {"theirs": 1.0, "ours": 1.0}, "ours: the rounds lie 1.0000 nats apart"),
        ({"theirs": 0.5, "ours": 0.5}, {"theirs": 1.0, "ours": 0.5}, "theirs: the rounds lie 1.0000 nats apart"),
    ],
)
def test_errors_that_are_larger_or_not_true_are_refused(
    told: dict[str, float], spread: dict[str, float], words: str
) -> None:
    with pytest.raises(RefusedError, match=words):
        _check_errors(told, spread, MIN_DOF)


def test_few_rounds_say_nothing_of_an_error() -> None:
    _check_errors({"theirs": 1.0, "ours": 2.0}, {"theirs": 9.0, "ours": 9.0}, MIN_DOF - 1)
    with pytest.raises(RefusedError, match="our error of"):
        _check_errors({"theirs": 1.0, "ours": 2.0}, {"theirs": 1.0, "ours": 2.0}, MIN_DOF)
