"""The bound of a discrete-time chain, summed path by path: naive, independent of dlm_core, plain Python.

alphas = [1, alpha_1, ..., alpha_T].  A kernel is its stationary distribution pi, a list over all ids: a step from t - 1
to t keeps the token with probability alpha_t / alpha_{t-1}, else draws it from pi.  The path of a token is
(x_1, ..., x_T).  A model is a function conditional(xt, place) -> [p(x0 at place = v | xt) for every real v], as
``reference.Joint.conditional``; it must copy what xt shows, since nothing else could have led there.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from tests.support.reference import Tokens, all_masks, apply_mask

Model = Callable[[Tokens, int], list[float]]
Paths = Mapping[Tokens, float]


def stationary(vocab_size: int, mask_token_id: int | None, mask_share: float) -> list[float]:
    """Where a noised token goes: the mask with mask_share, every other id equally likely."""
    real = [v for v in range(vocab_size) if v != mask_token_id]
    return [mask_share if v == mask_token_id else (1 - mask_share) / len(real) for v in range(vocab_size)]


def step_prob(before: int, after: int, keep: float, pi: Sequence[float]) -> float:
    """q(after | before) of one step that keeps a token with probability ``keep``."""
    return (keep if before == after else 0.0) + (1 - keep) * pi[after]


def token_paths(x0: int, alphas: Sequence[float], pi: Sequence[float]) -> dict[Tokens, float]:
    """Every path that one token can take from x0, with its probability."""
    paths = {}
    for path in itertools.product(range(len(pi)), repeat=len(alphas) - 1):
        prob, before = 1.0, x0
        for t, after in enumerate(path, start=1):
            keep = alphas[t] / alphas[t - 1] if alphas[t - 1] > 0 else 1.0
            prob *= step_prob(before, after, keep, pi)
            before = after
        if prob > 0:
            paths[path] = prob
    return paths


def marginal(paths: Paths, x0: int, t: int, vocab_size: int) -> list[float]:
    """q(xt = v | x0) for every id."""
    mass = [0.0] * vocab_size
    for path, prob in paths.items():
        mass[(x0, *path)[t]] += prob
    return mass


def posterior(paths: Paths, x0: int, s: int, t: int, xt: int, vocab_size: int) -> list[float] | None:
    """q(xs = v | xt, x0) for every id: the share of the paths through xt; None if no path leads to xt."""
    mass = [0.0] * vocab_size
    for path, prob in paths.items():
        states = (x0, *path)
        if states[t] == xt:
            mass[states[s]] += prob
    total = math.fsum(mass)
    return [m / total for m in mass] if total > 0 else None


def discrete_nelbo(
    alphas: Sequence[float],
    conditional: Model,
    x: Tokens,
    mask_token_id: int,
    *,
    pi: Sequence[float] | None = None,
    prior: Sequence[float] | None = None,
) -> float:
    """E_q[log q(x_{1:T} | x0) - log p(x_{0:T})] over every path of every token, in nats.

    p(x_{t-1} | x_t) is a product over places of sum_v q(x_{t-1} | x_t, x0 = v) p(x0 = v | x_t), and p(x_T) one of
    ``prior``.  Both default to the mask alone: the bound is then infinite unless alpha_T = 0.
    """
    only_mask = [0.0] * mask_token_id + [1.0]
    pi = only_mask if pi is None else pi
    prior = only_mask if prior is None else prior
    num_ids, num_steps = len(pi), len(alphas) - 1
    paths = [token_paths(v, alphas, pi) for v in range(num_ids)]
    reverse: dict[tuple[int, Tokens], list[list[float]]] = {}

    def reverse_probs(t: int, xt: Tokens) -> list[list[float]]:
        if (t, xt) not in reverse:
            reverse[t, xt] = [
                _mixed(
                    [(p, posterior(paths[v], v, t - 1, t, token, num_ids)) for v, p in enumerate(conditional(xt, i))]
                )
                for i, token in enumerate(xt)
            ]
        return reverse[t, xt]

    terms = []
    for chosen in itertools.product(*(paths[v].items() for v in x)):
        q = math.prod(prob for _, prob in chosen)
        states = [x, *zip(*(path for path, _ in chosen), strict=True)]
        p = math.prod(prior[v] for v in states[-1])
        for t in range(1, num_steps + 1):
            p *= math.prod(row[v] for row, v in zip(reverse_probs(t, states[t]), states[t - 1], strict=True))
        terms.append(q * (math.log(q) - math.log(p)) if p > 0 else math.inf)
    return math.fsum(terms)


def _mixed(parts: list[tuple[float, list[float] | None]]) -> list[float]:
    """sum_v p_v * distribution_v; a part of probability 0 may be impossible."""
    possible = []
    for p, distribution in parts:
        if p > 0:
            assert distribution is not None, "the model thinks an x0 possible that cannot lead to xt"
            possible.append([p * q for q in distribution])
    return [math.fsum(column) for column in zip(*possible, strict=True)]


def weighted_cross_entropy(alphas: Sequence[float], conditional: Model, x: Tokens, mask_token_id: int) -> float:
    """sum_t theta_t E_q[sum over masked places of -log p(x0 | xt)] of the absorbing kernel, in nats.

    theta_t = (alpha_{t-1} - alpha_t) / (1 - alpha_t); MDLM (arXiv 2406.07524) eq. 8.
    """
    terms = []
    for before, after in itertools.pairwise(alphas):
        for is_masked in all_masks(len(x)) if after < 1 else []:
            prob = math.prod(1 - after if hit else after for hit in is_masked)
            if prob > 0 and any(is_masked):
                xt = apply_mask(x, is_masked, mask_token_id)
                hidden = (place for place, hit in enumerate(is_masked) if hit)
                loss = math.fsum(-math.log(conditional(xt, place)[x[place]]) for place in hidden)
                terms.append((before - after) / (1 - after) * prob * loss)
    return math.fsum(terms)
