"""Samplers that take the surest first: against the loops of their papers over lists, and the laws of their samples."""

import itertools
import math
from collections import Counter

import pytest
import torch

from dlm_core.noise import Stream
from dlm_core.samplers.confident import Confident, EntropyBound, Factor, Threshold
from dlm_core.samplers.loop import sample, without_pass
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas, ScheduleQuotas, TimedQuotas
from tests.support import reference
from tests.support.sampling import LENGTH, MASK, draw_rows, follows, tiny_model, world

NUM_SAMPLES = 10_000
GREEDY = Proposal(temperature=0.0)
COUNTS = [Threshold(0.4), Factor(1.5), EntropyBound(0.5)]
ALL = [
    Confident("probability", EvenQuotas(4)),
    Confident("margin", TimedQuotas(5)),
    Confident("entropy", ScheduleQuotas(3)),
    Confident("entropy", EvenQuotas(4), order_temperature=0.5),
    *(Confident("probability", count) for count in COUNTS),
]
NAMES = [f"{rule.score}, {rule.num}, {rule.order_temperature}" for rule in ALL]


# Naive loops: one row, lists of floats


def _probs(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(z / temperature) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def _score(kind: str, probs: list[float], token: int) -> float:
    best = sorted(probs, reverse=True)
    if kind == "probability":
        return probs[token]
    return best[0] - best[1] if kind == "margin" else math.fsum(p * math.log(p) for p in probs if p > 0)


def _naive(rule: Confident, row: list[int], mask: int, proposal: Proposal, sample_id: int, model) -> list[int]:
    """Every position's logits in every step, sorting and counting by hand."""
    row, step = list(row), 0
    num_masks = row.count(mask)
    while mask in row:
        logits = model(torch.tensor([row])).tolist()
        found = []
        for place in [i for i, token in enumerate(row) if token == mask]:
            tempered = _probs(logits[place], proposal.temperature or 1.0)
            u = reference.uniform(5, Stream.CATEGORICAL, sample_id, place, step)
            token = reference.inverse_cdf(tempered, u) if proposal.temperature else tempered.index(max(tempered))
            probs = tempered if rule.is_tempered else _probs(logits[place])
            entropy = -math.fsum(p * math.log(p) for p in probs if p > 0)
            score = -math.inf if token in rule.last else _score(rule.score, probs, token)
            found.append((score, -place, token, entropy))
        found.sort(reverse=True)
        for _, place, token, _ in found[: _naive_count(rule.num, found, num_masks, step)]:
            row[-place] = token
        step += 1
    return row


def _naive_count(num, found: list[tuple], num_masks: int, step: int) -> int:
    scores, entropies = [f[0] for f in found], [f[3] for f in found]
    if isinstance(num, EvenQuotas):  # LLaDA: get_num_transfer_tokens
        return num_masks // num.num_steps + (1 if step < num_masks % num.num_steps else 0)
    if isinstance(num, TimedQuotas):  # Dream: _sample
        t, s = (1 - k / num.num_steps * (1 - num.t_end) for k in (step, step + 1))
        return len(found) if step == num.num_steps - 1 else int(len(found) * (1 - s / t) + 1e-9)
    if isinstance(num, ScheduleQuotas):  # MaskGIT: cosine
        return len(found) - int(num_masks * math.cos(math.pi / 2 * (step + 1) / num.num_steps) + 1e-9)
    if isinstance(num, Threshold):
        return max(1, sum(score > num.tau for score in scores))
    if isinstance(num, Factor):
        holds = [n for n in range(1, len(scores) + 1) if scores[n - 1] >= 1 - num.factor / (n + 1)]
        return max([1, *holds])
    prefixes = [n for n in range(1, len(found) + 1) if math.fsum(entropies[:n]) - max(entropies[:n]) <= num.gamma]
    return max(prefixes)


@pytest.mark.parametrize("proposal", [GREEDY, Proposal(), Proposal(0.6)], ids=["greedy", "t=1", "t=0.6"])
@pytest.mark.parametrize("is_tempered", [False, True])
@pytest.mark.parametrize(
    "rule", [rule for rule in ALL if not rule.order_temperature], ids=[n for n in NAMES if n.endswith(" 0.0")]
)
def test_rows_are_those_of_the_naive_loop(rule, is_tempered, proposal):
    _is_naive(Confident(rule.score, rule.num, is_tempered=is_tempered), proposal)


@pytest.mark.parametrize("proposal", [GREEDY, Proposal()], ids=["greedy", "t=1"])
@pytest.mark.parametrize(
    "rule", [rule for rule in ALL if not rule.order_temperature], ids=[n for n in NAMES if n.endswith(" 0.0")]
)
def test_what_is_to_come_last_has_no_confidence_in_the_naive_loop(rule, proposal):
    """Half of all ids, so that some of them are drawn in every step."""
    half = tuple(range(tiny_model().config.mask_token_id // 2))
    _is_naive(Confident(rule.score, rule.num, last=half), proposal)


def _is_naive(rule: Confident, proposal: Proposal) -> None:
    model = tiny_model()
    mask = model.config.mask_token_id
    xt = torch.randint(mask, (3, 12), generator=torch.Generator().manual_seed(0))
    xt[0, 2:], xt[1, ::2], xt[2, 7] = mask, mask, mask
    ids = torch.tensor([4, 0, 9])
    with torch.no_grad():
        found = sample(without_pass(model), xt, rule, proposal, mask_token_id=mask, noise_seed=5, sample_ids=ids)
        naive = [_naive(rule, row, mask, proposal, int(i), model) for row, i in zip(xt.tolist(), ids, strict=True)]
    assert found.x0.tolist() == naive


# The law of the samples


@pytest.mark.parametrize("score", ["margin", "entropy"])
@pytest.mark.parametrize("num", [EvenQuotas(LENGTH), EntropyBound(0.0)])
def test_one_token_a_step_in_an_order_that_no_draw_enters_follows_the_joint(score, num):
    assert follows(draw_rows(Confident(score, num), NUM_SAMPLES).x0, world()[0].prob)


def test_an_order_by_the_probability_of_what_was_drawn_does_not_follow_the_joint():
    assert not follows(draw_rows(Confident("probability", EvenQuotas(LENGTH)), NUM_SAMPLES).x0, world()[0].prob)


def test_order_temperature_draws_positions_without_replacement_in_proportion():
    scores = [0.9, 0.6, 0.5]
    logits = torch.tensor([[math.log(p), math.log((1 - p) / 2), math.log((1 - p) / 2), 0] for p in scores])
    rule = Confident("probability", EvenQuotas(2), order_temperature=0.25)  # two, then the last
    xt = torch.full((NUM_SAMPLES, LENGTH), MASK)
    predict = without_pass(lambda xt, select: logits.double()[select % LENGTH])
    frames = sample(predict, xt, rule, GREEDY, mask_token_id=MASK, noise_seed=0, keep_frames=True).frames
    pairs = Counter(tuple((row != MASK).nonzero().flatten().tolist()) for row in frames[1])
    weights = [math.exp(score / 0.25) for score in scores]
    law = dict.fromkeys(itertools.combinations(range(3), 2), 0.0)
    for i, j in itertools.permutations(range(3), 2):
        law[min(i, j), max(i, j)] += weights[i] / sum(weights) * weights[j] / (sum(weights) - weights[i])
    observed, expected = [pairs[p] for p in law], [NUM_SAMPLES * p for p in law.values()]
    assert reference.chi_square(observed, expected) < reference.chi_square_bound(2)


@pytest.mark.parametrize("order_temperature", [0.0, 50.0])
def test_what_is_to_come_last_does_so_in_a_drawn_order_too(order_temperature):
    logits = torch.tensor([[0.0, 99.0, 0.0, 0.0], *[[0.0, -math.inf, 0.0, 0.0]] * (LENGTH - 1)], dtype=torch.float64)
    rule = Confident("probability", EvenQuotas(LENGTH), order_temperature=order_temperature, last=(1,))
    frames = draw_rows(rule, denoise=lambda xt, select: logits[select % LENGTH], keep_frames=True).frames
    assert ((frames[-2] == MASK) == (torch.arange(LENGTH) == 0)).all()
    assert (frames[-1][:, 0] == 1).all()


@pytest.mark.parametrize(("num_steps", "order_temperature"), [(2, 0.0), (2, 0.3), (3, 0.2)])
def test_drawn_tokens_in_a_drawn_order_follow_the_enumerated_law(num_steps, order_temperature):
    """Which tokens are drawn and which positions they are drawn for are independent but for the scores."""
    rule = Confident("probability", EvenQuotas(num_steps), order_temperature=order_temperature)
    law: dict[reference.Tokens, float] = {(MASK,) * LENGTH: 1.0}
    for num in EvenQuotas(num_steps).split(torch.tensor([LENGTH]))[0].tolist():
        after: Counter[reference.Tokens] = Counter()
        for xt, p in law.items():
            masks = [place for place in range(LENGTH) if xt[place] == MASK]
            probs = {place: world()[0].conditional(xt, place) for place in masks}
            for tokens in itertools.product(range(MASK), repeat=len(masks)):
                drawn = dict(zip(masks, tokens, strict=True))
                scores = {place: probs[place][token] for place, token in drawn.items()}
                for taken, q in _orders(scores, num, order_temperature).items():
                    filled = tuple(drawn[i] if i in taken else x for i, x in enumerate(xt))
                    after[filled] += p * math.prod(scores.values()) * q
        law = dict(after)
    assert follows(draw_rows(rule, NUM_SAMPLES).x0, law)


def _orders(scores: dict[int, float], num: int, temperature: float) -> dict[tuple[int, ...], float]:
    if not temperature:
        return {tuple(sorted(scores, key=lambda place: (-scores[place], place))[:num]): 1.0}
    law = {}
    for order in itertools.permutations(scores, num):
        rest, law[order] = dict(scores), 1.0
        for place in order:
            weights = {i: math.exp(score / temperature) for i, score in rest.items()}
            law[order] *= weights[place] / math.fsum(weights.values())
            del rest[place]
    return law


# How many at a time


@pytest.mark.parametrize("quotas", [EvenQuotas(5), TimedQuotas(5), ScheduleQuotas(5), ScheduleQuotas(5, "linear")])
def test_quotas_add_up_to_the_masks_of_each_row(quotas):
    num_masks = torch.arange(40)
    split = quotas.split(num_masks)
    assert torch.equal(split.sum(dim=1), num_masks)
    assert (split >= 0).all()
    assert split.shape == (40, 5)


def test_even_quotas_differ_by_one_and_come_first():
    assert EvenQuotas(4).split(torch.tensor([10, 3, 8])).tolist() == [[3, 3, 2, 2], [1, 1, 1, 0], [2, 2, 2, 2]]


def test_quotas_by_time_leave_the_rest_to_the_last_step():
    # 1 - s/t of five steps to 1e-3: 0.1998, 0.2497, 0.3328, 0.4988 of 10, 9, 7, 5
    assert TimedQuotas(5).split(torch.tensor([10])).tolist() == [[1, 2, 2, 2, 3]]
    assert TimedQuotas(5, t_end=0.0).split(torch.tensor([10])).tolist() == [[2, 2, 2, 2, 2]]


def test_linear_quotas_of_as_many_steps_as_masks_are_one_each():
    assert ScheduleQuotas(10, "linear").split(torch.tensor([10])).tolist() == [[1] * 10]


@pytest.mark.parametrize("num", [Threshold(1.0), Factor(0.0), EntropyBound(0.0)])
def test_bounds_at_their_end_take_one_a_step(num):
    drawn = draw_rows(Confident("probability", num), 50)
    assert (drawn.nfe == LENGTH).all()


@pytest.mark.parametrize("num", [Threshold(0.0), Factor(10.0), EntropyBound(100.0)])
def test_bounds_that_nothing_breaks_take_all_at_once(num):
    drawn = draw_rows(Confident("probability", num), 50)
    assert drawn.num_passes == 1


# What all of them promise


@pytest.mark.parametrize("rule", ALL, ids=NAMES)
def test_the_prompt_is_kept_no_mask_is_left_and_a_row_is_the_same_in_any_batch(rule):
    xt = torch.randint(4, (60, LENGTH), generator=torch.Generator().manual_seed(0))
    drawn = draw_rows(rule, xt=xt)
    assert torch.equal(drawn.x0[xt != MASK], xt[xt != MASK])
    assert (drawn.x0 != MASK).all()
    one_by_one = [draw_rows(rule, xt=xt[i : i + 1], sample_ids=torch.tensor([i])) for i in range(60)]
    assert torch.equal(drawn.x0, torch.cat([one.x0 for one in one_by_one]))
    assert torch.equal(drawn.nfe, torch.cat([one.nfe for one in one_by_one]))
    assert (drawn.nfe[(xt != MASK).all(dim=1)] == 0).all()


@pytest.mark.parametrize("num", COUNTS)
def test_looking_less_often_changes_passes_and_nothing_else(num):
    often, seldom = (draw_rows(Confident("probability", num, look_every=n), 40) for n in (1, 3))
    assert torch.equal(often.x0, seldom.x0)
    assert torch.equal(often.nfe, seldom.nfe)
    assert often.num_passes == int(often.nfe.max()) <= seldom.num_passes


@pytest.mark.parametrize("rule", ALL, ids=NAMES)
def test_rows_without_a_mask_make_no_pass(rule):
    assert draw_rows(rule, xt=torch.tensor([[0, 1, 2]])).num_passes == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(1.5), "tau is 1.5"),
        (lambda: Factor(-1.0), "factor is -1.0"),
        (lambda: EntropyBound(-0.1), "gamma is -0.1"),
        (lambda: Confident(order_temperature=-1.0), "order_temperature is -1.0"),
        (lambda: Confident(num=Threshold(), order_temperature=1.0), "it goes with quotas"),
        (lambda: Confident("entropy", Threshold()), "a bound on the probability"),
        (lambda: Confident(look_every=0), "look_every is 0"),
        (lambda: Confident(last=(3, -1)), "last has the id -1; ids begin at 0"),
        (lambda: Confident("probabilty"), 'score is "probabilty"; it must be one of probability, margin, entropy'),  # pyright: ignore[reportArgumentType]
        (lambda: ScheduleQuotas(4, "cosin"), 'shape is "cosin"'),  # pyright: ignore[reportArgumentType]
        (lambda: EvenQuotas(0), "num_steps is 0; it"),
        (lambda: TimedQuotas(0), "num_steps is 0; .* at least 1"),
        (lambda: TimedQuotas(4, t_end=1.0), "t_end is 1.0"),
        (lambda: ScheduleQuotas(-1), "num_steps is -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
