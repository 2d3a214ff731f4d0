"""From logits to a token and its score, against naive computations over lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core.samplers import proposal as proposal_module
from dlm_core.samplers.proposal import Proposal, draw
from tests.support import reference

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
WEIGHTS = st.lists(
    st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(lambda row: sum(w > 0 for w in row) > 1),
    min_size=1,
    max_size=6,
)
UNIFORM = st.floats(0, 1, exclude_max=True)


def _drawn(weights: list[list[int]], u: float, proposal: Proposal) -> list[int]:
    logits = torch.tensor(weights, dtype=torch.float64).log()
    return draw(proposal, logits, torch.full((len(weights),), u, dtype=torch.float64)).x0.tolist()


def _is_at(probs: list[float], u: float, index: int) -> bool:
    """Whether an inverse of the cumulative distribution may give that index; nearer an edge rounding decides."""
    edges = [math.fsum(probs[:i]) for i in range(len(probs) + 1)]
    near = min(abs(u - edge) for edge in edges) <= 1e-12
    return probs[index] > 0 and (near or index == reference.inverse_cdf(probs, u))


def _normed(weights: list[float]) -> list[float]:
    return [w / math.fsum(weights) for w in weights]


@EXAMPLES
@given(WEIGHTS, UNIFORM)
def test_draw_of_any_row_is_the_naive_inverse_of_its_cdf(weights, u):
    for row, index in zip(weights, _drawn(weights, u, Proposal()), strict=True):
        assert _is_at(_normed(row), u, index)


@EXAMPLES
@given(WEIGHTS, UNIFORM, st.integers(1, 5))
def test_top_k_draws_among_the_k_most_likely(weights, u, top_k):
    for row, index in zip(weights, _drawn(weights, u, Proposal(top_k=top_k)), strict=True):
        least = sorted(row, reverse=True)[min(top_k, 4) - 1]
        assert row[index] >= least
        assert _is_at(_normed([w if w >= least else 0 for w in row]), u, index)  # all equals of the last are kept


@EXAMPLES
@given(WEIGHTS, UNIFORM, st.floats(0.05, 1.0))
def test_top_p_draws_among_the_most_likely_that_reach_p(weights, u, top_p):
    for row, index in zip(weights, _drawn(weights, u, Proposal(top_p=top_p)), strict=True):
        probs = _normed(row)
        order = sorted(range(4), key=lambda i: -probs[i])
        sums = [math.fsum(probs[i] for i in order[:n]) for n in range(4)]
        if min(abs(s - top_p) for s in sums) < 1e-9:
            continue  # rounding decides
        least = min(probs[i] for i, before in zip(order, sums, strict=True) if before < top_p)
        kept = {i for i in range(4) if probs[i] >= least}  # all equals of the last
        assert _is_at(_normed([p if i in kept else 0.0 for i, p in enumerate(probs)]), u, index)


def test_top_p_is_cut_before_top_k():
    row = [[0.4, 0.3, 0.2, 0.1]]  # top_k first would make these 4/7 and 3/7, of which 0.5 keeps one
    logits = torch.tensor(row, dtype=torch.float64).log()
    u = torch.tensor([0.99], dtype=torch.float64)
    assert draw(Proposal(top_k=2, top_p=0.5), logits, u).x0.tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_at_a_temperature_is_of_the_tempered_distribution(temperature):
    weights = [0.5, 0.3, 0.15, 0.05]
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = draw(Proposal(temperature), torch.tensor(weights).log().expand(10_000, 4), u).x0
    shares = (torch.bincount(drawn, minlength=4) / 10_000).tolist()
    assert shares == pytest.approx(_normed([w ** (1 / temperature) for w in weights]), abs=2e-4)  # a cell of u


def test_draw_reaches_tails_below_the_resolution_of_float32():
    tail = 1 / (1 + math.exp(20.0))  # 2e-9, which float32 cannot subtract from 1
    logits = torch.tensor([[0.0, -20.0]]).expand(2, 2)
    u = torch.tensor([1 - 1.5 * tail, 1 - 0.5 * tail], dtype=torch.float64)
    assert draw(Proposal(), logits, u).x0.tolist() == [0, 1]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("column", [0, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_an_impossible_or_suppressed_id_is_never_drawn(u, column, temperature):
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    logits[:, column] = -torch.inf
    suppressed = (column + 1) % 5
    drawn = draw(Proposal(temperature, suppressed=(suppressed,)), logits, torch.full((200,), u, dtype=torch.float64)).x0
    assert ((drawn >= 0) & (drawn < 5) & (drawn != column) & (drawn != suppressed)).all()


@pytest.mark.parametrize("score", [None, "probability", "margin", "entropy"])
@pytest.mark.parametrize("proposal", [Proposal(), Proposal(0.0), Proposal(0.7, top_p=0.8, suppressed=(2,))])
def test_rows_in_chunks_are_drawn_and_scored_bit_for_bit_as_at_once(monkeypatch, proposal, score):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, 50, generator=generator)
    u = torch.rand(23, generator=generator, dtype=torch.float64)
    held = torch.where(torch.rand(23, generator=generator) < 0.3, 7, -1)
    before, found = logits.clone(), []
    for rows in (1, 5, 23, 100):
        monkeypatch.setattr(proposal_module, "_chunk_bytes", lambda device, rows=rows: rows * 50 * 8)
        found.append(draw(proposal, logits, u, score, held=held, with_entropy=True))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("proposal", [Proposal(), Proposal(0.0), Proposal(0.7, top_p=0.9)])
def test_a_row_alone_is_drawn_and_scored_bit_for_bit_as_in_company(proposal, score):
    """Of so many ids that threads would divide the sum of a single row among them."""
    logits = 3 * torch.randn(12, 50_257, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    torch.set_num_threads(2)
    try:
        together = draw(proposal, logits, u, score)
        for row in range(12):
            alone = draw(proposal, logits[row : row + 1], u[row : row + 1], score)
            assert all(torch.equal(one[0], column[row]) for one, column in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("proposal", [Proposal(), Proposal(0.0)])
def test_no_rows_are_drawn_for_no_positions(proposal):
    found = draw(proposal, torch.zeros(0, 5), torch.zeros(0, dtype=torch.float64), "margin")
    assert [len(column) for column in found] == [0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 1e-308, 1e-320])
def test_draw_at_a_tiny_temperature_takes_the_most_likely(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=generator)
    logits[:, 4] = -torch.inf
    u = torch.rand(500, generator=generator, dtype=torch.float64)
    found = draw(Proposal(temperature), logits, u, "probability", is_tempered=True)
    assert torch.equal(found.x0, logits.argmax(dim=1))
    assert found.is_usable.all()
    assert (found.score == 1.0).all()


# Scores


def _entropy(probs: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


@pytest.mark.parametrize("is_tempered", [False, True])
@pytest.mark.parametrize("proposal", [Proposal(0.0), Proposal(1.0), Proposal(0.4), Proposal(0.7, top_k=3)])
def test_scores_are_those_of_the_naive_formulas(proposal, is_tempered):
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, generator=draws, dtype=torch.float64)
    u = torch.rand(40, generator=draws, dtype=torch.float64)
    held = torch.where(torch.rand(40, generator=draws) < 0.3, 2, -1)
    found = {
        score: draw(proposal, logits, u, score, is_tempered=is_tempered, held=held, with_entropy=True)
        for score in ("probability", "margin", "entropy")
    }
    for row in range(40):
        tempered = _normed([math.exp(z / (proposal.temperature or 1.0)) for z in logits[row].tolist()])
        cut = sorted(tempered, reverse=True)[: proposal.top_k or 6]
        of_draw = _normed([p if p >= cut[-1] else 0.0 for p in tempered])
        probs = of_draw if is_tempered else _normed([math.exp(z) for z in logits[row].tolist()])
        best = sorted(probs, reverse=True)
        scored = int(held[row]) if held[row] >= 0 else int(found["probability"].x0[row])
        assert float(found["probability"].score[row]) == pytest.approx(probs[scored], rel=1e-12)
        assert float(found["margin"].score[row]) == pytest.approx(best[0] - best[1], rel=1e-12, abs=1e-15)
        assert float(found["entropy"].score[row]) == pytest.approx(-_entropy(probs), rel=1e-12)
        assert float(found["margin"].entropy[row]) == pytest.approx(_entropy(probs), rel=1e-12)


def test_two_ids_are_ordered_alike_by_every_score():
    logits = torch.tensor([[0.3, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    u = torch.full((4,), 0.5, dtype=torch.float64)
    orders = {
        tuple(draw(Proposal(0.0), logits, u, score).score.argsort().tolist())
        for score in ("probability", "margin", "entropy")
    }
    assert len(orders) == 1


# Bad input


@pytest.mark.parametrize("proposal", [Proposal(), Proposal(0.5, top_p=0.9), Proposal(top_k=1), Proposal(0.0)])
@pytest.mark.parametrize("score", [None, "probability"])
@pytest.mark.parametrize("row", [[math.nan, 0.0], [0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_give_no_distribution_are_told(row, score, proposal):
    logits = torch.tensor([[0.0, 1.0], row, [-math.inf, 3.0]])
    assert draw(proposal, logits, torch.full((3,), 0.5, dtype=torch.float64), score).is_usable.tolist() == [1, 0, 1]


def test_logits_whose_every_id_is_suppressed_are_told():
    found = draw(Proposal(0.0, suppressed=(1,)), torch.tensor([[-math.inf, 3.0], [0.0, 3.0]]), torch.zeros(2))
    assert found.is_usable.tolist() == [False, True]


def test_a_suppressed_id_beyond_the_logits_is_refused():
    with pytest.raises(ValueError, match=r"the id 4 is to be suppressed; the logits have the ids 0\.\.3"):
        draw(Proposal(suppressed=(1, 4)), torch.zeros(2, 4), torch.zeros(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 0.0, "top_p": 0.9}, "change nothing at temperature 0"),
        ({"temperature": 0.0, "top_k": 5}, "change nothing at temperature 0; leave"),
        ({"suppressed": (3, -1)}, "suppressed has the id -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Proposal(**settings)
