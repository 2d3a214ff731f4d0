"""The weight of every token under every objective, against closed forms and loops."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from dlm_core.objectives import (
    Cart,
    Corrupted,
    DiscreteTime,
    ExactCount,
    InverseMaskProb,
    MinSnr,
    Nelbo,
    OneMinusT,
    Snr,
    Uniform,
    Weighting,
)
from dlm_core.schedules import (
    SCHEDULES,
    ClippedSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    PolynomialSchedule,
    Schedule,
)
from tests.support.toy_world import mixed_batch

EXACT = 1e-12  # a few float64 operations, the subtraction of nearby numbers among them
DIFFERENCES = 1e-7  # central differences of relative width 1e-5: 1e-10 from the third derivative, 1e-11 from rounding
FLOAT32 = 1e-5  # a few float32 operations on numbers that lose a digit to subtraction

LINEAR, SQUARE = LinearSchedule(), PolynomialSchedule(2.0)

MASK_PROB: dict[str, tuple[Schedule, Callable[[float], float]]] = {
    "linear": (SCHEDULES["linear"], lambda t: t),
    "cosine": (SCHEDULES["cosine"], lambda t: 1 - math.cos(math.pi * t / 2)),
    "cosine_sqr": (SCHEDULES["cosine_sqr"], lambda t: 1 - math.cos(math.pi * t / 2) ** 2),
    "sigma_linear": (SCHEDULES["sigma_linear"], lambda t: 1 - math.exp(-1e8 * t)),
    "geometric": (SCHEDULES["geometric"], lambda t: 1 - math.exp(-(1e-4 ** (1 - t)) * 20**t)),
    "square": (SCHEDULES["square"], lambda t: t**2),
    "sqrt": (SCHEDULES["sqrt"], lambda t: t**0.5),
    "log": (SCHEDULES["log"], lambda t: math.log(1 + t) / math.log(2)),
    "cube": (PolynomialSchedule(3.0), lambda t: t**3),
    "clipped": (ClippedSchedule(0.3, 0.8), lambda t: 0.3 + 0.5 * t),
}
CLOSED_FORMS = pytest.mark.parametrize("name", MASK_PROB)


def _times(name: str) -> list[float]:
    """Times at which the schedule is neither near 0 nor near 1."""
    return [3e-9, 1e-8, 2e-8] if name == "sigma_linear" else [0.4, 0.6, 0.8]


def _slope(function: Callable[[float], float], t: float) -> float:
    return (function(t * (1 + 1e-5)) - function(t * (1 - 1e-5))) / (2e-5 * t)


def _weights(weighting: Weighting, times: list[float]) -> list[float]:
    """Of a row of masked tokens, one at each time."""
    t = torch.tensor([times], dtype=torch.float64)
    everywhere = torch.ones(t.shape, dtype=torch.bool)
    tokens = torch.zeros(t.shape, dtype=torch.int64)
    return weighting.token_weight(Corrupted(tokens, tokens + 9, t, everywhere, everywhere, 9))[0].tolist()


# Closed forms in t


def test_every_published_schedule_has_a_closed_form_here():
    assert set(SCHEDULES) <= set(MASK_PROB)


@CLOSED_FORMS
def test_nelbo_weight_is_the_slope_of_log_mask_prob(name):
    schedule, mask_prob = MASK_PROB[name]
    expected = [_slope(lambda t: math.log(mask_prob(t)), t) for t in _times(name)]
    assert _weights(Nelbo(schedule), _times(name)) == pytest.approx(expected, rel=DIFFERENCES)


@CLOSED_FORMS
def test_inverse_mask_prob_weight_is_its_inverse(name):
    schedule, mask_prob = MASK_PROB[name]
    expected = [1 / mask_prob(t) for t in _times(name)]
    assert _weights(InverseMaskProb(schedule), _times(name)) == pytest.approx(expected, rel=EXACT)


@CLOSED_FORMS
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
def test_min_snr_weight_is_the_clipped_ratio(name, gamma):
    schedule, mask_prob = MASK_PROB[name]
    expected = [min((1 - mask_prob(t)) / mask_prob(t), gamma) for t in _times(name)]
    assert _weights(MinSnr(schedule, gamma), _times(name)) == pytest.approx(expected, rel=EXACT)


def test_min_snr_clips_at_five_by_default():
    assert _weights(MinSnr(LINEAR), [0.1, 0.5]) == [5.0, 1.0]


@CLOSED_FORMS
def test_snr_weight_is_the_ratio_over_its_slope(name):
    schedule, mask_prob = MASK_PROB[name]

    def snr(t: float) -> float:
        return (1 - mask_prob(t)) / mask_prob(t)

    expected = [snr(t) / abs(_slope(snr, t)) for t in _times(name)]
    assert _weights(Snr(schedule), _times(name)) == pytest.approx(expected, rel=DIFFERENCES)


@CLOSED_FORMS
@pytest.mark.parametrize("num_steps", [1, 2, 5, 100])
def test_discrete_time_weight_is_the_share_revealed_times_the_number_of_steps(name, num_steps):
    schedule, mask_prob = MASK_PROB[name]
    steps = sorted({1, (num_steps + 1) // 2, num_steps})
    expected = [
        num_steps * (mask_prob(i / num_steps) - mask_prob((i - 1) / num_steps)) / mask_prob(i / num_steps)
        for i in steps
    ]
    found = _weights(DiscreteTime(schedule, num_steps), [i / num_steps for i in steps])
    assert found == pytest.approx(expected, rel=1e-9)  # small mask probabilities come out of a subtraction from 1


def test_discrete_time_weight_tends_to_the_continuous_one():
    fine = _weights(DiscreteTime(CosineSchedule(), 10**5), [0.2, 0.5])
    assert fine == pytest.approx(_weights(Nelbo(CosineSchedule()), [0.2, 0.5]), rel=1e-4)


@pytest.mark.parametrize("off", [5e-7, -5e-7])
def test_discrete_time_takes_a_time_rounded_to_float32_for_the_step_it_is(off):
    assert _weights(DiscreteTime(LINEAR, 10), [0.3 + off]) == pytest.approx([10 / 3], rel=EXACT)


# In a batch with prompts, padding and blocks


@dataclass(frozen=True)
class Case:
    weighting: Weighting
    is_bound: bool
    naive: Callable[[Corrupted, int, int], float]
    """The weight of the token at a row and a place."""


def _t(batch: Corrupted, row: int, place: int) -> float:
    return float(batch.t[row, place])


def _counted(block_size: int) -> Callable[[Corrupted, int, int], float]:
    def naive(batch: Corrupted, row: int, place: int) -> float:
        block = [p for p in range(batch.x0.shape[1]) if p // block_size == place // block_size]
        maskable = [p for p in block if batch.maskable[row, p]]
        masked = [p for p in maskable if int(batch.xt[row, p]) == batch.mask_token_id]
        return len(maskable) / len(masked) if masked else 0.0

    return naive


def _near_context(p: float) -> Callable[[Corrupted, int, int], float]:
    def naive(batch: Corrupted, row: int, place: int) -> float:
        total = 0.0
        for other in range(batch.x0.shape[1]):
            clean = int(batch.xt[row, other]) != batch.mask_token_id and bool(batch.is_text[row, other])
            if clean and other != place:
                total += p * math.prod([1 - p] * (abs(place - other) - 1))
        return total / 2

    return naive


def _two_cosines(batch: Corrupted, row: int, place: int) -> float:
    alpha_s, alpha_t = (math.cos(math.pi * t / 2) for t in (_t(batch, row, place) - 1 / 20, _t(batch, row, place)))
    return 20 * (alpha_s - alpha_t) / (1 - alpha_t)


CASES = [
    Case(Nelbo(LINEAR), True, lambda *at: 1 / _t(*at)),
    Case(Nelbo(SQUARE), True, lambda *at: 2 / _t(*at)),
    Case(DiscreteTime(LINEAR, 20), True, lambda *at: 1 / _t(*at)),
    Case(DiscreteTime(CosineSchedule(), 20), True, _two_cosines),
    Case(ExactCount(), True, _counted(6)),
    Case(ExactCount(3), True, _counted(3)),
    Case(ExactCount(2), True, _counted(2)),
    Case(ExactCount(1), True, _counted(1)),
    Case(InverseMaskProb(SQUARE), False, lambda *at: 1 / _t(*at) ** 2),
    Case(Uniform(), False, lambda *at: 1.0),
    Case(OneMinusT(), False, lambda *at: 1 - _t(*at)),
    Case(Snr(LINEAR), False, lambda *at: _t(*at) * (1 - _t(*at))),
    Case(MinSnr(LINEAR, 1.5), False, lambda *at: min(1 / _t(*at) - 1, 1.5)),
    Case(Cart(0.1), False, _near_context(0.1)),
    Case(Cart(0.8), False, _near_context(0.8)),
    Case(Cart(1.0), False, _near_context(1.0)),
]
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.weighting))


@ALL_CASES
def test_token_weight_of_a_mixed_batch_equals_naive_loop(case):
    batch = mixed_batch()
    weight = case.weighting.token_weight(batch)
    assert weight.dtype == torch.float64
    for row, place in itertools.product(range(8), range(6)):
        assert float(weight[row, place]) == pytest.approx(case.naive(batch, row, place), rel=EXACT)


@ALL_CASES
def test_token_weight_is_in_the_dtype_of_the_times(case):
    batch = mixed_batch()
    narrow = case.weighting.token_weight(replace(batch, t=batch.t.float()))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), case.weighting.token_weight(batch), rtol=FLOAT32, atol=FLOAT32)


# Labels


def test_every_weighting_says_whether_it_is_a_bound():
    assert {type(case.weighting) for case in CASES} == {
        kind for kind in Weighting.__subclasses__() if kind.__module__ == Weighting.__module__
    }
    for case in CASES:
        kind = type(case.weighting)
        assert case.weighting.is_bound is case.is_bound
        assert ("Not a bound" in " ".join((kind.__doc__ or "").split())) is not case.is_bound
        assert not kind.__subclasses__()  # final: nobody inherits a label


@pytest.mark.parametrize("kind", [Nelbo, lambda schedule: DiscreteTime(schedule, 4)], ids=["nelbo", "discrete"])
def test_truncated_integral_is_no_bound(kind):
    whole = [LINEAR, CosineSchedule(), PolynomialSchedule(0.5), ClippedSchedule(0.0, 1.0)]
    cut = [ClippedSchedule(0.3, 1.0), ClippedSchedule(0.0, 0.8), GeometricSchedule()]
    assert [kind(schedule).is_bound for schedule in whole + cut] == [True] * 4 + [False] * 3


@dataclass(frozen=True)
class _Given(Weighting):
    value: float

    def _token_weight(self, batch: Corrupted) -> torch.Tensor:
        return torch.full_like(batch.t, self.value)


def test_a_weighting_that_says_nothing_is_no_bound():
    assert not _Given(1.0).is_bound


@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan])
def test_weight_of_a_masked_token_that_is_no_weight_is_refused(value):
    with pytest.raises(ValueError, match=rf"_Given\(value={value}\) weighs a masked token with {value} at t = 0\.5;"):
        _Given(value).token_weight(_row("cx"))
    assert _Given(value).token_weight(_row("cc")).shape == (1, 2)


# Context-adaptive reweighting


def _row(text: str) -> Corrupted:
    """Clean ``c``, masked ``x``, prompt ``q`` (clean), padding ``.``."""
    xt = torch.tensor([[9 if mark == "x" else 1 for mark in text]])
    is_text = torch.tensor([[mark != "." for mark in text]])
    maskable = torch.tensor([[mark in "cx" for mark in text]])
    return Corrupted(torch.ones_like(xt), xt, torch.full(xt.shape, 0.5, dtype=torch.float64), is_text, maskable, 9)


def _cart(text: str, p: float) -> list[float]:
    return Cart(p).token_weight(_row(text))[0].tolist()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("place", [0, 2, 7])
def test_cart_with_all_neighbours_clean_has_the_closed_form(p, place):
    text = "c" * place + "x" + "c" * (7 - place)
    left, right = 1 - (1 - p) ** place, 1 - (1 - p) ** (7 - place)
    found = _cart(text, p)[place]
    assert found == pytest.approx((left + right) / 2, rel=EXACT)
    assert 0 < found <= 1


def test_cart_with_everything_masked_is_zero():
    assert _cart("xxxxx", 0.3) == [0.0] * 5


def test_cart_of_mirrored_text_is_mirrored():
    text = "xcxxcccxxc"
    assert _cart(text[::-1], 0.3) == pytest.approx(_cart(text, 0.3)[::-1], rel=EXACT)


def test_cart_with_p_one_counts_direct_neighbours_alone():
    assert _cart("cxcxxxc", 1.0) == [0.0, 1.0, 0.0, 0.5, 0.0, 0.5, 0.0]


def test_cart_takes_a_prompt_for_context_and_padding_for_none():
    assert _cart("qxx", 0.5) == _cart("cxx", 0.5)
    assert _cart("qxx", 0.5)[1] == 0.25
    assert _cart("xx.", 0.5) == [0.0, 0.0, 0.0]
    assert _cart("cx..", 0.5)[1] == _cart("cx", 0.5)[1]


# Errors


@pytest.mark.parametrize("num_timesteps", [0, -3])
def test_discrete_time_without_steps_is_refused(num_timesteps):
    with pytest.raises(ValueError, match=f"num_timesteps is {num_timesteps};"):
        DiscreteTime(LINEAR, num_timesteps)


@pytest.mark.parametrize("t", [0.0, 0.04, 0.25, 0.30001, 0.3000012, 0.2999988, 0.29999])
def test_discrete_time_off_its_grid_is_refused(t):
    with pytest.raises(ValueError, match=f"t is {t}, which is no multiple of 1/10 "):
        _weights(DiscreteTime(LINEAR, 10), [0.1, t, 0.4])


@pytest.mark.parametrize("t", [1.1, math.nan])
def test_discrete_time_beyond_the_end_is_refused(t):
    with pytest.raises(ValueError, match=f"t is {t}"):
        _weights(DiscreteTime(LINEAR, 10), [0.1, t])


def test_snr_where_nothing_moves_is_refused():
    with pytest.raises(ValueError, match=re.escape("undefined at t = 0.0, where dalpha_t is 0")):
        _weights(Snr(CosineSchedule()), [0.5, 0.0])
    with pytest.raises(ValueError, match=re.escape("undefined at t = 0.25, where")):
        _weights(Snr(ClippedSchedule(0.5, 0.5)), [0.25, 0.5])


def test_inverse_mask_prob_where_nothing_is_masked_is_refused():
    batch = replace(mixed_batch(), t=torch.zeros_like(mixed_batch().t))
    with pytest.raises(ValueError, match="1 / mask_prob diverges where nothing is masked"):
        InverseMaskProb(LinearSchedule()).token_weight(batch)


def test_nelbo_where_nothing_is_masked_is_refused():
    with pytest.raises(ValueError, match=r"mask_prob of LinearSchedule\(\) is 0 at t = 0\.0"):
        _weights(Nelbo(LINEAR), [0.5, 0.0])
    assert _weights(Nelbo(GeometricSchedule()), [0.0])[0] > 0


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_min_snr_without_a_positive_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma is {gamma};"):
        MinSnr(LINEAR, gamma)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.001, math.nan])
def test_cart_with_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=f"p is {p};"):
        Cart(p)


@pytest.mark.parametrize("block_size", [-2, 0, 4, 7])
def test_exact_count_with_blocks_that_do_not_divide_the_row_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}; "):
        ExactCount(block_size).token_weight(mixed_batch())
