"""Samplers whose order is known in advance: the law of their samples, their cost, what they promise."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dlm_core.samplers.loop import sample
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas
from dlm_core.schedules import ClippedSchedule, CosineSchedule, GeometricSchedule, LinearSchedule
from tests.support import reference
from tests.support.sampling import LENGTH, MASK, draw_rows, follows, world
from tests.support.toy_world import ExactDenoiser

NUM_SAMPLES = 10_000
RULES = [Ancestral(7), Ancestral(7, is_lazy=False), FirstHitting(), RandomOrder(EvenQuotas(2))]
NAMES = ["ancestral", "every step", "first hitting", "random order"]


# The law of the samples


@pytest.mark.parametrize(
    "rule",
    [Ancestral(100), Ancestral(300, CosineSchedule()), FirstHitting(), RandomOrder(EvenQuotas(LENGTH))],
    ids=["ancestral", "ancestral, cosine", "first hitting", "random order"],
)
def test_samples_token_by_token_follow_the_joint(rule):
    assert follows(draw_rows(rule, NUM_SAMPLES).x0, world()[0].prob)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_samples_of_few_steps_follow_the_enumerated_chain(num_steps):
    law = world()[0].ancestral_distribution(num_steps)
    assert follows(draw_rows(Ancestral(num_steps), NUM_SAMPLES, noise_seed=num_steps).x0, law)


@pytest.mark.parametrize(
    "rule", [Ancestral(1), FirstHitting(per_pass=LENGTH), RandomOrder(EvenQuotas(1))], ids=["T=1", "all at once", "one"]
)
def test_samples_of_one_pass_follow_the_marginals_and_not_the_joint(rule):
    drawn = draw_rows(rule, NUM_SAMPLES)
    assert follows(drawn.x0, world()[0].product_of_marginals())
    assert not follows(drawn.x0, world()[0].prob)
    assert drawn.num_passes == 1


@pytest.mark.parametrize("schedule", [GeometricSchedule(1e-2, 3.0), LinearSchedule()])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_analytic_sampler_follows_the_chain_of_its_scores(num_steps, schedule):
    """SEDD: a mask becomes x with s_x (e^(sigma_t - sigma_s) - 1), where s_x is p_x / (e^sigma_t - 1)."""
    t = torch.linspace(1.0, 1e-3, num_steps + 1, dtype=torch.float64)
    total = -schedule.alpha(t.clamp(max=1 - 1e-9)).log()
    rates = [float(torch.expm1(a - b) / torch.expm1(a)) for a, b in itertools.pairwise(total)]
    drawn = draw_rows(Ancestral.analytic(num_steps, schedule, 1e-3), NUM_SAMPLES, noise_seed=num_steps)
    assert follows(drawn.x0, _chain([*rates, 1.0]))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_origin_follows_the_chain_of_dream(num_steps):
    """Of times from 1 to eps, each mask with 1 - s/t, and all that are left in the last of T passes."""
    times = [1 - k / num_steps * (1 - 0.1) for k in range(num_steps + 1)]
    rates = [1 - s / t for t, s in itertools.pairwise(times)]
    rule = Ancestral.origin(num_steps, eps=0.1)
    assert follows(draw_rows(rule, NUM_SAMPLES, noise_seed=num_steps).x0, _chain([*rates[:-1], 1.0]))
    shown = []

    def predict(xt, select, which):
        shown.append(float(which.t[0]))
        return torch.zeros(len(select), 4)

    xt = torch.full((500, LENGTH), MASK)
    sample(predict, xt, replace(rule, is_lazy=False), Proposal(), mask_token_id=MASK, noise_seed=0)
    assert shown == pytest.approx(times[:-1])


def _chain(rates: list[float]) -> dict[reference.Tokens, float]:
    """The law of rows of masks, each of which is drawn with these probabilities, step by step and by itself."""
    law: dict[reference.Tokens, float] = {(MASK,) * LENGTH: 1.0}
    for rate in rates:
        after: dict[reference.Tokens, float] = {}
        for xt, p in law.items():
            each = [
                [(x, 1.0)] if x != MASK
                else [(MASK, 1 - rate), *((v, rate * q) for v, q in enumerate(world()[0].conditional(xt, place)))]
                for place, x in enumerate(xt)
            ]  # fmt: skip
            for combination in itertools.product(*each):
                key, weight = tuple(v for v, _ in combination), math.prod(q for _, q in combination)
                after[key] = after.get(key, 0.0) + p * weight
        law = {x: p for x, p in after.items() if p > 0}
    return law


@pytest.mark.parametrize("rule", [Ancestral(100), FirstHitting()], ids=["ancestral", "first hitting"])
def test_samples_given_a_prompt_follow_the_conditional(rule):
    prompt = torch.tensor([MASK, 1, MASK]).expand(NUM_SAMPLES, LENGTH)
    mass = {x: p for x, p in world()[0].prob.items() if x[1] == 1}
    law = {x: p / math.fsum(mass.values()) for x, p in mass.items()}
    assert follows(draw_rows(rule, xt=prompt).x0, law)


def test_steps_without_number_are_first_hitting_token_for_token():
    many, first = draw_rows(Ancestral(1_000_000), 2_000), draw_rows(FirstHitting(), 2_000)
    assert torch.equal(many.x0, first.x0)
    assert torch.equal(many.nfe, first.nfe)


def test_noise_removal_takes_the_most_likely_of_what_is_left():
    def sure_of_one(xt, select):
        return torch.tensor([[0.0, 1.0, 0.0, -torch.inf]], dtype=torch.float64).expand(len(select), 4)

    at_end = {
        end: draw_rows(Ancestral(1, t_end=0.5, denoises_at_end=end), NUM_SAMPLES, denoise=sure_of_one)
        for end in ("argmax", "draw")
    }
    p = math.e / (2 + math.e)
    for end, expected in (("argmax", 0.5 * p + 0.5), ("draw", p)):
        share = float((at_end[end].x0 == 1).double().mean())
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / (NUM_SAMPLES * LENGTH))


# What it costs


@pytest.mark.parametrize("end", [{}, {"t_end": 1e-5, "denoises_at_end": "argmax"}], ids=["t_end=0", "noise removal"])
@pytest.mark.parametrize("num_steps", [1, 3, 8, 40])
def test_lazy_passes_give_the_tokens_of_a_pass_each_step(num_steps, end):
    lazy = draw_rows(Ancestral(num_steps, **end), noise_seed=7)
    literal = draw_rows(Ancestral(num_steps, is_lazy=False, **end), noise_seed=7)
    assert torch.equal(lazy.x0, literal.x0)
    assert (literal.nfe == num_steps + len(end) // 2).all()
    assert literal.num_passes == num_steps + len(end) // 2
    assert int(lazy.nfe.max()) <= min(num_steps, LENGTH) + len(end) // 2
    assert lazy.num_passes <= min(num_steps, LENGTH) + len(end) // 2


@pytest.mark.parametrize(("num_steps", "length"), [(4, 3), (64, 16), (16, 64), (1000, 100)])
@pytest.mark.parametrize("removes_noise", [False, True])
def test_lazy_passes_are_on_average_what_the_formula_says(num_steps, length, removes_noise):
    rule = Ancestral(num_steps, t_end=1e-9, denoises_at_end="argmax") if removes_noise else Ancestral(num_steps)
    xt = torch.full((2_000, length), MASK)
    nfe = draw_rows(rule, xt=xt, denoise=lambda xt, select: torch.zeros(len(select), 4)).nfe.double()
    expected = num_steps * (1 - (1 - 1 / num_steps) ** length) + removes_noise
    assert abs(float(nfe.mean()) - expected) <= 4 * float(nfe.std()) / math.sqrt(len(nfe))


@pytest.mark.parametrize("per_pass", [1, 2, 5])
def test_first_hitting_makes_a_pass_for_each_so_many_masks_of_a_row(per_pass):
    xt = torch.randint(4, (60, 17), generator=torch.Generator().manual_seed(0))
    drawn = draw_rows(FirstHitting(per_pass=per_pass), xt=xt, denoise=lambda xt, select: torch.zeros(len(select), 4))
    masks = (xt == MASK).sum(dim=1)
    assert torch.equal(drawn.nfe, -(-masks // per_pass))
    assert drawn.num_passes == int(drawn.nfe.max())


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_passes_that_are_counted_are_those_that_are_made(rule):
    denoise = ExactDenoiser(world()[0])
    assert draw_rows(rule, denoise=denoise).num_passes == denoise.calls


def test_rows_that_need_no_more_passes_are_left_out_of_them():
    seen = []

    def predict(xt, select, which):
        seen.append((xt.clone(), which.rows.tolist()))
        return torch.zeros(len(select), 4)

    xt = torch.tensor([[0, MASK, MASK, MASK], [0, 1, 2, 0], [MASK, 1, 1, 1]])
    drawn = sample(predict, xt, FirstHitting(), Proposal(), mask_token_id=MASK, noise_seed=0)
    assert [rows for _, rows in seen] == [[0, 2], [0], [0]]
    assert drawn.nfe.tolist() == [3, 0, 1]
    assert [len(xt) for xt, _ in seen] == [2, 1, 1]


# Times


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineSchedule(), GeometricSchedule(1e-2, 3.0), GeometricSchedule(1e-3, 20.0)]
)
def test_first_hitting_times_are_those_of_the_largest_of_uniform_numbers(schedule):
    """Of the share of masks that is left of what t = 1 has."""
    times = []

    def predict(xt, select, which):
        times.append(which.t)
        return torch.zeros(len(select), 4)

    num_rows, length = 4_000, 5
    xt = torch.full((num_rows, length), MASK)
    sample(predict, xt, FirstHitting(schedule), Proposal(), mask_token_id=MASK, noise_seed=0)
    most = schedule.mask_prob(torch.ones((), dtype=torch.float64))
    for number, t in enumerate(times):
        share = schedule.mask_prob(t) / most
        expected = (length - number) / (length + 1)  # mean of the order statistic
        spread = math.sqrt(expected * (1 - expected) / (length + 2) / num_rows)
        assert abs(float(share.mean()) - expected) < 5 * spread
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("schedule", [ClippedSchedule(0.3, 1.0), GeometricSchedule(1e-2, 3.0)])
def test_what_a_schedule_never_reveals_comes_last_at_time_0(schedule):
    times = []

    def predict(xt, select, which):
        times.append(which.t)
        return torch.zeros(len(select), 4)

    xt = torch.full((50, 64), MASK)
    drawn = sample(predict, xt, FirstHitting(schedule), Proposal(), mask_token_id=MASK, noise_seed=0)
    assert (drawn.nfe == 64).all()
    least, most = schedule.mask_prob(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    at_end = (torch.stack(times) == 0).sum(dim=0)
    assert abs(float(at_end.double().mean()) - 64 * least / most) < 5 * math.sqrt(64 * least / most / 50)
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(times))


def test_several_tokens_of_a_pass_are_shown_the_time_of_the_first():
    by_size = {}
    for per_pass in (1, 3):
        times = by_size[per_pass] = []

        def predict(xt, select, which, times=times):
            times.append(which.t)
            return torch.zeros(len(select), 4)

        xt = torch.full((20, 9), MASK)
        sample(predict, xt, FirstHitting(per_pass=per_pass), Proposal(), mask_token_id=MASK, noise_seed=0)
    assert torch.equal(torch.stack(by_size[1][::3]), torch.stack(by_size[3]))


@pytest.mark.parametrize(
    "schedule",
    [LinearSchedule(), CosineSchedule(), GeometricSchedule(1e-3, 20.0), GeometricSchedule(1e-2, 3.0)],
)
def test_a_step_is_shown_the_time_at_its_start_and_masks_as_often_as_the_schedule_says(schedule):
    num_steps, shown = 6, []

    def predict(xt, select, which):
        shown.append((float(which.t[0]), float((xt == MASK).double().mean())))
        return torch.zeros(len(select), 4)

    xt = torch.full((500, 40), MASK)
    rule = Ancestral(num_steps, schedule, t_end=1e-3, denoises_at_end="draw", is_lazy=False)
    sample(predict, xt, rule, Proposal(), mask_token_id=MASK, noise_seed=0)
    times = torch.linspace(1.0, 1e-3, num_steps + 1, dtype=torch.float64)
    shares = schedule.mask_prob(times) / schedule.mask_prob(times[:1])
    assert [t for t, _ in shown] == pytest.approx(times.tolist())
    for (_, share), p in zip(shown, shares.tolist(), strict=True):
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / xt.numel()) + 1e-12


# What all of them promise


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_prompt_is_kept_and_no_mask_is_left(rule):
    xt = torch.randint(4, (300, LENGTH), generator=torch.Generator().manual_seed(0))
    before, given = xt.clone(), xt != MASK
    x0 = draw_rows(rule, xt=xt).x0
    assert torch.equal(xt, before)
    assert torch.equal(x0[given], xt[given])
    assert ((x0 >= 0) & (x0 < MASK)).all()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_rows_without_a_mask_make_no_pass_unless_every_step_does(rule):
    for one in (rule, replace(rule, t_end=0.1, denoises_at_end="draw") if isinstance(rule, Ancestral) else rule):
        drawn = draw_rows(one, xt=torch.tensor([[0, 1, 2]]))
        assert drawn.num_passes == (0 if rule != RULES[1] else 7 if one == rule else 8)
        assert drawn.x0.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_row_is_the_same_in_any_batch_in_any_order(rule):
    ids = torch.tensor([5, 2, 9, 0])
    alone = [draw_rows(rule, 1, sample_ids=ids[i : i + 1]) for i in range(4)]
    together = draw_rows(rule, 4, sample_ids=ids)
    turned = draw_rows(rule, 4, sample_ids=ids.flip(0))
    assert torch.equal(together.x0, torch.cat([one.x0 for one in alone]))
    assert torch.equal(together.nfe, torch.cat([one.nfe for one in alone]))
    assert torch.equal(together.x0, turned.x0.flip(0))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_all_rows_in_every_pass_give_the_same_tokens_and_count(rule):
    xt = torch.randint(2, 4, (40, LENGTH), generator=torch.Generator().manual_seed(1))
    seen = []

    def predict(xt, select, which):
        seen.append(which.rows.tolist())
        return world()[1](xt, select)

    kept = sample(predict, xt, rule, Proposal(), mask_token_id=MASK, noise_seed=3, keeps_rows=True)
    free = draw_rows(rule, xt=xt, noise_seed=3)
    assert torch.equal(kept.x0, free.x0)
    assert torch.equal(kept.nfe, free.nfe)
    assert seen == [list(range(40))] * kept.num_passes


def test_samples_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = draw_rows(Ancestral(8))
    torch.manual_seed(2)
    assert torch.equal(first.x0, draw_rows(Ancestral(8)).x0)
    assert not torch.equal(first.x0, draw_rows(Ancestral(8), noise_seed=1).x0)


def test_rows_are_drawn_independently():
    drawn = draw_rows(Ancestral(1), NUM_SAMPLES)
    pairs = Counter(zip(drawn.x0[:-1, 0].tolist(), drawn.x0[1:, 0].tolist(), strict=True))
    marginal = world()[0].conditional((MASK,) * LENGTH, 0)
    expected = [(NUM_SAMPLES - 1) * p * q for p in marginal for q in marginal]
    observed = [pairs[a, b] for a in range(3) for b in range(3)]
    assert reference.chi_square(observed, expected) < reference.chi_square_bound(8)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_only_what_is_revealed_is_asked_for_and_only_once(rule):
    seen = []

    def predict(xt, select, which):
        seen.extend((which.rows[select // 3] * 3 + select % 3).tolist())
        assert (xt.flatten()[select] == MASK).all()
        return torch.zeros(len(select), 4)

    xt = torch.tensor([[MASK, 0, MASK], [1, MASK, MASK]])
    sample(predict, xt, rule, Proposal(), mask_token_id=MASK, noise_seed=0)
    assert sorted(seen) == [0, 2, 4, 5]


def test_frames_go_from_masks_to_the_text_and_change_nothing_that_stands():
    drawn = draw_rows(Ancestral(8), keep_frames=True)
    assert len(drawn.frames) == drawn.num_passes + 1
    assert (drawn.frames[0] == MASK).all()
    assert torch.equal(drawn.frames[-1], drawn.x0)
    for earlier, later in itertools.pairwise(drawn.frames):
        assert torch.equal(later[earlier != MASK], earlier[earlier != MASK])
    assert draw_rows(Ancestral(8)).frames == []


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ancestral(0), "num_steps is 0"),
        (lambda: Ancestral(4, t_end=1.0), "t_end is 1.0"),
        (lambda: Ancestral(4, t_end=0.1), "leaves masks at t_end 0.1"),
        (lambda: Ancestral(4, GeometricSchedule(1e-3, 20.0)), "leaves masks at t_end 0.0"),
        (
            lambda: Ancestral(4, denoises_at_end="sample"),  # pyright: ignore[reportArgumentType]
            '"no", "argmax" or "draw"',
        ),
        (lambda: FirstHitting(per_pass=0), "per_pass is 0"),
        (lambda: Ancestral.origin(0), "num_steps is 0; it must be at least 1"),
        (lambda: Ancestral.origin(4, eps=1.0), "eps is 1.0"),
    ],
)
def test_rules_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
