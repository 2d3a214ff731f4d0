"""Scores of answers: what a naive loop over one row at a time says, whatever the batch, the order and the company."""

import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from dlm_core.models.attention import AttentionMask
from pipeline.errors import UserError, classify
from pipeline.inference.likelihood import LikelihoodConfig, Request, Score, ScoreError, score
from pipeline.inference.model import OpenModel
from tests.support.model_kinds import KINDS, spoilt

pytestmark = pytest.mark.timeout(120)
SEQ_LEN, BLOCK = 32, 4
EVERYWHERE, CAUSAL_BLOCKS = AttentionMask("full"), AttentionMask("block_causal", block_size=BLOCK)
CONFIG = LikelihoodConfig(num_masks=16)
SHORT = (Request((5, 9, 12), (7, 8, 30), 0), Request((), (11, 12, 13, 14), 1), Request((40,), (41,), 2, (42, 43)))
"""Whose masks are all taken."""
LONG = tuple(Request(range(20, 20 + 2 * i), range(50 + i, 56 + 2 * i), i // 2, range(90, 90 + i % 3)) for i in range(6))


def naive_loss(model: OpenModel, row: list[int], masked: Sequence[int], mask: AttentionMask = EVERYWHERE) -> float:
    """Sum of -log p of the masked tokens of one row."""
    xt = torch.tensor([row])
    xt[0, list(masked)] = model.mask_token_id
    offset = model.record.target_offset
    logits = model.denoiser(xt, mask=mask)
    log_probs = logits[[place - offset for place in masked]].log_softmax(-1)
    return -float(log_probs[range(len(masked)), [row[place] for place in masked]].sum())


def enumerated(model: OpenModel, request: Request) -> float:
    """The bound of an answer by every subset of its tokens."""
    context = list(request.context) or [model.vocabulary.special.eos_token_id] * model.record.target_offset
    row = [*context, *request.answer, *request.suffix]
    places, total = range(len(context), len(context) + len(request.answer)), 0.0
    for k in range(1, len(places) + 1):
        losses = [naive_loss(model, row, subset) for subset in itertools.combinations(places, k)]
        total += math.fsum(losses) / len(losses) / k
    return total


@pytest.mark.parametrize("name", ["masked", "shifted"])
def test_short_answers_are_scored_by_every_subset_of_their_tokens(doubles: dict[str, OpenModel], name: str) -> None:
    scores = score(doubles[name], SHORT, CONFIG)
    assert [s.nats for s in scores] == pytest.approx([enumerated(doubles[name], r) for r in SHORT], rel=1e-10)
    assert [(s.mc_se, s.dof, s.num_passes) for s in scores] == [(0.0, math.inf, n) for n in (7, 15, 1)]


def test_answers_of_a_next_token_model_are_scored_exactly(doubles: dict[str, OpenModel]) -> None:
    model, requests = doubles["next"], [*SHORT, *LONG]
    wanted = []
    for request in requests:
        row = [model.vocabulary.special.eos_token_id, *request.context, *request.answer]
        log_probs = model.denoiser(torch.tensor([row]), mask=AttentionMask("causal")).log_softmax(-1)
        places = range(1 + len(request.context), len(row))
        wanted.append(-math.fsum(float(log_probs[place - 1, row[place]]) for place in places))
    scores = score(model, requests, CONFIG)
    assert [s.nats for s in scores] == pytest.approx(wanted, rel=1e-6)
    assert all((s.mc_se, s.num_passes) == (0.0, 1) for s in scores)


def test_answers_of_a_model_of_blocks_are_a_chain_over_blocks(doubles: dict[str, OpenModel]) -> None:
    """Every subset of an answer's tokens in a block, given the clean blocks before it alone."""
    model, requests = doubles["blocks"], [*SHORT, *LONG]
    wanted: list[float] = []
    for request in requests:
        row, total = [*request.context, *request.answer, *request.suffix], 0.0
        answer = range(len(request.context), len(request.context) + len(request.answer))
        for first in range(0, len(row), BLOCK):
            seen = row[: first + BLOCK]
            places = [place for place in range(first, len(seen)) if place in answer]
            for k in range(1, len(places) + 1):
                losses = [naive_loss(model, seen, s, CAUSAL_BLOCKS) for s in itertools.combinations(places, k)]
                total += math.fsum(losses) / len(losses) / k
        wanted.append(total)
    scores = score(model, requests, CONFIG)
    assert [s.nats for s in scores] == pytest.approx(wanted, rel=1e-10)
    assert all((s.mc_se, s.dof) == (0.0, math.inf) for s in scores)
    assert max(s.num_passes for s in scores) == 2**BLOCK - 1


@pytest.mark.parametrize("name", ["masked", "shifted", "blocks", "next"])
def test_scores_depend_on_their_request_alone(doubles: dict[str, OpenModel], name: str) -> None:
    """Of blocks, with fewer masks than their tokens have subsets."""
    requests, config = [*SHORT, *LONG], replace(CONFIG, num_masks=8) if name == "blocks" else CONFIG
    whole = score(doubles[name], requests, config)
    assert max(s.mc_se for s in whole) > 0 or name == "next"
    for changed in (
        [score(doubles[name], [request], config)[0] for request in requests],
        score(doubles[name], requests[::-1], config)[::-1],
        score(doubles[name], requests, replace(config, batch_rows=1)),
        score(doubles[name], requests, replace(config, batch_rows=7)),
    ):
        for one, other in zip(whole, changed, strict=True):
            assert one.nats == pytest.approx(other.nats, rel=1e-6 if name == "next" else 1e-9)
            assert one.mc_se == pytest.approx(other.mc_se, rel=1e-6, abs=1e-9)
            assert (one.num_passes, one.num_cut) == (other.num_passes, other.num_cut)
    again = score(doubles[name], requests, config)
    assert again == whole
    if name != "next":
        assert score(doubles[name], requests, replace(config, noise_seed=1)) != whole


@pytest.mark.parametrize("batch_rows", [1, 7, 32])
@pytest.mark.parametrize(
    ("name", "guidance", "most"),
    [("masked", 0.0, 0), ("shifted", 0.0, 0), ("blocks", 0.0, 0), ("masked", 0.5, 20), ("shifted", 0.5, 20)],
)
def test_scores_are_the_same_where_logits_are_too_many_to_be_held(
    name: str, guidance: float, most: int, batch_rows: int, doubles: dict[str, OpenModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The core counts a loss in parts, of the same batches; under guidance batches have fewer rows."""
    model, config = doubles[name], replace(CONFIG, num_masks=8, guidance=guidance, batch_rows=batch_rows)
    rows, asked = list[int](), list[int]()

    def look(_: object, args: tuple[torch.Tensor, ...], out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        rows.append(len(args[0]))
        asked.append(len(out) if isinstance(out, torch.Tensor) else 0)

    handle = model.denoiser.register_forward_hook(look)
    try:
        held, batches = score(model, LONG[1:], config), rows.copy()
        rows.clear()
        asked.clear()
        monkeypatch.setattr(
            "pipeline.inference.likelihood._MAX_LOGITS",
            (2 if guidance else 1) * most * model.record.model.vocab_size,
        )
        cut = score(model, LONG[1:], config)
    finally:
        handle.remove()
    for one, other in zip(held, cut, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-9)
        assert one.mc_se == pytest.approx(other.mc_se, rel=1e-6, abs=1e-9)
    if guidance:
        assert most // 2 < max(asked) <= most
    else:
        assert (rows, max(batches)) == (batches, batch_rows)
        assert max(asked) <= 1  # of a single token the logits are no more than the least that is held


def test_guidance_masks_the_context_of_the_side_without_it(doubles: dict[str, OpenModel]) -> None:
    model, request, w = doubles["masked"], Request((5, 9, 12), (7,), 0, (42,)), 1.5
    row, mask = [*request.context, *request.answer, *request.suffix], model.mask_token_id
    sides = [torch.tensor([[*context, mask, 42]]) for context in (row[:3], [mask] * 3)]
    c, u = (model.denoiser(side, torch.tensor([3]))[0] for side in sides)
    wanted = -float(torch.log_softmax((c + w * (c - u)).nan_to_num(nan=-torch.inf), -1)[7])
    (found,) = score(model, [request], replace(CONFIG, guidance=w))
    assert found.nats == pytest.approx(wanted, rel=1e-6)
    for name in ("next", "blocks"):
        with pytest.raises(UserError, match=r"guidance is 1\.5, but the model"):
            score(doubles[name], [request], replace(CONFIG, guidance=w))


@pytest.mark.parametrize(
    ("name", "context", "size"),
    [("masked", (), 2), ("masked", range(5, 9), SEQ_LEN), ("shifted", (), 2), ("shifted", (5,), 2),
     ("shifted", range(5, 9), SEQ_LEN - 1)],
)  # fmt: skip
def test_guidance_without_a_context_to_mask_is_refused(
    doubles: dict[str, OpenModel], name: str, context: Sequence[int], size: int
) -> None:
    """Both sides of it would be alike; the first token of a shifted model, which nothing predicts, is never masked."""
    request = Request(context, range(20, 20 + size), 0)
    with pytest.raises(UserError, match=r"guidance is 0\.5, but no context stands before the answer that it could"):
        score(doubles[name], [LONG[3], request], replace(CONFIG, guidance=0.5))
    longer = replace(request, context=(*context, 6, 8), answer=(7,))
    guided, plain = (score(doubles[name], [longer], replace(CONFIG, guidance=w))[0] for w in (0.5, 0.0))
    assert guided.nats != pytest.approx(plain.nats, rel=1e-3)


@pytest.mark.parametrize("name", ["masked", "shifted", "blocks"])
def test_a_context_without_room_loses_its_beginning_and_says_how_much(doubles: dict[str, OpenModel], name: str) -> None:
    context, answer, suffix = range(5, 55), (60, 61), (62, 63)
    long, cut = score(
        doubles[name], [Request(context, answer, 3, suffix), Request(context[22:], answer, 3, suffix)], CONFIG
    )
    assert (long.num_cut, cut.num_cut) == (22, 0)
    assert (long.nats, long.mc_se) == (cut.nats, cut.mc_se)


def test_next_tokens_are_given_the_last_token_for_which_there_was_no_room(doubles: dict[str, OpenModel]) -> None:
    model, context, answer = doubles["next"], range(5, 55), (60, 61)
    row = [*context[19:], *answer]
    log_probs = model.denoiser(torch.tensor([row[:-1]]), mask=AttentionMask("causal")).log_softmax(-1)
    (found,) = score(model, [Request(context, answer, 0)], CONFIG)
    assert found.nats == pytest.approx(-float(log_probs[[-2, -1], list(answer)].sum()), rel=1e-6)
    assert found.num_cut == 19


def test_an_answer_longer_than_a_row_is_refused(doubles: dict[str, OpenModel]) -> None:
    with pytest.raises(UserError, match="an answer has 33 tokens and 0 follow it, but rows of the model have 32;"):
        score(doubles["masked"], [Request((), range(5, 38), 0)], CONFIG)
    with pytest.raises(UserError, match="of which the first must be given; shorten it"):
        score(doubles["shifted"], [Request((), range(5, 37), 0)], CONFIG)


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_that_is_no_number_is_refused_and_tells_its_request(doubles: dict[str, OpenModel], name: str) -> None:
    model = spoilt(doubles[name], "q")
    (token,) = model.encode("q")
    bad = Request((5, token), (7, 8, 9), 3)
    for requests in ([*SHORT, bad, *LONG], [bad]):
        with pytest.raises(ScoreError, match="a token costs nan nats: the weights give no finite loss") as refused:
            score(model, requests, CONFIG)
        assert refused.value.request == bad
        assert classify(refused.value) == "numerics"
        assert pickle.loads(pickle.dumps(refused.value)).request == bad  # as from a worker
    assert score(model, SHORT, CONFIG) == score(doubles[name], SHORT, CONFIG)


def test_nothing_is_asked_of_empty_answers_and_no_requests(doubles: dict[str, OpenModel]) -> None:
    assert score(doubles["masked"], [], CONFIG) == []
    for name in doubles:
        assert score(doubles[name], [Request((5,), (), 0)], CONFIG) == [Score(0.0, (), 0, 0)]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_masks", 7, "num_masks is 7; a standard error needs at least 8"),
        ("guidance", -0.1, r"guidance is -0\.1; it must be 0 or more"),
        ("guidance", math.inf, "guidance is inf"),
        ("batch_rows", 0, "batch_rows is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **{field: value})
