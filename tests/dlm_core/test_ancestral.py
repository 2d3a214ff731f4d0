"""Ancestral sampling with an exact denoiser: the law of its samples, its promises and its cost."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core.samplers.ancestral import Sampled, categorical, sample_ancestral
from tests.support import reference
from tests.support.toy_world import ExactDenoiser

MASK = 3
NUM_SAMPLES = 10_000
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def joint() -> reference.Joint:
    return reference.Joint(num_real=3, length=3, seed=0, sharpness=1.5)


@pytest.fixture(scope="module")
def table(joint) -> ExactDenoiser:
    return ExactDenoiser(joint)


def _sample(denoise, xt=None, *, num_rows=200, num_steps=8, noise_seed=0, **options) -> Sampled:
    xt = torch.full((num_rows, 3), MASK) if xt is None else xt
    return sample_ancestral(denoise, xt, mask_token_id=MASK, num_steps=num_steps, noise_seed=noise_seed, **options)


def _chi_square(x0: torch.Tensor, law: dict[reference.Tokens, float]) -> float:
    counts = Counter(tuple(row) for row in x0.tolist())
    assert set(counts) <= set(law)
    return reference.chi_square([counts[x] for x in law], [len(x0) * p for p in law.values()])


# The law of the samples


def test_samples_of_many_steps_follow_the_joint(joint, table):
    sampled = _sample(table, num_rows=NUM_SAMPLES, num_steps=100)
    assert _chi_square(sampled.x0, joint.prob) < reference.chi_square_bound(len(joint.prob) - 1)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_samples_of_few_steps_follow_the_enumerated_chain(joint, table, num_steps):
    law = joint.ancestral_distribution(num_steps)
    sampled = _sample(table, num_rows=NUM_SAMPLES, num_steps=num_steps, noise_seed=num_steps)
    assert _chi_square(sampled.x0, law) < reference.chi_square_bound(len(law) - 1)


def test_samples_of_one_step_follow_the_marginals_and_not_the_joint(joint, table):
    sampled = _sample(table, num_rows=NUM_SAMPLES, num_steps=1)
    bound = reference.chi_square_bound(len(joint.prob) - 1)
    assert _chi_square(sampled.x0, joint.product_of_marginals()) < bound
    assert _chi_square(sampled.x0, joint.prob) > 10 * bound


def test_samples_given_a_prompt_follow_the_conditional(joint, table):
    prompt = torch.tensor([MASK, 1, MASK]).expand(NUM_SAMPLES, 3)
    sampled = _sample(table, prompt, num_steps=100)
    mass = {x: p for x, p in joint.prob.items() if x[1] == 1}
    law = {x: p / math.fsum(mass.values()) for x, p in mass.items()}
    assert _chi_square(sampled.x0, law) < reference.chi_square_bound(len(law) - 1)


# What it promises


@pytest.mark.parametrize("num_steps", [1, 3, 17])
def test_sample_ancestral_keeps_the_prompt_and_leaves_no_mask(table, num_steps):
    xt = torch.randint(4, (300, 3), generator=torch.Generator().manual_seed(0))
    before, given_tokens = xt.clone(), xt != MASK
    sampled = _sample(table, xt, num_steps=num_steps)
    assert torch.equal(xt, before)
    assert torch.equal(sampled.x0[given_tokens], xt[given_tokens])
    assert ((sampled.x0 >= 0) & (sampled.x0 < MASK)).all()


def test_sample_ancestral_is_a_function_of_noise_seed_alone(table):
    torch.manual_seed(1)
    first = _sample(table)
    torch.manual_seed(2)
    assert torch.equal(first.x0, _sample(table).x0)
    assert not torch.equal(first.x0, _sample(table, noise_seed=1).x0)


def test_sample_ancestral_of_fewer_rows_equals_the_first_rows_of_more(table):
    assert torch.equal(_sample(table, num_rows=50).x0, _sample(table, num_rows=200).x0[:50])


def test_sample_ancestral_of_rows_draws_rows_independently(joint, table):
    sampled = _sample(table, num_rows=NUM_SAMPLES, num_steps=1)
    pairs = Counter(zip(sampled.x0[:-1, 0].tolist(), sampled.x0[1:, 0].tolist(), strict=True))
    marginal = joint.conditional((MASK, MASK, MASK), 0)
    expected = [(NUM_SAMPLES - 1) * p * q for p in marginal for q in marginal]
    observed = [pairs[a, b] for a in range(3) for b in range(3)]
    assert reference.chi_square(observed, expected) < reference.chi_square_bound(8)


@pytest.mark.parametrize(("num_rows", "num_steps"), [(1, 1), (1, 50), (2, 4), (40, 3)])
def test_sample_ancestral_counts_the_passes_it_makes(joint, num_rows, num_steps):
    denoise = ExactDenoiser(joint)
    sampled = _sample(denoise, num_rows=num_rows, num_steps=num_steps)
    assert sampled.nfe == denoise.calls
    assert 1 <= sampled.nfe <= min(num_steps, num_rows * 3)


def test_sample_ancestral_without_masks_makes_no_pass(joint):
    denoise = ExactDenoiser(joint)
    xt = torch.tensor([[0, 1, 2]])
    sampled = _sample(denoise, xt)
    assert sampled.nfe == denoise.calls == 0
    assert torch.equal(sampled.x0, xt)


def test_sample_ancestral_shows_the_denoiser_masks_alone_to_fill():
    seen = []

    def denoise(xt, select):
        seen.append((xt.clone(), select))
        return torch.tensor([0.0, 0.0, 0.0, -torch.inf]).expand(len(select), 4)

    _sample(denoise, torch.tensor([[MASK, 0, MASK], [1, MASK, MASK]]), num_steps=6)
    assert all((xt.flatten()[select] == MASK).all() for xt, select in seen)
    assert sorted(int(i) for _, select in seen for i in select) == [0, 2, 4, 5]


def test_sample_ancestral_at_temperature_zero_takes_the_most_likely(joint, table):
    sampled = _sample(table, num_steps=1, temperature=0.0)
    marginals = [joint.conditional((MASK, MASK, MASK), place) for place in range(3)]
    assert torch.equal(sampled.x0, torch.tensor([m.index(max(m)) for m in marginals]).expand(200, 3))


def test_sample_ancestral_records_from_all_masks_to_the_text(table):
    num_steps = 8
    sampled = _sample(table, num_steps=num_steps, record_steps=frozenset(range(num_steps + 1)))
    assert len(sampled.trajectory) == num_steps + 1
    assert (sampled.trajectory[0] == MASK).all()
    assert torch.equal(sampled.trajectory[-1], sampled.x0)
    for earlier, later in zip(sampled.trajectory, sampled.trajectory[1:], strict=False):
        assert torch.equal(later[earlier != MASK], earlier[earlier != MASK])
    shares = [float((xt == MASK).double().mean()) for xt in sampled.trajectory]
    for step, share in enumerate(shares):
        t = 1 - step / num_steps
        assert abs(share - t) <= 5 * math.sqrt(t * (1 - t) / 600)  # five standard errors of 600 tokens
    ends = _sample(table, num_steps=num_steps, record_steps=frozenset({0, num_steps}))
    assert torch.equal(torch.stack(ends.trajectory), torch.stack([sampled.trajectory[0], sampled.x0]))
    assert _sample(table).trajectory == []


@pytest.mark.parametrize("num_steps", [0, -1])
def test_sample_ancestral_with_no_step_raises(table, num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}"):
        _sample(table, num_steps=num_steps)


# One draw


@EXAMPLES
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), min_size=1, max_size=6),
    st.floats(0, 1, exclude_max=True),
)
def test_categorical_of_any_row_equals_naive_inverse_cdf(weights, u):
    probs = [[w / sum(row) for w in row] for row in weights]
    logits = torch.tensor(weights, dtype=torch.float64).log()
    drawn = categorical(logits, torch.full((len(weights),), u, dtype=torch.float64), 1.0).tolist()
    for row, index in zip(probs, drawn, strict=True):
        assert row[index] > 0
        edges = [math.fsum(row[:i]) for i in range(5)]
        if min(abs(u - edge) for edge in edges) > 1e-12:  # nearer an edge, rounding decides
            assert index == reference.inverse_cdf(row, u)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("column", [0, 2, 4])
def test_categorical_never_draws_an_impossible_id(u, column):
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    logits[:, column] = -torch.inf
    drawn = categorical(logits, torch.full((200,), u, dtype=torch.float64), 1.0)
    assert ((drawn >= 0) & (drawn < 5) & (drawn != column)).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_categorical_at_a_temperature_draws_from_the_tempered_distribution(temperature):
    weights = [0.5, 0.3, 0.15, 0.05]
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = categorical(torch.tensor(weights).log().expand(10_000, 4), u, temperature)
    shares = (torch.bincount(drawn, minlength=4) / 10_000).tolist()
    tempered = [w ** (1 / temperature) for w in weights]
    expected = [w / sum(tempered) for w in tempered]
    assert shares == pytest.approx(expected, abs=2e-4)  # a cell of the grid of u at each of its two ends


def test_categorical_reaches_tails_below_the_resolution_of_float32():
    tail = 1 / (1 + math.exp(20.0))  # 2e-9, which float32 cannot subtract from 1
    logits = torch.tensor([[0.0, -20.0]]).expand(2, 2)
    u = torch.tensor([1 - 1.5 * tail, 1 - 0.5 * tail], dtype=torch.float64)
    assert categorical(logits, u, 1.0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"record_steps": frozenset({0, 9})}, r"0\.\.2"),
    ],
)
def test_sampler_with_a_setting_out_of_range_is_refused(settings, message):
    xt = torch.full((1, 3), 3)
    with pytest.raises(ValueError, match=message):
        sample_ancestral(lambda xt, select: None, xt, mask_token_id=3, num_steps=2, noise_seed=0, **settings)


def test_sampler_addresses_rows_by_sample_id_in_any_order():
    def denoise(xt, select):
        return torch.zeros(len(select), 4)

    def sample(ids):
        xt = torch.full((len(ids), 8), 3)
        return sample_ancestral(
            denoise, xt, mask_token_id=3, num_steps=4, noise_seed=1, sample_ids=torch.tensor(ids)
        ).x0

    assert torch.equal(sample([5, 2]), sample([2, 5]).flip(0))
    assert not torch.equal(sample([5]), sample([2]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_give_no_distribution_raise(logits, temperature):
    with pytest.raises(ValueError, match="hold nan or inf, or are -inf for every id"):
        categorical(torch.tensor([[0.0, 1.0], logits]), torch.tensor([0.5, 0.5]), temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampler_of_a_denoiser_that_would_predict_the_mask_never_draws_it(temperature):
    def denoise(xt: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 0.0, 0.0, 9.0]).expand(len(select), 4)

    assert int(_sample(denoise, num_rows=20, num_steps=3, temperature=temperature).x0.max()) < MASK
