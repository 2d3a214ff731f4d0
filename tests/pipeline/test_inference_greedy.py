"""Whether answers are what greedy decoding gives, beside a naive loop that decodes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlm_core.models.attention import AttentionMask
from pipeline.errors import NumericsError, UserError
from pipeline.inference.greedy import are_greedy
from pipeline.inference.likelihood import LikelihoodConfig, Request
from pipeline.inference.model import OpenModel, open_model
from tests.support.model_kinds import save_models, spoilt
from tests.support.tiny_run import Artifacts

CONFIG = LikelihoodConfig(batch_rows=2)


@pytest.fixture(scope="module")
def models(made: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenModel]:
    saved: dict[str, Path] = save_models(tmp_path_factory.mktemp("weights"), made.tokenizer)
    return {kind: open_model(weights, made.tokenizer, "cpu") for kind, weights in saved.items()}


def decoded(model: OpenModel, context: list[int], size: int, suffix: list[int]) -> list[int]:
    """The most likely token at each place, from left to right."""
    eos = model.vocabulary.special.eos_token_id
    row = [*context, *[model.mask_token_id] * size, *suffix]
    for place in range(len(context), len(context) + size):
        if model.is_autoregressive:
            seen = torch.tensor([[eos, *row[:place]]])
            row[place] = int(model.denoiser(seen, mask=AttentionMask("causal"))[-1].argmax())
        else:
            row[place] = int(model.denoiser(torch.tensor([row]))[place - model.record.target_offset].argmax())
    return row[len(context) : len(context) + size]


@pytest.mark.parametrize("kind", ["masked", "shifted", "next"])
def test_an_answer_is_greedy_if_decoding_gives_it(models: dict[str, OpenModel], kind: str) -> None:
    model, suffix = models[kind], [] if kind == "next" else [42, 43]
    for context in ([5, 9, 12], [30]):
        answer = decoded(model, context, 5, suffix)
        for place in range(5):
            wrong = [*answer[:place], (answer[place] + 1) % 200 + 5, *answer[place + 1 :]]
            requests = [Request(context, one, 0, suffix) for one in (answer, wrong, answer[:place] or answer)]
            first, second, _ = are_greedy(model, requests, CONFIG)
            assert (first, second) == (True, False)
    assert are_greedy(model, [], CONFIG) == []


@pytest.mark.parametrize("kind", ["masked", "shifted", "next"])
def test_answers_of_unlike_lengths_are_asked_together(models: dict[str, OpenModel], kind: str) -> None:
    """Right ones of all lengths among wrong ones: the same in any batch, and in few passes."""
    model, suffix = models[kind], [] if kind == "next" else [42]
    requests, wanted = [], []
    for number in range(12):
        context, size = list(range(40, 41 + number)), 1 + number % 5
        answer = decoded(model, context, size, suffix)
        is_right = number % 4 == 0
        wanted.append(is_right)
        if not is_right:
            answer[number % size] = 7 if answer[number % size] != 7 else 8
        requests.append(Request(context, answer, 0, suffix))
    calls: list[int] = []
    handle = model.denoiser.embedding.register_forward_hook(lambda _, args, out: calls.append(len(out)))
    try:
        for batch_rows in (1, 7, 32):
            calls.clear()
            assert are_greedy(model, requests, replace(CONFIG, batch_rows=batch_rows)) == wanted
            assert max(calls) <= batch_rows
    finally:
        handle.remove()
    assert len(calls) <= (1 if kind == "next" else 4)  # rounds of 1, 1, 2 and 1 tokens of an answer
    assert calls[0] == 12


@pytest.mark.parametrize(("kind", "most"), [("masked", 4), ("next", 13)])
def test_no_more_logits_are_held_than_there_is_room_for(
    models: dict[str, OpenModel], kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers from batches of fewer rows."""
    model, asked = models[kind], list[int]()
    requests = [Request((5, 9 + number), decoded(model, [5, 9 + number], 5, []), 0) for number in range(6)]
    requests[2] = replace(requests[2], answer=(7, 7, 7))
    wanted = are_greedy(model, requests, replace(CONFIG, batch_rows=32))
    monkeypatch.setattr("pipeline.inference.likelihood._MAX_LOGITS", most * model.record.model.vocab_size)
    handle = model.denoiser.register_forward_hook(lambda _, args, out: asked.append(len(out)))
    try:
        assert are_greedy(model, requests, replace(CONFIG, batch_rows=32)) == wanted
    finally:
        handle.remove()
    assert wanted == [number != 2 for number in range(6)]
    assert max(asked) == most


def test_what_is_not_built_is_refused(models: dict[str, OpenModel]) -> None:
    request = [Request((5,), (6,), 0)]
    with pytest.raises(UserError, match="is_greedy is true, but the model is of blocks"):
        are_greedy(models["blocks"], request, CONFIG)
    with pytest.raises(UserError, match=r"is_greedy is true, but guidance is 0\.5"):
        are_greedy(models["masked"], request, replace(CONFIG, guidance=0.5))


@pytest.mark.parametrize("kind", ["masked", "shifted", "next"])
def test_logits_without_a_largest_are_refused(models: dict[str, OpenModel], kind: str) -> None:
    model = spoilt(models[kind], "q")
    with pytest.raises(NumericsError, match="the largest logit of a token is nan; it must be finite"):
        are_greedy(model, [Request((5, 9), (7, 8), 0), Request((5, *model.encode("q")), (7, 8), 0)], CONFIG)
