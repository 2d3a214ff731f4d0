"""The benchmark of evaluation: its peer estimates what it should, and both sides score the same."""

import itertools
import math

import pytest
import torch

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
