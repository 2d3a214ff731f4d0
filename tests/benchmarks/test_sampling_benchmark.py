"""The benchmark of sampling: the peers draw from our law, write our tokens at temperature 0, in as many passes."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import sampling, sampling_sides
from benchmarks.command import Options, RefusedError
from benchmarks.sampling import QUICKSTART
from benchmarks.sampling_peers import llada, mdlm
from benchmarks.sampling_sides import DDPM, DDPM_CACHE, LOW_CONFIDENCE, RANDOM
from dlm_core.models.transformer import Denoiser
from dlm_core.samplers.confident import Confident
from dlm_core.samplers.planned import Ancestral
from dlm_core.samplers.quotas import EvenQuotas
from tests.support import reference
from tests.support.sampling import LENGTH, MASK, draw_rows, follows, world

NUM_SAMPLES = 10_000
TINY = sampling._quick(QUICKSTART)

pytestmark = pytest.mark.usefixtures("one_thread")


def _toy(xt: torch.Tensor) -> torch.Tensor:
    """Exact conditionals of the toy world at every position; any token where nothing is masked."""
    logits = world()[1](xt, torch.arange(xt.numel())).view(*xt.shape, -1)
    return logits.nan_to_num(0.0, neginf=-math.inf)


def _of_llada(remasking: str, num_steps: int, xt: torch.Tensor | None = None, **options):
    torch.manual_seed(num_steps)
    xt = torch.full((NUM_SAMPLES, LENGTH), MASK) if xt is None else xt
    return llada(
        options.pop("model", _toy), xt, start=0, num_steps=num_steps, block_size=LENGTH, remasking=remasking,
        mask_token_id=MASK, **{"temperature": 1.0, **options},
    )  # fmt: skip


def _of_mdlm(num_steps: int, *, keeps_prediction: bool = False, xt: torch.Tensor | None = None, model=_toy):
    torch.manual_seed(num_steps)
    xt = torch.full((NUM_SAMPLES, LENGTH), MASK) if xt is None else xt
    return mdlm(model, xt, num_steps=num_steps, mask_token_id=MASK, keeps_prediction=keeps_prediction)


# Their law is ours


@pytest.mark.parametrize("keeps_prediction", [False, True])
def test_mdlm_of_few_steps_follows_the_enumerated_chain(keeps_prediction):
    drawn, num_passes = _of_mdlm(5, keeps_prediction=keeps_prediction)
    assert follows(drawn, world()[0].ancestral_distribution(5))
    assert num_passes == 6


def test_mdlm_of_many_steps_follows_the_joint_and_keeps_predictions_of_unchanged_batches():
    rows = [_of_mdlm(150, keeps_prediction=True, xt=torch.full((5, LENGTH), MASK)) for _ in range(2)]
    assert torch.equal(*(x for x, _ in rows))
    assert all(num_passes <= 5 * LENGTH + 2 for _, num_passes in rows)  # the last change is followed by one as well
    assert follows(_of_mdlm(150)[0], world()[0].prob)


def test_llada_in_random_order_token_by_token_follows_the_joint():
    assert follows(_of_llada("random", LENGTH)[0], world()[0].prob)
    assert follows(_of_llada("random", 1)[0], world()[0].product_of_marginals())


def _confidence_law() -> dict[reference.Tokens, float]:
    """Of two steps, in which the two surest of three drawn tokens are taken, then the last: by enumeration."""
    joint, blank = world()[0], (MASK,) * LENGTH
    marginals = [joint.conditional(blank, place) for place in range(LENGTH)]
    law: dict[reference.Tokens, float] = dict.fromkeys(joint.prob, 0.0)
    for drawn in itertools.product(range(3), repeat=LENGTH):
        sureness = [marginals[place][token] for place, token in enumerate(drawn)]
        last = min(range(LENGTH), key=lambda place: sureness[place])
        given = tuple(MASK if place == last else token for place, token in enumerate(drawn))
        for token, p in enumerate(joint.conditional(given, last)):
            filled = tuple(token if place == last else kept for place, kept in enumerate(drawn))
            law[filled] += math.prod(sureness) * p
    return law


def test_both_sides_by_confidence_follow_the_enumerated_law():
    theirs, num_passes = _of_llada("low_confidence", 2)
    ours = draw_rows(Confident("probability", EvenQuotas(2)), NUM_SAMPLES)
    assert num_passes == ours.num_passes == 2
    assert follows(theirs, _confidence_law())
    assert follows(ours.x0, _confidence_law())
    assert not follows(theirs, world()[0].prob)


# At temperature 0, and passes


def _model() -> Denoiser:
    with torch.no_grad():
        return sampling_sides.make_model(TINY)


@torch.no_grad()
def test_sides_write_the_same_at_temperature_zero():
    sampling_sides.check_equal(TINY, _model())
    sampling_sides.check_equal(replace(TINY, target_offset=1), _model())


@torch.no_grad()
def test_a_side_that_writes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(
        sampling_sides, "rule_of", lambda sampler, num_steps: Confident("margin", EvenQuotas(num_steps))
    )
    with pytest.raises(RefusedError, match=r"at temperature 0, \d+ of 56 tokens of ours differ from theirs in float64"):
        sampling_sides.check_equal(TINY, _model())


def test_semi_autoregressive_blocks_of_llada_are_filled_one_after_the_other():
    seen = []

    def model(xt):
        seen.append(xt.clone())
        return torch.randn(*xt.shape, 9, generator=torch.Generator().manual_seed(len(seen)))

    xt = torch.tensor([[1, 8, 8, 8, 8], [2, 3, 8, 8, 8]])
    x, num_passes = llada(
        model, xt, start=1, num_steps=4, block_size=2, temperature=0.0, remasking="low_confidence", mask_token_id=8
    )
    assert num_passes == len(seen) == 4
    assert [(one == 8).sum(dim=1).tolist() for one in seen] == [[4, 3], [3, 2], [2, 2], [1, 1]]
    assert all((one[:, 3:] == 8).all() for one in seen[:3])
    assert torch.equal(x[:, 0], xt[:, 0])
    assert x[1, 1] == 3
    assert not (x == 8).any()


@torch.no_grad()
@pytest.mark.parametrize("sampler", [LOW_CONFIDENCE, RANDOM, DDPM])
def test_both_sides_fill_the_prompts_in_as_many_passes(sampler):
    model, xt = _model(), sampling_sides.make_prompts(TINY)
    sides = [side(TINY, sampler, model)(xt, 0) for side in (sampling_sides.theirs, sampling_sides.ours)]
    assert {one.num_passes for one in sides} == {TINY.num_steps + (sampler == DDPM)}
    sampling._check_filled(TINY, xt, sampler, sides[:1], sides[1:])
    assert all(one.forward_s > 0 for one in sides)


def test_unequal_passes_changed_prompts_and_masks_are_refused():
    xt = sampling_sides.make_prompts(TINY)
    filled = sampling_sides.Filled(xt.masked_fill(xt == sampling_sides.mask_of(TINY), 1), 4, 0.1)
    sampling._check_filled(TINY, xt, RANDOM, [filled], [filled])
    with pytest.raises(RefusedError, match=r"made \(theirs, ours\) \[\(5, 4\)\] passes"):
        sampling._check_filled(TINY, xt, RANDOM, [replace(filled, num_passes=5)], [filled])
    sampling._check_filled(TINY, xt, DDPM_CACHE, [replace(filled, num_passes=5)], [filled])
    for x0 in (xt, filled.x0.clone().fill_(1)):
        with pytest.raises(RefusedError, match="left a mask or changed a prompt"):
            sampling._check_filled(TINY, xt, RANDOM, [filled], [replace(filled, x0=x0)])


# The report


def test_overhead_is_what_a_step_takes_without_the_model():
    rounds = sampling.Rounds(wall_s=[3.0, 5.0], forward_s=[1.0, 1.0], num_passes=[4, 2])
    assert rounds.overhead_s() == [0.5, 2.0]
    ours = replace(rounds, wall_s=[1.5, 1.5])
    both = {f"{RANDOM}, theirs": rounds, f"{RANDOM}, ours": ours}
    found = sampling._ratios(replace(TINY, samplers=(RANDOM,)), both)
    assert found == {RANDOM: (4.0 / 1.5, 1.25 / 0.1875)}


def test_settings_are_those_that_are_asked_for():
    a = QUICKSTART.model.architecture
    assert (a.d_model, a.num_layers, QUICKSTART.model.vocab_size) == (192, 4, 4096)
    assert (QUICKSTART.num_prompts, QUICKSTART.num_tokens, QUICKSTART.temperature) == (16, 256, 1.0)
    assert QUICKSTART.samplers == (LOW_CONFIDENCE, RANDOM, DDPM)
    assert sampling_sides.rule_of(DDPM, 7) == Ancestral(7, t_end=1e-5, denoises_at_end="argmax", is_lazy=False)
    assert sampling.SMOLLM2.temperature == sampling.GREEDY.temperature == 0.0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_quick_run_has_its_ratios_and_figures():
    options = Options(quick=True, text=(), own=sampling.arguments().parse_args([]))
    measured = sampling.measure(options)
    assert measured.ratios.keys() == {"sampling", "overhead"}
    assert all(ratio > 0 for ratio in measured.ratios.values())
    settings = (QUICKSTART, sampling.GREEDY, sampling.MANY_STEPS, sampling.SMOLLM2)
    assert set(measured.figures) == {setting.label for setting in settings}
    json.dumps(measured.figures)
