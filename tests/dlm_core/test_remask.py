"""Samplers that take tokens back: what they are without that, the marginals they keep, naive loops."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch

from dlm_core.noise import Stream
from dlm_core.samplers.confident import Confident
from dlm_core.samplers.loop import sample, without_pass
from dlm_core.samplers.planned import Ancestral
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import ScheduleQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from dlm_core.schedules import Schedule
from tests.support import reference
from tests.support.sampling import LENGTH, MASK, draw_rows, follows, tiny_model, world

NUM_SAMPLES = 10_000
KINDS = ["cap", "rescale", "confidence", "loop"]
ALL = [*(ReMDM(12, 0.2, kind) for kind in KINDS), PathPlanning(5, eta=1.0), PathPlanning(9, eta=3.0)]
NAMES = [*KINDS, "eta 1", "eta 3"]


# ReMDM


@pytest.mark.parametrize("num_steps", [1, 2, 5, 60])
@pytest.mark.parametrize("kind", ["cap", "rescale", "confidence"])
def test_remdm_that_takes_nothing_back_is_ancestral_token_for_token(kind, num_steps):
    plain, none = draw_rows(Ancestral(num_steps), 2_000), draw_rows(ReMDM(num_steps, 0.0, kind), 2_000)
    assert torch.equal(plain.x0, none.x0)
    assert torch.equal(plain.nfe, none.nfe)


@dataclass(frozen=True)
class _OfLoop(Schedule):
    """1 - alpha of "loop" as it is by default."""

    def _mask_prob(self, t):
        rising, ending = 1 - (1 - t) * 0.9 / 0.45, t * 0.1 / 0.05
        return torch.where(t > 0.55, rising, torch.where(t > 0.05, 0.1, ending))

    def _slope(self, t):
        pytest.fail("a sampler asks for the share of masks alone")

    def _time_of(self, mask_prob):
        pytest.fail("a sampler asks for the share of masks alone")


@pytest.mark.parametrize("num_steps", [1, 5, 60])
def test_loop_that_takes_nothing_back_is_ancestral_by_its_own_schedule(num_steps):
    plain, none = draw_rows(Ancestral(num_steps, _OfLoop()), 2_000), draw_rows(ReMDM(num_steps, 0.0, "loop"), 2_000)
    assert torch.equal(plain.x0, none.x0)
    assert torch.equal(plain.nfe, none.nfe)
    if num_steps > 1:
        assert not torch.equal(none.nfe, draw_rows(Ancestral(num_steps), 2_000).nfe)


@pytest.mark.parametrize("rule", [ReMDM(300, 0.05, kind) for kind in KINDS[:3]], ids=KINDS[:3])
def test_remdm_of_many_steps_follows_the_joint(rule):
    drawn = draw_rows(rule, NUM_SAMPLES)
    assert follows(drawn.x0, world()[0].prob)
    assert float(drawn.nfe.double().mean()) > LENGTH + 1  # it does take tokens back


def test_loop_of_many_steps_follows_the_joint_but_for_what_it_draws_at_once():
    """After the loop the last tokens come within t_off of the time: in enough steps one at a time."""
    assert follows(draw_rows(ReMDM(1_000, 0.02, "loop"), NUM_SAMPLES).x0, world()[0].prob)


@pytest.mark.parametrize("kind", ["cap", "rescale", "loop"])
def test_remdm_keeps_the_mask_rate_of_its_schedule(kind):
    rule, shares = ReMDM(20, 0.3, kind), []
    alphas, sigmas = rule.rates()

    def predict(xt, select, which):
        shares.append((float(which.t.min()), float((xt == MASK).double().mean())))  # rows without a pass have t = 1
        return torch.zeros(len(select), 4)

    xt = torch.full((400, 30), MASK)
    sample(predict, xt, rule, Proposal(), mask_token_id=MASK, noise_seed=2, keeps_rows=True)
    assert len(shares) == 20
    assert (sigmas <= (1 - alphas[1:]) / alphas[:-1].clamp(min=1e-9) + 1e-12).all()
    for (p, share), alpha_t in zip(shares, alphas.tolist(), strict=False):
        assert p == pytest.approx(1 - alpha_t)
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / xt.numel()) + 1e-9


@pytest.mark.parametrize(("eta", "kind"), [(0.3, "cap"), (0.3, "rescale")])
def test_sigmas_are_those_of_the_formulas(eta, kind):
    _, sigmas = ReMDM(10, eta, kind).rates()
    for step, sigma in enumerate(sigmas.tolist()):
        alpha_t, alpha_s = step / 10, (step + 1) / 10
        most = (1 - alpha_s) / alpha_t if step else math.inf
        assert sigma == pytest.approx(min(eta, most) if kind == "cap" else eta * min(1, most), abs=1e-12)


def test_loop_rises_stays_and_rises():
    alphas, sigmas = ReMDM(20, 0.02, "loop").rates()
    t = [1 - step / 20 for step in range(21)]
    expected = [(1 - x) * 0.9 / 0.45 if x > 0.55 + 1e-9 else 0.9 if x > 0.05 + 1e-9 else 1 - x * 0.1 / 0.05 for x in t]
    assert alphas.tolist() == pytest.approx(expected)
    assert [s > 0 for s in sigmas.tolist()] == [0.05 + 1e-9 < x <= 0.55 + 1e-9 for x in t[:-1]]


def test_tokens_are_taken_back_by_their_confidence_as_often_as_in_the_naive_process():
    """The first two tokens of a row are sure, the third is not."""
    num_rows, num_steps, eta = 4_000, 30, 0.5
    logits = torch.tensor([[99.0, 0.0, 0.0, 0.0], [99.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    xt = torch.full((num_rows, LENGTH), MASK)
    frames = sample(
        without_pass(lambda xt, select: logits[select % LENGTH]),
        xt, ReMDM(num_steps, eta, "confidence"), Proposal(), mask_token_id=MASK, noise_seed=0, keep_frames=True,
    ).frames  # fmt: skip
    taken = sum(((before != MASK) & (after == MASK)).double() for before, after in itertools.pairwise(frames))
    naive = torch.tensor(_naive_remaskings(num_rows, num_steps, eta, [1.0, 1.0, 1 / 3]))
    error = torch.sqrt((taken.var(dim=0) + naive.var(dim=0)) / num_rows)
    assert ((taken.mean(dim=0) - naive.mean(dim=0)).abs() < 5 * error).all()
    assert taken[:, 2].mean() > taken[:, :2].mean(dim=0).max()


def _naive_remaskings(num_rows: int, num_steps: int, eta: float, p: list[float]) -> list[list[float]]:
    draw, taken = random.Random(0), []
    for _ in range(num_rows):
        is_token, count = [False] * len(p), [0.0] * len(p)
        for step in range(num_steps):
            alpha_t, alpha_s = step / num_steps, (step + 1) / num_steps
            sigma = eta * min(1.0, (1 - alpha_s) / alpha_t) if step else eta
            total = math.fsum(math.exp(-p[i]) for i in range(len(p)) if is_token[i])
            after = list(is_token)
            for i in range(len(p)):
                if not is_token[i]:
                    after[i] = draw.random() < (alpha_s - alpha_t) / (1 - alpha_t)
                elif draw.random() < sigma * math.exp(-p[i]) / total:
                    after[i], count[i] = False, count[i] + 1
            is_token = after
        taken.append(count)
    return taken


# Path planning


@pytest.mark.parametrize("is_tempered", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_path_planning_that_takes_nothing_back_is_confident_token_for_token(num_steps, is_tempered):
    xt = torch.randint(2, 4, (500, LENGTH), generator=torch.Generator().manual_seed(0))
    quotas = ScheduleQuotas(num_steps, "linear")
    plain = draw_rows(Confident("probability", quotas, is_tempered=is_tempered), xt=xt, proposal=Proposal(0.7))
    none = draw_rows(PathPlanning(num_steps, 0.0, is_tempered=is_tempered), xt=xt, proposal=Proposal(0.7))
    assert torch.equal(plain.x0, none.x0)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.5])
def test_path_planning_is_the_naive_loop(eta):
    model, num_steps = tiny_model(), 6
    mask = model.config.mask_token_id
    xt = torch.full((2, 9), mask)
    xt[0, :2], xt[1, 4] = torch.tensor([3, 8]), 5
    with torch.no_grad():
        found = sample(
            without_pass(model), xt, PathPlanning(num_steps, eta), Proposal(), mask_token_id=mask, noise_seed=4
        )
        for sample_id, start in enumerate(xt.tolist()):
            row, filled = list(start), [i for i, token in enumerate(start) if token == mask]
            for step in range(num_steps):
                logits = model(torch.tensor([row])).softmax(dim=1).tolist()
                tokens, scores = {}, {}
                for place in filled:
                    u = reference.uniform(4, Stream.CATEGORICAL, sample_id, place, step)
                    is_mask = row[place] == mask
                    tokens[place] = reference.inverse_cdf(logits[place], u) if is_mask else row[place]
                    scores[place] = math.log(logits[place][tokens[place]]) * (1 if is_mask else eta)
                num_masks = math.floor(len(filled) * (1 - (step + 1) / num_steps) + 1e-9)
                masked = sorted(filled, key=lambda place: scores[place])[:num_masks]
                for place in filled:
                    row[place] = mask if place in masked else tokens[place]
            assert found.x0[sample_id].tolist() == row


def test_path_planning_makes_a_pass_a_step():
    assert (draw_rows(PathPlanning(11), 20).nfe == 11).all()


# What all of them promise


@pytest.mark.parametrize("rule", ALL, ids=NAMES)
def test_the_prompt_is_kept_no_mask_is_left_and_a_row_is_the_same_in_any_batch(rule):
    xt = torch.randint(4, (40, LENGTH), generator=torch.Generator().manual_seed(0))
    drawn = draw_rows(rule, xt=xt)
    assert torch.equal(drawn.x0[xt != MASK], xt[xt != MASK])
    assert (drawn.x0 != MASK).all()
    one_by_one = [draw_rows(rule, xt=xt[i : i + 1], sample_ids=torch.tensor([i])) for i in range(40)]
    assert torch.equal(drawn.x0, torch.cat([one.x0 for one in one_by_one]))
    kept = draw_rows(rule, xt=xt, keeps_rows=True)
    assert torch.equal(kept.x0, drawn.x0)


@pytest.mark.parametrize("rule", ALL, ids=NAMES)
def test_rows_without_a_mask_make_no_pass(rule):
    drawn = draw_rows(rule, xt=torch.tensor([[0, 1, 2]]))
    assert drawn.num_passes == 0
    assert drawn.x0.tolist() == [[0, 1, 2]]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReMDM(0, 0.1), "num_steps is 0; it"),
        (lambda: ReMDM(8, 1.5), "eta is 1.5"),
        (lambda: ReMDM(8, 0.1, "loop", t_on=0.05, t_off=0.5), "t_off is 0.5 and t_on 0.05"),
        (lambda: ReMDM(8, 0.1, "loop", alpha_loop=1.0), "alpha_loop is 1.0"),
        (lambda: ReMDM(8, 0.1, "typo"), 'kind is "typo"; it must be one of cap, '),  # pyright: ignore[reportArgumentType]
        (lambda: ReMDM(8, 0.1, t_on=0.3), 't_on is 0.3, which kind "cap" has no use for'),
        (lambda: ReMDM(8, 0.1, "confidence", alpha_loop=0.5), "alpha_loop is 0.5, which"),
        (lambda: PathPlanning(0), "num_steps is 0; .* at least 1"),
        (lambda: PathPlanning(4, -0.5), "eta is -0.5"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
