"""Transitions and posteriors against paths enumerated one by one, and the bound that follows from them."""

import itertools
import math

import pytest
import torch

from dlm_core.kernels import Kernel, reveal_prob
from dlm_core.schedules import DiscreteChain, LinearSchedule
from tests.support import elbo, reference

FLOAT64_ATOL = 1e-13  # a few hundred roundings of numbers below 1
FLOAT64_RTOL = 1e-12  # of sums of hundreds of logarithms

BETAS = (0.1, 0.35, 0.2, 0.6)
TO_THE_END = (0.25, 0.4, 0.5, 1.0)  # alpha_T = 0: the bound is finite with all masks as the prior

KERNELS = {
    "absorbing": Kernel.absorbing(4, 3),
    "absorbing, mask inside": Kernel.absorbing(4, 1),
    "absorbing, one real token": Kernel.absorbing(2, 0),
    "uniform": Kernel.uniform(3),
    "uniform beside a mask": Kernel.uniform(4, 0),
    "mixed": Kernel(4, 3, 0.7),
    "mixed, mask inside": Kernel(4, 1, 0.25),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def _float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _pi(kernel: Kernel) -> list[float]:
    return elbo.stationary(kernel.vocab_size, kernel.mask_token_id, kernel.mask_share)


def _alphas(betas) -> list[float]:
    return list(itertools.accumulate(betas, lambda alpha, beta: alpha * (1 - beta), initial=1.0))


def _ids(kernel: Kernel) -> range:
    return range(kernel.vocab_size)


def _paths(kernel: Kernel) -> list[elbo.Paths]:
    return [elbo.token_paths(x0, _alphas(BETAS), _pi(kernel)) for x0 in _ids(kernel)]


def _posterior(kernel: Kernel, xt: int, x0: int, alpha_s: float, alpha_t: float) -> list[float]:
    ids = torch.tensor([xt]), torch.tensor([x0])
    return kernel.posterior(*ids, _float64([alpha_s]), _float64([alpha_t]))[0].tolist()


def _near(expected):
    return pytest.approx(expected, rel=0, abs=FLOAT64_ATOL)


# Where a noised token goes


@every_kernel
def test_stationary_distribution_is_the_share_of_the_mask_and_equal_parts(kernel):
    pi = kernel.stationary()
    assert pi.dtype == torch.float64
    assert pi.tolist() == _near(_pi(kernel))
    assert float(pi.sum()) == _near(1.0)
    assert kernel.num_real_tokens == sum(v != kernel.mask_token_id for v in _ids(kernel))


def test_named_kernels_are_the_ends_of_the_mixture():
    assert Kernel.absorbing(5, 2) == Kernel(vocab_size=5, mask_token_id=2, mask_share=1.0)
    assert Kernel.uniform(5, 2) == Kernel(vocab_size=5, mask_token_id=2, mask_share=0.0)
    assert Kernel.uniform(5) == Kernel(vocab_size=5, mask_token_id=None, mask_share=0.0)


# Matrices


def test_absorbing_transition_is_the_drawn_matrix():
    drawn = [[0.7, 0.0, 0.3], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]]
    assert Kernel.absorbing(3, 2).transition(_float64(0.7)).tolist() == [_near(row) for row in drawn]


def test_uniform_transition_is_the_drawn_matrix():
    drawn = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    assert Kernel.uniform(3).transition(_float64(0.7)).tolist() == [_near(row) for row in drawn]


def test_mixed_transition_is_the_drawn_matrix():
    drawn = [[0.6, 0.1, 0.3], [0.1, 0.6, 0.3], [0.1, 0.1, 0.8]]  # alpha 0.5: half of (0.2, 0.2, 0.6) everywhere
    assert Kernel(3, 2, 0.6).transition(_float64(0.5)).tolist() == [_near(row) for row in drawn]


@every_kernel
def test_transitions_of_many_alphas_are_those_of_each(kernel):
    alphas = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.75, 0.125]], dtype=torch.float32)
    matrices = kernel.transition(alphas)
    assert (matrices.shape, matrices.dtype) == ((2, 3, kernel.vocab_size, kernel.vocab_size), torch.float64)
    for i, j, before, after in itertools.product(range(2), range(3), _ids(kernel), _ids(kernel)):
        expected = elbo.step_prob(before, after, float(alphas[i, j]), _pi(kernel))
        assert float(matrices[i, j, before, after]) == _near(expected)
    torch.testing.assert_close(matrices.sum(dim=-1), torch.ones(2, 3, kernel.vocab_size, dtype=torch.float64))


@every_kernel
def test_product_of_step_matrices_is_the_cumulative_matrix(kernel):
    chain = DiscreteChain(BETAS)
    steps, alphas = kernel.transition(1 - _float64(BETAS)), chain.alphas()
    for s, t in itertools.combinations(range(len(BETAS) + 1), 2):
        product = torch.eye(kernel.vocab_size, dtype=torch.float64)
        for step in range(s, t):
            product = product @ steps[step]
        torch.testing.assert_close(kernel.transition(alphas[t] / alphas[s]), product, rtol=0, atol=FLOAT64_ATOL)


@every_kernel
def test_marginal_counts_every_path(kernel):
    alphas, paths = _alphas(BETAS), _paths(kernel)
    for t in range(len(alphas)):
        x0 = torch.arange(kernel.vocab_size)
        found = kernel.marginal(x0, torch.full((kernel.vocab_size,), alphas[t], dtype=torch.float64))
        assert found.dtype == torch.float64
        for v in _ids(kernel):
            assert found[v].tolist() == _near(elbo.marginal(paths[v], v, t, kernel.vocab_size))


@every_kernel
def test_marginal_is_a_row_of_the_transition(kernel):
    x0 = torch.arange(2 * kernel.vocab_size).view(2, -1) % kernel.vocab_size
    alphas = torch.linspace(0, 1, x0.numel(), dtype=torch.float32).view_as(x0)
    found, matrices = kernel.marginal(x0, alphas), kernel.transition(alphas)
    assert (found.shape, found.dtype) == ((*x0.shape, kernel.vocab_size), torch.float64)
    for i, j in itertools.product(range(2), _ids(kernel)):
        assert torch.equal(found[i, j], matrices[i, j, x0[i, j]])


# The posterior


@every_kernel
@pytest.mark.parametrize(("s", "t"), list(itertools.combinations(range(len(BETAS) + 1), 2)))
def test_posterior_counts_the_paths_through_xt(kernel, s, t):
    alphas, paths = _alphas(BETAS), _paths(kernel)
    for xt, x0 in itertools.product(_ids(kernel), _ids(kernel)):
        expected = elbo.posterior(paths[x0], x0, s, t, xt, kernel.vocab_size)
        if expected is None:
            with pytest.raises(ValueError, match="cannot come from"):
                _posterior(kernel, xt, x0, alphas[s], alphas[t])
        else:
            assert _posterior(kernel, xt, x0, alphas[s], alphas[t]) == _near(expected)


@every_kernel
def test_posterior_at_the_same_time_is_xt(kernel):
    for xt, x0 in itertools.product(_ids(kernel), _ids(kernel)):
        if elbo.step_prob(x0, xt, 0.4, _pi(kernel)) > 0:
            assert _posterior(kernel, xt, x0, 0.4, 0.4) == _near([float(v == xt) for v in _ids(kernel)])


@every_kernel
def test_posterior_where_all_is_noised_at_both_times_is_xt(kernel):
    for xt, x0 in itertools.product(_ids(kernel), _ids(kernel)):
        if _pi(kernel)[xt] > 0:  # a chain has beta = 0 after alpha = 0
            assert _posterior(kernel, xt, x0, 0.0, 0.0) == _near([float(v == xt) for v in _ids(kernel)])


def test_absorbing_posterior_reveals_x0_or_stays_masked():
    kernel, (alpha_s, alpha_t) = Kernel.absorbing(4, 3), (0.7, 0.2)
    for x0 in range(3):
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        masked = [reveal * (v == x0) for v in range(3)] + [(1 - alpha_s) / (1 - alpha_t)]
        assert _posterior(kernel, 3, x0, alpha_s, alpha_t) == _near(masked)
        assert _posterior(kernel, x0, x0, alpha_s, alpha_t) == _near([float(v == x0) for v in range(4)])


@every_kernel
@pytest.mark.parametrize(("alpha_s", "alpha_t"), [(1.0, 0.3), (0.8, 0.3), (0.8, 0.0), (0.5, 0.5)])
def test_posterior_after_the_marginal_is_the_earlier_marginal(kernel, alpha_s, alpha_t):
    for x0 in range(kernel.vocab_size):
        earlier, later = (kernel.marginal(torch.tensor(x0), _float64(alpha)).tolist() for alpha in (alpha_s, alpha_t))
        rows = [(p, _posterior(kernel, xt, x0, alpha_s, alpha_t)) for xt, p in enumerate(later) if p > 0]
        assert all(math.fsum(row) == _near(1.0) for _, row in rows)
        assert [math.fsum(p * row[v] for p, row in rows) for v in _ids(kernel)] == _near(earlier)


def test_posterior_of_a_batch_is_that_of_each_token():
    kernel = Kernel(4, 1, 0.25)
    xt, x0 = torch.tensor([[0, 1, 2], [3, 1, 0]]), torch.tensor([[2, 0, 2], [3, 3, 1]])
    alpha_t = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.6]], dtype=torch.float32)
    alpha_s = torch.tensor([[0.9, 0.3, 1.0], [0.5, 0.7, 0.6]], dtype=torch.float32)
    found = kernel.posterior(xt, x0, alpha_s, alpha_t)
    assert (found.shape, found.dtype) == ((2, 3, 4), torch.float64)
    for i, j in itertools.product(range(2), range(3)):
        each = _posterior(kernel, *(int(x[i, j]) for x in (xt, x0)), *(float(a[i, j]) for a in (alpha_s, alpha_t)))
        assert found[i, j].tolist() == _near(each)


def test_posterior_with_one_impossible_token_raises():
    kernel, alpha_s, alpha_t = Kernel.absorbing(4, 3), _float64([0.5, 0.5]), _float64([0.25, 0.25])
    with pytest.raises(ValueError, match="xt holds a token that cannot come from its x0"):
        kernel.posterior(torch.tensor([3, 0]), torch.tensor([1, 1]), alpha_s, alpha_t)


@every_kernel
def test_posterior_of_one_later_time_raises(kernel):
    ids = torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"alpha_s is 0\.5 and alpha_t 0\.9; wanted 1 >= alpha_s >= alpha_t >= 0"):
        kernel.posterior(ids, ids, _float64([0.9, 0.5]), _float64([0.5, 0.9]))


# The share of the masks that a step reveals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reveal_prob_of_the_linear_schedule_is_the_relative_step(dtype):
    t, s = torch.tensor([[0.8, 0.5], [1.0, 0.25]], dtype=dtype), torch.tensor([[0.2, 0.0], [0.75, 0.25]], dtype=dtype)
    schedule = LinearSchedule()
    found = reveal_prob(schedule.alpha(s), schedule.alpha(t))
    expected = torch.tensor([[0.75, 1.0], [0.25, 0.0]], dtype=dtype)  # (t - s) / t
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_reveal_prob_of_neighbours_is_theta_of_the_chain():
    chain = DiscreteChain(BETAS)
    alphas = chain.alphas()
    torch.testing.assert_close(reveal_prob(alphas[:-1], alphas[1:]), chain.thetas(), rtol=0, atol=FLOAT64_ATOL)
    expected = [beta * before / (1 - after) for beta, before, after in zip(BETAS, alphas, alphas[1:], strict=False)]
    assert chain.thetas().tolist() == _near([float(theta) for theta in expected])


def test_reveal_prob_of_steps_between_composes():
    alphas = DiscreteChain(BETAS).alphas()
    for s, t in itertools.combinations(range(1, len(BETAS) + 1), 2):
        hidden = 1 - reveal_prob(alphas[s], alphas[t])
        stepwise = 1 - reveal_prob(alphas[s:t], alphas[s + 1 : t + 1])
        torch.testing.assert_close(hidden, stepwise.prod(), rtol=0, atol=FLOAT64_ATOL)


@pytest.mark.parametrize(
    ("alpha_s", "alpha_t", "message"),
    [
        ([0.9, 0.3], [0.5, 0.5], "alpha_s is 0.3 and alpha_t 0.5; wanted 1 >= alpha_s >= alpha_t >= 0"),
        ([0.9, 1.5], [0.5, 0.5], "alpha_s is 1.5 and alpha_t 0.5"),
        ([0.9, 0.5], [0.5, -0.1], "alpha_s is 0.5 and alpha_t -0.1"),
        ([math.nan, 0.5], [0.5, 0.5], "alpha_s is nan and alpha_t 0.5"),
        ([1.0, 1.0], [0.5, 1.0], "alpha_t is 1 somewhere"),
    ],
)
def test_reveal_prob_of_one_bad_pair_raises(alpha_s, alpha_t, message):
    with pytest.raises(ValueError, match=message):
        reveal_prob(_float64(alpha_s), _float64(alpha_t))


# The bound


def _kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def _reverse(kernel: Kernel, xt: int, predicted: list[float], alpha_s: float, alpha_t: float) -> list[float]:
    """p(xs | xt) = sum_v q(xs | xt, x0 = v) p(x0 = v)."""
    rows = [(p, _posterior(kernel, xt, v, alpha_s, alpha_t)) for v, p in enumerate(predicted) if p > 0]
    return [math.fsum(p * row[v] for p, row in rows) for v in _ids(kernel)]


@pytest.mark.parametrize(("alpha_s", "alpha_t"), [(1.0, 0.6), (0.7, 0.2), (0.25, 0.0), (0.5, 0.5)])
def test_kl_between_posteriors_is_the_revealed_share_of_the_cross_entropy(alpha_s, alpha_t):
    kernel, predicted = Kernel.absorbing(4, 3), [0.5, 0.3, 0.2]
    reveal = float(reveal_prob(_float64(alpha_s), _float64(alpha_t)))
    for x0 in range(3):
        model = _reverse(kernel, 3, predicted, alpha_s, alpha_t)
        cross_entropy = -math.log(predicted[x0])
        assert _kl(_posterior(kernel, 3, x0, alpha_s, alpha_t), model) == _near(reveal * cross_entropy)
        if alpha_t > 0:
            copied = _reverse(kernel, x0, [float(v == x0) for v in range(3)], alpha_s, alpha_t)
            assert _kl(_posterior(kernel, x0, x0, alpha_s, alpha_t), copied) == 0.0


def _three_terms(kernel: Kernel, alphas: list[float], conditional: elbo.Model, x: reference.Tokens, prior) -> float:
    """-ELBO = KL of the prior + sum over t >= 2 of the KL between posteriors - E log p(x0 | x1), over noised rows."""

    def rows(t: int) -> list[list[float]]:
        return [kernel.marginal(torch.tensor(v), _float64(alphas[t])).tolist() for v in x]

    total = sum(_kl(row, prior) for row in rows(len(alphas) - 1))
    for t in range(1, len(alphas)):
        for noised in itertools.product(_ids(kernel), repeat=len(x)):
            q = math.prod(row[v] for row, v in zip(rows(t), noised, strict=True))
            for place, x0 in enumerate(x) if q > 0 else ():
                model = _reverse(kernel, noised[place], conditional(noised, place), alphas[t - 1], alphas[t])
                if t == 1:
                    total -= q * math.log(model[x0])
                else:
                    total += q * _kl(_posterior(kernel, noised[place], x0, alphas[t - 1], alphas[t]), model)
    return total


def _skewed(xt: reference.Tokens, place: int) -> list[float]:
    """Predictions that depend on the place and on what is noised; every real token is possible."""
    weights = [1.0 + place + v * (1 + sum(xt)) for v in range(3)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("x", [(0,), (2,)])
@pytest.mark.parametrize("kernel", [KERNELS["uniform"], KERNELS["mixed"]], ids=["uniform", "mixed"])
def test_three_terms_of_any_kernel_sum_to_the_bound_over_paths(kernel, x):
    alphas, pi = _alphas(BETAS), _pi(kernel)
    expected = elbo.discrete_nelbo(alphas, _skewed, x, mask_token_id=3, pi=pi, prior=pi)
    assert _three_terms(kernel, alphas, _skewed, x, pi) == pytest.approx(expected, rel=FLOAT64_RTOL)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(
    ("betas", "prior"),
    [(TO_THE_END, [0.0, 0.0, 0.0, 1.0]), (BETAS, [0.01, 0.01, 0.02, 0.96])],
    ids=["to the end", "part"],
)
def test_three_terms_of_masking_sum_to_the_bound_over_paths(length, betas, prior):
    alphas, model = _alphas(betas), reference.Joint(num_real=3, length=length, seed=9, sharpness=2.0)
    for x in [(1,) * length, tuple(range(length))]:
        expected = elbo.discrete_nelbo(alphas, model.conditional, x, model.mask_token_id, prior=prior)
        found = _three_terms(Kernel.absorbing(4, 3), alphas, model.conditional, x, prior)
        assert found == pytest.approx(expected, rel=FLOAT64_RTOL)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bound_of_masking_over_paths_is_the_weighted_cross_entropy(length):
    chain, model = DiscreteChain(TO_THE_END), reference.Joint(num_real=3, length=length, seed=5, sharpness=2.0)
    alphas, thetas = chain.alphas().tolist(), chain.thetas().tolist()
    for x in [(2,) * length, tuple(range(length))]:
        bound = elbo.discrete_nelbo(alphas, model.conditional, x, model.mask_token_id)
        assert elbo.weighted_cross_entropy(alphas, model.conditional, x, 3) == pytest.approx(bound, rel=FLOAT64_RTOL)
        terms = []
        for theta, alpha in zip(thetas, alphas[1:], strict=True):
            for is_masked in reference.all_masks(length):
                xt = reference.apply_mask(x, is_masked, model.mask_token_id)
                prob = math.prod(1 - alpha if hit else alpha for hit in is_masked)
                predicted = [model.conditional(xt, place)[x[place]] for place in range(length)]  # 1 where not masked
                terms.append(-theta * prob * math.log(math.prod(predicted)))
        assert math.fsum(terms) == pytest.approx(bound, rel=FLOAT64_RTOL)


def test_bound_of_the_exact_conditionals_of_one_token_is_the_likelihood():
    joint = reference.Joint(num_real=3, length=1, seed=2)
    for x, p in joint.prob.items():
        bound = elbo.discrete_nelbo(_alphas(TO_THE_END), joint.conditional, x, joint.mask_token_id)
        assert bound == pytest.approx(-math.log(p), rel=FLOAT64_RTOL)


# What a kernel refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 1.0), r"mask_token_id is 4; the vocabulary has the ids 0\.\.3"),
        ((4, -1, 1.0), "mask_token_id is -1"),
        ((4, 3, 1.005), "mask_share is 1.005; it must lie"),
        ((4, 3, -0.1), "mask_share is -0.1"),
        ((4, 3, math.nan), "mask_share is nan"),
        ((4, None, 0.5), "mask_share is 0.5, but there is no mask_token_id"),
        ((1, 0, 1.0), "vocab_size is 1, which leaves no real token"),
        ((0, None, 0.0), "vocab_size is 0, which leaves no real token"),
    ],
)
def test_kernel_that_cannot_be_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        Kernel(*arguments)


@pytest.mark.parametrize("alpha", [-0.005, 1.005, math.nan])
def test_alpha_that_is_no_probability_raises(alpha):
    kernel = Kernel.absorbing(4, 3)
    with pytest.raises(ValueError, match=f"alpha is {alpha}; it must lie in"):
        kernel.transition(_float64([0.5, alpha]))
    with pytest.raises(ValueError, match=f"alpha is {alpha}; it must lie in"):
        kernel.marginal(torch.tensor([0, 1]), _float64([0.5, alpha]))
