"""What holds of every rule: rows of unlike numbers of masks, shifted models, suppressed ids, rows without a mask."""

import pytest
import torch

from dlm_core.ar_init import shifted
from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.confident import Confident, EntropyBound, Factor, Threshold
from dlm_core.samplers.contexts import Whole
from dlm_core.samplers.loop import Rule, Sampled, sample, without_pass
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas, ScheduleQuotas, TimedQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from dlm_core.samplers.speculative import SelfSpeculative
from tests.support.sampling import tiny_model

LAZY = [
    Ancestral(4),
    Ancestral(4, t_end=0.1, denoises_at_end="argmax"),
    FirstHitting(),
    FirstHitting(per_pass=3),
    RandomOrder(EvenQuotas(3)),
    Confident("probability", EvenQuotas(4)),
    Confident("margin", TimedQuotas(5)),
    Confident("entropy", ScheduleQuotas(3), order_temperature=0.5),
    Confident("probability", Threshold(0.05)),
    Confident("probability", Factor(1.9)),
    Confident("entropy", EntropyBound(2.0)),
    Confident("probability", Threshold(0.05), look_every=3),
    ReMDM(8, 0.3),
    ReMDM(8, 0.8, "confidence"),
    PathPlanning(5),
    SelfSpeculative(3),
]
EVERY = [*LAZY, Ancestral(4, is_lazy=False)]
MASK = tiny_model().config.mask_token_id


def _ragged() -> torch.Tensor:
    """Nine, three, one and no masks, never at the first position."""
    xt = torch.randint(MASK, (4, 10), generator=torch.Generator().manual_seed(0))
    xt[0, 1:], xt[1, [2, 5, 9]], xt[2, 4] = MASK, MASK, MASK
    return xt


def _fill(rule: Rule, xt: torch.Tensor, ids: torch.Tensor, *, is_shifted: bool = False) -> Sampled:
    context = Whole(without_pass(shifted(tiny_model()) if is_shifted else tiny_model()))
    options = {"block_size": xt.shape[1], "mask_token_id": MASK, "noise_seed": 3, "sample_ids": ids}
    with torch.no_grad():
        return sample_blocks(context, xt, rule, Proposal(), **options)


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_a_row_is_filled_and_counted_as_it_is_alone(rule, is_shifted):
    ids = torch.tensor([3, 8, 1, 5])
    together = _fill(rule, _ragged(), ids, is_shifted=is_shifted)
    assert (together.x0 != MASK).all()
    assert torch.equal(together.x0[_ragged() != MASK], _ragged()[_ragged() != MASK])
    for row in range(4):
        alone = _fill(rule, _ragged()[row : row + 1], ids[row : row + 1], is_shifted=is_shifted)
        assert torch.equal(alone.x0[0], together.x0[row])
        assert int(alone.nfe) == int(together.nfe[row])
    assert int(together.nfe[3]) == 0


@pytest.mark.parametrize("rule", LAZY, ids=repr)
def test_masks_alone_are_asked_for_and_rows_that_have_some(rule):
    """But for what path planning scores again, and what rows ask for that are done and that nobody has looked at."""
    is_exact = not isinstance(rule, PathPlanning) and getattr(rule, "look_every", 1) == 1

    def predict(xt, select, which):
        opened = (_ragged() == MASK)[which.rows]
        assert opened.flatten()[select].all()
        assert opened.any(dim=1).all()
        if is_exact:
            assert (xt.flatten()[select] == MASK).all()
            assert len(set(select.tolist())) == len(select)
        if is_exact and getattr(rule, "denoises_at_end", "no") == "no":
            assert set((select // xt.shape[1]).tolist()) == set(range(len(xt)))
        return torch.randn(len(select), MASK + 1, generator=torch.Generator().manual_seed(len(select)))

    sample(predict, _ragged(), rule, Proposal(), mask_token_id=MASK, noise_seed=0)


@pytest.mark.parametrize("mask", [0, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_what_leaves_nothing_to_draw_raises_and_ends(rule, temperature, mask):
    xt, real = torch.full((2, 6), mask), [i for i in range(5) if i != mask]

    def fill(proposal, logit=0.0):
        denoise = lambda xt, select: torch.full((len(select), 5), logit)  # noqa: E731
        sample(without_pass(denoise), xt, rule, proposal, mask_token_id=mask, noise_seed=0)

    with pytest.raises(ValueError, match=r"all ids 0\.\.4 are suppressed or the mask"):
        fill(Proposal(temperature, suppressed=tuple(real)))
    with pytest.raises(ValueError, match=r"the id 7 is to be suppressed; the logits have the ids 0\.\.4"):
        fill(Proposal(temperature, suppressed=(7,)))
    with pytest.raises(ValueError, match="-inf for every id that is not suppressed"):
        fill(Proposal(temperature), -torch.inf)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_logits_of_suppressed_ids_alone_raise(rule, temperature):
    def only_one(xt, select):
        return torch.full((len(select), 5), -torch.inf).index_fill(1, torch.tensor([2]), 0.0)

    with pytest.raises(ValueError, match="-inf for every id that is not suppressed"):
        sample(
            without_pass(only_one), torch.full((2, 6), 4), rule, Proposal(temperature, suppressed=(2,)),
            mask_token_id=4, noise_seed=0,
        )  # fmt: skip
