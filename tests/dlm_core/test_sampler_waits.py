"""From the first pass to the last the host waits for nothing, but where a sampler cannot do without."""

import itertools

import pytest
import torch

from dlm_core.ar_init import shifted
from dlm_core.samplers.confident import Confident, Threshold
from dlm_core.samplers.loop import Rule, sample
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas, ScheduleQuotas, TimedQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from dlm_core.samplers.speculative import SelfSpeculative
from tests.support.waits import DEVICE, Waits

VOCAB = 9
NO_WAIT = [
    Ancestral(8),
    Ancestral(8, is_lazy=False),
    Ancestral(8, t_end=0.2, denoises_at_end="draw"),
    FirstHitting(),
    FirstHitting(per_pass=3),
    RandomOrder(EvenQuotas(6)),
    Confident("probability", EvenQuotas(6)),
    Confident("margin", TimedQuotas(6)),
    Confident("entropy", ScheduleQuotas(6), order_temperature=0.5, last=(2, 5)),
    ReMDM(10, 0.3, "cap"),
    ReMDM(10, 0.3, "loop"),
    PathPlanning(5),
]


def _waits(rule: Rule, proposal: Proposal | None = None, *, is_shifted: bool = False) -> tuple[list[list[str]], int]:
    """By pass, what the host waited for after its logits and before those of the next; all told, number of passes."""
    waits, marks = Waits(), []

    def denoise(xt, select):
        return torch.zeros(len(select), VOCAB, device=DEVICE)

    def predict(xt, select, which):
        marks.append(len(waits.found))
        return (shifted(denoise) if is_shifted else denoise)(xt, select)

    with waits:
        xt = torch.full((4, 16), VOCAB - 1, device=DEVICE)
        sample(predict, xt, rule, proposal or Proposal(), mask_token_id=VOCAB - 1, noise_seed=0)
    ends = [*marks[1:], marks[-1]]
    return [waits.found[a:b] for a, b in zip(marks, ends, strict=True)], len(marks)


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("rule", NO_WAIT, ids=repr)
def test_no_step_waits(rule, is_shifted):
    found, num_passes = _waits(rule, is_shifted=is_shifted)
    assert num_passes > 1
    assert found == [[]] * num_passes


@pytest.mark.parametrize("proposal", [Proposal(suppressed=(1, 2)), Proposal(0.7, top_k=3, top_p=0.9), Proposal(0.0)])
def test_no_way_to_draw_waits(proposal):
    found, num_passes = _waits(FirstHitting(), proposal)
    assert found == [[]] * num_passes


@pytest.mark.parametrize("look_every", [1, 2, 5])
def test_a_number_that_the_device_alone_knows_is_looked_at_every_so_many_passes(look_every):
    rule = Confident("probability", Threshold(0.5), look_every=look_every)
    found = _looks(rule)
    assert [len(waits) > 0 for waits in found] == [(n + 1) % look_every == 0 for n in range(len(found))]


def test_a_verified_chain_is_looked_at_once_a_pass():
    assert all(1 <= len(waits) <= 2 for waits in _looks(SelfSpeculative(2)))  # the look, and what it says sent back


def _looks(rule: Rule) -> list[list[str]]:
    """The waits after each of the first passes: no text ever ends where every look finds 5 masks a row."""

    class Enough(Exception):
        pass

    waits, marks = Waits(number=5), []

    def predict(xt, select, which):
        marks.append(len(waits.found))
        if len(marks) == 11:
            raise Enough
        return torch.zeros(len(select), VOCAB, device=DEVICE)

    xt = torch.full((4, 16), VOCAB - 1, device=DEVICE)
    with pytest.raises(Enough), waits:
        sample(predict, xt, rule, Proposal(), mask_token_id=VOCAB - 1, noise_seed=0)
    return [waits.found[a:b] for a, b in itertools.pairwise(marks)]
