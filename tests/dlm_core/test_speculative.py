"""Several greedy steps verified in one pass are the steps themselves."""

import pytest
import torch

from dlm_core.samplers.confident import Confident
from dlm_core.samplers.loop import sample, without_pass
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas
from dlm_core.samplers.speculative import SelfSpeculative
from tests.support.sampling import MASK, draw_rows, tiny_model

GREEDY = Proposal(temperature=0.0)


@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("num_states", [1, 2, 3, 8, 40])
def test_what_is_written_is_what_one_token_a_step_writes_in_fewer_passes(num_states, score):
    model = tiny_model()
    mask = model.config.mask_token_id
    xt = torch.randint(mask, (6, 20), generator=torch.Generator().manual_seed(0))
    xt[0, 4:], xt[1, ::2], xt[2, 3:6], xt[3, 7], xt[5, :] = mask, mask, mask, mask, mask
    kw = {"mask_token_id": mask, "noise_seed": 0}
    with torch.no_grad():
        stepwise = sample(without_pass(model), xt, Confident(score, EvenQuotas(20)), GREEDY, **kw)
        found = sample(without_pass(model), xt, SelfSpeculative(num_states, score), GREEDY, **kw)
    assert torch.equal(found.x0, stepwise.x0)
    assert found.num_passes <= stepwise.num_passes
    assert (found.num_passes < stepwise.num_passes) == (num_states > 1)
    assert (found.nfe >= stepwise.nfe).all()
    if num_states == 1:
        assert torch.equal(found.nfe, stepwise.nfe)


def test_rows_of_a_pass_are_counted_one_by_one():
    seen = []

    def denoise(xt, select):
        seen.append(len(xt))
        return torch.tensor([2.0, 1.0, 0.0, 0.0]).expand(len(select), 4)

    drawn = draw_rows(SelfSpeculative(3), 1, xt=torch.full((1, 7), MASK), proposal=GREEDY, denoise=denoise)
    assert seen == [1, 3, 3]  # 1 token, then 3 + 3, each draft being right
    assert drawn.nfe.tolist() == [7]


@pytest.mark.usefixtures("unchecked")
def test_fewer_states_than_one_are_refused():
    with pytest.raises(ValueError, match="num_states is 0"):
        SelfSpeculative(0)
    with pytest.raises(ValueError, match='score is "sure"'):
        SelfSpeculative(2, "sure")  # pyright: ignore[reportArgumentType]
